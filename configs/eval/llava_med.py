"""A file in LLaVA-Med's own test format: `{id, image, answer_type, conversations}`, such as `test.json` or `test_w_options.json`."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "llava_med", judge=True,
        root="",  # the file, or a folder with train.json and test.json
        images="",  # the folder of the images; empty: the file's own
        train="",  # a file of training rows; empty: train.json in the root, if it is there
    )
