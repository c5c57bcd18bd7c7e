"""DICOM headers that contradict the pixel data beside them, in every compression, as decompressors and gateways leave them.

Reported for viewers and readers of DICOM: pydicom #1133 (YBR_FULL_422 of whole pixels), #2010 and fo-dicom #1992 (16 bits
allocated beside a stream of 8), JPEGLosslessDecoderJS #8 (planes beside JPEG).
"""

import io

import numpy as np
import pytest
from PIL import Image

pydicom = pytest.importorskip("pydicom", reason="pydicom, the extra [medical], is not installed")

from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import (  # noqa: E402
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.images.load import load_image  # noqa: E402
from tests.support.dicom_files import dataset, encoded  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, on headers that are wrong on purpose
ROW, COLUMN = np.linspace(0, 255, 64).astype(np.uint8)[None], np.linspace(255, 0, 48).astype(np.uint8)[:, None]
COLORS = np.stack(np.broadcast_arrays(ROW, COLUMN, np.uint8(90)), -1)  # [48,64,3]
GREY = COLORS[..., 0].copy()
SYNTAXES = {"jpeg": JPEGBaseline8Bit, "extended": JPEGExtended12Bit, "lossless": JPEGLosslessSV1,
            "jpeg2000": JPEG2000Lossless, "jpegls": JPEGLSLossless}


def stream(kind, values):
    if kind == "jpeg2000":
        encode = pytest.importorskip("openjpeg.utils").encode_array
        is_color = values.ndim == 3
        return encode(values, use_mct=is_color, photometric_interpretation=1 if is_color else 2)
    if kind == "jpegls":
        encode = pytest.importorskip("jpeg_ls").encode_array
        return bytes(encode(values, interleave_mode=2 if values.ndim == 3 else None))
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG", quality=100)  # of 8 bits, whatever the syntax
    return buffer.getvalue()


def compressed(kind, values, interpretation, **elements):
    ds = dataset(values, interpretation, **elements)
    ds.file_meta.TransferSyntaxUID = SYNTAXES[kind]
    ds.PixelData = encapsulate([stream(kind, values)])
    ds["PixelData"].is_undefined_length, ds["PixelData"].VR = True, "OB"
    return ds


def rgb(ds):
    return np.asarray(load_image(encoded(ds))).astype(int)


@pytest.mark.parametrize("kind", SYNTAXES)
@pytest.mark.parametrize("values, interpretation", [(GREY, "MONOCHROME2"), (COLORS, "RGB"), (COLORS, "YBR_FULL_422")])
def test_a_stream_goes_before_its_header(kind, values, interpretation):
    """Bits allocated and stored, and the order of planes, which a stream says itself."""
    if kind == "lossless":
        pytest.importorskip("gdcm")
    if kind in ("jpeg2000", "jpegls") and interpretation == "YBR_FULL_422":
        pytest.skip("the stream holds RGB")
    is_lossy = kind not in ("jpeg2000", "jpegls")
    wanted = np.asarray(load_image(stream(kind, values)) if is_lossy else Image.fromarray(values).convert("RGB"))
    pairs = ((8, 8), (16, 8), (16, 12), (16, 16))
    for allocated, stored in pairs[3:] if kind == "lossless" else pairs:
        # A decoder that takes a second to start is asked once for each order and each interpretation.
        once = (1,) if interpretation == "YBR_FULL_422" else (0,)
        for planes in (None,) if values.ndim < 3 else once if kind == "lossless" else (0, 1):
            elements = dict(BitsAllocated=allocated, BitsStored=stored, HighBit=stored - 1)
            if planes is not None:
                elements["PlanarConfiguration"] = planes
            found = rgb(compressed(kind, values, interpretation, **elements))
            assert np.abs(found - wanted).max() <= (values.ndim == 3 and is_lossy), elements


def test_planes_of_uncompressed_and_rle_pixels():
    """There the header counts: planes lie as it says, in RLE always one by one."""
    planes = dataset(COLORS, "RGB", PlanarConfiguration=1, PixelData=COLORS.transpose(2, 0, 1).tobytes())
    np.testing.assert_array_equal(rgb(planes), COLORS)
    for configuration in (0, 1):
        ds = dataset(COLORS, "RGB")
        ds.compress(RLELossless)
        ds.PlanarConfiguration = configuration
        np.testing.assert_array_equal(rgb(ds), COLORS)


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian,
                                    DeflatedExplicitVRLittleEndian])
@pytest.mark.parametrize("frames", [None, 3])
def test_halved_colours_that_are_whole(syntax, frames):
    """Decompressed files that kept YBR_FULL_422 may hold RGB or YBR_FULL: neither is guessed."""
    whole = np.stack([COLORS] * frames) if frames else COLORS
    halved = np.concatenate([whole[..., 0::2, :1], whole[..., 1::2, :1], whole[..., 0::2, 1:]], -1)  # Y Y Cb Cr
    with pytest.raises(UserError, match="has YBR_FULL_422 with three bytes per pixel, as in RGB or YBR_FULL; two"):
        rgb(dataset(whole, "YBR_FULL_422", frames=frames, syntax=syntax))
    ybr = np.asarray(Image.fromarray(COLORS, "YCbCr").convert("RGB")).astype(int)
    found = rgb(dataset(whole, "YBR_FULL_422", frames=frames, syntax=syntax, PixelData=halved.tobytes()))
    assert np.abs(found - ybr)[:, 0::2].max() <= 2  # pydicom's conversion rounds once, Pillow's several times


@pytest.mark.parametrize("bits", [None, 0])
def test_bits_stored_of_nothing_are_those_allocated(bits):
    for values in (GREY, GREY.astype(np.uint16) << 8):
        np.testing.assert_array_equal(rgb(dataset(values, BitsStored=bits))[..., 0], GREY)
    np.testing.assert_array_equal(rgb(dataset(COLORS.astype(np.uint16) << 8, "RGB", BitsStored=bits)), COLORS)


def test_a_stream_of_another_size_is_one_sentence():
    for elements in (dict(Rows=40), dict(Columns=65), dict(SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2")):
        with pytest.raises(UserError, match="its compressed pixel data decode to another size than its rows, columns"):
            rgb(compressed("jpeg", COLORS, "RGB", **elements))
