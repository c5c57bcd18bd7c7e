"""Shows a DICOM frame as a viewer does.

    grey    stored -> modality LUT or rescale -> VOI LUT or window -> 0 … 255 -> inverted for MONOCHROME1
    colour  RGB, YBR and palettes -> RGB, the upper eight bits

Elements are as `dicom_elements.remove_empty` leaves them. Of several values and several items the first usable one
counts. Source: DICOM PS3.3, C.7.6.3 (pixels), C.7.6.16 (functional groups), C.11.1 (modality LUT), C.11.2 (VOI LUT). H
and W are rows and columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from llavamed_jax.errors import UserError
from llavamed_jax.images.dicom_elements import bits_stored, called, first_number, items, numbers, text, values, wrong

if TYPE_CHECKING:
    from pydicom import Dataset

GREY = ("MONOCHROME1", "MONOCHROME2")
COLOR = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
PALETTE = "PALETTE COLOR"


def render(stored: np.ndarray, header: Dataset, index: int, name: str,
           window: tuple[float, float] | None = None) -> Image.Image:
    """Converts the stored values of a frame to an image of mode L or RGB.

    Args:
      stored: [H,W], or [H,W,3] with YBR converted to RGB.
      header: the file's header.
      index: of the frame, from 0.
      name: the image's name in errors.
      window: centre and width to show instead of the file's table or window, or None.

    Returns:
      The image.

    Raises:
      UserError: values or elements cannot be shown, or a window is given that cannot be applied.
    """
    interpretation = text(header, "PhotometricInterpretation", name)
    if interpretation in GREY:
        shown = _grey(stored, header, index, name, window)
        return Image.fromarray(255 - shown if interpretation == "MONOCHROME1" else shown)
    if window is not None:
        raise UserError(f"{name} is in colour; a grey image was expected, because windows apply to grey only")
    if interpretation == PALETTE:
        stored, bits = _apply_palette(stored, header, name)
    else:
        bits = _color_bits(stored, bits_stored(header, name))
    if stored.ndim != 3 or stored.dtype.kind != "u":
        raise UserError(f"{name} has {interpretation} with signed values or another number of samples; three unsigned "
                        "samples per pixel were expected")
    return Image.fromarray((stored[..., :3] >> max(0, bits - 8)).astype(np.uint8))


def _color_bits(values: np.ndarray, stated: int) -> int:
    """Returns the bits of a colour, at least as many as the highest value needs.

    These are the stated bits, or eight if the stated bits only repeat the width of the samples, as for other 16-bit
    files (`depth.py`): 12 bits in 16 are not black.
    """
    return max(stated if stated < 8 * values.dtype.itemsize else 8, int(values.max(initial=0)).bit_length())


def _grey(stored: np.ndarray, header: Dataset, index: int, name: str,
          window: tuple[float, float] | None) -> np.ndarray:
    """Converts stored values [H,W] as MONOCHROME2 shows them to uint8 [H,W]."""
    if stored.ndim != 2:
        raise UserError(f"{name} is grey but has {stored.shape[-1]} samples per pixel; one was expected")
    padding = _is_padding(stored, header, name)
    result = _modality(stored, header, index, name)
    if not np.isfinite(result[~padding]).all():
        raise UserError(f"{name} has pixel values that are NaN or infinite; finite values were expected")
    result = np.where(np.isfinite(result), result, -np.inf)  # padding that is NaN is shown black
    bits = bits_stored(header, name)
    if window is not None:
        voi = _chosen(window, header, index, name)
    else:
        voi = _voi(header, index, name, is_signed=stored.dtype.kind == "i" or bool((result < 0).any()))
    if voi is not None:
        shown = voi.apply(result)
    elif stored.dtype.kind == "u" and bits <= 8 and np.array_equal(result, stored):
        shown = result / (2**bits - 1)
    else:
        low, high = result[~padding].min(), result[~padding].max()
        shown = np.clip((result - low) / ((high - low) or 1), 0, 1)
    return np.rint(np.clip(shown, 0, 1) * 255).astype(np.uint8)


# ---- modality


def _modality(stored: np.ndarray, header: Dataset, index: int, name: str) -> np.ndarray:
    """Converts stored values to the modality's own (for example Hounsfield units), float64 of the same shape."""
    table = _table(items(header, "ModalityLUTSequence"), name, is_signed=stored.dtype.kind == "i")
    if table is not None and stored.dtype.kind != "f":
        return table.look_up(stored).astype(np.float64)
    slope, intercept = _rescale(header, index, name)
    with np.errstate(over="ignore", invalid="ignore"):
        return stored.astype(np.float64) * slope + intercept


