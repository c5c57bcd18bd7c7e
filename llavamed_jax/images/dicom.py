"""Reads DICOM files as 8-bit images.

A frame's stored values are decoded here and shown by `dicom_display` as a viewer does. Files are read by pydicom, which
is in the extra `[medical]` with its decoders. Only the requested frame is decoded. Source: DICOM PS3.3, C.7.6.3
(pixels). H and W are rows and columns.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from llavamed_jax.errors import UserError
from llavamed_jax.images.dicom_deflated import check_deflated
from llavamed_jax.images.dicom_display import COLOR, GREY, PALETTE, render, windows_of
from llavamed_jax.images.dicom_elements import bits_stored, called, remove_empty, text, whole_number

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

SUFFIXES = (".dcm", ".dicom", ".dic")
MAX_PIXELS = 178_956_970  # of a frame: Pillow's limit for decompression bombs
# The array goes through memory: numpy asks a file for its position, which a pipe has only with PYTHONUNBUFFERED. The
# output of libraries goes to stderr.
_APART = """
import io, json, os, sys
out = os.fdopen(os.dup(1), "wb")
os.dup2(2, 1)
import numpy
from pydicom.pixels import pixel_array
array = io.BytesIO()
numpy.save(array, pixel_array(io.BytesIO(sys.stdin.buffer.read()), **json.loads(sys.argv[1])))
out.write(array.getbuffer())
out.close()
"""
_MOST_SECONDS = 300  # limit for decoding a frame in that process
_INSTALL = "pip install 'llavamed-jax[medical]'"
# The elements that are read from a header; all others are skipped.
_PALETTES = [f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue")]
_KEYWORDS = [
    "SOPClassUID", "Modality", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", *(
        f"{kind}PixelPadding{end}" for kind in ("", "Float", "DoubleFloat") for end in ("Value", "RangeLimit")),
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "WindowCenterWidthExplanation", "VOILUTFunction", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
    *(f"{name}Descriptor" for name in _PALETTES), *(f"{name}Data" for name in _PALETTES),
    *(f"Segmented{name}Data" for name in _PALETTES)]
_READ_AGAIN = {0x00280008, 0x7FE00001}  # Number of Frames, Extended Offset Table: pydicom reads them when it decodes
# Errors of Python, numpy and struct on damaged headers. Their messages do not help a user of DICOM.
_PYTHONS = (TypeError, LookupError, ArithmeticError, AssertionError, UnicodeError, struct.error)
_PYTHONS_WORDS = re.compile(r"^'\w+' object |invalid literal|could not convert|NoneType|buffer")


def is_dicom(head: bytes, suffix: str) -> bool:
    """Returns whether a file is DICOM.

    Args:
      head: the first 132 bytes or more; DICOM has `DICM` behind a preamble of 128 bytes.
      suffix: the file's suffix, which decides for old files without a preamble.

    Returns:
      Whether the content or the suffix is DICOM's.
    """
    return head[128:132] == b"DICM" or suffix.lower() in SUFFIXES


def read_dicom(file: BinaryIO, name: str, frame: int = 1, window: tuple[float, float] | None = None) -> Image.Image:
    """Reads one frame as an image of mode L or RGB.

    Of several windows of the file the first is taken. Without a window, unsigned values of at most eight bits are shown
    unchanged; other values are stretched from the frame's lowest to its highest value, padding excluded.

    Args:
      file: the whole DICOM file.
      name: the image's name in errors.
      frame: counted from 1, as in DICOM.
      window: centre and width in the modality's values, instead of the file's own window; None for the file's.

    Returns:
      The image.

    Raises:
      UserError: pydicom or a decoder is not installed, the file has no image or no such frame, the file is damaged, or
        a window is given for an image in colour.
    """
    with _refusing(name):
        header = _read_header(file, name)
        removed = remove_empty(header)
        count = _check(header, name, frame)
        values = _decode(file, header, name, frame - 1, count, is_whole=bool(removed & _READ_AGAIN))
        return render(values, header, frame - 1, name, window)


@dataclass(frozen=True)
class Description:
    """What a DICOM image lets a viewer choose.

    Attributes:
      frames: the number of frames.
      is_grey: whether a window applies.
      modality: such as `CT`; empty if the file does not say.
      windows: the windows of a frame: name (may be empty), centre and width.
    """

    frames: int
    is_grey: bool
    modality: str
    windows: list[tuple[str, float, float]]


def describe(file: BinaryIO, name: str = "the image", frame: int = 1) -> Description:
    """Reads from a DICOM file's header what a viewer may choose. Raises UserError as `read_dicom` does."""
    with _refusing(name):
        header = _read_header(file, name)
        remove_empty(header)
        count = _check(header, name, frame)
        is_grey = text(header, "PhotometricInterpretation", name) in GREY
        return Description(count, is_grey, _printable(text(header, "Modality", name) or ""),
                           windows_of(header, frame - 1, name) if is_grey else [])


