"""Makes small pictures for pages that open offline."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image

SIDE = 256  # longer side, in pixels


def thumbnail(path: str | Path, side: int = SIDE) -> str | None:
    """Returns a small JPEG of an image file as a data URL; None if the file is missing or is not an image."""
    try:
        small = load_image(str(path))
    except UserError:
        return None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
