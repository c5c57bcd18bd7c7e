"""OmniMedVQA, the part with open access."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    return common.base(
        "omnimedvqa", toolkit=(),
        root="",  # the folder with QA_information/ and Images/
        images="",  # the folder that holds Images/; empty: the root
    )
