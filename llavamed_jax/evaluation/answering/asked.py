"""Records what the answers of an evaluation depend on, for `metrics.json` and for resuming.

The key of an evaluation includes everything that may change an answer: each file of the checkpoint, its tower and its
tokenizer, the template, every key of the config and every flag, each question and the content of its image, the code
and the packages that compute. If any of these has changed, kept answers belong to another evaluation and are not
reused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets.sample import VqaSample, own_images
from llavamed_jax.errors import cut
from llavamed_jax.evaluation.answering.answerer import Answerer, Generation
from llavamed_jax.evaluation.scoring.predictions import image_names
from llavamed_jax.images.load import split_frame
from llavamed_jax.utils.code import code_sha256, version
from llavamed_jax.utils.hashes import sha256_of_each, short_hash
from llavamed_jax.utils.nested import flatten

# The keys that `asked` of `metrics.json` always has; unknown values are None.
KEYS = ("checkpoint", "checkpoint_sha256", "step", "template", "tower", "tokenizer", "dtype", "mesh", "quantize",
        "kv_cache", "adapter", "endpoint", "model", "generation")  # fmt: skip
# Config keys that change no answer: settings of the scoring, and paths of files whose contents are compared instead.
_BESIDE = ("judge", "published", "scoring", "medevalkit", "data.train", "data.trained_on",
           "data.trained_on_images", "data.root", "data.images")
# Packages that read the images, for a loaded model and for a server, and those that a loaded model computes with.
PACKAGES = ("numpy", "pillow", "pydicom", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls", "python-gdcm")
OF_MODEL = ("jax", "jaxlib", "flax", "ml_dtypes", "jinja2", "sentencepiece", "tokenizers", "transformers")


def record(answerer: Answerer, generation: Generation) -> dict:
    """Returns the object `asked` of `metrics.json`: all of `KEYS`, and whatever else the answerer states."""
    return dict.fromkeys(KEYS) | answerer.describe() | {"generation": vars(generation)}


_WORDS = ("template", "tower", "tokenizer", "dtype", "mesh", "quantize", "kv_cache", "adapter", "endpoint",
          "predictions")


def words(said: Mapping[str, object]) -> str:
    """Formats a record as one line for readers of a result: template, tower, tokenizer, precision, generation."""
    parts = [f"{name} {said[name]}" for name in _WORDS if said.get(name) is not None]
    generation = said.get("generation")
    if isinstance(generation, Mapping):
        parts.append(", ".join(f"{name} {value}" for name, value in generation.items() if name != "batch_size"))
    return "; ".join(parts)


def key(answerer: Answerer, cfg: ConfigDict, samples: Sequence[VqaSample], source: Mapping[str, str],
        flags: Mapping[str, object]) -> dict[str, object]:
    """Returns everything that the answers depend on.

    A checkpoint is identified by the content of its files (`Answerer.depends_on`) and not by its path, if the answerer
    knows its files.

    Args:
      answerer: answers the questions.
      cfg: the eval config.
      samples: the questions.
      source: who answers, as on the command line: `checkpoint`, or `endpoint` and `model`.
      flags: the flags of the model.

    Returns:
      A name that fits into a sentence -> a value of a JSON type.
    """
    is_by_content = getattr(getattr(answerer, "model", None), "origin", None) is not None
    given = {f"--{name}": value for name, value in {**({} if is_by_content else source), **flags}.items()}
    given |= {f"--{name}": "given" for name in ("vision_tower", "tokenizer", "adapter")
              if is_by_content and flags.get(name)}
    config = {name: value for name, value in flatten(cfg.to_dict()).items()
              if not any(name == key or name.startswith(f"{key}.") for key in _BESIDE)}
    return {
        **{name: value for name, value in given.items() if value is not None},
        **answerer.depends_on(),
        **{f"the config key {name!r}": value for name, value in config.items()},
        "the order of the questions": short_hash([str(sample.question_id) for sample in samples]),
        **{f"question {cut(str(sample.question_id))}": short_hash(sample.question) for sample in samples},
        **_images(samples),
        **versions(PACKAGES),
        "the code": code_sha256()[:16],
    }


def _images(samples: Sequence[VqaSample]) -> dict[str, str]:
    """Returns, for each image, a hash of the file's content, of the ids of its questions and of its place in each.

    The ids count because two images may have been exchanged under their names, and the places because the images of a
    question may have been put into another order.
    """
    own = own_images(samples)
    names = image_names([image for images in own for image in images])
    files = {image: Path(image if Path(image).exists() else split_frame(image)[0]) for image in names}
    hashes = sha256_of_each(list(dict.fromkeys(files.values())))
    asked: dict[str, list] = {image: [] for image in names}
    for sample, images in zip(samples, own, strict=True):
        for place, image in enumerate(images):
            asked[image].append([str(sample.question_id), place])
    return {f"the image {cut(name)}": short_hash(hashes[files[image]], asked[image]) for image, name in names.items()}


def versions(packages: Sequence[str]) -> dict[str, str | None]:
    """Returns the version of each package; None if it is not installed."""
    return {f"the package {name}": version(name) for name in packages}