def _rescale(header: Dataset, index: int, name: str) -> tuple[float, float]:
    """Returns slope and intercept.

    If only one of the two is absent, it leaves values unchanged. With a slope of 0, which would make all values equal,
    viewers ignore both.
    """
    for ds in (*_group_items(header, index, "PixelValueTransformationSequence"), header):
        slope, intercept = first_number(ds, "RescaleSlope", name), first_number(ds, "RescaleIntercept", name)
        for keyword, value in (("RescaleSlope", slope), ("RescaleIntercept", intercept)):
            if value is not None and not math.isfinite(value):
                raise wrong(name, keyword, value, "a finite number")
        if slope == 0:
            return 1.0, 0.0
        if slope is not None or intercept is not None:
            return 1.0 if slope is None else slope, intercept or 0.0
    return 1.0, 0.0


def _group_items(header: Dataset, index: int, keyword: str) -> list[Dataset]:
    """Returns the items of a functional group of an enhanced file: a frame's own before those of all frames."""
    own = items(header, "PerFrameFunctionalGroupsSequence")[index:index + 1]
    return [item for group in (*own, *items(header, "SharedFunctionalGroupsSequence")[:1])
            for item in items(group, keyword)]


# ---- values of interest (VOI)


@dataclass(frozen=True)
class _Window:
    """A window of values.

    Attributes:
      center: the middle of the window.
      width: above 0.
      function: LINEAR, LINEAR_EXACT or SIGMOID, between the window's ends.
    """

    center: float
    width: float
    function: str

    def apply(self, x: np.ndarray) -> np.ndarray:
        """Maps values [H,W] to 0 (black) … 1 (white)."""
        if self.function == "SIGMOID":
            return 1 / (1 + np.exp(np.clip(-4 * (x - self.center) / self.width, -700, 700)))
        center, width = (self.center - 0.5, self.width - 1) if self.function == "LINEAR" else (self.center, self.width)
        return (x > center).astype(np.float64) if width == 0 else np.clip((x - center) / width + 0.5, 0, 1)


@dataclass(frozen=True)
class _Table:
    """A lookup table.

    Attributes:
      first: the value of `entries[0]`, which also holds for all values below; the last entry holds for all values
        above.
      entries: [N], whole numbers.
      bits: bits of an entry.
    """

    first: int
    entries: np.ndarray
    bits: int

    def look_up(self, x: np.ndarray) -> np.ndarray:
        place = np.clip(np.rint(np.nan_to_num(x.astype(np.float64))) - self.first, 0, len(self.entries) - 1)
        return self.entries[place.astype(np.int64)]

    def apply(self, x: np.ndarray) -> np.ndarray:
        return self.look_up(x) / (2**self.bits - 1)


def _voi(header: Dataset, index: int, name: str, is_signed: bool) -> _Window | _Table | None:
    """Returns the table or window of the frame, of all frames or of the file, in this order; None without one."""
    for ds in (*_group_items(header, index, "FrameVOILUTSequence"), header):
        found = _table(items(ds, "VOILUTSequence"), name, is_signed) or _window(ds, name)
        if found is not None:
            return found
    return None


def windows_of(header: Dataset, index: int, name: str) -> list[tuple[str, float, float]]:
    """Returns the windows of a frame, else those of the file: name (may be empty), centre and width.

    Args:
      header: the file's header.
      index: of the frame, from 0.
      name: the image's name in errors.

    Returns:
      The usable windows.

    Raises:
      UserError: an element is damaged.
    """
    for ds in (*_group_items(header, index, "FrameVOILUTSequence"), header):
        found = _pairs(ds, name)
        if found:
            names = [str(value or "").strip() for value in values(ds, "WindowCenterWidthExplanation", name)]
            return [(names[i] if i < len(names) else "", center, width) for i, center, width in found]
    return []


def _chosen(window: tuple[float, float], header: Dataset, index: int, name: str) -> _Window:
    """Returns a viewer's window, between whose ends the file's own function holds."""
    center, width = window
    if not (math.isfinite(center) and 0 < width < math.inf):
        raise UserError(f"{name} cannot be shown with the window centre {center:g} and width {width:g}; a number and a "
                        "width above 0 were expected")
    places = [ds for ds in (*_group_items(header, index, "FrameVOILUTSequence"), header) if _pairs(ds, name)]
    return _Window(center, width, _function((places or [header])[0], width, name))


def _pairs(ds: Dataset, name: str) -> list[tuple[int, float, float]]:
    """Returns place, centre and width of each window whose width is a number above 0."""
    centers, widths = (numbers(ds, keyword, name) for keyword in ("WindowCenter", "WindowWidth"))
    return [(i, center, width) for i, (center, width) in enumerate(zip(centers, widths))
            if center is not None and width is not None and math.isfinite(center) and 0 < width < math.inf]


def _window(ds: Dataset, name: str) -> _Window | None:
    """Returns the first usable centre and width; None without one.

    A width that is not a number above 0 makes no window. A width between 0 and 1, which LINEAR does not allow
    (parametric maps of small values), is read as LINEAR_EXACT.
    """
    for _, center, width in _pairs(ds, name)[:1]:
        return _Window(center, width, _function(ds, width, name))
    return None


