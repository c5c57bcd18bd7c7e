"""Loads images and preprocesses them for a vision tower.

Images are paths, bytes, data URLs, Pillow images or arrays. Order and rounding are those of transformers'
`CLIPImageProcessorPil` and `LlavaImageProcessorPil`: to RGB, padded to a square or not, resized on uint8, the centre
cut out, then scale, mean and standard deviation in float32, with the checkpoint's settings (`config/images.py`). The
conversion to RGB is the originals' `Image.open(path).convert("RGB")`: transparency is dropped, not blended with a
colour, and an orientation in EXIF is ignored (Pillow applies that of a TIFF). If the original shows white, black or a
negative instead of the image, `images/depth.py` corrects it. H and W are height and width.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from llavamed_jax.config import CLIP_MEAN, CLIP_STD, ImageSettings
from llavamed_jax.errors import UserError
from llavamed_jax.images.depth import of_pillow, open_page
from llavamed_jax.images.dicom import MAX_PIXELS, is_dicom, one_line, read_dicom
from llavamed_jax.utils.paths import is_address

PAD_COLOR = (122, 116, 104)  # int(255 * mean): the originals pad with it
MODES = ("pad", "square")
_CLIPS = ImageSettings()
MAX_ASPECT = 200  # above it, resizing the short edge to the tower's size turns a few kilobytes into gigabytes


class Stored(str):
    """The name of an image whose encoded bytes are at hand, such as one of a shard.

    Args:
      name: the name for errors.
      data: the encoded bytes.
    """

    def __new__(cls, name: str, data: bytes) -> "Stored":
        """Makes the name with its bytes."""
        self = super().__new__(cls, name)
        self.data = data
        return self

    def __getnewargs__(self) -> tuple[str, bytes]:  # for pickle
        return str(self), self.data


def load_image(source, frame: int | None = None) -> Image.Image:
    """Loads an image as RGB.

    Args:
      source: a path, encoded bytes, a `data:` URL, a Pillow image, or a uint8 array [H,W], [H,W,1], [H,W,3] or [H,W,4].
        Files are in a format of Pillow's, or DICOM by content or by suffix (extra `[medical]`, `images/dicom.py`). A
        path may end in `#frame=N`. Grey values of more than eight bits lose as many of their lowest bits as the image's
        highest value has beyond eight, so that 12 bits in a 16-bit file are not black.
      frame: the frame of files that have several (DICOM, GIF, TIFF), counted from 1; None is the first, or the path's.

    Returns:
      An image of mode RGB.

    Raises:
      UserError: the file does not exist, is not an image or is damaged, has no such frame, or an array has another
        shape or dtype.
    """
    if frame is not None and (not isinstance(frame, int) or frame < 1):
        raise UserError(f"the frame is {frame!r}; a whole number of at least 1 was expected")
    if isinstance(source, (Image.Image, np.ndarray)):
        if frame not in (None, 1):
            raise UserError(f"the image is a {type(source).__name__}, which has one frame; there is no frame {frame}")
        return _from_array(source) if isinstance(source, np.ndarray) else _from_pillow(source)
    if isinstance(source, Stored):
        return _read(io.BytesIO(source.data), f"the image {source}", frame or 1)
    if isinstance(source, (bytes, bytearray)):
        return _read(io.BytesIO(source), f"the image of {len(source)} bytes", frame or 1)
    if isinstance(source, str) and source[:5].lower() == "data:":
        return _read(io.BytesIO(_data_url(source)), "the image in the data URL", frame or 1)
    if is_address(source):
        raise UserError(f"the image {source[:200]} is a web address; a path, a data URL or an image was expected")
    if not isinstance(source, (str, Path)):
        raise UserError(f"the image is of type {type(source).__name__}; a path, a Pillow image, a uint8 array or bytes "
                        "was expected")
    path, named = split_frame(str(source))
    with _open(path) as file:
        return _read(file, f"the image {path}", frame or named or 1, Path(path).suffix)


def preprocess_uint8(image: Image.Image, size: int, mode: str = "pad", settings: ImageSettings = _CLIPS,
                     color: tuple[int, ...] | None = PAD_COLOR) -> np.ndarray:
    """Preprocesses an image without normalisation: uint8 has a quarter of the bytes to send to a device.

    Args:
      image: the image.
      size: edge of the result in pixels.
      mode: `pad` first pads to a square, with the image at half the difference rounded down (v1.5 drew that pixel at
        random, quirk Q3); `square` does not pad, so that with CLIP's settings the image outside its central square is
        lost.
      settings: how images are resized and cut.
      color: the colour of the padding.

    Returns:
      uint8 [size,size,3].

    Raises:
      UserError: the mode is unknown, the image is too large or too long, or the settings do not make a square of this
        size.
    """
    if mode not in MODES:
        raise UserError(f"the image mode is {mode!r}; {' or '.join(MODES)} was expected")
    image = _from_pillow(image)
    short, long = sorted(image.size)
    keeps_shape = settings.resize is None or len(settings.resize) == 1
    if short < 1 or keeps_shape and long > MAX_ASPECT * short:
        raise UserError(f"the image is {image.width} x {image.height} pixels; an aspect ratio of at most {MAX_ASPECT} "
                        "was expected")
    if mode == "pad" and long * long > MAX_PIXELS:
        raise UserError(f"the image is {image.width} x {image.height} pixels; at most {int(MAX_PIXELS**0.5)} on a side "
                        "were expected, because it is padded to a square")
    if mode == "pad":
        image = pad_to_square(image, color)
    image = _resize(image, size, settings)
    if settings.is_cropped:
        left, top = (image.width - size) // 2, (image.height - size) // 2
        image = image.crop((left, top, left + size, top + size))  # black beyond the image
    if image.size != (size, size):
        raise UserError(f"the checkpoint's image settings resize an image to {image.width} x {image.height} pixels; "
                        f"{size} x {size} were expected")
    return np.asarray(image)


def _resize(image: Image.Image, size: int, settings: ImageSettings) -> Image.Image:
    edges = (size,) if settings.resize is None else settings.resize
    if not edges:
        return image
    height, width = edges if len(edges) == 2 else (int(edges[0] * edge / min(image.size)) for edge in image.size[::-1])
    if width * height > MAX_PIXELS:
        raise UserError(f"the checkpoint's image settings resize an image to {width} x {height} pixels; at most "
                        f"{MAX_PIXELS} pixels were expected")
    return image.resize((width, height), Image.Resampling[settings.resample.upper()])


def normalize(pixels: np.ndarray, mean=CLIP_MEAN, std=CLIP_STD, scale: float = 1 / 255) -> np.ndarray:
    """Normalises pixels: (x * scale - mean) / std in float32.

    Args:
      pixels: uint8 [...,3].
      mean: of the three colours, in units of the scaled values.
      std: standard deviation of the three colours, in the same units.
      scale: the factor for pixels.

    Returns:
      float32 [...,3].
    """
    table = _normalize_table(tuple(mean), tuple(std), scale)
    return table[pixels, np.arange(3)]


@functools.lru_cache(maxsize=8)
def _normalize_table(mean, std, scale) -> np.ndarray:  # [256,3]
    values = (np.arange(256, dtype=np.float64) * scale).astype(np.float32)[:, None]
    return (values - np.float32(mean)) / np.float32(std)


def pad_to_square(image: Image.Image, color=PAD_COLOR) -> Image.Image:
    """Pads an RGB image to a square of its longer edge, with the image in the middle."""
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _open(path: str) -> BinaryIO:
    try:
        # O_NONBLOCK: opening a pipe would otherwise wait for a writer.
        file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
        raise UserError(f"the image {path} is a pipe or a device; a file was expected")
    except FileNotFoundError:
        raise UserError(f"the image {path or repr(path)} does not exist{_beside(path)}") from None
    except IsADirectoryError:
        raise UserError(f"the image {path} is a directory") from None
    except (OSError, ValueError) as error:  # no permission, or a name that is too long or has a null character
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"the image {path[:200]} cannot be opened: {reason}") from error


def _beside(path: str) -> str:
    """Returns a hint if the file exists under a name that differs only in ways in which operating systems differ."""
    stem, suffix = os.path.splitext(path)
    forms = {f"in Unicode's form {form}": unicodedata.normalize(form, path) for form in ("NFC", "NFD")}
    cases = {f"with the suffix {other}": stem + other for other in (suffix.lower(), suffix.upper())}
    for how, other in {**forms, **cases, "with / instead of \\": path.replace("\\", "/")}.items():
        if other != path and os.path.exists(other):
            return f"; it exists {how}"
    return ""


def split_frame(path: str) -> tuple[str, int | None]:
    """Splits a frame number off a path: `scan.dcm#frame=3` -> (`scan.dcm`, 3), unless a file has that very name."""
    match = re.fullmatch(r"(.*)#frame=(\d{1,9})", path, re.DOTALL)
    if match is None or os.path.exists(path):  # Path.exists raises if the name is too long
        return path, None
    if not int(match[2]):
        raise UserError(f"the image {path} names frame 0; a whole number of at least 1 was expected")
    return match[1], int(match[2])


def _read(file: BinaryIO, name: str, frame: int, suffix: str = "") -> Image.Image:
    head = file.read(132)
    file.seek(0)
    if not head:
        raise UserError(f"{name} is empty")
    if is_dicom(head, suffix):
        return read_dicom(file, name, frame).convert("RGB")
    with _refusing(name, frame):
        page = open_page(file, frame)
        if page.image.format == "EPS":  # Pillow would run it with Ghostscript
            raise UserError(f"{name} is PostScript, which is not supported; an image was expected")
        return page.to_rgb(name)


def _from_pillow(image: Image.Image) -> Image.Image:
    with _refusing("the image"):
        return of_pillow(image).to_rgb("the image")  # a lazily opened image is read only here


@contextlib.contextmanager
def _refusing(name: str, frame: int = 1) -> Iterator[None]:
    """Converts Pillow's errors to UserError."""
    try:
        yield
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more pixels than Pillow accepts: {one_line(error)}") from error
    except Exception as error:  # on damaged files Pillow's decoders raise nearly anything
        if isinstance(error, EOFError) and frame > 1:
            raise UserError(f"{name} has fewer than {frame} frames") from error
        raise UserError(f"{name} is damaged: {one_line(error)}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image or 0 in array.shape:
        raise UserError(f"the image is a {array.dtype} array of shape {array.shape}; uint8 [H,W,3] or [H,W] was "
                        "expected")
    return Image.fromarray(array[..., 0] if array.shape[-1] == 1 and array.ndim == 3 else array).convert("RGB")


def _data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise UserError("the data URL of an image begins wrongly; data:image/TYPE;base64, was expected")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"the data URL of an image holds invalid base64: {error}") from error
