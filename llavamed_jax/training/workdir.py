"""Reads and writes a run's directory: the recipe it belongs to, and its logs. `place.py` locks the directory."""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from llavamed_jax.config import PRESET
from llavamed_jax.errors import UsageError, UserError, exists
from llavamed_jax.training.optimizer import warmup_cosine
from llavamed_jax.training.recipe import SCHEMA
from llavamed_jax.utils.files import write_whole
from llavamed_jax.utils.nested import flatten

_LENGTH = ("epochs", "total_steps")
_MEMORY = ("remat", "micro_batches")  # they decide how an update is computed; its result is rounded differently
# Keys that a resumed run may change: how long it trains, when it gives up, where and how often it logs, but not what it
# computes. Only preflight reads data.mean_….
MAY_DIFFER = (*_LENGTH, *_MEMORY, "log_every", "samples_every", "data.samples", "nan_limit", "checkpoint.",
              "data.workers", "data.skip_limit", "mesh.", "data.mean_")
# Keys that older recipes lack, and the value that older runs used. Such a run keeps this value on resuming.
LATER = {key: SCHEMA[key].default for key in ("loss_weighting", "quantize", "compute", "batch_size_may_grow", *(
    key for key in SCHEMA if key.startswith("lora.")))}
_RENAMED = {"data.protocol": "protocol"}  # older name -> present name


def settled(workdir: Path, cfg: ConfigDict, step: int, record: Mapping[str, Any]) -> dict:
    """Returns the values that the run had settled when it saved a step (`resolved` of `recipe.json`).

    The step's own record is authoritative, since a step is checked by its hashes; `recipe.json`, which anyone may edit,
    has to agree with it. A number of updates that followed from `epochs` holds only for the same `epochs`, and `remat`
    and `micro_batches` only for the same keys.

    Args:
      workdir: the run's directory.
      cfg: the recipe.
      step: number of the saved step.
      record: the step's record (`write_recipe`).

    Raises:
      UsageError: `cfg` differs from the recipe of this directory or of the step in a key that may not change.
      UserError: the step belongs to another run, or `recipe.json` was changed.
    """
    resolved = read_recipe(workdir, cfg)
    where, file = workdir / "checkpoints" / str(step), workdir / "recipe.json"
    if record.get("run") != read_record(workdir).get("run"):
        raise UserError(f"{where} belongs to another run than {file}; a step of the run in {workdir} was expected")
    _refuse_changes(cfg, record["recipe"], f"the run saved {where}")
    is_same_length = {key: record["recipe"][key] for key in _LENGTH} == {key: _plain(cfg)[key] for key in _LENGTH}
    written = read_record(workdir)["recipe"]  # of a run that may have changed keys and ended before it saved a step
    others = {key for key in _MEMORY if written.get(key) != record["recipe"].get(key)}
    for key, value in record["resolved"].items():
        if (resolved.get(key) != value and key not in others
                and (key != "total_steps" or is_same_length and key in resolved)):
            raise UserError(f"{file} has been changed: {key} is {resolved.get(key)!r}, but the run saved {where} with "
                            f"{value!r}")
    changed = {key for key in _MEMORY if record["recipe"].get(key) != _plain(cfg)[key]}
    return {key: value for key, value in record["resolved"].items()
            if key not in changed and (key != "total_steps" or is_same_length)}


def notes(cfg: ConfigDict, record: Mapping[str, Any], step: int, total_steps: int) -> list[str]:
    """Returns a line for each change that decides how updates are computed, and for another number of updates.

    Args:
      cfg: the recipe.
      record: the record of the step that the run resumes from (`write_recipe`).
      step: the number of this step.
      total_steps: updates of the whole run.
    """
    earlier, optimizer, was = record["recipe"], cfg.optimizer, record["resolved"].get("total_steps")
    changed = []
    if was not in (None, total_steps):
        last, following = (float(warmup_cosine(optimizer.learning_rate, optimizer.warmup_ratio, length)(at))
                           for length, at in ((was, step - 1), (total_steps, step)))
        changed.append(f"the run had {was} updates and has {total_steps} now, and its learning rate follows the "
                       f"schedule of {total_steps}: it was {last:.2e} in update {step} and is {following:.2e} in "
                       f"update {step + 1}")
    redrawn = " and draws another dropout" if cfg.lora.dropout else ""
    return [*changed, *(
        f"{key} was {earlier[key]} and is {cfg[key]} now: an update computes the same as before, rounds "
        f"differently{redrawn if key == 'micro_batches' else ''}, and needs another amount of memory"
        for key in _MEMORY if key in earlier and earlier[key] != _plain(cfg)[key])]


def read_recipe(workdir: Path, cfg: ConfigDict) -> dict:
    """Returns `resolved` of `recipe.json`, without a number of updates that belongs to other `epochs`.

    Raises:
      UsageError: `cfg` differs from the recipe of this directory in a key that may not change.
      UserError: the directory has no recipe.
    """
    found, now = read_record(workdir), _plain(cfg)
    _refuse_changes(cfg, found["recipe"], f"the run in {workdir} was started")
    is_same_length = all(found["recipe"].get(key) == now.get(key) for key in _LENGTH)
    return {key: value for key, value in found["resolved"].items() if key != "total_steps" or is_same_length}


