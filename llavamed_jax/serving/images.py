"""Turns the images of a request into pixels within the limits: bytes, then the size in the header, then pixels."""

from __future__ import annotations

import base64
import binascii
import functools
import io
import re
import warnings
from urllib.parse import unquote_to_bytes

from PIL import Image

from llavamed_jax.errors import UserError, count_of, short
from llavamed_jax.images.dicom import is_dicom
from llavamed_jax.images.load import load_image
from llavamed_jax.serving.errors import invalid
from llavamed_jax.serving.limits import Limits

# Pillow knows formats, PostScript among them, that no client sends and that only widen what a stranger can reach.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM")


def data_of(url: str, where: str, limits: Limits) -> bytes:
    """Decodes a `data:` URL.

    The label is ignored, since the bytes say what they are. base64 may be urlsafe, unpadded or broken into lines.

    Args:
      url: the URL.
      where: the image's name in errors.
      limits: the server's limits.

    Returns:
      The bytes.

    Raises:
      ApiError: the URL is not one of bytes, or there are too many of them.
    """
    header, comma, body = url.partition(",")
    if not comma:
        raise invalid(f"{where} is the data URL {short(header, 40)} without a comma; data:image/TYPE;base64, was "
                      "expected", code="invalid_image_url")
    if not body.isascii():
        raise invalid(f"{where} is a data URL with characters that are not ASCII; base64 was expected",
                      code="invalid_image_url")
    if not re.search(r";\s*base64\s*$", header, re.IGNORECASE):
        data = unquote_to_bytes(body)
    else:
        if len(body) > limits.max_image_bytes * 3 // 2 + 1024:
            raise too_many_bytes(where, limits)
        body = re.sub(r"\s+", "", unquote_to_bytes(body).decode("latin-1") if "%" in body else body)
        body = body.rstrip("=").replace("-", "+").replace("_", "/")
        try:
            data = base64.b64decode(body + "=" * (-len(body) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise invalid(f"{where} holds invalid base64: {error}", code="invalid_image_url") from None
    if len(data) > limits.max_image_bytes:
        raise too_many_bytes(where, limits)
    return data


def too_many_bytes(where: str, limits: Limits):
    """Returns the error of an image with too many bytes."""
    return invalid(f"{where} has too many bytes; at most {limits.max_image_bytes} were expected",
                   code="image_too_large")


def pixels_of(data: bytes, where: str, limits: Limits) -> int:
    """Returns the number of pixels of an image, by its header. Raises ApiError as `decode`."""
    try:
        width, height = _size(data, where)
    except UserError as error:
        raise invalid(f"{where}: {error}", code="invalid_image") from None
    if not 0 < width * height <= limits.max_image_pixels:
        raise invalid(f"{where} has {width} x {height} pixels; at most {limits.max_image_pixels} were expected",
                      code="image_too_large")
    return width * height


def decode(data: bytes, where: str, limits: Limits) -> Image.Image:
    """Decodes an image, after its header has shown that its size is within the limit.

    Args:
      data: the encoded image; DICOM too, of which the first frame is shown.
      where: the image's name in errors.
      limits: the server's limits.

    Returns:
      An image of mode RGB.

    Raises:
      ApiError: the bytes are no image, are damaged, or have too many pixels.
    """
    pixels_of(data, where, limits)
    try:
        return load_image(data)
    except UserError as error:
        raise invalid(f"{where}: {error}", code="invalid_image") from None


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _size(data: bytes, where: str) -> tuple[int, int]:
    """Reads width and height from the header of an image."""
    if is_dicom(data[:132], ""):
        from llavamed_jax.images.dicom import size_of

        return size_of(io.BytesIO(data))
    try:
        with warnings.catch_warnings():  # of Pillow's own limit: ours is checked next
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                return image.size
    except Image.DecompressionBombError:
        raise invalid(f"{where} has more pixels than Pillow opens", code="image_too_large") from None
    except Image.UnidentifiedImageError:
        raise UserError(f"the {count_of(len(data), 'byte')} are not an image in a known format: PNG, JPEG, WebP, GIF, "
                        "BMP, TIFF, JPEG 2000, AVIF, PPM or DICOM was expected") from None
    except Exception as error:  # on damaged files Pillow's plugins raise nearly anything
        raise UserError(f"the image is damaged: {type(error).__name__}") from None
