"""Captions and reports: `{id, image, caption}` in JSON or JSON lines, or a LLaVA file whose answers are the texts."""

from ml_collections import ConfigDict

from llavamed_jax.datasets.captions import INSTRUCTION
from llavamed_jax.errors import UsageError


def get_config(arg: str = "") -> ConfigDict:
    if arg:
        raise UsageError(f"the recipe argument {arg!r} does not exist; this recipe has none")
    cfg = ConfigDict()
    cfg.data = ConfigDict()
    cfg.data.name = "captions"
    cfg.data.root = ""  # the file, or a folder with train.json and test.json
    cfg.data.split = "test"
    cfg.data.images = ""  # the folder of the images; empty: the file's own
    cfg.data.question = INSTRUCTION  # about every image; empty: what a LLaVA file asks of its own
    cfg.data.train = ""  # a file of training rows; empty: train.json in the root, if it is there
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
    cfg.seed = 0
    return cfg
