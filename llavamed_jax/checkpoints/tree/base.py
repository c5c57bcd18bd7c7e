"""Reads and writes the part of this project's own tree that is written once: `base/` with the frozen tensors, `model/`.

`base/manifest.json` has a sha256 of each tensor and is written last; each tensor is checked against it when it is read,
so the base of a 7B model is checked without being read twice. A run's steps carry the sha256 of this manifest and of
the files of `model/` (`fingerprints`), so that a step is never combined with another base.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import text_files, tree_config
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import read_safetensors
from llavamed_jax.checkpoints.torch.write import Progress, write_safetensors
from llavamed_jax.checkpoints.tree import reference
from llavamed_jax.checkpoints.tree.step_manifest import MANIFEST
from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import read_json, write_json
from llavamed_jax.utils.hashes import sha256, sha256_of


def write_base(directory: Path, tensors: Mapping[str, Tensor], progress: Progress = iter) -> None:
    """Writes tensors, and then their manifest, into an empty directory.

    Args:
      directory: an empty directory.
      tensors: the tensors by canonical name.
      progress: wraps the names of the tensors.
    """
    hashes: dict[str, str] = {}
    write_safetensors(directory, {name: _noting(name, tensor, hashes) for name, tensor in tensors.items()}, progress)
    write_json(directory / MANIFEST, hashes)


def read_base(root: Path) -> dict[str, Tensor]:
    """Reads the tensors of a tree's base by canonical name; each is checked by its sha256 when it is read.

    The base of a run that trains an adapter may lie elsewhere (`reference`).

    A base without a manifest is read unchecked; whether it may lack one is up to the caller (`fingerprints`).

    Raises:
      UserError: the base is missing or cut, or lacks a tensor of its manifest; when a tensor is read, its sha256
        differs.
    """
    if (root / reference.FILE).is_file():
        return reference.read(root, read_base) | reference.unused_factors(tree_config(root))
    directory = root / "base"
    tensors = read_safetensors(directory)
    if not (directory / MANIFEST).is_file():
        return tensors
    hashes = read_json(directory / MANIFEST)
    absent = [name for name in hashes if name not in tensors]
    if absent:
        raise UserError(f"{directory} is damaged: it lacks {absent[0]}, which its {MANIFEST} names")
    return {name: _held(directory, name, tensor, hashes.get(name)) for name, tensor in tensors.items()}


def open_base(root: Path) -> Checkpoint:
    """Opens a run's directory without its steps: config, files and the frozen tensors."""
    return Checkpoint(tree_config(root), "tree", root, read_base(root), text_files(root / "model"),
                      "the tensors in its base/")


def fingerprints(root: Path) -> dict[str, str]:
    """Returns the sha256 by name of the files that a step depends on: the base's manifest and the files of `model/`."""
    files = [root / "base" / MANIFEST, root / "model" / "config.json", *text_files(root / "model").values()]
    found = {file.relative_to(root).as_posix(): sha256_of(file) for file in files if file.is_file()}
    if (root / reference.FILE).is_file():
        found[reference.FILE] = sha256(reference.fingerprint(root))
    return found


def check_fingerprints(root: Path, wanted: Mapping[str, str], part: str = "") -> None:
    """Raises UserError if a file of `fingerprints` is gone, new or changed.

    Args:
      root: the run's directory.
      wanted: the fingerprints that the run recorded.
      part: checks only names that begin with this (`base`); "" checks all.
    """
    found = fingerprints(root)
    for name in sorted({*wanted, *found}):
        if name.startswith(part) and found.get(name) != wanted.get(name):
            what = ("has been removed" if name not in found else "has been added" if name not in wanted
                    else "has changed")
            raise UserError(f"{root / name} {what} since the run in {root} was started, and the run's steps belong to "
                            "the original file; undo the change, or name another workdir to start a new run")


def check_base(root: Path) -> None:
    """Reads the whole base, and raises UserError for the first damaged tensor."""
    tensors = read_base(root)
    if not (root / reference.FILE).is_file():  # whose files were hashed just now
        for tensor in tensors.values():
            tensor.load()


def _noting(name: str, tensor: Tensor, hashes: dict[str, str]) -> Tensor:
    """Returns the tensor, which records its sha256 when it is read."""
    def load():
        array = np.asarray(tensor.load(), order="C")  # the bytes that are written
        hashes[name] = _sha256(array)
        return array
    return Tensor(tensor.shape, tensor.dtype, load)


def _held(directory: Path, name: str, tensor: Tensor, sha256: str | None) -> Tensor:
    """Returns the tensor, which raises UserError when it is read and has another sha256."""
    def load():
        array = tensor.load()
        if _sha256(array) != sha256:
            raise UserError(f"{directory} is damaged: {name} has another sha256 than its {MANIFEST} says")
        return array
    return Tensor(tensor.shape, tensor.dtype, load)


def _sha256(array: np.ndarray) -> str:
    return sha256(array.reshape(-1).view(np.uint8))
