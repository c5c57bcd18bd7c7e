"""DICOM files to 8-bit images: the stored values of a frame, which `dicom_display` shows as a viewer does.

Files are read by pydicom, which with its decoders is the extra `[medical]`. Only the frame that is asked for is
decoded. Source: DICOM PS3.3, C.7.6.3 (pixels). H and W are rows and columns.
"""

from __future__ import annotations

import io
import json
import re
import struct
import subprocess
import sys
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from llavamed_jax.errors import UserError
from llavamed_jax.images.dicom_display import COLOR, GREY, PALETTE, render
from llavamed_jax.images.dicom_elements import bits_stored, called, remove_empty, text, whole_number

if TYPE_CHECKING:
    from pydicom import Dataset
    from pydicom.uid import UID

SUFFIXES = (".dcm", ".dicom", ".dic")
MAX_PIXELS = 178_956_970  # of a frame: where Pillow speaks of a decompression bomb
_MAX_DEFLATED = 2**20  # bytes of a file that is deflated as a whole; a thousandfold in memory at worst
# Through memory: numpy asks a file for its position, which a pipe has only where PYTHONUNBUFFERED is set. What
# libraries print goes to stderr.
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
_MOST_SECONDS = 300  # that a frame may take to decode there
_INSTALL = "pip install 'llavamed-jax[medical]'"
# What is read of a header; the rest, however large, is passed over.
_PALETTES = [f"{color}PaletteColorLookupTable" for color in ("Red", "Green", "Blue")]
_KEYWORDS = [
    "SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", *(
        f"{kind}PixelPadding{end}" for kind in ("", "Float", "DoubleFloat") for end in ("Value", "RangeLimit")),
    "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept", "VOILUTSequence", "WindowCenter", "WindowWidth",
    "VOILUTFunction", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths", *(f"{name}Descriptor" for name in _PALETTES), *(f"{name}Data" for name in _PALETTES),
    *(f"Segmented{name}Data" for name in _PALETTES)]
_READ_AGAIN = {0x00280008, 0x7FE00001}  # Number of Frames, Extended Offset Table: pydicom reads them when it decodes
# What Python, numpy and struct say of a header that they were not made for: nothing that a reader of DICOM could use.
_PYTHONS = (TypeError, LookupError, ArithmeticError, AssertionError, UnicodeError, struct.error)
_PYTHONS_WORDS = re.compile(r"^'\w+' object |invalid literal|could not convert|NoneType|buffer")


def is_dicom(head: bytes, suffix: str) -> bool:
    """By content (`DICM` behind a preamble of 128 bytes) or by suffix, since old files have no preamble."""
    return head[128:132] == b"DICM" or suffix.lower() in SUFFIXES


def read_dicom(file: BinaryIO, name: str, frame: int = 1) -> Image.Image:
    """One frame as an image of mode L or RGB.

    Of several windows the first is taken. Without one, unsigned values of at most eight bits are shown as they are,
    others spread from the frame's lowest to its highest, padding aside.

    Args:
      file: the whole DICOM file.
      name: what errors call it.
      frame: counted from 1, as DICOM does.
    Raises:
      UserError: pydicom or a decoder is not installed, no image is inside, no such frame, or the file is damaged.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError:
        raise UserError(f"{name} is DICOM, which needs pydicom: {_INSTALL}") from None
    try:
        header = _read_header(file, name)
        removed = remove_empty(header)
        count = _check(header, name, frame)
        values = _decode(file, header, name, frame - 1, count, is_whole=bool(removed & _READ_AGAIN))
        return render(values, header, frame - 1, name)
    except UserError:
        raise
    except Exception as error:  # on damaged files pydicom and its decoders raise nearly anything
        raise UserError(f"{name} is no DICOM image that can be read: {_in_dicoms_words(error)}") from error


def _in_dicoms_words(error: Exception) -> str:
    """What pydicom says of a file, which names elements; of Python's and numpy's own errors what they mean here."""
    said = one_line(error)
    if "cannot reshape" in said:
        return "its pixel data are less than expected by its rows, columns and samples"
    if "could not broadcast" in said:
        return "its compressed pixel data make another image than expected by its rows, columns and samples"
    if isinstance(error, _PYTHONS) or isinstance(error, (AttributeError, ValueError)) and _PYTHONS_WORDS.search(said):
        return "its header or its pixel data are damaged, or not as the standard has them"
    return said


def one_line(error: Exception) -> str:
    """What a library says of an error, as part of a sentence."""
    return _printable(" ".join(str(error).split()).rstrip(".")) or type(error).__name__


def _printable(text: str) -> str:
    """A text of a file for a sentence: what no terminal should be sent is escaped."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def _read_header(file: BinaryIO, name: str) -> Dataset:
    """What `_KEYWORDS` names, and in `file_meta` the transfer syntax, which old files leave out."""
    from pydicom import dcmread, uid

    start, size = file.read(4096), file.seek(0, 2)
    if uid.DeflatedExplicitVRLittleEndian.encode() in start and size > _MAX_DEFLATED:
        raise UserError(f"{name} is deflated as a whole and has {size} bytes; at most {_MAX_DEFLATED} were expected")
    file.seek(0)
    header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=_KEYWORDS)
    if not header.file_meta.get("TransferSyntaxUID"):
        is_implicit, is_little_endian = header.original_encoding
        header.file_meta.TransferSyntaxUID = (
            uid.ImplicitVRLittleEndian if is_implicit else uid.ExplicitVRLittleEndian if is_little_endian
            else uid.ExplicitVRBigEndian)
    return header


