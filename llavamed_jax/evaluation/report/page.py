"""Renders HTML pages from jinja2 templates, and formats numbers and pictures for them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jinja2

LONGEST_TEXT = 600  # characters of a question, an answer or a gold text; the page cuts longer ones


def render(template: str, **values) -> str:
    """Renders a template of this folder. Every value is escaped; a missing value raises an error."""
    return environment().get_template(template).render(**values)


@functools.cache
def environment() -> jinja2.Environment:
    """Returns the jinja2 environment of this folder, with the functions that the templates call."""
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {"number": number, "points": points, "probability": probability, "longest_text": LONGEST_TEXT}
    made.filters["json"] = functools.partial(json.dumps, ensure_ascii=False)
    return made


def number(value: float | None) -> str:
    """Formats a percentage with one decimal; a dash for None, and `<0.05` for a positive number that rounds to 0.0."""
    if value is None:
        return "–"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return "<0.05" if 0 < value < 0.05 else f"{round(value, 1) + 0.0:.1f}".replace("-", "−")


def points(value: float | None) -> str:
    """Formats a judge's points with two decimals; a dash for None."""
    return "–" if value is None else f"{value:.2f}"


def probability(value: float | None) -> str:
    """Formats a p-value with three decimals; a dash for None, and `<0.001` for smaller values."""
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"
