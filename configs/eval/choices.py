"""Multiple choice: `{id, image, question, options, answer}` in JSON or JSON lines."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "choices",
        root="",  # the file, or a folder with train.json and test.json
        images="",  # the folder of the images; empty: the file's own
        train="",  # a file of training rows; empty: train.json in the root, if it is there
    )