def _check(header: Dataset, name: str, frame: int) -> int:
    """How many frames there are.

    Raises:
      UserError: before anything is decoded, for what cannot be an image of reasonable size.
    """
    rows, columns = (whole_number(header, keyword, name) for keyword in ("Rows", "Columns"))
    if rows is None or columns is None:
        kind = f"; it is of the class {header.SOPClassUID.name}" if "SOPClassUID" in header else ""
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
    """The stored values of a frame, [H,W] or [H,W,3]; YBR is RGB already.

    Args:
      is_whole: the file has to be read as a whole, to take empty elements out of it that pydicom would stumble over.
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
    described["planar_configuration"] = 0  # streams say themselves how planes lie, and pydicom's plugins know it
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
    """The elements that say how pixels are stored, as options of `pixel_array`, which would read them once more: of
    several values the first, and for those that are absent or empty what viewers take."""
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
    """Where stored values begin in a word, which is above its lowest bit where the highest is not BitsStored - 1.
    `described` is changed to the bits up to the highest: what pydicom takes for BitsStored begins at the lowest."""
    high, stored, allocated = (whole_number(header, "HighBit", name), described["bits_stored"],
                               described["bits_allocated"])
    if None in (high, stored, allocated) or not stored <= high < allocated:
        return 0
    described["bits_stored"] = high + 1
    return high + 1 - stored


def _check_stream(file: BinaryIO, name: str, index: int, count: int) -> int | None:
    """Bits a sample of the compressed frame as its stream says, which goes before the header; None for RLE.

    Raises:
      UserError: a JPEG 2000 stream claims more pixels than a frame may have: OpenJPEG goes by its claim. Decoders of
        the other kinds go by the header, or look themselves.
    """
    from pydicom.encaps import get_frame

    _seek_pixels(file)
    file.seek(12, 1)  # tag, VR and length
    frame = get_frame(file, index, number_of_frames=count)
    # SOC, and of SIZ width, height and the precision of the first component
    size = re.search(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4}).{26}(.)", frame[:4096], re.DOTALL)
    file.seek(0)
    if size is None:
        return _precision_of_jpeg(frame)
    width, height = (int.from_bytes(x, "big") for x in size.groups()[:2])
    if width * height > MAX_PIXELS:
        raise UserError(f"{name} has a stream of {width} x {height} pixels; at most {MAX_PIXELS} were expected")
    return (size[3][0] & 127) + 1


def _precision_of_jpeg(stream: bytes) -> int | None:
    """Bits a sample of JPEG and JPEG-LS, from the header of their frame; None of other streams."""
    place = 2
    while stream[:2] == b"\xff\xd8" and place + 4 < len(stream) and stream[place] == 0xFF:
        marker = stream[place + 1]
        if marker == 0xF7 or 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # SOF55 and SOF0 … SOF15
            return stream[place + 4] or None
        place += 1 if marker == 0xFF else 2 + int.from_bytes(stream[place + 2:place + 4], "big")
    return None


def _check_length(source: BinaryIO | Dataset, described: dict, name: str) -> None:
    """Raises UserError for YBR_FULL_422 whose colours are not halved: files that were decompressed and kept the
    interpretation. They may hold RGB or YBR_FULL."""
    if described["photometric_interpretation"] != "YBR_FULL_422" or described["bits_allocated"] != 8:
        return
    pixels = described["rows"] * described["columns"] * described["number_of_frames"]
    if _length_of_pixels(source, described["transfer_syntax_uid"]) >= 3 * pixels:
        raise UserError(f"{name} has YBR_FULL_422 and three bytes a pixel, which RGB and YBR_FULL have; two were "
                        "expected")


def _length_of_pixels(source: BinaryIO | Dataset, syntax: UID) -> int:
    """Bytes of uncompressed pixel data."""
    if not hasattr(source, "read"):
        return len(source.PixelData)
    _seek_pixels(source)
    start = source.read(12)
    source.seek(0)
    order = "little" if syntax.is_little_endian else "big"
    return int.from_bytes(start[4:8] if syntax.is_implicit_VR else start[8:12], order)


def _seek_pixels(file: BinaryIO) -> None:
    """To the tag of the pixel data."""
    from pydicom import dcmread

    file.seek(0)
    dcmread(file, stop_before_pixels=True, force=True, specific_tags=["Rows"])


def _decode_apart(file: BinaryIO, **arguments) -> np.ndarray:
    """`pixel_array` in a process of its own: on some damaged files GDCM, the one decoder of lossless JPEG here, ends
    the process that it runs in."""
    file.seek(0)
    # -P: the folder that the user works in may hold a numpy.py. utf8: a path to this environment that the locale cannot spell.
    command = [sys.executable, "-P", "-X", "utf8", "-c", _APART, json.dumps(arguments)]
    try:
        done = subprocess.run(command, input=file.read(), capture_output=True, timeout=_MOST_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"its decoder takes more than {_MOST_SECONDS} s") from None
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if done.returncode > 0 and lines else "its decoder broke down")
    return np.load(io.BytesIO(done.stdout))
