"""Questions about images in parquet files, whatever set they are of: columns image, question, answer."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "parquet", judge=True, published=True,
        root="",  # the folder with data/test-*.parquet, or with the files themselves
        images="",  # the folder that the images are written to; empty: images/ in the root
        language="all",  # en or zh where there is a column q_lang or language
    )
