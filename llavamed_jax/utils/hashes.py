"""Computes sha256 of files, and caches those of large files: a 7B model's weights take half a minute or more to hash.

A cached hash is valid for a file of the same device, inode, size, time of change (`mtime`) and of inode change
(`ctime`), all to the nanosecond. The kernel sets `ctime` whenever content, name or owner change, and no program can set
it back; the cache relies on the kernel and its clock. The hash of a file that changed within the last seconds is not
cached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import open_file, write_whole
from llavamed_jax.utils.paths import user_cache

LARGE = 2**26  # bytes from which on a hash is cached
_RECENT_S = 5.0
_MOST = 4096  # hashes in the cache
_THREADS = 8


def sha256_of_files(files: Mapping[str, Path]) -> dict[str, str]:
    """Returns name -> sha256 of each file; hashes several at a time.

    Raises:
      UserError: a file is gone or cannot be read.
    """
    known = _remembered()
    with ThreadPoolExecutor(_THREADS) as threads:  # hashing releases the interpreter lock
        found = dict(zip(files, threads.map(lambda file: _sha256(file, known), files.values()), strict=True))
    new = {mark: digest for digest, mark in found.values() if mark is not None and mark not in known}
    if new:
        _remember({**known, **new})
    return {name: digest for name, (digest, _) in found.items()}


def sha256(content: bytes | str) -> str:
    """Returns the sha256 of bytes, or of a text's UTF-8, in hexadecimal."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()


def sha256_of_list(hashes: Mapping[str, str]) -> str:
    """Returns one sha256 for several files: that of the lines `NAME SHA256`, sorted by name."""
    return sha256("".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items())))


def _sha256(file: Path, known: Mapping[str, str]) -> tuple[str, str | None]:
    """Returns a file's hash, and the key under which it may be cached, or None."""
    try:
        with open_file(file) as opened:
            before = _mark(opened.fileno())
            if before in known:
                return known[before], before
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            return digest, before if before == _mark(opened.fileno()) else None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None


def _mark(descriptor: int) -> str | None:
    """Returns the key of a large file in the cache; None for a small file, and for one that changed just now."""
    s = os.fstat(descriptor)
    if s.st_size < LARGE or max(s.st_mtime, s.st_ctime) > time.time() - _RECENT_S:
        return None
    return " ".join(map(str, (s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns)))


def _file() -> Path:
    return user_cache() / "sha256.json"


def _remembered() -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, RecursionError):
        found = json.loads(_file().read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return {mark: digest for mark, digest in found.items() if isinstance(digest, str) and len(digest) == 64}
    return {}


def _remember(hashes: Mapping[str, str]) -> None:
    """Writes the cache atomically; if the home directory cannot be written to, there is no cache."""
    kept = dict(list(hashes.items())[-_MOST:])
    with contextlib.suppress(OSError):
        file = _file()
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, lambda opened: opened.write(json.dumps(kept).encode()))


def short_hash(*values: object) -> str:
    """Returns a name of 16 characters for values of JSON's types, equal for equal values."""
    return sha256(json.dumps(values, sort_keys=True, default=str))[:16]


def sha256_of_each(files: Sequence[Path]) -> dict[Path, str | None]:
    """Returns file -> sha256; None for a file that cannot be read, which is not an error here."""
    def read(file: Path) -> str | None:
        try:
            with open_file(file) as opened:
                return hashlib.file_digest(opened, "sha256").hexdigest()
        except (OSError, UserError):
            return None

    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(files, threads.map(read, files), strict=True))


def sha256_of_folder(folder: Path) -> str:
    """Returns one sha256 for all files below a folder: `sha256_of_list` of their paths in it."""
    return sha256_of_list(sha256_of_files({file.relative_to(folder).as_posix(): file for file in folder.rglob("*")
                                           if file.is_file()}))


def sha256_of(file: Path) -> str:
    """Returns the sha256 of a file. Raises UserError or FileNotFoundError as `open_file` does."""
    with open_file(file) as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
