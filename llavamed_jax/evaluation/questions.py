"""Which questions an eval config asks, and which training rows stand beside them."""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.checkpoints.files import read_json
from llavamed_jax.data import datasets
from llavamed_jax.data.datasets import VqaSample
from llavamed_jax.errors import UsageError, UserError


def load_samples(
    name: str, root: str, split: str, protocol: str, held_out: str = ""
) -> tuple[list[VqaSample], list[VqaSample]]:
    """The questions to ask, and the training rows that candidates, majority answer and leakage counts come from.

    Args:
      name: `vqa_rad` or `slake`; `root` holds its official layout.
      split: `train`, `validation` or `test`.
      protocol: `clean` or `paper`, VQA-RAD's training rows.
      held_out: a JSON file `{"images": [names]}`. Then the rows of exactly these images are asked, whatever their
        split, and all rows of the other images count as training rows.
    Raises:
      UsageError: a data set that is not known, or an empty root. UserError: what the readers find wrong.
    """
    readers = {"vqa_rad": _read_vqa_rad, "slake": _read_slake}
    if name not in readers:
        raise UsageError(f"the data set {name!r} is not known; data.name may be {' or '.join(readers)}")
    if not root:
        raise UsageError(f"data.root is empty; the folder with {name} was expected: --config.data.root=DIR")
    read = readers[name]
    if not held_out:
        return read(root, split, protocol), read(root, "train", protocol)
    if split != "test":
        raise UsageError(f"data.split is {split!r}; beside data.held_out, which asks rows of both splits, it may be test only")
    if name != "vqa_rad":
        raise UsageError(f"data.held_out holds out images of VQA-RAD; {name} has splits without common images: data.split")
    names = _held_out_images(held_out)
    rows = datasets.read_vqa_rad(root, "all", "clean")  # each row once, without the rephrasings of the paper's protocol
    asked = [sample for sample in rows if Path(sample.image).name in names]
    unknown = names - {Path(sample.image).name for sample in asked}
    if unknown:
        raise UserError(f"{held_out} holds out images of which {root} has no row: {', '.join(sorted(unknown))}")
    return asked, [sample for sample in rows if Path(sample.image).name not in names]


def _read_vqa_rad(root: str, split: str, protocol: str) -> list[VqaSample]:
    if split not in ("train", "test"):
        raise UsageError(f"VQA-RAD has no split {split!r}; data.split may be train or test")
    return datasets.read_vqa_rad(root, split, protocol)


def _read_slake(root: str, split: str, protocol: str) -> list[VqaSample]:
    if split not in ("train", "validation", "test"):
        raise UsageError(f"SLAKE has no split {split!r}; data.split may be train, validation or test")
    return datasets.read_slake(root, split)


def _held_out_images(path: str) -> set[str]:
    images = read_json(Path(path)).get("images")
    if not isinstance(images, list) or not images:
        raise UserError(f'data.held_out: {path} was expected to be {{"images": [at least one name]}}')
    return {str(image) for image in images}
