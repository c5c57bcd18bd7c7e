"""Reads pages of image files whose samples have more than eight bits, are signed, or are white at 0.

Pillow shows colour and grey with alpha of 16 bits by their upper eight bits, so that 12 bits in a 16-bit file are
black; it inverts TIFF in which 0 is white up to eight bits only, and does not read most of the others; and it swaps the
bytes of some compressed TIFF. Here a page is read as Pillow describes it in `Image.tile` (PIL/TiffImagePlugin.py,
OPEN_INFO), with another raw mode if Pillow's is wrong. Source: TIFF 6.0 (PhotometricInterpretation, SampleFormat), PNG
12.4. H and W are height and width.
"""

from __future__ import annotations

import io
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from llavamed_jax.errors import UserError

_BITS, _PHOTOMETRIC, _PLANAR, _FORMAT = 258, 262, 284, 339  # tags of TIFF
_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS_OF_PNG = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND", b"acTL", b"fcTL", b"fdAT")  # the last three: animations
_PLAIN = "RGB, of 65535"  # the name that `_raw_mode` gives 16-bit PPM


@dataclass
class Page:
    """One page of a file, not loaded yet.

    Attributes:
      image: the Pillow image, at this page.
      content: returns the file's bytes.
      frame: the page's number, counted from 1.
      is_negative: whether 0 is white and Pillow does not show it so.
    """

    image: Image.Image
    content: Callable[[], bytes]
    frame: int
    is_negative: bool

    def to_rgb(self, name: str) -> Image.Image:
        """Converts the page to 8-bit RGB; alpha is dropped.

        Samples of more than eight bits lose as many of their lowest bits as the page's highest value has beyond eight.

        Args:
          name: the image's name in errors.

        Returns:
          An image of mode RGB.

        Raises:
          UserError: values are negative or floating-point, or a decoder is not installed.
        """
        if self.image.format == "JPEG2000" and getattr(self.image, "tile", None):
            values = _jpeg_2000(self.content(), self.image.size, name)
            if values is not None:
                return from_integers(values, name)
        self.is_negative |= _mend_raw_modes(self.image)
        raw_modes = _raw_modes(self.image)
        self.image.load()
        values = _grey(self.image)
        if values is not None:
            return from_integers(values, name, self.is_negative)
        shown = as_pillow_converts(self.image, name)
        values = self._wide_colors(shown, raw_modes)
        if values is not None:
            return from_integers(values, name)
        return ImageOps.invert(shown) if self.is_negative else shown

    def _wide_colors(self, shown: Image.Image, raw_modes: list[str | None]) -> np.ndarray | None:
        """Returns 16-bit colours [H,W,3] or grey [H,W] if the image as shown stays below 128; otherwise None."""
        low = [_other_bytes(mode) for mode in raw_modes]
        is_plain = self.image.format == "PPM" and raw_modes == [_PLAIN]
        if not (is_plain or low and all(low)) or np.asarray(shown).max() >= 128:
            return None
        content = self.content()
        if is_plain:  # read again as 16-bit grey of three times the width
            magic, start = {b"P6": b"P5", b"P3": b"P2"}[content[:2]], self._offset
            header = b"%s %d %d 65535\n" % (magic, 3 * shown.width, shown.height)
            grey = np.asarray(Image.open(io.BytesIO(header + content[start:])))
            return grey.reshape(shown.height, shown.width, 3)
        again = seek(Image.open(io.BytesIO(content)), self.frame)
        is_grey = raw_modes == ["LA;16B"]
        again.tile = [_with_raw_mode(tile, mode) for tile, mode in zip(again.tile, low)]
        again.load()
        lower = np.asarray(again).astype(np.uint16)
        return (lower[..., 0] << 8 | lower[..., 1] if is_grey
                else np.asarray(shown).astype(np.uint16) << 8 | lower[..., :3])

    def __post_init__(self):
        tiles = getattr(self.image, "tile", None)
        self._offset = tiles[0].offset if tiles else 0


def open_page(file: BinaryIO, frame: int = 1) -> Page:
    """Opens a page that Pillow reads, or would read if 0 were black in it.

    Args:
      file: the whole file.
      frame: the page's number, counted from 1.

    Returns:
      The page.

    Raises:
      UnidentifiedImageError: Pillow cannot read the file; its decoders may also raise other errors.
      EOFError: there is no such page.
    """
    def content() -> bytes:
        file.seek(0)
        return file.read()

    start = file.read(8)
    file.seek(0)
    if start == _PNG:
        file = io.BytesIO(bare_png(file.read()))
    try:
        image = seek(Image.open(file), frame)
        return Page(image, content, frame, is_white_zero(image))
    except (UnidentifiedImageError, SyntaxError):  # SyntaxError on a page that is not the first
        patched = bytearray(content())
        negative = _negative_pages(bytes(patched))
        if not negative:
            raise
    for place in negative.values():
        patched[place:place + 2] = struct.pack(_order(patched) + "H", 1)
    return Page(seek(Image.open(io.BytesIO(patched)), frame), lambda: bytes(patched), frame, frame - 1 in negative)


