"""PathVQA: the release's folder, or the hub's parquet files."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "pathvqa", judge=True, published=True, toolkit=("permuted_f1", "pathvqa_drop"),
        root="",  # the folder with qas/ and images/, or with data/test-*.parquet
        images="",  # where the images lie, or those of parquet files are written; empty: images/ in the root
    )
