"""A run's directory: who may write to it, which recipe it belongs to, and its log cut back to where a run goes on."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.parallel import distributed
from llavamed_jax.training import recipe

# What a run that goes on may change: how long, where and how often, but not what is computed.
MAY_DIFFER = ("epochs", "total_steps", "log_every", "samples_every", "data.samples", "nan_limit", "checkpoint.", "data.workers", "mesh.")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Callable[[], None]]:
    """Holds the directory for one run; the kernel lets go of it however the process ends. Of several processes the first does.

    Yields a function that signs the lock, for the message that others get: a run that has nothing to do leaves no trace.
    Raises:
      UserError: another run holds it.
    """
    if distributed.process_index():
        yield lambda: None
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be made: {error.strerror}") from None
    try:
        file = open(workdir / ".lock", "a+")
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(f"the workdir {workdir} is in use by another run (process {file.read().strip() or 'unknown'})") from None

        def sign():
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()

        yield sign


def read_recipe(workdir: Path, cfg: ConfigDict) -> dict:
    """What the run had settled when it was last started here (`resolved` of `recipe.json`); {} in a new directory.

    A number of updates that followed from `epochs` is settled only for the same `epochs`.
    Raises:
      UsageError: `cfg` differs from the recipe of this directory in a key that may not.
    """
    if not (workdir / "recipe.json").exists():
        return {}
    earlier, resolved = _earlier(workdir)
    now = _plain(cfg)
    for key in sorted(set(earlier) | set(now)):
        if earlier.get(key) != now.get(key) and not key.startswith(MAY_DIFFER):
            raise UsageError(f"the config key {key!r} is {now.get(key)!r}, but the run in {workdir} was started with "
                             f"{earlier.get(key)!r}; the same recipe or another workdir was expected")
    if any(earlier.get(key) != now.get(key) for key in ("epochs", "total_steps")):
        resolved = {key: value for key, value in resolved.items() if key != "total_steps"}
    return resolved


def _earlier(workdir: Path) -> tuple[dict, dict]:
    """Recipe and `resolved` of `recipe.json`."""
    path = workdir / "recipe.json"
    try:
        found = json.loads(path.read_text())
        earlier, resolved = found["recipe"], found["resolved"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        earlier = resolved = None
    if not isinstance(earlier, dict) or not isinstance(resolved, dict):
        raise UserError(f"{path} is damaged; the recipe of an earlier run was expected")
    return earlier, resolved


def discard_start(workdir: Path, cfg: ConfigDict) -> None:
    """Removes the model that a run of another recipe put here before it failed without a step; `cfg` starts from its own."""
    if not (workdir / "recipe.json").exists():
        return
    earlier, now = _earlier(workdir)[0], _plain(cfg)
    if any(earlier.get(key) != now.get(key) for key in {*earlier, *now} if not key.startswith(MAY_DIFFER)):
        shutil.rmtree(workdir / "model", ignore_errors=True)  # the base goes with it: `store.write_model`


def write_recipe(workdir: Path, cfg: ConfigDict, resolved: dict) -> None:
    """Writes `recipe.json`: the recipe by dotted key, and what the run settled from it and its data."""
    write_text(workdir / "recipe.json", json.dumps({"recipe": _plain(cfg), "resolved": resolved}, indent=1) + "\n")


def _plain(cfg: ConfigDict) -> dict:
    """Values by dotted key, as JSON gives them back."""
    return json.loads(json.dumps(recipe.flatten(cfg), default=lambda value: value.to_dict()))


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    temporary.rename(path)


def cut_back(path: Path, step: int) -> None:
    """Leaves of a JSON-lines log the lines of steps up to `step`, so that a run that goes on repeats none."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):  # the last line of a killed run may be torn, or a disk's error
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    write_text(path, "".join(kept))
