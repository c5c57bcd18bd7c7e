"""MedFrameQA: two to five frames a question."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "medframeqa", toolkit=(),
        root="",  # the folder with data/test-*.parquet
        images="",  # the folder that the images are written to; empty: images/ in the root
    )
