"""The plumbing of evaluation recipes: the keys that all or most of them have, in one order."""

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation.judging.settings import judge_settings


def refuse_arguments(arg: str, *known: str) -> None:
    """Raises UsageError for what stands after the colon, but for the words of `known`."""
    if arg and arg not in known:
        expected = f"{' or '.join(known)} was expected, or nothing" if known else "this recipe has none"
        raise UsageError(f"the recipe argument {arg!r} does not exist; {expected}")


def base(name: str, max_new_tokens: int = 1024, judge: bool = False, published: bool = False, leakage: bool = True,
         toolkit: tuple[str, ...] | None = None, **data: str) -> ConfigDict:
    """A recipe with all of its keys.

    Args:
      name: the data set (`data.name`).
      max_new_tokens: `generation.max_new_tokens`.
      judge: whether a judge may score open answers (`judge.…`).
      published: whether the paper has numbers of this set (`published`).
      leakage: whether there may be training rows, and so `data.held_out`, `data.trained_on` and `organ_question`.
      toolkit: the switches of MedEvalKit's protocol (`medevalkit.…`), where it has one for this set (`scoring`).
      data: the keys of `data` that this set has beside them, with their values; `root`, which is empty otherwise.
    """
    cfg = ConfigDict()
    cfg.data = ConfigDict()
    cfg.data.name = name
    cfg.data.root = data.pop("root", "")
    cfg.data.split = "test"
    held_out = data.pop("held_out", "")
    cfg.data.update(data)
    if leakage:
        # A JSON file {"images": [...]}: ask all rows of these images and take all others for training rows.
        cfg.data.held_out = held_out
        # What the model was trained on, as data.train of a recipe: the report says which questions occur in it.
        cfg.data.trained_on = ""
        cfg.data.trained_on_images = ""  # the folder of its images, where it is a LLaVA file
    cfg.protocol = "clean"  # or "paper": VQA-RAD's training rows with all rephrasings, those of test questions included
    if toolkit is not None:
        # Or a program of llavamed_jax/evaluation/scoring/programs.py: its prompts and rules, in a block of their own (docs/metrics.md).
        cfg.scoring = "ours"
        if toolkit:
            # Defects of that toolkit which change a number (docs/metrics.md).
            cfg.medevalkit = ConfigDict(dict.fromkeys(toolkit, False))
    cfg.generation = ConfigDict()
    cfg.generation.max_new_tokens = max_new_tokens
    cfg.generation.temperature = 0.0
    cfg.generation.num_beams = 1
    cfg.generation.batch_size = 16
    if leakage:
        cfg.organ_question = False  # one more question an image, the same for all: only the image tells the answers apart
    if judge:
        cfg.judge = judge_settings()  # judge.model names who judges the open answers; nobody does while it is empty
    if published:
        cfg.published = ""  # the published model that this one is, such as from_llava: the paper's numbers stand beside it
    cfg.seed = 0
    return cfg
