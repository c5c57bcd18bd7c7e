"""Pages from templates: the environment, which escapes every value, and how numbers and pictures are shown."""

from __future__ import annotations

import base64
import functools
import io
import json
from pathlib import Path

import jinja2

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image

THUMBNAIL = 256  # pixels of the longer side
LONGEST_TEXT = 600  # characters of a question, an answer or a gold text that are shown


def render(template: str, **values) -> str:
    """A page of a template of this folder. Every value is escaped; a value that is missing is an error."""
    return environment().get_template(template).render(**values)


@functools.cache
def environment() -> jinja2.Environment:
    """The templates of this folder, with the functions that they call."""
    made = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True,
                              undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.globals |= {"number": number, "points": points, "probability": probability, "longest_text": LONGEST_TEXT}
    made.filters["json"] = functools.partial(json.dumps, ensure_ascii=False)
    return made


def number(value: float | None) -> str:
    """A percentage with one decimal; a dash where there is none; `<0.05` where rounding would hide that it is not 0."""
    if value is None:
        return "–"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return "<0.05" if 0 < value < 0.05 else f"{round(value, 1) + 0.0:.1f}".replace("-", "−")


def points(value: float | None) -> str:
    """A judge's points with two decimals; a dash where there are none."""
    return "–" if value is None else f"{value:.2f}"


def probability(value: float | None) -> str:
    """A p with three decimals, `<0.001` where they would all be 0."""
    return "–" if value is None else "<0.001" if value < 0.001 else f"{value:.3f}"


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
