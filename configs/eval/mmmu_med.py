"""MMMU's Health & Medicine; its validation split, because MMMU's own files state no answers of the test split."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    cfg = common.base(
        "mmmu_med", judge=True, toolkit=(),
        root="",  # the folder with Clinical_Medicine/, Pharmacy/, …
        images="",  # the folder that the images are written to; empty: images/ in the root
    )
    cfg.data.split = "validation"
    return cfg
