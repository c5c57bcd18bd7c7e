"""Makes small pictures for pages that open offline."""

from __future__ import annotations

import base64
import functools
import io
import os
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image

SIDE = 256  # longer side, in pixels


def thumbnail(path: str | Path, side: int = SIDE) -> str | None:
    """Returns a small JPEG of an image file as a data URL; None if the file is missing or is not an image."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):  # missing, or the name of a frame
        return _draw(path, side)
    version = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
    return _drawn(str(path), side, version)


@functools.lru_cache(256)  # a page shows an image in several places, a suite in several reports
def _drawn(path: str, side: int, version: tuple[int, ...]) -> str | None:
    """The thumbnail of a file; `version` tells the file from one that was there before or comes later."""
    return _draw(path, side)


def _draw(path: str | Path, side: int) -> str | None:
    try:
        small = load_image(str(path))
    except UserError:
        return None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
