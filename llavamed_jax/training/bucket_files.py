"""Says which files of a run's local directory belong in its bucket, and keeps what the bucket lacks."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.checkpoints.tree import bucket_copy
from llavamed_jax.checkpoints.tree.bucket_copy import RECORD, STEPS
from llavamed_jax.checkpoints.tree.folder import number
from llavamed_jax.checkpoints.tree.step_manifest import MANIFEST
from llavamed_jax.errors import warn
from llavamed_jax.utils.directories import PARTIAL

_LOGS = ("metrics.jsonl", "skipped.jsonl", "tensorboard/")


def keep_or_delete(directory: Path, record: Mapping[str, list], has_logs: bool = False) -> str:
    """Deletes a run's local directory; one that has what the bucket lacks gets a lasting name.

    Args:
      directory: the directory, which this process has locked.
      record: what the bucket has, as in RECORD.
      has_logs: whether new logs are a reason to keep the directory, and not only a step.

    Returns:
      A sentence that says what is kept and where; "" if the directory was deleted.
    """
    lacking = [name for name, mark in listed(directory).items() if record.get(name, [])[1:] != [*mark]]
    steps, logs = [step_of(name) for name in lacking if is_manifest(name)], [name for name in lacking if is_log(name)]
    if not steps and not (has_logs and logs):
        shutil.rmtree(directory, ignore_errors=True)
        return ""
    kept = directory.with_suffix("")
    directory.rename(kept)
    for name in (RECORD, ".lock"):
        (kept / name).unlink(missing_ok=True)
    if not steps:
        return f"the newest lines of {logs[0]} are kept in {kept}"
    return f"step {max(steps)} is kept in {kept}, from which `--workdir {kept}` goes on"


def delete_leftover(directory: Path) -> None:
    """Deletes the local directory of a killed run, or keeps it, with a warning."""
    if kept := keep_or_delete(directory, bucket_copy.read_record(directory)):
        warn(f"an earlier run on this machine was killed before its bucket had its newest step: {kept}")


def listed(directory: Path) -> dict[str, tuple[int, int]]:
    """Returns size and time of each file of a run that belongs in the bucket, by name.

    A step belongs there once it has its manifest, and unless the manifest is all that was copied of it. What a run
    finds again by itself (`cache/`) does not.

    Raises:
      OSError: a directory cannot be read, so that it is not known whether it has a step.
    """
    found = {}
    for folder, folders, names in os.walk(directory, onerror=_raise):
        below = Path(folder).relative_to(directory)
        if below.parts[:1] == ("checkpoints",) and len(below.parts) == 2 and not (
                MANIFEST in names and "params" in folders and _has_files(Path(folder) / "params")):
            folders.clear()
            continue
        if not below.parts:
            folders[:] = [name for name in folders if name != "cache"]
        folders[:] = [name for name in folders if not name.endswith(PARTIAL) and ".orbax-checkpoint-tmp" not in name]
        for name in names:
            if not name.endswith(".tmp") and name not in (".lock", RECORD):
                with contextlib.suppress(FileNotFoundError):
                    stat = (Path(folder) / name).stat()
                    found[(below / name).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return found


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # a step that is deleted in the meantime
        raise error


def _has_files(directory: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return bool(os.listdir(directory))
    return False


def is_manifest(name: str) -> bool:
    """Returns whether a name is that of a step's manifest."""
    return (name.startswith(STEPS) and name.count("/") == 2 and name.endswith(f"/{MANIFEST}")
            and number(name.split("/")[1]) is not None)


def step_of(manifest: str) -> int:
    """Returns the step of a manifest."""
    return int(manifest.split("/")[1])


def is_log(name: str) -> bool:
    """Returns whether a name is that of a log, which grows while the run trains."""
    return name.startswith(_LOGS)
