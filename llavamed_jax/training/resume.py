"""Begins a run in its workdir, or finds the step that it resumes from and restores it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.tree import base, folder, store
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.errors import UserError, some
from llavamed_jax.models.stacking import unstack
from llavamed_jax.parallel import distributed
from llavamed_jax.parallel.mesh import put, replicated
from llavamed_jax.training import arithmetic
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.program import Program, from_disk
from llavamed_jax.training.progress import Progress
from llavamed_jax.training.rows import Data
from llavamed_jax.training.state import TrainState
from llavamed_jax.utils import signals
from llavamed_jax.utils.buckets import is_local_copy
from llavamed_jax.utils.files import read_bytes, recover_jsonl

_RENAMED = {"seen": "samples_read"}  # counts of earlier versions -> present name
# What a step has to record for its run to go on, besides its number.
_RECORDED = {"data": (), "progress": (), "run": ("run", "recipe", "resolved", "model", "validation", "computed")}


def find(workdir: Path, cfg: ConfigDict) -> tuple[dict, int | None]:
    """Finds the step that a run in a workdir resumes from.

    Returns:
      The record of the newest intact step, and its number; ({}, None) to begin.

    Raises:
      UsageError: the recipe differs from the run's in a key that may not change.
      UserError: the workdir's steps are damaged, cannot be reached, or belong to another run.
    """
    step = _newest_step(workdir)
    if step is None:  # no recipe owns the workdir yet: the recipe may be corrected before the first step
        workdirs.begin_anew(workdir, cfg)
        return {}, None
    meta = store.read_meta(workdir, step)
    if (saved_as := meta.get("step")) != step:
        what = f"was saved as step {saved_as}"
        if saved_as is None:
            what = "does not record its number, because an earlier version saved it"
        raise UserError(f"{workdir}/checkpoints/{step} {what}; a step under its own number was expected")
    _refuse_other_version(workdir / "checkpoints" / str(step), meta)
    record = meta["run"]
    record["settled"] = workdirs.settled(workdir, cfg, step, record)
    base.check_fingerprints(workdir, record["model"])
    return record, step


def _refuse_other_version(directory: Path, meta: Mapping) -> None:
    """Raises UserError if a step lacks a record that this version needs, or counts what this version does not."""
    missing = [key for key in _RECORDED if not isinstance(meta.get(key), dict)] or [
        key for group, keys in _RECORDED.items() for key in keys if key not in meta[group]]
    if missing:
        raise UserError(f"{directory} does not record {missing[0]!r}, because another version saved it; a step of "
                        "this version was expected")
    known = {each.name for each in fields(Progress)} | _RENAMED.keys()
    if unknown := sorted(meta["progress"].keys() - known):
        raise UserError(f"{directory} records the count {unknown[0]!r}, which this version does not know, because "
                        "another version saved it; a step of this version was expected")


def _newest_step(workdir: Path) -> int | None:
    """Returns the step to resume from, None to begin; prints damaged steps. A run with steps never begins anew."""
    folder.check(workdir)
    step, damaged = store.newest_intact_step(workdir)
    if step is None and (len(damaged) > 1 or store.has_sealed(workdir)):
        why = some(damaged, separator="; ") or "its steps were removed"
        raise UserError(f"{workdir} has no intact step to resume from: {why}; delete its checkpoints/ to start "
                        "from the beginning, or name another workdir")
    if step is None and not damaged:
        _say_what_is_lost(workdir)
    for sentence in damaged:
        print(f"{sentence}; {'the run starts from the beginning' if step is None else 'this step is skipped'}",
              flush=True)
    return step


def _say_what_is_lost(workdir: Path) -> None:
    """Says that a run without steps starts from the beginning, if it had begun.

    Raises:
      UserError: the run has saved steps, so they must be elsewhere, as on a disk that is not mounted. The save after a
        step waits for this step, so a log that has gone beyond that save shows it, unless the first save had failed;
        then it costs the user the removal of an empty directory.
    """
    log = workdir / "metrics.jsonl"
    with contextlib.suppress(FileNotFoundError):
        lines = recover_jsonl(read_bytes(log).decode("utf-8", errors="replace"))
        reached = max((line["step"] for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)),
                      default=0)
        if not reached:
            return
        if 0 < 2 * _every_steps(workdir) < reached and (workdir / "checkpoints").is_dir():
            raise UserError(f"{workdir}/checkpoints has no step, but {log} has reached update {reached}, before which "
                            "steps were saved; mount the disk that has them, or remove the directory "
                            f"{workdir}/checkpoints to start from the beginning")
        print(f"{workdir} has no step: the run starts from the beginning, and so does its metrics.jsonl, which had "
              f"reached update {reached}", flush=True)


def _every_steps(workdir: Path) -> int:
    """Returns `checkpoint.every_steps` of the run that was last in a workdir; 0 if that is not known."""
    try:
        every = workdirs.read_record(workdir)["recipe"].get("checkpoint.every_steps")
    except UserError:
        return 0
    return every if isinstance(every, int) else 0


def begin(workdir: Path, cfg: ConfigDict, checkpoint: Checkpoint, program: Program, data: Data, total_steps: int,
          earlier: Mapping) -> dict:
    """Writes the recipe and, in a run without a step, the frozen parameters. Only process 0 calls it.

    Args:
      workdir: the run's directory.
      cfg: the recipe.
      checkpoint: the checkpoint that the run starts from, or the run's own base.
      program: the run's program.
      data: the run's data.
      total_steps: updates of the run.
      earlier: the record of the step that the run resumes from; {} to begin.

    Returns:
      The record that every step carries: the run's recipe, base, validation data and arithmetic.
    """
    if not earlier:
        workdirs.discard_start(workdir)
    resolved = {"total_steps": total_steps, **data.resolved(), "remat": program.model.remat}
    record = workdirs.write_recipe(workdir, cfg, resolved, earlier)
    if not earlier:
        write_model(workdir, checkpoint, without=program.trained_names(), progress=signals.checked,
                    stays=not is_local_copy(workdir), vision_tower=cfg.vision_tower)  # a bucket is read elsewhere
    return {**record, "model": base.fingerprints(workdir), "validation": data.judged_by(),
            "computed": arithmetic.used(program)}


def restore(workdir: Path, step: int, own: Checkpoint, program: Program, meta: Mapping) -> tuple[TrainState, Progress]:
    """Restores a saved step over the run's own base.

    Args:
      workdir: the run's directory.
      step: number of the saved step.
      own: the run's base (`base.open_base`).
      program: the run's program.
      meta: what the step recorded (`store.read_meta`).

    Returns:
      The state, and the run's counts so far.
    """
    like = program.abstract_state()
    trained, opt_state, _ = store.restore_step(workdir, step, unstack(like.trainable), like.opt_state)
    frozen = program.frozen(own)
    if distributed.process_index() == 0:
        for name in own.unused:  # checks tensors that no update needs, but an export of this run does
            own.read(name)
    counts = {_RENAMED.get(name, name): count for name, count in meta["progress"].items()}
    progress = Progress(**{"updates_moved": 1, **counts})  # earlier versions did not count moved updates
    everywhere = replicated(program.mesh)
    return TrainState(
        step=put(np.int32(step), everywhere), skipped=put(np.int32(progress.updates_skipped), everywhere),
        trainable=from_disk(trained, program.shardings.trainable), frozen=frozen, opt_state=opt_state), progress
