"""What the answers of an evaluation follow from: the record of it in `metrics.json`, and the key of a stopped one.

Everything counts that may change an answer: each file of the checkpoint, its tower and its tokenizer, the template, every key of
the config and every flag, each question and the content of its image, the code and the packages that compute. Where any of it has
changed, answers that are kept are another evaluation's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import cut
from llavamed_jax.evaluation.answering.answerer import Answerer, Generation
from llavamed_jax.evaluation.scoring.predictions import image_names
from llavamed_jax.images.load import split_frame
from llavamed_jax.utils.code import code_sha256, version
from llavamed_jax.utils.hashes import sha256_of_each, short_hash
from llavamed_jax.utils.nested import flatten

# The keys that `asked` of `metrics.json` always has; None for what is not known of who answered.
KEYS = ("checkpoint", "checkpoint_sha256", "step", "template", "tower", "tokenizer", "dtype", "mesh", "quantize", "adapter",
        "endpoint", "model", "generation")  # fmt: skip
# Keys of a config that change no answer: what is computed from the answers, and paths to what counts by its content.
_BESIDE = ("judge", "published", "data.train", "data.trained_on", "data.trained_on_images", "data.root", "data.images")
_PACKAGES = ("numpy", "pillow", "pydicom")  # read the images, whoever answers


def record(answerer: Answerer, generation: Generation) -> dict:
    """What `metrics.json` holds under `asked`: `KEYS`, and what else is known of who answered."""
    described = getattr(answerer, "describe", dict)()  # a stand-in for a model need not say
    return dict.fromkeys(KEYS) | described | {"generation": vars(generation)}


_WORDS = ("template", "tower", "tokenizer", "dtype", "mesh", "quantize", "adapter", "endpoint", "predictions")


def words(said: Mapping[str, object]) -> str:
    """A record in one line, for whoever reads a result: which template, tower, tokenizer and numbers it is of."""
    parts = [f"{name} {said[name]}" for name in _WORDS if said.get(name) is not None]
    generation = said.get("generation")
    if isinstance(generation, Mapping):
        parts.append(", ".join(f"{name} {value}" for name, value in generation.items() if name != "batch_size"))
    return "; ".join(parts)


def key(answerer: Answerer, cfg: ConfigDict, samples: Sequence[VqaSample], source: Mapping[str, str],
        flags: Mapping[str, object]) -> dict[str, object]:
    """What the answers depend on: its name, as a sentence calls it -> a value in JSON's types.

    A checkpoint that says what it was read from counts by its content (`Answerer.depends_on`), wherever it lies.

    Args:
      source: who answers, as the command line has it: `checkpoint`, or `endpoint` and `model`.
      flags: the model's flags.
    """
    is_by_content = getattr(getattr(answerer, "model", None), "origin", None) is not None
    given = {f"--{name}": value for name, value in {**({} if is_by_content else source), **flags}.items()}
    given |= {f"--{name}": "given" for name in ("vision_tower", "tokenizer") if is_by_content and flags.get(name)}
    config = {name: value for name, value in flatten(cfg.to_dict()).items()
              if not any(name == key or name.startswith(f"{key}.") for key in _BESIDE)}
    return {
        **{name: value for name, value in given.items() if value is not None},
        **getattr(answerer, "depends_on", dict)(),
        **{f"the config key {name!r}": value for name, value in config.items()},
        "the order of the questions": short_hash([str(sample.question_id) for sample in samples]),
        **{f"question {cut(str(sample.question_id))}": short_hash(sample.question) for sample in samples},
        **_images(samples),
        **versions(_PACKAGES),
        "the code": code_sha256()[:16],
    }


def _images(samples: Sequence[VqaSample]) -> dict[str, str]:
    """Name -> the file's content and which question it belongs to: an image may be another's under its own name."""
    names = image_names(str(sample.image) for sample in samples)
    files = {image: Path(image if Path(image).exists() else split_frame(image)[0]) for image in names}
    hashes = sha256_of_each(list(dict.fromkeys(files.values())))
    asked: dict[str, list[str]] = {image: [] for image in names}
    for sample in samples:
        asked[str(sample.image)].append(str(sample.question_id))
    return {f"the image {cut(name)}": short_hash(hashes[files[image]], asked[image]) for image, name in names.items()}


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """The version of each package, None where it is not there."""
    return {f"the package {name}": version(name) for name in packages}