def _function(ds: Dataset, width: float, name: str) -> str:
    function = text(ds, "VOILUTFunction", name) or "LINEAR"
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        raise wrong(name, "VOILUTFunction", function, "LINEAR, LINEAR_EXACT or SIGMOID")
    return "LINEAR_EXACT" if function == "LINEAR" and width < 1 else function


def _table(sequence: list[Dataset], name: str, is_signed: bool) -> _Table | None:
    """Returns the first item that has a descriptor and data. `is_signed` says whether values below 0 are looked up."""
    for item in sequence:
        descriptor = _words(item, "LUTDescriptor", name)
        data = item.get("LUTData") if descriptor else None
        if data is None:
            continue
        if len(descriptor) != 3:
            raise wrong(name, "LUTDescriptor", descriptor, "three numbers")
        count, first, bits = descriptor[0] % 65536 or 65536, descriptor[1], descriptor[2]
        entries = _entries(item, data, count, name)
        bits = max(bits if 0 < bits <= 16 else 0, int(entries.max()).bit_length(), 1)
        return _Table(first - 65536 if is_signed and first >= 32768 else first, entries, bits)
    return None


def _entries(item: Dataset, data: object, count: int, name: str, keyword: str = "LUTData") -> np.ndarray:
    """Returns the entries of a table: words, or bytes packed two to a word."""
    if isinstance(data, bytes):
        is_little = item.original_encoding[1] is not False
        entries = np.frombuffer(data[: len(data) // 2 * 2], "<u2" if is_little else ">u2")
    else:
        entries = np.array(_words(item, keyword, name), np.int64).astype(np.uint16)
    if len(entries) < count and 2 * len(entries) >= count:
        entries = entries.astype("<u2").view(np.uint8)
    if len(entries) < count:
        raise UserError(f"{name} has {len(entries)} entries in {called(keyword)}; {count} were expected, as its "
                        "descriptor says")
    return entries[:count].astype(np.int64)


def _words(ds: Dataset, keyword: str, name: str) -> list[int]:
    """Returns the whole numbers of an element whose representation (US, SS, OW) may be unknown."""
    found = values(ds, keyword, name)
    if len(found) == 1 and isinstance(found[0], bytes):
        return np.frombuffer(found[0][: len(found[0]) // 2 * 2], "<u2").tolist()
    try:
        return [int(value) for value in found]
    except (TypeError, ValueError):
        raise wrong(name, keyword, found, "whole numbers") from None


# ---- padding and palettes


def _is_padding(stored: np.ndarray, header: Dataset, name: str) -> np.ndarray:
    """Returns where a frame [H,W] has the padding value; nowhere if all of its values are padding."""
    prefix = {"float32": "Float", "float64": "DoubleFloat"}.get(stored.dtype.name, "")
    first, last = (first_number(header, f"{prefix}PixelPadding{end}", name) for end in ("Value", "RangeLimit"))
    if first is None:
        return np.zeros(stored.shape, bool)
    if math.isnan(first):
        padding = np.isnan(stored)
    else:
        ends = [first, first if last is None or math.isnan(last) else last]
        # Padding of signed values may be written as US, and the reverse.
        if stored.dtype.kind != "f" and all(map(math.isfinite, ends)):
            ends = np.array([int(end) for end in ends]).astype(stored.dtype).tolist()
        padding = (stored >= min(ends)) & (stored <= max(ends))
    return padding & ~padding.all()


def _apply_palette(stored: np.ndarray, header: Dataset, name: str) -> tuple[np.ndarray, int]:
    """Maps indices [H,W] to colours [H,W,3], and returns the bits of a colour in the whole table."""
    keyword = "RedPaletteColorLookupTableDescriptor"
    descriptor = _words(header, keyword, name)
    if len(descriptor) != 3:
        raise wrong(name, keyword, descriptor or None, "three numbers")
    count, first, bits = descriptor[0] % 65536 or 65536, descriptor[1], descriptor[2]
    if stored.dtype.kind == "i" and first >= 32768:
        first -= 65536
    colors = _palette(header, count, first, name)
    return colors[np.clip(stored.astype(np.int64) - first, 0, len(colors) - 1)], _color_bits(colors, bits)


def _palette(header: Dataset, count: int, first: int, name: str) -> np.ndarray:
    """Returns the colours of a palette, unsigned [N,3]."""
    from pydicom.pixels import apply_color_lut

    keywords = [f"{color}PaletteColorLookupTableData" for color in ("Red", "Green", "Blue")]
    lacking = [keyword for keyword in keywords if keyword not in header]
    if not lacking:
        return np.stack([_entries(header, header.get(keyword), count, name, keyword) for keyword in keywords],
                        -1).astype(np.uint16)
    if any(f"Segmented{keyword}" not in header for keyword in keywords):
        raise UserError(f"{name} is {PALETTE} without {called(lacking[0])}")
    return apply_color_lut(np.arange(first, first + count), header)[:, :3]
