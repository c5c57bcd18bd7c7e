"""PMC-VQA: `test_2.csv`, or the file that `data.root` names (`test_clean.csv`)."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "pmc_vqa", toolkit=(),
        root="",  # the folder with test_2.csv and figures/, or a CSV file
        images="",  # the folder of the images; empty: figures/ or images/ beside the file
    )
