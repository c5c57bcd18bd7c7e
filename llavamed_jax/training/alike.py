"""What has to be the same in all processes of a training job, and is compared before its first update (`agreement.check_same`).

Three times, as early as each is known: what the command line says, before anything is opened; the weights and text files, when they
are open; records, images and rows, when they are measured. A path is one of the recipe's values and so the same text everywhere; what
lies there is compared beside it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
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
from llavamed_jax.utils import signals
from llavamed_jax.utils.hashes import sha256_of_each
from llavamed_jax.utils.nested import flatten

IMAGES = 64  # of each set of records, those whose content is compared: half a million would be read for hours
_PATIENCE_S = 10.0  # until a directory that another host has made is seen over NFS


def start(cfg: ConfigDict, workdir: Path, flags: Mapping[str, object]) -> dict[str, object]:
    """What is known before anything is opened: recipe, flags, code and packages.

    Args:
      flags: others than `--workdir`, by name.
    """
    return {"--workdir": os.path.abspath(workdir), **{f"--{name}": value for name, value in flags.items()},
            **{f"the config key {key!r}": value for key, value in flatten(cfg).items()}, **agreement.installation()}


def model(cfg: ConfigDict, workdir: Path, checkpoint: Checkpoint, step: int | None) -> dict[str, object]:
    """sha256 of what the model is made of: tensors by their manifest where they have one, else their files; tokenizer, config, tower.

    Args:
      step: the one that the run goes on from, of which the directory has the rest; None to begin from `init`.
    """
    if step is None:
        origin = identity.origin(cfg.init, checkpoint, cfg.tokenizer)
        return {"the workdir": _seen(workdir), "the config of the model": _sha256(origin.config),
                **{f"the model's file {name}": _sha256(digest) for name, digest in origin.hashes().items()}}
    manifest = workdir / "checkpoints" / str(step) / store.MANIFEST
    files = {**base.fingerprints(workdir), manifest.relative_to(workdir).as_posix(): sha256_of_each([manifest])[manifest]}
    return {f"the workdir's file {name}": _sha256(digest) for name, digest in files.items()}


def data(found: Data, total_steps: int) -> dict[str, object]:
    """Counts and sha256 of the records, of the rows that were made of them, and of some of the images."""
    values: dict[str, object] = {}
    for key, records, plan in (("data.train", found.train, found.plan), ("data.validation", found.validation, found.validation_plan),
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
    """The images of `IMAGES` records, evenly spread."""
    found: dict[Path, None] = {}
    for number in np.unique(np.linspace(0, records.num_records - 1, min(IMAGES, records.num_records)).astype(int)):
        with contextlib.suppress(UserError):  # a damaged record, which is counted where it is measured
            for image in records.record(int(number))["image"]:
                found[Path(image) if os.path.exists(image) else Path(split_frame(image)[0])] = None
    return list(found)


def _rows(plan: Plan) -> str:
    layout = plan.layout
    return f"{layout.rows} an update, of {layout.row_length} tokens and {layout.image_slots} images, {_sha256(plan.fingerprint())}"


def _sha256(digest: str | None) -> str:
    return "cannot be read" if digest is None else f"sha256 {digest[:12]}"


def _seen(workdir: Path) -> str:
    """Whether this process sees the directory that the first one has made: one of a host's own disk is another one elsewhere."""
    until = time.monotonic() + _PATIENCE_S
    while not workdir.is_dir():
        if time.monotonic() > until:
            return "is not there"
        signals.check()
        time.sleep(0.2)
    return "is there"
