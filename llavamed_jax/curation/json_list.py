"""Writes records one by one into a JSON list or JSON lines, by the file's suffix; complete or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.utils.files import utf8, write_whole


def check_place(flag: str, path: Path) -> None:
    """Makes the folder of a file that will be written after long work, so that a wrong place is an error at once.

    Args:
      flag: the flag that names the file.
      path: the file.

    Raises:
      UsageError: the path is a folder.
      UserError: its folder cannot be made or written to.
    """
    if path.is_dir():
        raise UsageError(f"{flag} is {path}, which is a directory; a file was expected")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path} cannot be written: its directory does not allow it")


def write_records(path: Path, records: Iterable[dict]) -> int:
    """Writes records, each on one line; returns their number.

    Args:
      path: the file; `.jsonl` makes JSON lines, any other suffix a list.
      records: the records.

    Raises:
      UserError: the file cannot be written.
    """
    count, is_lines = 0, path.suffix == ".jsonl"

    def write(file: BinaryIO) -> None:
        nonlocal count
        file.write(b"" if is_lines else b"[")
        for record in records:
            before = b"" if is_lines else b"\n" if not count else b",\n"
            file.write(before + utf8(json.dumps(record, ensure_ascii=False)) + (b"\n" if is_lines else b""))
            count += 1
        file.write(b"" if is_lines else b"\n]\n")

    try:
        write_whole(path, write)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return count
