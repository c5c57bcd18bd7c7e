"""Which code is running: a name for it that changes with every line, and the versions of other packages."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

from llavamed_jax.utils.hashes import sha256

_SUFFIXES = (".py", ".txt", ".j2", ".css")  # what the judge is told and the pages of reports lie beside the code


@functools.cache
def code_sha256() -> str:
    """A sha256 of this package's files: their names and contents, wherever they are installed."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES):
        digest.update(f"{file.relative_to(root).as_posix()} {sha256(file.read_bytes())}\n".encode())
    return digest.hexdigest()


def version(package: str) -> str | None:
    """The version of an installed package; None where it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
