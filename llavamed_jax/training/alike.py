"""Collects the values that must be equal in all processes of a training job (`agreement.check_same` compares them).

They are compared before the first update, each as early as it is known: the command line, before anything is opened;
the weights and text files, once they are open; the mesh; records, images and rows, once they are measured; and what
`remat=auto` and `micro_batches=auto` stand for, which each process chooses by the memory of its devices. A path is a
value of the recipe and therefore the same text everywhere; the content at the path is compared separately.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llavamed_jax.checkpoints import identity
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.tree import base, store
from llavamed_jax.datasets.training import TrainingData
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import split_frame
from llavamed_jax.parallel import agreement
from llavamed_jax.pipeline.packing import Plan
from llavamed_jax.training.rows import Data
from llavamed_jax.training.settings import Settings
from llavamed_jax.utils import signals
from llavamed_jax.utils.hashes import sha256_of_each
from llavamed_jax.utils.nested import flatten
from llavamed_jax.utils.paths import is_bucket

# How many records of each set have their images compared: hashing half a million images would take hours.
IMAGES = 64
_PATIENCE_S = 10.0  # seconds until a directory that another host has made is visible over NFS


def start(cfg: ConfigDict, workdir: str | Path, flags: Mapping[str, object]) -> dict[str, object]:
    """Returns the values that are known before anything is opened: recipe, flags, code and packages.

    Args:
      cfg: the recipe.
      workdir: the run's directory.
      flags: the command line's flags other than `--workdir`, by name.

    Returns:
      Value by its description.
    """
    return {"--workdir": workdir if is_bucket(workdir) else os.path.abspath(workdir),
            **{f"--{name}": value for name, value in flags.items()},
            **{f"the config key {key!r}": value for key, value in flatten(cfg).items()}, **agreement.installation()}


def model(cfg: ConfigDict, workdir: Path, checkpoint: Checkpoint, step: int | None) -> dict[str, object]:
    """Returns the sha256 of the model's parts: tensors, tokenizer, config and tower.

    Tensors are identified by their manifest if they have one, else by their files.

    Args:
      cfg: the recipe.
      workdir: the run's directory.
      checkpoint: the checkpoint that the run starts from, or the run's own base.
      step: the saved step that the run resumes from; None to begin from `init`.

    Returns:
      sha256 by the part's description.
    """
    if step is None:
        origin = identity.origin(cfg.init, checkpoint, cfg.tokenizer)
        return {"the workdir": _seen(workdir), "the config of the model": _sha256(origin.config),
                **{f"the model's file {name}": _sha256(digest) for name, digest in origin.hashes().items()}}
    manifest = workdir / "checkpoints" / str(step) / store.MANIFEST
    files = {**base.fingerprints(workdir),
             manifest.relative_to(workdir).as_posix(): sha256_of_each([manifest])[manifest]}
    return {f"the workdir's file {name}": _sha256(digest) for name, digest in files.items()}


def mesh(found: Mesh) -> dict[str, object]:
    """Returns the sizes of the mesh, which `mesh.auto` chooses by the memory of a process's devices."""
    return {"the mesh that fits its devices": ", ".join(f"{axis} {size}" for axis, size in found.shape.items())}


def chosen(found: Settings) -> dict[str, object]:
    """Returns the settings of the update, which `auto` chooses by the memory of a process's devices."""
    return {"the settings that fit the memory of its devices": str(found)}


def data(found: Data, total_steps: int) -> dict[str, object]:
    """Returns counts and sha256 of the records, of the rows made from them, and of some of the images."""
    values: dict[str, object] = {}
    for key, records, plan in (("data.train", found.train, found.plan),
                               ("data.validation", found.validation, found.validation_plan),
                               ("data.samples", found.shown, None)):
        if records is not None:
            values |= _records(key, records)
        if plan is not None:
            values[f"the rows of {key}"] = _rows(plan)
    return {**values, "the number of updates": total_steps}


def _records(key: str, records: TrainingData) -> dict[str, object]:
    values = {}
    for number, source in enumerate(records.sources, 1):
        name = f"source {number} of {key}" if len(records.sources) > 1 else key
        values[f"the records of {name}"] = f"{len(source)} records, {_sha256(source.fingerprint())}"
    images = sha256_of_each(_some_images(records))
    return {**values, **{f"the image {path}": _sha256(digest) for path, digest in images.items()}}


def _some_images(records: TrainingData) -> list[Path]:
    """Returns the images of `IMAGES` records, evenly spaced over the set."""
    found: dict[Path, None] = {}
    for number in np.unique(np.linspace(0, records.num_records - 1, min(IMAGES, records.num_records)).astype(int)):
        with contextlib.suppress(UserError):  # measuring counts damaged records
            for image in records.record(int(number))["image"]:
                found[Path(image) if os.path.exists(image) else Path(split_frame(image)[0])] = None
    return list(found)


def _rows(plan: Plan) -> str:
    layout = plan.layout
    return (f"{layout.rows} per update, of {layout.row_length} tokens and {layout.image_slots} images, "
            f"{_sha256(plan.fingerprint())}")


def _sha256(digest: str | None) -> str:
    return "cannot be read" if digest is None else f"sha256 {digest[:12]}"


def _seen(workdir: Path) -> str:
    """Says whether this process sees the directory that process 0 made; it does not if each host has its own disk."""
    until = time.monotonic() + _PATIENCE_S
    while not workdir.is_dir():
        if time.monotonic() > until:
            return "does not exist"
        signals.check()
        time.sleep(0.2)
    return "exists"
