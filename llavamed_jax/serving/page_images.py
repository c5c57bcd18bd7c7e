"""Images that a person adds on the page: bytes for the API, a small picture for the browser, and DICOM's choices.

A DICOM file becomes a PNG of the frame and window that the person sees, so that the model gets exactly these pixels.
"""

from __future__ import annotations

import base64
import io
import os
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from llavamed_jax.errors import UserError, short
from llavamed_jax.images.dicom import Description, describe, is_dicom, read_dicom, size_of
from llavamed_jax.serving import images
from llavamed_jax.serving.errors import invalid
from llavamed_jax.serving.limits import Limits

_PREVIEW = 768  # longer edge of what the browser shows, in pixels
AS_FILE, OWN = "As the file says", "Own values"
# Centre and width in Hounsfield units, which only CT has.
_CT = {"CT soft tissue": (40.0, 400.0), "CT lung": (-600.0, 1500.0), "CT bone": (400.0, 1800.0),
       "CT brain": (40.0, 80.0)}


@dataclass(frozen=True)
class Choice:
    """What a person chose for a DICOM file: the frame from 1, and centre and width; None is the file's own window."""

    frame: int = 1
    window: tuple[float, float] | None = None


@dataclass(frozen=True)
class Picture:
    """An image of a question.

    Attributes:
      url: the `data:` URL that the API gets.
      preview: the `data:` URL that the browser shows.
      name: what a screen reader says.
    """

    url: str
    preview: str
    name: str


def picture(path: str, limits: Limits, choice: Choice = Choice()) -> Picture:
    """Reads a file as the API would read its bytes.

    Args:
      path: the uploaded file.
      limits: the server's limits.
      choice: the frame and window, if the file is DICOM.

    Returns:
      The picture.

    Raises:
      ApiError: the file is gone, is not an image, is damaged, or is above a limit.
    """
    name, data, shown = short(Path(path).name, 60), _read(path, limits), Path(path).name
    if not _is_dicom(path, data):
        image = images.decode(data, name, limits)
        return Picture(_url(data, "image"), _preview(image), shown)
    try:
        _check_size(data, name, limits)
        image = read_dicom(io.BytesIO(data), name, choice.frame, choice.window)
    except UserError as error:
        raise invalid(str(error), code="invalid_image") from None
    file = io.BytesIO()
    image.save(file, "PNG")
    shown = shown if choice.frame == 1 else f"{shown}, frame {choice.frame}"
    return Picture(_url(file.getvalue(), "image/png"), _preview(image.convert("RGB")), shown)


def choices(path: str, limits: Limits, frame: int = 1) -> Description | None:
    """Returns what may be chosen for a DICOM file; None for another image. Raises ApiError as `picture` does."""
    name, data = short(Path(path).name, 60), _read(path, limits)
    if not _is_dicom(path, data):
        return None
    try:
        return describe(io.BytesIO(data), name, frame)
    except UserError as error:
        raise invalid(str(error), code="invalid_image") from None


def windows(described: Description) -> dict[str, tuple[float, float] | None]:
    """Returns the windows to choose from by the names that a person sees."""
    found: dict[str, tuple[float, float] | None] = {AS_FILE: None}
    for i, (name, center, width) in enumerate(described.windows, 1):
        found[f"{name or f'Window {i}'} ({center:g} / {width:g})"] = (center, width)
    if described.modality == "CT":
        found |= {f"{name} ({center:g} / {width:g})": (center, width) for name, (center, width) in _CT.items()}
    return found


def _read(path: str, limits: Limits) -> bytes:
    name = short(Path(path).name, 60)
    try:
        if os.path.getsize(path) > limits.max_image_bytes:
            raise images.too_many_bytes(name, limits)
        return Path(path).read_bytes()
    except OSError:
        raise invalid(f"{name} is no longer on the server, which keeps uploads for a short time; add it again",
                      code="invalid_image") from None


def _is_dicom(path: str, data: bytes) -> bool:
    return is_dicom(data[:132], Path(path).suffix)


def _check_size(data: bytes, name: str, limits: Limits) -> None:
    width, height = size_of(io.BytesIO(data), name)
    if width * height > limits.max_image_pixels:
        raise invalid(f"{name} has {width} x {height} pixels; at most {limits.max_image_pixels} were expected",
                      code="image_too_large")


def _preview(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((_PREVIEW, _PREVIEW))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return _url(file.getvalue(), "image/jpeg")


def _url(data: bytes, label: str) -> str:
    return f"data:{label};base64,{base64.b64encode(data).decode()}"
