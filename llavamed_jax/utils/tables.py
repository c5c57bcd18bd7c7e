"""Reads CSV text strictly, row by row. A damaged row costs no other row."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

_MOST_FIELD = 2**24  # characters of a cell; csv's own limit, 131072, is shorter than some reports


@dataclass(frozen=True)
class Line:
    """A row of a table.

    Attributes:
      number: the line on which it begins, counted from 1.
      cells: its cells, at least one; None if it is damaged.
      is_doubtful: whether it stands in what a damaged row before it, such as one with an unclosed quote, may hold too.
    """

    number: int
    cells: list[str] | None
    is_doubtful: bool


def allow_long_cells() -> None:
    """Raises csv's limit of a cell. The limit belongs to the process, so every reader of tables calls this."""
    csv.field_size_limit(_MOST_FIELD)


def read(text: str) -> Iterator[Line]:
    """Yields the rows of CSV text, without empty ones. After a damaged row, reading goes on at the next line."""
    allow_long_cells()
    lines, place, doubtful = list(io.StringIO(text, newline="")), 0, 0

    def rest() -> Iterator[str]:
        nonlocal place
        while place < len(lines):
            place += 1
            yield lines[place - 1]

    while place < len(lines):
        start = place
        try:
            cells = next(csv.reader(rest(), strict=True))
        except csv.Error:
            cells, place, end = None, start + 1, place
        if cells != []:
            yield Line(start + 1, cells, start < doubtful)
        if cells is None:
            doubtful = max(doubtful, end)
