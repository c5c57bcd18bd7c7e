"""MedXpertQA MM: several images a question."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "medxpertqa_mm", toolkit=(),
        root="",  # the folder with MM/ and images/
        images="",  # the folder of the images; empty: images/ in the root
    )
