"""The manifest of a training step: the sha256 of each of its files, written last."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import read_json, write_json
from llavamed_jax.utils.hashes import sha256_of

MANIFEST = "manifest.json"
INTERRUPTED = "the save was interrupted"  # or is in progress, if the run is still running


def write(directory: Path) -> None:
    """Hashes every file of a step and writes its manifest atomically."""
    temporary = directory / f".{MANIFEST}"
    write_json(temporary, _hashes(directory, _files(directory)))
    temporary.replace(directory / MANIFEST)


def damage(directory: Path, part: str = "") -> str | None:
    """Says in a sentence why a step is damaged or cannot be read; None if it is intact.

    Args:
      directory: the step's directory.
      part: checks only this part of the step (`params`); "" checks everything.
    """
    try:
        return _damage(directory, part)
    except UserError as error:
        return str(error)
    except OSError as error:  # no permission, a failing disk, a name in the manifest that no file can have
        return f"{directory} cannot be read: {error.strerror or error}"


def _damage(directory: Path, part: str) -> str | None:
    """Returns what `damage` says, except of a step that cannot be read, for which it raises UserError or OSError."""
    if not (directory / MANIFEST).is_file():
        return f"{directory} has no {MANIFEST}: {INTERRUPTED}"
    manifest = read_json(directory / MANIFEST)
    for needed in (part,) if part else ("params", "optimizer", "state"):
        if not any(file.startswith(f"{needed}/") for file in manifest):
            return f"{directory} is damaged: its {MANIFEST} names no file of {needed}/"
    wanted = {file: sha for file, sha in manifest.items() if file.startswith(f"{part}/" if part else "")}
    absent = [file for file in wanted if not (directory / file).is_file()]
    if absent:
        return f"{directory} lacks {absent[0]}, which its {MANIFEST} names"
    found = _hashes(directory, list(wanted))
    changed = [file for file in wanted if found[file] != wanted[file]]
    return f"{directory} is damaged: {changed[0]} has another sha256 than its {MANIFEST} says" if changed else None


def _files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*")
                  if p.is_file() and p.name != MANIFEST)


def _hashes(directory: Path, names: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing releases the interpreter lock
        return dict(zip(names, threads.map(lambda file: sha256_of(directory / file), names)))
