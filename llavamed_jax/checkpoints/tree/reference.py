"""The base of a run that trains an adapter: it stays where it is, and `base.json` has its path and its files' sha256.

A base of 7B parameters is 14 GB and an adapter of rank 128 below 1 GB, so a copy for each run would be most of what
runs write.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import hub, names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.identity import origin
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.open import open_torch
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import is_factor
from llavamed_jax.errors import UserError, some
from llavamed_jax.utils.buckets import is_local_copy
from llavamed_jax.utils.files import read_json, write_json
from llavamed_jax.utils.hashes import sha256_of

FILE = "base.json"
_TREE = "base/manifest.json"  # has a sha256 of each tensor, which is checked when the tensor is read


def is_referred(checkpoint: Checkpoint, without: Container[str]) -> bool:
    """Returns whether a run that starts from a checkpoint leaves its tensors where they are.

    Only a run that trains an adapter does. It copies the base if that has no files (a preset), or if it is the step of
    another run, which may delete it.

    Args:
      checkpoint: the checkpoint, with the run's adapter.
      without: names of the tensors that every step has.
    """
    if checkpoint.config.adapter is None or checkpoint.directory is None:
        return False
    unused = {*checkpoint.unused}  # no step has factors of layers that the model does not compute with
    if any(is_factor(name) and name not in without and name not in unused for name in checkpoint.tensors):
        return False
    if is_local_copy(checkpoint.directory):  # of a bucket: another machine would not find it
        return False
    if checkpoint.layout == "tree":  # with its own tower, and with a manifest, which older trees lack
        return (checkpoint.step is None and checkpoint.tower_directory is None
                and (checkpoint.directory / _TREE).is_file())
    return checkpoint.layout in ("llava", "transformers")


def write(root: Path, checkpoint: Checkpoint, vision_tower: str | Path | None) -> None:
    """Writes `root/base.json`.

    Args:
      root: the run's directory.
      checkpoint: the checkpoint that the run starts from, with the run's adapter.
      vision_tower: the tower that replaced the checkpoint's own; None for its own.
    """
    directory, tower = checkpoint.directory.absolute(), vision_tower and str(hub.local(vision_tower).absolute())
    hashes = _weights(origin(directory, checkpoint).hashes())
    write_json(root / FILE, {"checkpoint": str(directory), "vision_tower": tower, "sha256": hashes})


def read(root: Path, of_tree: Callable[[Path], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors of a run's base by canonical name, once its files have the sha256 of `base.json`.

    Kernels of few bits are read as float32, as the run began with them.

    Args:
      root: the run's directory.
      of_tree: reads the base of a directory that is a tree of this project.

    Raises:
      UserError: `base.json` is damaged; the base is gone or has changed.
    """
    file = root / FILE
    record = read_json(file)
    wanted, path, tower = (record.get(key) for key in ("sha256", "checkpoint", "vision_tower"))
    if not isinstance(path, str) or not isinstance(tower, str | None) or not isinstance(wanted, dict) or not wanted:
        raise UserError(f"{file} is damaged; the path of a checkpoint and the sha256 of its files were expected")
    directory = Path(path)
    if not directory.is_dir():
        raise UserError(f"{file} names the base {path}, which does not exist; the checkpoint that the run was started "
                        "from was expected there, or its new path in the file")
    if (directory / "model" / "config.json").is_file():
        if (is_run := (directory / FILE).is_file()) or not (directory / _TREE).is_file():
            what = "is the workdir of a run that trains an adapter" if is_run else f"has no {_TREE}"
            raise UserError(f"{file} names the base {path}, which {what}; the checkpoint that the run was started from "
                            "was expected there, or its new path in the file")
        tensors = dict(of_tree(directory))
        found = {_TREE: sha256_of(directory / _TREE)}
    else:
        checkpoint = open_torch(directory, None if tower is None else Path(tower))
        tensors, found = dict(checkpoint.tensors), _weights(origin(path, checkpoint).hashes())
    differing = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
    if differing:
        raise UserError(f"{directory}, the base of the run in {root}, has changed since the run was started: "
                        f"{some(differing)}; the same files as then were expected")
    return {name: tensor.widened() for name, tensor in tensors.items() if not is_factor(name)}


def unused_factors(config: LlavaConfig) -> dict[str, Tensor]:
    """Returns zeros for the factors of the tower's unused layers, which neither the base nor a step of a run has."""
    specs = names.specs(config)
    shapes = {name: specs[name].shape for name in names.unused_names(config) if is_factor(name)}
    return {name: Tensor(shape, np.dtype(np.float32), lambda shape=shape: np.zeros(shape, np.float32))
            for name, shape in shapes.items()}


def path(root: Path) -> str | None:
    """Returns the path in `base.json`; None for a directory without one."""
    return read_json(root / FILE).get("checkpoint") if (root / FILE).is_file() else None


def fingerprint(root: Path) -> str:
    """Returns the hashes in `base.json` as one text; the base may have moved."""
    found = read_json(root / FILE).get("sha256")
    return " ".join(f"{name} {digest}" for name, digest in sorted(found.items())) if isinstance(found, dict) else ""


def _weights(hashes: Mapping[str, str]) -> dict[str, str]:
    """Returns the hashes of the files with tensors; the run has copies of the others."""
    return {name: digest for name, digest in hashes.items()
            if name.endswith((".safetensors", ".bin", _TREE))}
