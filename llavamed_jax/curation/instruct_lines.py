"""Reads the JSONL files of a run that generates conversations."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import open_file, recover_jsonl

_LONGEST_LINE = 2**26  # bytes


def lines_of(path: Path) -> Iterator[object]:
    """Yields the value of each line of a JSONL file, None for a damaged one; yields nothing if there is no file.

    A byte-order mark, which editors put before a file's first line, is left out; files may be joined.
    """
    try:
        with open_file(path) as file:
            while line := file.readline(_LONGEST_LINE):
                yield from recover_jsonl(line.removeprefix(codecs.BOM_UTF8).decode("utf-8", "replace"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
