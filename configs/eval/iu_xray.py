"""IU X-Ray: the findings of a chest X-ray's report, compared by BLEU and ROUGE."""

from ml_collections import ConfigDict

from configs.eval import common
from llavamed_jax.datasets.iu_xray import INSTRUCTION


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "iu_xray", max_new_tokens=256,
        root="",  # the folder with annotation.json, indiana_reports.csv or ecgen-radiology/
        images="",  # the folder of the images; empty: that of the layout
        question=INSTRUCTION,  # about every study
    )