def size_of(file: BinaryIO, name: str = "the image") -> tuple[int, int]:
    """Reads the width and height of a DICOM image's frames from its header. Raises UserError as `read_dicom` does."""
    with _refusing(name):
        header = _read_header(file, name)
        _check(header, name, 1)
        return int(header.Columns), int(header.Rows)


@contextlib.contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Raises what goes wrong in the block as UserError: pydicom is not installed, or the file is damaged."""
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise UserError(f"{name} is DICOM, which needs pydicom: {_INSTALL}") from None
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # on damaged files pydicom and its decoders raise nearly anything
        raise UserError(f"{name} cannot be read as a DICOM image: {_in_dicoms_words(error)}") from error


def _in_dicoms_words(error: Exception) -> str:
    """Returns pydicom's message, which names elements; explains the errors of Python and numpy."""
    said = one_line(error)
    if "cannot reshape" in said:
        return "its pixel data are shorter than its rows, columns and samples say"
    if "could not broadcast" in said:
        return "its compressed pixel data decode to another size than its rows, columns and samples say"
    if isinstance(error, _PYTHONS) or isinstance(error, (AttributeError, ValueError)) and _PYTHONS_WORDS.search(said):
        return "its header or its pixel data are damaged or do not follow the DICOM standard"
    return said


def one_line(error: Exception) -> str:
    """Returns a library's error message as part of a sentence."""
    return _printable(" ".join(str(error).split()).rstrip(".")) or type(error).__name__


