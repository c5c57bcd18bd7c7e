"""Images: from a path, bytes, a data URL, Pillow or an array to the pixels that a CLIP tower takes (spec 3.3).

Order and rounding are those of transformers' `CLIPImageProcessorPil`: to RGB (transparency over white), shortest edge to
the size (bicubic, on uint8), centre crop, then 1/255, mean and standard deviation in float32. H and W are height and width.
"""

from __future__ import annotations

import base64
import binascii
import functools
import io
from pathlib import Path

import numpy as np
from PIL import Image

from llavamed_jax.config import CLIP_MEAN, CLIP_STD
from llavamed_jax.errors import UserError

PAD_COLOR = (122, 116, 104)  # int(255 * mean): the originals pad with it
MODES = ("pad", "square")
MAX_ASPECT = 200  # beyond it, resizing the short edge to the tower's size makes gigabytes of a few kilobytes


def load_image(source, frame: int | None = None) -> Image.Image:
    """An RGB image.

    Args:
      source: a path, encoded bytes, a `data:` URL, a Pillow image, or a uint8 array [H,W], [H,W,1], [H,W,3] or [H,W,4].
        16-bit grey images keep their upper eight bits.
    Raises:
      UserError: nothing there, not an image, a damaged one, or an array of another kind.
    """
    if isinstance(source, Image.Image):
        return _to_rgb(source, "the image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, (bytes, bytearray)):
        return _decode(io.BytesIO(source), f"the image of {len(source)} bytes")
    if isinstance(source, str) and source.startswith("data:"):
        return _decode(io.BytesIO(_data_url(source)), "the image in the data URL")
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        raise UserError(f"the image {source} is a web address; a file, a data URL or an image was expected")
    if not isinstance(source, (str, Path)):
        raise UserError(f"an image is a {type(source).__name__}; a path, a Pillow image, a uint8 array or bytes was expected")
    if not Path(source).is_file():
        raise UserError(f"the image {source} {'is a directory' if Path(source).is_dir() else 'does not exist'}")
    return _decode(source, f"the image {source}")


def preprocess(image: Image.Image, size: int, mode: str = "pad", mean=CLIP_MEAN, std=CLIP_STD) -> np.ndarray:
    """Pixels for the tower: float32 [size,size,3]. See `preprocess_uint8` for `mode`."""
    return normalize(preprocess_uint8(image, size, mode), mean, std)


def preprocess_uint8(image: Image.Image, size: int, mode: str = "pad") -> np.ndarray:
    """The same before normalisation, uint8 [size,size,3]: a quarter of the bytes on the way to a device.

    `square` cuts the centre out (what lies outside is lost); `pad` first pads to a square in the mean colour, the image
    at half the difference rounded down (v1.5 drew that pixel at random, quirk Q3).
    """
    if mode not in MODES:
        raise UserError(f"the image mode is {mode!r}; {' or '.join(MODES)} was expected")
    image = _to_rgb(image, "the image")
    short, long = sorted(image.size)
    if short < 1 or long > MAX_ASPECT * short:
        raise UserError(f"the image is {image.width} x {image.height} pixels; an aspect ratio of at most {MAX_ASPECT} was expected")
    if mode == "pad":
        image = pad_to_square(image)
    width, height = (int(size * edge / min(image.size)) for edge in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))


def normalize(pixels: np.ndarray, mean=CLIP_MEAN, std=CLIP_STD) -> np.ndarray:
    """uint8 [...,3] to float32 [...,3]: (x / 255 - mean) / std."""
    table = _normalize_table(tuple(mean), tuple(std))
    return table[pixels, np.arange(3)]


@functools.lru_cache(maxsize=8)
def _normalize_table(mean, std) -> np.ndarray:  # [256,3]
    values = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)[:, None]
    return (values - np.float32(mean)) / np.float32(std)


def pad_to_square(image: Image.Image, color=PAD_COLOR) -> Image.Image:
    side = max(image.size)
    if image.size == (side, side):
        return image
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _decode(file, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            image.load()
            return _to_rgb(image, name)
    except UserError:
        raise
    except Image.UnidentifiedImageError as error:
        raise UserError(f"{name} is not an image that Pillow can read") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{name} has more pixels than Pillow accepts: {error}") from error
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # Pillow's decoders raise all of these
        raise UserError(f"{name} is damaged: {error}") from error


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode == "RGB" and image.info.get("transparency") is None:
        return image
    if image.mode.startswith("I;16") or image.mode == "I":
        values = np.asarray(image).astype(np.int64)
        if values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise UserError(f"{name} has grey values beyond 16 bits; an 8-bit or 16-bit image was expected")
        return Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels; an 8-bit or 16-bit image was expected")
    if "A" in image.getbands() or image.info.get("transparency") is not None:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _from_array(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image or 0 in array.shape:
        raise UserError(f"an image is a {array.dtype} array of shape {array.shape}; uint8 [H,W,3] or [H,W] was expected")
    return _to_rgb(Image.fromarray(array[..., 0] if array.shape[-1] == 1 and array.ndim == 3 else array), "the image")


def _data_url(url: str) -> bytes:
    header, comma, body = url.partition(",")
    if not comma or not header.endswith(";base64"):
        raise UserError("an image's data URL does not begin with data:image/TYPE;base64, as was expected")
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise UserError(f"an image's data URL holds no base64: {error}") from error
