"""Reads the JSONL files of a run that generates conversations."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import open_file, recover_jsonl

_LONGEST_LINE = 2**26  # bytes


def lines_of(path: Path) -> Iterator[object]:
    """Yields the value of each line of a JSONL file, None for a damaged one; yields nothing if there is no file."""
    try:
        with open_file(path) as file:
            while line := file.readline(_LONGEST_LINE):
                yield from recover_jsonl(line.decode("utf-8", "replace"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