def _printable(text: str) -> str:
    """Escapes the characters of a file's text that must not be sent to a terminal."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _read_header(file: BinaryIO, name: str) -> Dataset:
    """Reads the elements of `_KEYWORDS` and the transfer syntax, in `file_meta`; old files do not state the syntax."""
    from pydicom import dcmread, uid

    check_deflated(file, name)
    file.seek(0)
    header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=_KEYWORDS)
    if not header.file_meta.get("TransferSyntaxUID"):
        is_implicit, is_little_endian = header.original_encoding
        header.file_meta.TransferSyntaxUID = (
            uid.ImplicitVRLittleEndian if is_implicit else uid.ExplicitVRLittleEndian if is_little_endian
            else uid.ExplicitVRBigEndian)
    return header


def _check(header: Dataset, name: str, frame: int) -> int:
    """Checks a header before anything is decoded, and returns the number of frames.

    Raises:
      UserError: the file cannot be an image of reasonable size.
    """
    rows, columns = (whole_number(header, keyword, name) for keyword in ("Rows", "Columns"))
    if rows is None or columns is None:
        kind = f"; its SOP class is {header.SOPClassUID.name}" if "SOPClassUID" in header else ""
        raise UserError(f"{name} holds no DICOM image{kind}")
    if not 0 < rows * columns <= MAX_PIXELS:
        raise UserError(f"{name} has {columns} x {rows} pixels a frame; 1 to {MAX_PIXELS} were expected")
    interpretation = text(header, "PhotometricInterpretation", name)
    if interpretation not in (*GREY, *COLOR, PALETTE):
        found = f"the photometric interpretation {_printable(interpretation or '')}"
        found = found if interpretation else f"no {called('PhotometricInterpretation')}"
        raise UserError(f"{name} has {found}; one of {', '.join((*GREY, *COLOR))} or {PALETTE} was expected")
    count = whole_number(header, "NumberOfFrames", name) or 1
    if not 1 <= frame <= count:
        raise UserError(f"{name} has {count} frame{'s' * (count > 1)}, counted from 1; there is no frame {frame}")
    return count


def _decode(file: BinaryIO, header: Dataset, name: str, index: int, count: int, is_whole: bool) -> np.ndarray:
    """Decodes the stored values of a frame, [H,W] or [H,W,3]; YBR is converted to RGB.

    Args:
      file: the whole DICOM file.
      header: its header.
      name: the image's name in errors.
      index: of the frame, from 0.
      count: the number of frames.
      is_whole: whether the whole file must be read, to remove empty elements that pydicom fails on.
    """
    from pydicom import dcmread, uid
    from pydicom.pixels import get_decoder, pixel_array

    syntax = header.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(f"{name} is compressed as {_printable(syntax.name)}, which pydicom does not decode") from None
    if not decoder.is_available:
        raise UserError(f"{name} is compressed as {syntax.name}, which needs another decoder: {_INSTALL}")
    precision = _check_stream(file, name, index, count) if syntax.is_encapsulated else None
    if precision is not None:
        header.BitsAllocated = 8 if precision <= 8 else 16 if precision <= 16 else 32
        header.BitsStored = min(precision, whole_number(header, "BitsStored", name) or precision)
    described = _described(header, name, count)
    shift = 0 if syntax.is_encapsulated and syntax != uid.RLELossless else _lowest_bit(header, described, name)
    file.seek(0)
    source, described["transfer_syntax_uid"] = file, syntax
    if is_whole or syntax == uid.DeflatedExplicitVRLittleEndian:
        source = dcmread(file, force=True)
        source.file_meta = header.file_meta
        remove_empty(source)
    if not syntax.is_encapsulated:
        _check_length(source, described, name)
        values = pixel_array(source, index=index, **described)
        return values >> shift if shift else values
    described["planar_configuration"] = 0  # compressed streams state it themselves, and pydicom's plugins read it
    errors = []
    for plugin in [p for p in decoder.available_plugins if p != "gdcm"]:
        try:
            return pixel_array(source, index=index, decoding_plugin=plugin, **described) >> shift
        except Exception as error:  # as in `read_dicom`
            errors.append(error)
    if errors:
        raise errors[0]
    return _decode_apart(file, index=index, decoding_plugin="gdcm", **described)


def _described(header: Dataset, name: str, count: int) -> dict[str, object]:
    """Returns the elements that describe how pixels are stored, as options of `pixel_array`.

    `pixel_array` would otherwise read them again. Of several values the first is taken; absent and empty elements get
    the values that viewers use.
    """
    number = lambda keyword: whole_number(header, keyword, name)
    interpretation, allocated = text(header, "PhotometricInterpretation", name), number("BitsAllocated")
    found = dict(
        rows=number("Rows"), columns=number("Columns"), number_of_frames=count,
        photometric_interpretation=interpretation, bits_allocated=allocated,
        samples_per_pixel=number("SamplesPerPixel") or (3 if interpretation in COLOR else 1),
        bits_stored=bits_stored(header, name), pixel_representation=number("PixelRepresentation") or 0,
        planar_configuration=number("PlanarConfiguration") or 0)
    offsets = [keyword in header for keyword in ("ExtendedOffsetTable", "ExtendedOffsetTableLengths")]
    return found if all(offsets) else {**found, "extended_offsets": None}


def _lowest_bit(header: Dataset, described: dict, name: str) -> int:
    """Returns the lowest bit of stored values in a word; it is above 0 if the highest bit is not BitsStored - 1.

    `bits_stored` in `described` is changed to the number of bits up to the highest: pydicom counts it from bit 0.
    """
    high, stored, allocated = (whole_number(header, "HighBit", name), described["bits_stored"],
                               described["bits_allocated"])
    if None in (high, stored, allocated) or not stored <= high < allocated:
        return 0
    described["bits_stored"] = high + 1
    return high + 1 - stored


def _check_stream(file: BinaryIO, name: str, index: int, count: int) -> int | None:
    """Returns the bits a sample of a compressed frame as its stream states them; None for RLE.

    The stream's statement overrules the header.

    Raises:
      UserError: a JPEG 2000 stream claims more pixels than a frame may have, since OpenJPEG trusts the claim. Decoders
        of the other formats follow the header or check the claim.
    """
    from pydicom.encaps import get_frame

    _seek_pixels(file)
    file.seek(12, 1)  # tag, VR and length
    frame = get_frame(file, index, number_of_frames=count)
    # SOC, and width, height and the first component's precision in SIZ
    size = re.search(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4}).{26}(.)", frame[:4096], re.DOTALL)
    file.seek(0)
    if size is None:
        return _precision_of_jpeg(frame)
    width, height = (int.from_bytes(x, "big") for x in size.groups()[:2])
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has a compressed stream of {width} x {height} pixels; at most {MAX_PIXELS} were "
                        "expected")
    return (size[3][0] & 127) + 1


def _precision_of_jpeg(stream: bytes) -> int | None:
    """Returns the bits a sample of JPEG and JPEG-LS, from their frame header; None for other streams."""
    place = 2
    while stream[:2] == b"\xff\xd8" and place + 4 < len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF55 and SOF0 … SOF15
            return stream[place + 4] or None
        place += 1 if marker == 0xFF else 2 + int.from_bytes(stream[place + 2:place + 4], "big")
    return None


def _check_length(source: BinaryIO | Dataset, described: dict, name: str) -> None:
    """Raises UserError for YBR_FULL_422 with colours that are not halved.

    Such files were decompressed and kept the interpretation; they may hold RGB or YBR_FULL.
    """
    if described["photometric_interpretation"] != "YBR_FULL_422" or described["bits_allocated"] != 8:
        return
    pixels = described["rows"] * described["columns"] * described["number_of_frames"]
    if _length_of_pixels(source, described["transfer_syntax_uid"]) >= 3 * pixels:
        raise UserError(f"{name} has YBR_FULL_422 with three bytes per pixel, as in RGB or YBR_FULL; two bytes were "
                        "expected")


def _length_of_pixels(source: BinaryIO | Dataset, syntax: UID) -> int:
    """Returns the bytes of uncompressed pixel data."""
    if not hasattr(source, "read"):
        return len(source.PixelData)
    _seek_pixels(source)
    start = source.read(12)
    source.seek(0)
    order = "little" if syntax.is_little_endian else "big"
    return int.from_bytes(start[4:8] if syntax.is_implicit_VR else start[8:12], order)


def _seek_pixels(file: BinaryIO) -> None:
    """Moves the file to the tag of the pixel data."""
    from pydicom import dcmread

    file.seek(0)
    dcmread(file, stop_before_pixels=True, force=True, specific_tags=["Rows"])


def _decode_apart(file: BinaryIO, **arguments) -> np.ndarray:
    """Runs `pixel_array` in a separate process.

    GDCM, the only decoder of lossless JPEG here, crashes its process on some damaged files.
    """
    file.seek(0)
    # -P: the working directory may contain a numpy.py. utf8: the locale may not encode the path of this environment.
    command = [sys.executable, "-P", "-X", "utf8", "-c", _APART, json.dumps(arguments)]
    try:
        done = subprocess.run(command, input=file.read(), capture_output=True, timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"its decoder takes more than {_MOST_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if done.returncode > 0 and lines else "its decoder crashed")
    return np.load(io.BytesIO(done.stdout))
