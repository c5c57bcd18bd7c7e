"""LLaVA-Med's 193 chat questions: a judge scores each answer beside GPT-4's own."""

from ml_collections import ConfigDict

from configs.eval import common


def get_config(arg: str = "") -> ConfigDict:
    common.refuse_arguments(arg)
    cfg = common.base(
        "chat", judge=True, leakage=False,  # there are no training rows
        root="",  # llava_med_eval_qa50_qa.jsonl, or its folder
        images="",  # the folder of the figures; "" is images/ beside the file
    )
    # judge.model has no default: it is paid for; --dry_run says what it will cost
    cfg.judge.image_marker = False  # leaves "<image>" in the judge's question, as v1.5's code did; v1.0's took it away
    # "strict": scores from 1 to 10, else the judge is asked again; "original": whatever two numbers it gives.
    cfg.judge.reading = "strict"
    return cfg
