"""VQA-RAD: the 451 test questions; with `:demo` the held-out images of `samples/vqa_rad`."""

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation.judging.settings import judge_settings


def get_config(arg: str = "") -> ConfigDict:
    if arg not in ("", "demo"):
        raise UsageError(f"the recipe argument {arg!r} does not exist; demo was expected, or nothing")
    is_demo = arg == "demo"
    cfg = ConfigDict()
    cfg.data = ConfigDict()
    cfg.data.name = "vqa_rad"
    cfg.data.root = "samples/vqa_rad" if is_demo else ""  # the folder of the official layout
    cfg.data.split = "test"
    # A JSON file {"images": [...]}: ask all rows of these images and take all others for training rows.
    cfg.data.held_out = "samples/vqa_rad/held_out.json" if is_demo else ""
    cfg.data.trained_on = ""  # what the model was trained on, as data.train of a recipe: the report says which questions occur in it
    cfg.data.trained_on_images = ""  # the folder of its images, where it is a LLaVA file
    cfg.protocol = "clean"  # or "paper": training rows with all rephrasings, those of test questions included
    cfg.generation = ConfigDict()
    cfg.generation.max_new_tokens = 16 if is_demo else 1024
    cfg.generation.temperature = 0.0
    cfg.generation.num_beams = 1
    cfg.generation.batch_size = 16
    cfg.organ_question = is_demo  # one more question an image, the same for all: only the image tells the answers apart
    cfg.judge = judge_settings()  # judge.model names who judges the open answers; nobody does while it is empty
    cfg.published = ""  # the published model that this one is, such as from_llava: the paper's numbers then stand beside it
    cfg.seed = 0
    return cfg