def bare_png(content: bytes) -> bytes:
    """Removes the chunks of a PNG file that do not describe its pixels: texts, colour profiles, EXIF.

    Pillow refuses a file if one of these chunks is damaged or large (a mebibyte of text or profile).

    Args:
      content: the file.

    Returns:
      The file without these chunks.
    """
    kept, place = [content[:8]], 8
    while place + 12 <= len(content):
        end = place + 12 + int.from_bytes(content[place:place + 4], "big")  # length, name, data, checksum
        name = content[place + 4:place + 8]
        is_optional = name.isalpha() and name[:1].islower()
        if end > len(content) or not is_optional or name in _PIXELS_OF_PNG:
            kept.append(content[place:end])
        place = end
    return b"".join(kept)


def of_pillow(image: Image.Image) -> Page:
    """Returns the page that a Pillow image shows. An image that is not loaded yet is read as from its file."""
    data = b""
    is_asked = image.format == "JPEG2000" or any(_other_bytes(mode) or mode == _PLAIN for mode in _raw_modes(image))
    if isinstance(image, ImageFile.ImageFile) and image.tile and is_asked:
        place = image.fp.tell()
        image.fp.seek(0)
        data = image.fp.read()
        image.fp.seek(place)
    return Page(image, lambda: data, image.tell() + 1, is_white_zero(image))


def seek(image: Image.Image, frame: int) -> Image.Image:
    """Moves an image to a frame, counted from 1, and returns the image."""
    image.seek(frame - 1)
    return image


