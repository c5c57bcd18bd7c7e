"""Copies this project's own tree from a bucket to this machine: what a reader of the model needs, or what a run needs.

A file is copied again only if its object or the copy has changed. The copy is a tree like any other: its steps and
tensors are checked by the sha256 of their manifests when they are read.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from llavamed_jax.checkpoints.tree import folder, holding
from llavamed_jax.checkpoints.tree.step_manifest import MANIFEST, damage
from llavamed_jax.errors import UsageError, UserError, amount, warn_once
from llavamed_jax.utils import locks
from llavamed_jax.utils.buckets import DIRECTORY, Bucket, Entry, Missing, local_copies, on_local_disk
from llavamed_jax.utils.files import read_json, write_json
from llavamed_jax.utils.paths import split_bucket

STEPS = "checkpoints/"
_PARTS = ("params/", "state/")  # of a step, for a reader of the model: not the optimizer
RECORD = ".objects.json"  # what was copied: by name, version of the object, and size and time of the file
_TRIES = 5  # to copy the newest step of a run that deletes older ones in the meantime


def local(url: str, has_weights: bool = True) -> Path:
    """Returns the local copy of a tree, or of one step of it, brought up to date.

    Args:
      url: the address of a run's workdir, of `convert import`'s directory, or of `…/checkpoints/STEP`.
      has_weights: False copies only config, tokenizer and preprocessor.

    Returns:
      The copy of the newest intact step or of the given one; that of the tree if it has no step, or without weights.

    Raises:
      UserError: there is no tree; the bucket cannot be read; the copy does not fit on the disk.
    """
    scheme, bucket, key = split_bucket(url)
    root, _, step = key.rpartition("/checkpoints/")
    if folder.number(step) is None or not root:
        root, step = key, ""
    directory = local_copies() / "read" / scheme / bucket / root
    source = Bucket(f"{scheme}://{bucket}/{root}")
    with _alone(directory):
        for number in range(_TRIES):
            try:
                found = _update(source, directory, step, has_weights)
                break
            except Missing:  # the run has deleted a step since it was listed
                if number == _TRIES - 1:
                    raise
    return directory if found is None else directory / STEPS / str(found)


def _update(source: Bucket, directory: Path, step: str, has_weights: bool) -> int | None:
    """Brings a copy up to date; returns the step that is read, None for the base alone."""
    entries = source.entries()
    if "model/config.json" not in entries:
        raise UsageError(f"{source.url} has no model/config.json; a run's workdir, or the directory of `convert "
                         "import`, was expected (only this project's own tree is read from a bucket)")
    if step and f"{STEPS}{step}/{MANIFEST}" not in entries:
        raise UsageError(f"{source.url}/{STEPS}{step} has no {MANIFEST}: there is no such step, or its save was "
                         "interrupted")
    wanted = [name for name in entries if name.startswith(("model/", "base/") if has_weights else "model/")
              or name in ("recipe.json", "base.json")]
    _forget_old(entries, directory)
    copy(source, entries, directory, wanted)
    if not has_weights:
        return None
    steps = [int(step)] if step else sealed(entries)
    found = copy_newest_step(source, entries, directory, steps, "params", _PARTS)
    return int(step) if step else found


def sealed(entries: Mapping[str, Entry]) -> list[int]:
    """Returns the numbers of the steps in a listing that have a manifest, ascending."""
    found = (name.split("/") for name in entries if name.startswith(STEPS))
    steps = (folder.number(parts[1]) for parts in found if len(parts) == 3 and parts[2] == MANIFEST)
    return sorted(step for step in steps if step is not None)


def copy_newest_step(source: Bucket, entries: Mapping[str, Entry], directory: Path, steps: list[int], part: str = "",
                     parts: tuple[str, ...] = ("",)) -> int | None:
    """Copies the newest of some steps, and further ones until one is intact.

    Args:
      source: the run's address.
      entries: its listing.
      directory: gets the steps.
      steps: numbers of steps with a manifest, ascending.
      part: the part of a step that must be intact; "" for everything.
      parts: beginnings of the names of a step's files that are copied.

    Returns:
      The intact step; None if there is none.
    """
    for step in reversed(steps):
        below = f"{STEPS}{step}/"
        names = [name for name in entries if name.removeprefix(below).startswith(parts) and name.startswith(below)]
        copy(source, entries, directory, [name for name in names if name != below + MANIFEST])
        copy(source, entries, directory, [below + MANIFEST])  # last, as it was written
        if (sentence := damage(directory / STEPS / str(step), part)) is None:
            return step
        warn_once(f"{sentence} ({source.url})")
    return None


def copy(source: Bucket, entries: Mapping[str, Entry], directory: Path, names: list[str]) -> None:
    """Copies objects into a directory; leaves files alone that are there and have not changed.

    Raises:
      UserError: the files do not fit on the disk.
    """
    record = read_record(directory)
    needed = [name for name in names if record.get(name, "never") != _mark(directory / name, entries[name])]
    if not needed:
        return
    size = sum(entries[name].size for name in needed)
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if free < size:
        raise UserError(f"{source.url} needs {amount(size)} in {directory}; its disk has {amount(free)} free "
                        f"({DIRECTORY} names another directory for local copies)")
    source.download(directory, needed)
    marks = {name: _mark(directory / name, entries[name]) for name in needed}
    wrong = next((name for name in needed if marks[name][1] != entries[name].size), None)
    if wrong is not None:
        raise Missing(f"{source.url}/{wrong} was replaced while it was read")
    write_json(directory / RECORD, {**record, **marks})


def read_record(directory: Path) -> dict[str, list]:
    """Returns the record of the files that were copied into a directory; {} without an intact one."""
    with contextlib.suppress(UserError):
        return read_json(directory / RECORD)
    return {}


def _mark(file: Path, entry: Entry) -> list | None:
    """Returns the version of an object, and size and time of its copy; None without a copy."""
    try:
        found = file.stat()
    except OSError:
        return None
    return [entry.version, found.st_size, found.st_mtime_ns]


def _forget_old(entries: Mapping[str, Entry], directory: Path) -> None:
    """Deletes the copies of objects that do not exist any more; a step that another process reads stays."""
    kept = sealed(entries)
    for path in (directory / STEPS).glob("*"):
        if (found := folder.number(path.name)) is not None and found not in kept:
            if (path / MANIFEST).exists():
                holding.delete(path)
            else:
                shutil.rmtree(path, ignore_errors=True)
    for name in read_record(directory).keys() - entries.keys():
        if not name.startswith(STEPS):
            (directory / name).unlink(missing_ok=True)


@contextlib.contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Waits until no other process updates a copy."""
    with on_local_disk(directory):
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            locks.wait(descriptor)
            yield
        finally:
            os.close(descriptor)
