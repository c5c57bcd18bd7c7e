"""Captions and reports: `{id, image, caption}` in JSON or JSON lines, or a LLaVA file whose answers are the texts."""

from ml_collections import ConfigDict

from configs.eval import common
from llavamed_jax.datasets.captions import INSTRUCTION


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "captions",
        root="",  # the file, or a folder with train.json and test.json
        images="",  # the folder of the images; empty: the file's own
        question=INSTRUCTION,  # about every image; empty: what a LLaVA file asks of its own
        train="",  # a file of training rows; empty: train.json in the root, if it is there
    )