def is_white_zero(image: Image.Image) -> bool:
    """Returns whether 0 is white in values that Pillow does not invert."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    return image.format == "TIFF" and image.mode.startswith("I") and tags.get(_PHOTOMETRIC, 0) == 0


def as_pillow_converts(image: Image.Image, name: str) -> Image.Image:
    """Converts an image of an eight-bit mode to RGB as the originals do. Raises UserError for floating-point pixels."""
    if image.mode == "F":
        raise UserError(f"{name} has floating-point pixels; whole numbers were expected")
    if image.mode in ("La", "RGBa"):  # only this conversion divides by alpha again
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    return image if image.mode == "RGB" else image.convert("RGB")


def from_integers(values: np.ndarray, name: str, is_negative: bool = False) -> Image.Image:
    """Scales whole numbers by a power of two so that the highest fits eight bits; inverts them if 0 is white.

    Args:
      values: integers of any width, [H,W] or [H,W,3].
      name: the image's name in errors.
      is_negative: whether 0 is white.

    Returns:
      An image of mode RGB.

    Raises:
      UserError: a value is negative.
    """
    if values.min(initial=0) < 0:
        raise UserError(f"{name} has grey values below 0; 0 and more were expected")
    excess = max(0, int(values.max(initial=0)).bit_length() - 8)
    shown = (values >> excess).astype(np.uint8)
    return Image.fromarray(255 - shown if is_negative else shown).convert("RGB")


def _grey(image: Image.Image) -> np.ndarray | None:
    """Returns the values [H,W] of a grey image with more than eight bits or a sign; None for other images."""
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    is_signed = tuple(tags.get(_FORMAT, (1,)))[:1] == (2,)
    if image.mode == "L" and is_signed:
        return np.asarray(image).view(np.int8)
    if not image.mode.startswith("I"):  # I;16 in its byte orders, and I of 32 bits
        return None
    values = np.asarray(image)
    if image.mode == "I" and tags and not is_signed:  # Pillow has no unsigned values of 32 bits
        values = values.view(np.uint32)
    return values


def _jpeg_2000(content: bytes, size: tuple[int, int], name: str) -> np.ndarray | None:
    """Decodes JPEG 2000 with several components of more than eight bits; returns None for other images.

    The result is colours [H,W,3] or grey [H,W], scaled to 16 bits. Pillow rounds such components up, and the brightest
    to 256, which is 0: white would be black.
    """
    place = content.find(b"\xff\x4f\xff\x51")  # SOC and SIZ
    if place < 0 or len(content) < place + 46:
        return None
    right, bottom, left, top, *_, count = struct.unpack_from(">8IH", content, place + 8)
    bits = [(size & 127) + 1 for size in content[place + 42:place + 42 + 3 * count:3]]
    if count == 1 or max(bits, default=0) <= 8:
        return None
    try:
        import openjpeg
    except ImportError:
        raise UserError(f"{name} is JPEG 2000 of {max(bits)} bits per colour, which needs pylibjpeg-openjpeg: "
                        "pip install 'llavamed-jax[medical]'") from None
    kind = openjpeg.get_parameters(content)["colourspace"]
    if (right - left, bottom - top) != size or len({*bits}) > 1 or kind not in ("unspecified", "sRGB", "monochrome"):
        raise UserError(f"{name} is JPEG 2000 of {max(bits)} bits per colour in the colour space {kind}; RGB with the "
                        "same number of bits in each colour was expected")
    values = openjpeg.decode(content).astype(np.int64)
    is_signed = content[place + 42] & 128
    values = (values + is_signed * 2 ** (bits[0] - 1) // 128) << max(0, 16 - bits[0])
    return values[..., 0] if count == 2 else values[..., :3]


# ---- raw modes: how Pillow unpacks the samples of a tile


def _raw_modes(image: Image.Image) -> list[str | None]:
    """Returns the raw mode of each tile that is not loaded yet; None or an empty list if the mode must not be changed.

    It must not be changed for libtiff's planes, which are unpacked one by one, for an animation's later frames, which
    are drawn over earlier ones, and for formats that have decoders of their own.
    """
    if image.format not in ("TIFF", "PNG", "PPM") or image.format == "PNG" and image.tell():
        return []
    is_split = image.format == "TIFF" and image.tag_v2.get(_PLANAR) == 2
    return [None if is_split and tile.codec_name == "libtiff" else _raw_mode(tile)
            for tile in getattr(image, "tile", ())]


def _raw_mode(tile) -> str | None:
    args = tile.args
    if tile.codec_name in ("ppm", "ppm_plain") and isinstance(args, tuple):
        return f"{args[0]}, of {args[1]}"
    mode = args[0] if isinstance(args, tuple) and args else args
    return mode if isinstance(mode, str) else None


def _with_raw_mode(tile, mode: str):
    return tile._replace(args=(mode, *tile.args[1:]) if isinstance(tile.args, tuple) else mode)


def _other_bytes(mode: str | None) -> str | None:
    """Returns the raw mode that unpacks the lower bytes of 16-bit samples if `mode` unpacks the upper bytes."""
    if mode == "LA;16B":
        return "RGBA"  # upper and lower byte of grey, then of alpha
    found = re.fullmatch(r"(RGB[AX]?|[RGBA]);16([LBN])", mode or "")
    if found is None:
        return None
    order = {"little": "L", "big": "B"}[sys.byteorder] if found[2] == "N" else found[2]
    return f"{found[1]};16{'B' if order == 'L' else 'L'}"


def _mend_raw_modes(image: Image.Image) -> bool:
    """Corrects the raw modes of TIFF that are wrong in Pillow; returns whether the image must be inverted.

    libtiff returns words in the machine's byte order, and planes of 16 bits are not planes of 8 bits. An image must be
    inverted if Pillow lacks the raw mode to do so.
    """
    if image.format != "TIFF" or not getattr(image, "tile", None):
        return False
    is_negative = any(_raw_mode(tile) == "L;IR" for tile in image.tile)
    is_split, order = image.tag_v2.get(_PLANAR) == 2, "L" if image.tag_v2.prefix == b"II" else "B"
    image.tile = [tile for tile in image.tile if _raw_mode(tile) != ";"]  # Pillow's mode for a plane beyond RGB
    for i, tile in enumerate(image.tile):
        mode = _raw_mode(tile)
        if tile.codec_name == "libtiff" and mode in ("I;16S", "I;16BS", "I;32S", "I;32BS"):
            image.tile[i] = _with_raw_mode(tile, f"{mode[:4]}NS")
        elif (tile.codec_name == "raw" and is_split and mode in tuple("RGBA")
                and max(image.tag_v2.get(_BITS, (8,))) == 16):
            image.tile[i] = _with_raw_mode(tile, f"{mode};16{order}")
        elif mode == "L;IR":
            image.tile[i] = _with_raw_mode(tile, "L;R")
    return is_negative


# ---- TIFF that Pillow would read if 0 were black in it


def _order(data: bytes | bytearray) -> str:
    return "<" if data[:2] == b"II" else ">"


def _negative_pages(data: bytes) -> dict[int, int]:
    """Finds the pages of a TIFF file in which 0 is white and that Pillow reads only if 0 is black.

    Returns:
      Page, counted from 0 -> the offset of that tag's value in the file.
    """
    if data[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return {}
    try:
        return {page: tags[_PHOTOMETRIC][1] for page, tags in enumerate(_directories(data))
                if _PHOTOMETRIC in tags and tags[_PHOTOMETRIC][0] == 0}
    except struct.error:  # cut off
        return {}


def _directories(data: bytes) -> Iterator[dict[int, tuple[int, int]]]:
    """Yields each directory's tags of one short number: tag -> (value, offset of the value).

    TIFF and BigTIFF are read; BigTIFF has longer numbers of entries and longer offsets.
    """
    order, seen, is_big = _order(data), set(), b"+" in data[2:4]
    number, offset, entry, at = ("Q", "Q", 20, 8) if is_big else ("H", "I", 12, 4)

    def read(kind: str, place: int) -> int:
        return struct.unpack_from(order + kind, data, place)[0]

    start = read(offset, at)
    while start and start not in seen:
        seen.add(start)
        count, first = read(number, start), start + struct.calcsize(number)
        if count * entry > len(data):
            return
        places = range(first, first + count * entry, entry)
        yield {read("H", place): (read("H", place + entry - at), place + entry - at) for place in places
               if read("H", place + 2) == 3 and read(offset, place + 4) == 1}
        start = read(offset, first + count * entry)
