"""LLaVA-Med's 193 chat questions: a judge scores each answer beside GPT-4's own."""

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation.judging.settings import judge_settings


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise UsageError(f"the recipe argument {arg!r} does not exist; this recipe has none")
    cfg = ConfigDict()
    cfg.data = ConfigDict()
    cfg.data.name = "chat"
    cfg.data.root = ""  # llava_med_eval_qa50_qa.jsonl, or its folder
    cfg.data.images = ""  # the folder of the figures; "" is images/ beside the file
    cfg.data.split = "test"
    cfg.protocol = "clean"  # there are no training rows
    cfg.generation = ConfigDict()
    cfg.generation.max_new_tokens = 1024
    cfg.generation.temperature = 0.0
    cfg.generation.num_beams = 1
    cfg.generation.batch_size = 16
    cfg.judge = judge_settings()  # judge.model has no default: it is paid for; --dry_run says what it will cost
    cfg.judge.image_marker = False  # leaves "<image>" in the judge's question, as v1.5's code did; v1.0's took it away
    cfg.judge.reading = "strict"  # scores from 1 to 10, else the judge is asked again; "original": whatever two numbers it gives
    cfg.seed = 0
    return cfg
