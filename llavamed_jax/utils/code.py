"""Identifies the running code: a hash of this package's files, and the versions of other packages."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from pathlib import Path

# The judge's prompts and the pages are files beside the code.
_SUFFIXES = (".py", ".txt", ".j2", ".css", ".js")


@functools.cache
def code_sha256() -> str:
    """Returns a sha256 of this package's files, their names and contents, wherever they are installed."""
    root, digest = Path(__file__).resolve().parents[1], hashlib.sha256()
    for file in sorted(path for path in root.rglob("*") if path.suffix in _SUFFIXES):
        digest.update(f"{file.relative_to(root).as_posix()} {hashlib.sha256(file.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


@functools.cache
def version(package: str) -> str | None:
    """Returns the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
