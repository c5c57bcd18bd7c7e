"""Renders the page of `inspect`: one HTML file that opens offline. The template is `page.html.j2`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from llavamed_jax.images.thumbnail import thumbnail

LONGEST_TEXT = 600  # characters of a text on the page


def render(**values) -> str:
    """Renders the page. Every value is escaped; a missing value raises an error."""
    folder = Path(__file__).parent
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(folder), autoescape=True, undefined=jinja2.StrictUndefined,
                              trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"n": number, "share": share}
    made.globals["longest"] = LONGEST_TEXT
    return made.get_template("page.html.j2").render(**values)


def number(value: float) -> str:
    """Formats a count with commas; a number that is not whole has one decimal."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.1f}"


def share(part: int, whole: int) -> str:
    """Formats a part as a percentage of a whole."""
    return f"{100 * part / whole:.1f} %" if whole else "–"


def figure(path: str, labels: Sequence[str], pairs: Sequence[tuple[str, str]] = ()) -> Mapping:
    """Returns what the template needs of an image: its picture, labels, and questions with answers."""
    return {"url": thumbnail(path) if path else None, "name": Path(path).name,
            "labels": [each for each in labels if each], "pairs": pairs}
