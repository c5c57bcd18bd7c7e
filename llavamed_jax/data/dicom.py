"""DICOM to 8-bit images, as a viewer shows them: the stored values, rescaled, through the file's own window.

    grey    stored -> modality LUT or rescale -> VOI LUT or window -> 0 … 255 -> inverted for MONOCHROME1
    colour  RGB, YBR and palettes -> RGB, the upper eight bits

Each step is pydicom's, which with its decoders is the extra `[medical]`. Only the frame that is asked for is decoded.
Source: DICOM PS3.3, C.7.6.3 (pixels), C.11.1 (modality LUT), C.11.2 (VOI LUT). H and W are rows and columns.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import Image

from llavamed_jax.errors import UserError

if TYPE_CHECKING:
    from pydicom import Dataset

SUFFIXES = (".dcm", ".dicom", ".dic")
MAX_PIXELS = 178_956_970  # of a frame: where Pillow speaks of a decompression bomb
_MAX_DEFLATED = 2**20  # bytes of a file that is deflated as a whole; a thousandfold in memory at worst
_APART = """
import io, json, sys
import numpy
from pydicom.pixels import pixel_array
values = pixel_array(io.BytesIO(sys.stdin.buffer.read()), **json.loads(sys.argv[1]))
numpy.save(sys.stdout.buffer, values)
"""
_GREY, _COLOR = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_INSTALL = "pip install 'llavamed-jax[medical]'"
# What is read of a header; the rest, however large, is passed over.
_PALETTE = [f"{kind}{color}PaletteColorLookupTableData" for kind in ("", "Segmented") for color in ("Red", "Green", "Blue", "Alpha")]
_KEYWORDS = [
    "SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "NumberOfFrames", "BitsStored",
    "PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit", "ModalityLUTSequence", "RescaleSlope", "RescaleIntercept",
    "VOILUTSequence", "WindowCenter", "WindowWidth", "VOILUTFunction", "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence", *(f"{color}PaletteColorLookupTableDescriptor" for color in ("Red", "Green", "Blue")), *_PALETTE]


def is_dicom(head: bytes, suffix: str) -> bool:
    """By content (`DICM` behind a preamble of 128 bytes) or by suffix, since old files have no preamble."""
    return head[128:132] == b"DICM" or suffix.lower() in SUFFIXES


def read_dicom(file: BinaryIO, name: str, frame: int = 1) -> Image.Image:
    """One frame as an image of mode L or RGB.

    Of several windows the first is taken. Without one, unsigned values of at most eight bits are shown as they are, others
    spread from the frame's lowest to its highest, padding aside.

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
        _check(header, name, frame)
        values = _decode(file, header, name, frame - 1)
        return _render(values, _for_frame(header, frame - 1), name)
    except UserError:
        raise
    except Exception as error:  # on damaged files pydicom and its decoders raise nearly anything
        raise UserError(f"{name} is no DICOM image that can be read: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """What a library says of an error, as part of a sentence."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _read_header(file: BinaryIO, name: str) -> Dataset:
    """What `_KEYWORDS` names, and in `file_meta` the transfer syntax, which old files leave out."""
    from pydicom import dcmread, uid

    start, size = file.read(4096), file.seek(0, 2)
    if uid.DeflatedExplicitVRLittleEndian.encode() in start and size > _MAX_DEFLATED:
        raise UserError(f"{name} is deflated as a whole and has {size} bytes; at most {_MAX_DEFLATED} were expected")
    file.seek(0)
    header = dcmread(file, stop_before_pixels=True, force=True, specific_tags=_KEYWORDS)
    if "TransferSyntaxUID" not in header.file_meta:
        is_implicit, is_little_endian = header.original_encoding
        header.file_meta.TransferSyntaxUID = (
            uid.ImplicitVRLittleEndian if is_implicit else uid.ExplicitVRLittleEndian if is_little_endian else uid.ExplicitVRBigEndian)
    return header


def _check(header: Dataset, name: str, frame: int) -> None:
    """Raises UserError, before anything is decoded, for what cannot be an image of reasonable size."""
    if "Rows" not in header or "Columns" not in header:
        kind = f"; it is of the class {header.SOPClassUID.name}" if "SOPClassUID" in header else ""
        raise UserError(f"{name} holds no DICOM image{kind}")
    if not 0 < header.Rows * header.Columns <= MAX_PIXELS:
        raise UserError(f"{name} has {header.Columns} x {header.Rows} pixels a frame; 1 to {MAX_PIXELS} were expected")
    interpretation = header.get("PhotometricInterpretation")
    if interpretation not in (*_GREY, *_COLOR, "PALETTE COLOR"):
        raise UserError(f"{name} has the photometric interpretation {interpretation}; one of "
                        f"{', '.join((*_GREY, *_COLOR))} or PALETTE COLOR was expected")
    count = int(header.get("NumberOfFrames") or 1)
    if not 1 <= frame <= count:
        raise UserError(f"{name} has {count} frame{'s' * (count > 1)}, counted from 1; there is no frame {frame}")


def _decode(file: BinaryIO, header: Dataset, name: str, index: int) -> np.ndarray:
    """The stored values of a frame, [H,W] or [H,W,3]; YBR is RGB already."""
    from pydicom import dcmread, uid
    from pydicom.pixels import get_decoder, pixel_array

    syntax = header.file_meta.TransferSyntaxUID
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        raise UserError(f"{name} is compressed as {syntax.name}, which pydicom does not decode") from None
    if not decoder.is_available:
        raise UserError(f"{name} is compressed as {syntax.name}, which needs another decoder: {_INSTALL}")
    file.seek(0)
    if syntax == uid.DeflatedExplicitVRLittleEndian:
        return pixel_array(dcmread(file), index=index)
    if not syntax.is_encapsulated:
        return pixel_array(file, index=index, transfer_syntax_uid=syntax)
    _check_stream(file, header, name, index)
    errors = []
    for plugin in [p for p in decoder.available_plugins if p != "gdcm"]:
        try:
            return pixel_array(file, index=index, transfer_syntax_uid=syntax, decoding_plugin=plugin)
        except Exception as error:  # as in `read_dicom`
            errors.append(error)
    if errors:
        raise errors[0]
    return _decode_apart(file, index=index, transfer_syntax_uid=syntax, decoding_plugin="gdcm")


def _check_stream(file: BinaryIO, header: Dataset, name: str, index: int) -> None:
    """Raises UserError for a JPEG 2000 stream that claims more pixels than a frame may have: OpenJPEG goes by its claim.
    Decoders of the other kinds go by the header, or look themselves."""
    from pydicom import dcmread
    from pydicom.encaps import get_frame

    file.seek(0)
    dcmread(file, stop_before_pixels=True, force=True, specific_tags=["Rows"])  # leaves the file at the pixels' tag
    file.seek(12, 1)  # tag, VR and length
    frame = get_frame(file, index, number_of_frames=int(header.get("NumberOfFrames") or 1))
    size = re.search(rb"\xff\x4f\xff\x51.{4}(.{4})(.{4})", frame[:4096], re.DOTALL)  # SOC, and of SIZ width and height
    if size is not None:
        width, height = (int.from_bytes(x, "big") for x in size.groups())
        if width * height > MAX_PIXELS:
            raise UserError(f"{name} has a stream of {width} x {height} pixels; at most {MAX_PIXELS} were expected")
    file.seek(0)


def _decode_apart(file: BinaryIO, **arguments) -> np.ndarray:
    """`pixel_array` in a process of its own: on some damaged files GDCM, the one decoder of lossless JPEG here, ends the
    process that it runs in."""
    file.seek(0)
    done = subprocess.run([sys.executable, "-c", _APART, json.dumps(arguments)], input=file.read(), capture_output=True, timeout=300)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise ValueError(lines[-1] if done.returncode > 0 and lines else "its decoder broke down")
    return np.load(io.BytesIO(done.stdout))


def _for_frame(header: Dataset, index: int) -> Dataset:
    """The header as it holds for one frame: enhanced files keep rescale and window in groups, shared or a frame's own."""
    for groups in (header.get("SharedFunctionalGroupsSequence") or [])[:1], _at(header.get("PerFrameFunctionalGroupsSequence"), index):
        for group in groups:
            for keyword in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                for item in group.get(keyword) or []:
                    header.update(item)
    return header


def _at(sequence, index: int) -> list:
    return list(sequence or [])[index:index + 1]


def _render(values: np.ndarray, header: Dataset, name: str) -> Image.Image:
    from pydicom.pixels import apply_color_lut

    if header.PhotometricInterpretation in _GREY:
        return Image.fromarray(_grey(values, header, name))
    if header.PhotometricInterpretation == "PALETTE COLOR":
        bits, values = header.RedPaletteColorLookupTableDescriptor[2], apply_color_lut(values, header)
    else:
        bits = header.BitsStored
    if values.ndim != 3 or values.dtype.kind != "u":
        raise UserError(f"{name} has colours as {values.dtype} of shape {values.shape}; unsigned [H,W,3] was expected")
    return Image.fromarray((values[..., :3] >> max(0, bits - 8)).astype(np.uint8))


def _grey(stored: np.ndarray, header: Dataset, name: str) -> np.ndarray:
    """Stored values [H,W] as they are shown, uint8."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    bits = [_widen(header.get(keyword)) for keyword in ("ModalityLUTSequence", "VOILUTSequence")][1]
    values = apply_modality_lut(stored if stored.dtype.kind == "f" else stored.astype(np.int64), header).astype(np.float64)
    if bits:
        values = apply_voi_lut(np.rint(values).astype(np.int64), header).astype(np.float64)
        low, high = 0, 2**bits - 1
    elif header.get("WindowWidth") is not None and header.get("WindowCenter") is not None:
        values = apply_voi_lut(values, header)
        low, high = apply_voi_lut(np.array([-np.inf, np.inf]), header)  # where the window's ends are shown
    elif stored.dtype.kind == "u" and header.BitsStored <= 8 and np.array_equal(values, stored):
        low, high = 0, 2**header.BitsStored - 1
    else:
        low, high = _extent(values[~_is_padding(stored, header)], name)
    shown = np.clip((values - low) / ((high - low) or 1), 0, 1)
    shown = np.rint(shown * 255).astype(np.uint8)
    return 255 - shown if header.PhotometricInterpretation == "MONOCHROME1" else shown


def _widen(tables) -> int:
    """How many bits the entries of a lookup table have, 0 for no table. They are declared as 16, since pydicom looks values
    up in the entries' own width, which is too narrow for a table of 4,096 entries of 8 bits and unknown to numpy for 12."""
    if not tables:
        return 0
    entries, first, bits = tables[0].LUTDescriptor
    tables[0].LUTDescriptor = [entries, first, 16]
    return bits


def _is_padding(stored: np.ndarray, header: Dataset) -> np.ndarray:
    """Where a frame holds the value that stands for no pixel; nowhere if it holds nothing else."""
    first = header.get("PixelPaddingValue")
    if first is None:
        return np.zeros(stored.shape, bool)
    last = header.get("PixelPaddingRangeLimit", first)
    padding = (stored >= min(first, last)) & (stored <= max(first, last))
    return padding & ~padding.all()


def _extent(values: np.ndarray, name: str) -> tuple[float, float]:
    if not np.isfinite(values).all():
        raise UserError(f"{name} has values that are not finite; finite ones were expected")
    return float(values.min()), float(values.max())
