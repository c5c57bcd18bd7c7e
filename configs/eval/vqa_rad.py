"""VQA-RAD: the 451 test questions; with `:demo` the held-out images of `samples/vqa_rad`."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg, "demo")
    if arg != "demo":
        return common.base(
            "vqa_rad", judge=True, published=True, toolkit=("permuted_f1",), root="")  # the folder of the official layout
    sample = "samples/vqa_rad"
    cfg = common.base(
        "vqa_rad", judge=True, published=True, toolkit=("permuted_f1",), root=sample, held_out=f"{sample}/held_out.json",
        max_new_tokens=16)
    cfg.organ_question = True
    return cfg