def _refuse_changes(cfg: ConfigDict, earlier: Mapping[str, Any], when: str) -> None:
    now, earlier = _plain(cfg), {_RENAMED.get(key, key): value for key, value in earlier.items()}
    for key in sorted((set(earlier) | set(now)) - (LATER.keys() - earlier.keys())):
        is_free = key.startswith(MAY_DIFFER) and (key != "micro_batches" or now["compute"] != "fp8")
        if earlier.get(key) != now.get(key) and not is_free:  # an FP8 scale belongs to a micro-batch
            raise UsageError(f"the config key {key!r} is {now.get(key)!r}, but {when} with "
                             f"{earlier.get(key)!r}; the same recipe or another workdir was expected")


def as_started(cfg: ConfigDict, earlier: Mapping[str, Any]) -> ConfigDict:
    """Returns the recipe for a run that was started with the keys of `earlier`.

    For a key that `earlier` lacks, the run keeps its old behaviour and prints a warning.
    """
    own = cfg.copy_and_resolve_references()
    for key, value in LATER.items():
        *groups, leaf = key.split(".")
        place = own[groups[0]] if groups else own
        if key not in earlier and place[leaf] != value:
            print(f"warning: this run was started before the config key {key!r} existed; it continues with {value!r} "
                  f"instead of {place[leaf]!r}", flush=True)
            place[leaf] = value
    return own


def read_record(workdir: Path) -> dict:
    """Reads `recipe.json`: the run's name, recipe, and settled values. Raises UserError if it is missing or damaged."""
    path = workdir / "recipe.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or not all(isinstance(found.get(key), dict) for key in ("recipe", "resolved")):
        raise UserError(f"{path} is {'damaged' if path.exists() else 'missing'}; the recipe of an earlier run was "
                        "expected")
    return found


def begin_anew(workdir: Path, cfg: ConfigDict) -> None:
    """Checks that a run without a step may begin in a directory.

    Raises:
      UserError: the directory holds a model that no run wrote and that the run's steps would overwrite.
      UsageError: `init` is the directory's own model.
    """
    start = None if cfg.init.startswith(PRESET) else Path(cfg.init)
    if start is not None and exists(start) and start.is_dir():
        inside = (start.resolve().relative_to(workdir.resolve()).parts
                  if start.resolve().is_relative_to(workdir.resolve()) else None)
        if inside is not None and inside[:1] in ((), ("checkpoints",), ("base",), ("model",)):
            raise UsageError(f"the config key 'init' is {cfg.init!r}, which is the workdir's own model; a run that "
                             "starts from it needs another workdir")
    for part in ("model", "base"):
        if (workdir / part).exists() and not (workdir / "recipe.json").exists():
            raise UserError(f"the workdir {workdir} has {part}/ but no recipe.json, so it does not belong to a run; a "
                            "new directory was expected")


def discard_start(workdir: Path) -> None:
    """Removes the model of a run that ended without a step; the next run may start from another `init`."""
    shutil.rmtree(workdir / "model", ignore_errors=True)  # `write_model` also replaces the base


def write_recipe(workdir: Path, cfg: ConfigDict, resolved: dict, earlier: Mapping[str, Any] | None = None) -> dict:
    """Writes `recipe.json`: the run's name, the recipe by dotted key, and the values settled from recipe and data.

    Args:
      workdir: the run's directory.
      cfg: the recipe.
      resolved: the settled values.
      earlier: the record of the step that the run resumes from: its name, and its recipe, which may lack newer keys.

    Returns:
      The record, which every step carries.
    """
    earlier = earlier or {}
    newer = LATER.keys() - earlier["recipe"].keys() if earlier else set()
    recipe = {key: value for key, value in _plain(cfg).items() if key not in newer}
    record = {"run": earlier.get("run") or uuid.uuid4().hex, "recipe": recipe, "resolved": resolved}
    write_record(workdir, record)
    return record


def write_record(workdir: Path, record: Mapping[str, Any]) -> None:
    """Writes a record to `recipe.json`."""
    write_text(workdir / "recipe.json",
               json.dumps({key: record[key] for key in ("run", "recipe", "resolved")}, indent=1) + "\n")


def _plain(cfg: ConfigDict) -> dict:
    """Returns the recipe's values by dotted key, as JSON gives them back."""
    return json.loads(json.dumps(flatten(cfg), default=lambda value: value.to_dict()))


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content atomically."""
    write_whole(path, lambda file: file.write(text.encode()))


def cut_back(path: Path, step: int) -> None:
    """Removes from a JSON-lines log the lines of steps after `step`, so that a resumed run repeats none."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        # A killed run may leave a partial last line.
        with contextlib.suppress(ValueError, TypeError, KeyError, RecursionError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))
