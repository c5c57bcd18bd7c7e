"""SLAKE 1.0 in the official layout, its English questions."""

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation.judging.settings import judge_settings


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise UsageError(f"the recipe argument {arg!r} does not exist; this recipe has none")
    cfg = ConfigDict()
    cfg.data = ConfigDict()
    cfg.data.name = "slake"
    cfg.data.root = ""  # the folder with train.json, validate.json, test.json and imgs/
    cfg.data.split = "test"
    cfg.data.language = "en"  # the language of the published numbers; zh, or all
    cfg.data.held_out = ""
    cfg.data.trained_on = ""  # what the model was trained on, as data.train of a recipe: the report says which questions occur in it
    cfg.data.trained_on_images = ""  # the folder of its images, where it is a LLaVA file
    cfg.protocol = "clean"
    cfg.generation = ConfigDict()
    cfg.generation.max_new_tokens = 1024
    cfg.generation.temperature = 0.0
    cfg.generation.num_beams = 1
    cfg.generation.batch_size = 16
    cfg.organ_question = False
    cfg.judge = judge_settings()  # judge.model names who judges the open answers; nobody does while it is empty
    cfg.published = ""  # the published model that this one is, such as from_llava: the paper's numbers then stand beside it
    cfg.seed = 0
    return cfg
