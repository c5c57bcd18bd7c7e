"""Pieces of `report.html`: numbers, bars, tables, texts, thumbnails. `text` escapes what comes from outside; tables take ready HTML."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image

THUMBNAIL = 256  # pixels of the longer side
LONGEST_TEXT = 600  # characters of a question, an answer or a gold text that are shown
_BAR = 150  # pixels


def number(value: float | None) -> str:
    """A percentage with one decimal; a dash where there is none; `<0.05` where rounding would hide that it is not 0."""
    if value is None:
        return "–"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return "&lt;0.05" if 0 < value < 0.05 else f"{round(value, 1) + 0.0:.1f}".replace("-", "−")


def probability(value: float | None) -> str:
    """A p with three decimals, `<0.001` where they would all be 0."""
    return "–" if value is None else "&lt;0.001" if value < 0.001 else f"{value:.3f}"


def interval(low: float | None, high: float | None, form: Callable[[float], str] = number) -> str:
    """A 95 % interval in small print; nothing where there is none."""
    return "" if low is None else f'<span class="ci">[{form(low)}, {form(high)}]</span>'


def interval_of(table: Mapping, name: str, form: Callable[[float], str] = number) -> str:
    """The interval of a metric in a table of `metrics.json`."""
    return interval(table.get(f"{name}_low"), table.get(f"{name}_high"), form)


def with_interval(table: Mapping, name: str) -> str:
    """A metric and its interval."""
    return f"{number(table[name])} {interval_of(table, name)}"


def with_bar(table: Mapping, name: str, most: float = 100) -> str:
    """A metric, its interval, and both drawn; a dash where the table has it not."""
    if table.get(name) is None:
        return number(None)
    return with_interval(table, name) + bar(table[name], table.get(f"{name}_low"), table.get(f"{name}_high"), most)


def bar(value: float, low: float | None = None, high: float | None = None, most: float = 100) -> str:
    """A value as a bar from 0 to `most`, its interval as a line across the end, 100 as a mark where there is more."""
    scale, lines = _BAR / most, ""
    if low is not None:
        lines = f'<line x1="{low * scale:.1f}" x2="{high * scale:.1f}" y1="5" y2="5" stroke="#1c2733" stroke-width="1.5"/>'
    if most > 100:
        lines += f'<line x1="{100 * scale:.1f}" x2="{100 * scale:.1f}" y1="0" y2="10" stroke="#a8322b"/>'
    return (
        f'<svg class="bar" width="{_BAR}" height="10" role="img" aria-label="{number(value)} percent">'
        f'<rect width="{_BAR}" height="10" fill="#eef2f5"/>'
        f'<rect width="{max(value, 0) * scale:.1f}" height="10" fill="#7aa9d3"/>{lines}</svg>'
    )


def card(title: str, value: str, small: str, beside: str) -> str:
    """A headline number, of ready HTML."""
    return f'<div class="card"><span>{title}</span><b>{value}</b>{small}<span>{beside}</span></div>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table of ready HTML cells; the first column is the row's heading, `numeric` columns are set to the right."""
    kinds = [' class="n"' if column in numeric else "" for column in range(len(head))]
    top = "".join(f"<th{kind}>{cell}</th>" for cell, kind in zip(head, kinds, strict=True))
    lines = [
        "<tr>"
        + "".join(
            f"<th>{cell}</th>" if column == 0 else f"<td{kind}>{cell}</td>"
            for column, (cell, kind) in enumerate(zip(row, kinds, strict=True))
        )
        + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def section(title: str, note: str, *parts: str) -> str:
    """A heading, a note under it, and what follows."""
    return f"<h2>{title}</h2>" + (f'<p class="note">{note}</p>' if note else "") + "".join(parts)


def text(value: str) -> str:
    """A text from outside: escaped, and cut where it is long, which is said with the number of characters there are."""
    if not value:
        return "(nothing)"
    if len(value) <= LONGEST_TEXT:
        return escape(value)
    return f'{escape(value[:LONGEST_TEXT])}… <span class="ci">(cut: {len(value):,} characters in all)</span>'


def thumbnail(path: str | Path) -> str | None:
    """A small JPEG as a data URL; None for a file that is not there or is no picture."""
    try:
        small = load_image(str(path))
    except UserError:
        return None
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
