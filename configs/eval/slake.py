"""SLAKE 1.0 in the official layout or the hub's parquet files; its English questions, or with data.language=zh or all the others too."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "slake", judge=True, published=True, toolkit=("permuted_f1", "slake_twice", "slake_case"),
        root="",  # the folder with train.json, validate.json, test.json and imgs/
        language="en",  # the language of the published numbers; zh, or all
    )
