"""Keeps what was fetched: images, a manifest, and what cannot be had.

    OUT/images/…            images, each under its final name only when it is whole and was decoded
    OUT/articles/PMCn.v/…   XML and images of whole articles
    OUT/manifest.jsonl      a line for each file that is there; appended after the file has its name
    OUT/missing.jsonl       a line for each file that cannot be had, with the reason
    OUT/resolved.jsonl      a line for each article whose metadata was read, so that it is not read again
    OUT/mirrors.jsonl       a line for each article of which a mirror on the web lacks files
    OUT/settings.json       what later runs must share

A killed run leaves at most a torn last line, which is cut off, and files without a line, which are verified by md5 and
taken over. So a run that was stopped goes on exactly.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

from llavamed_jax.errors import UsageError, UserError, short
from llavamed_jax.utils import locks
from llavamed_jax.utils.files import read_json, recover_jsonl, to_jsonl, write_text, write_whole

MANIFEST, MISSING, RESOLVED, SETTINGS = "manifest.jsonl", "missing.jsonl", "resolved.jsonl", "settings.json"
MIRRORS = "mirrors.jsonl"


class Store:
    """A folder that one run at a time fills.

    Args:
      out: the folder.
      settings: flag -> value; those of an earlier run must be the same.

    Raises:
      UserError: another run fills the folder, or it cannot be written.
      UsageError: a setting differs from that of the earlier runs.
    """

    def __init__(self, out: Path, settings: Mapping[str, object]):
        self.out = out
        self._lock = threading.Lock()
        self._files: dict[str, object] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(out, os.O_RDONLY)
        except OSError as error:
            raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
        if not locks.is_free(self._descriptor, out):
            os.close(self._descriptor)
            raise UserError(f"{out} is in use by another run; wait until it ends, or name another --out")
        try:
            self._check(dict(settings))
            self._remove_temporary()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _check(self, settings: dict) -> None:
        file = self.out / SETTINGS
        if not file.exists():
            write_text(file, json.dumps(settings, indent=2, sort_keys=True) + "\n")
            return
        earlier = read_json(file)
        for name, value in settings.items():
            if earlier.get(name) != value:
                raise UsageError(f"--{name} is {short(value)}, but {self.out} was filled with "
                                 f"{short(earlier.get(name))}; the same value or another --out was expected")

    def _remove_temporary(self) -> None:
        """Removes what a killed run was writing."""
        for name in ("images", "articles"):
            for path in (self.out / name).rglob(".*.tmp"):
                with contextlib.suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        """Closes the files, and lets other runs in."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        self._files = {}
        os.close(self._descriptor)

    def lines(self, name: str) -> Iterator[dict]:
        """Yields the objects of one of the folder's files of lines; cuts off a torn last line."""
        path = self.out / name
        try:
            with open(path, "rb+") as file:
                end = 0
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    end += len(line)
                    yield from (each for each in recover_jsonl(line.decode("utf-8", "replace"))
                                if isinstance(each, dict))
                file.truncate(end)
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror or error}") from None

    def append(self, name: str, *rows: dict) -> None:
        """Appends lines to a file of lines. Raises UserError if the disk refuses them."""
        data = to_jsonl(rows).encode("utf-8", "backslashreplace")
        with self._lock:
            try:
                if name not in self._files:
                    self._files[name] = open(self.out / name, "ab", buffering=0)
                written = self._files[name].write(data)
                if written != len(data):  # a disk that is nearly full takes a part
                    raise OSError(28, "No space left on device")
            except OSError as error:
                raise UserError(f"{self.out / name} cannot be written: {error.strerror or error}") from None

    def replace(self, name: str, rows: Iterator[dict]) -> None:
        """Writes a file of lines whole."""
        def write(file) -> None:
            for row in rows:
                file.write(to_jsonl([row]).encode("utf-8", "backslashreplace"))

        with self._lock:
            if name in self._files:
                self._files.pop(name).close()
            try:
                write_whole(self.out / name, write)
            except OSError as error:
                raise UserError(f"{self.out / name} cannot be written: {error.strerror or error}") from None

    def put(self, path: str, data: bytes) -> None:
        """Writes a file below the folder, whole or not at all. Raises UserError if the disk refuses it."""
        target = self.out / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, lambda file: file.write(data))
        except OSError as error:
            raise UserError(f"{target} cannot be written: {error.strerror or error}") from None

    def size(self, path: str) -> int | None:
        """Returns the bytes of a regular file below the folder; None if there is none."""
        with contextlib.suppress(OSError):
            target = self.out / path
            return target.stat().st_size if target.is_file() else None
        return None
