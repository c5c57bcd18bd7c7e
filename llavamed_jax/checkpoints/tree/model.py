"""Writes and opens this project's own tree: the base that a run began with, and a step's trained tensors over it."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.generation_file import copy_files
from llavamed_jax.checkpoints.model_config import text_files, tree_config, tree_root
from llavamed_jax.checkpoints.preprocessor_file import make_equal
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.layout import match
from llavamed_jax.checkpoints.torch.write import Progress, total_bytes
from llavamed_jax.checkpoints.tree import folder, holding, reference
from llavamed_jax.checkpoints.tree.base import check_fingerprints, read_base, write_base
from llavamed_jax.checkpoints.tree.holding import Hold, StepGone, reading
from llavamed_jax.checkpoints.tree.step_manifest import INTERRUPTED
from llavamed_jax.checkpoints.tree.step_manifest import damage as _damage
from llavamed_jax.checkpoints.tree.store import TRIES, hold_newest, read_meta
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import without_factors
from llavamed_jax.errors import UserError, at, exists
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import write_json


def write_model(out: str | Path, checkpoint: Checkpoint, config: LlavaConfig | None = None,
                files: Mapping[str, Path] | None = None,
                without: Iterable[str] = (), progress: Progress = iter, stays: bool = False,
                vision_tower: str | Path | None = None) -> None:
    """Writes `out/base` and then `out/model`, which marks the base as complete; each appears when it is complete.

    With `stays`, an adapter's base stays where it is (`reference.is_referred`), and `out/base.json` names it.

    Args:
      out: the directory of the tree.
      checkpoint: the checkpoint.
      config: replaces the checkpoint's own config; None keeps it.
      files: replaces the checkpoint's own files; None keeps them.
      without: canonical names that the base leaves out, because every step has them.
      progress: wraps the names of the tensors.
      stays: whether the checkpoint's files stay where they are as long as `out` is used.
      vision_tower: the tower that replaced the checkpoint's own; None for its own.

    Raises:
      UserError: `out` has a model already; the weights are not a model's (`Checkpoint.sound`).
    """
    out, without, checkpoint, config = Path(out), set(without), checkpoint.sound(), config or checkpoint.config
    if (out / "base").exists() and not (out / "model").exists():
        shutil.rmtree(out / "base")  # left by a run that was stopped while it wrote its base
    if stays and reference.is_referred(checkpoint, without):
        reference.write(out, checkpoint, vision_tower)
    else:
        (out / reference.FILE).unlink(missing_ok=True)
        tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in without}
        with new_directory(out / "base", total_bytes(tensors)) as base:
            write_base(base, tensors, progress)
        checkpoint.tally.warn()
    with new_directory(out / "model") as model:
        write_json(model / "config.json", config.to_dict())
        copy_files(config, checkpoint.files if files is None else files, model)
        make_equal(config, model, config.source == "transformers", is_needed=False)


def open_tree(path: str | Path) -> Checkpoint:
    """Opens a workdir or `convert import`'s directory (base and newest intact step), or one `DIR/checkpoints/STEP`.

    The step is held as long as its tensors may be read (`holding`), since a running job deletes old steps.

    Raises:
      UserError: tensors are missing, unexpected or misshapen; the given step is not intact; the steps cannot be
        reached.
    """
    path = Path(path)
    for _ in range(TRIES - 1):
        with contextlib.suppress(StepGone):
            return _open_tree(path)
    return _open_tree(path)


def _open_tree(path: Path) -> Checkpoint:
    root, config = tree_root(path), tree_config(path)
    if root == path:
        folder.check(root)
        step, held, damaged = hold_newest(root, "params")
    else:
        step, damaged = folder.number(path.name) if path.is_dir() else None, []
        held = holding.hold(path)
        what = "is not the directory of a step" if exists(path) else "does not exist"
        damage = f"{path} {what}; DIR/checkpoints/STEP was expected" if step is None else _damage(path, "params")
        if damage:
            raise at(path, damage)
    found, changed = read_base(root), {}
    if step is not None:
        _refuse_other_base(root, step)
        changed = _step_tensors(root / "checkpoints" / str(step), held)
        found |= changed
    shapes = {name: spec.shape for name, spec in names.specs(config).items()}
    try:
        tensors = match(root, found, {name: (name,) for name in shapes}, shapes)
    except UserError as error:
        if step is None and not damaged and (root / "recipe.json").is_file():
            raise UserError(f"{root} is the workdir of a run without a saved step; at least one step in its "
                            "checkpoints/ was expected") from None
        raise UserError("; ".join([*damaged, str(error)])) from None
    for sentence in damaged:
        warnings.warn(sentence + " or is in progress" * sentence.endswith(INTERRUPTED), stacklevel=3)
    return Checkpoint(config, "tree", root, tensors, text_files(root / "model"), "the tensors in the tree", step,
                      changed=frozenset(without_factors(changed)))


def _refuse_other_base(root: Path, step: int) -> None:
    """Raises UserError if a run's step was trained over another base; steps that belong to no run do not record it."""
    if _damage(root / "checkpoints" / str(step), "state") is None and (record := read_meta(root, step).get("run")):
        check_fingerprints(root, record["model"], "base")


def _step_tensors(directory: Path, held: Hold | None) -> dict[str, Tensor]:
    """Returns the trained tensors of a step, each read on demand; the step is held as long as one of them exists."""
    params = (directory / "params").absolute()
    handler = ocp.PyTreeCheckpointHandler()
    with reading(directory):
        metadata = flatten_dict(handler.metadata(params).tree, sep="/")

    def read(name: str, _: Hold | None = held) -> np.ndarray:
        item = unflatten_dict({name: 0}, sep="/")
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        with reading(directory):
            return flatten_dict(handler.restore(params, args=ocp.args.PyTreeRestore(
                item=item, restore_args=arguments, partial_restore=True)), sep="/")[name]

    return {name: Tensor(tuple(m.shape), np.dtype(m.dtype), lambda name=name: read(name))
            for name, m in metadata.items()}
