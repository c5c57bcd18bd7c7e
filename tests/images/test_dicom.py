"""DICOM: files made here with known values, and pydicom's own test files."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom, the extra [medical], is not installed")

from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402
from pydicom.uid import DeflatedExplicitVRLittleEndian  # noqa: E402

from llavamed_jax.config import preset  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.images import dicom_deflated  # noqa: E402
from llavamed_jax.images.dicom import read_dicom  # noqa: E402
from llavamed_jax.images.load import load_image  # noqa: E402
from llavamed_jax.processor import Processor  # noqa: E402
from tests.support.damage import changed, sentences  # noqa: E402
from tests.support.dicom_files import HOUNSFIELD, RAMP, dataset, encoded, shown  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, on values that its test files get wrong
FOLDER = Path(pydicom.__file__).parent / "data" / "test_files"
# Mean grey of the shown image, looked at on a contact sheet: anatomy, text and test patterns as they should be.
SHOWN = {
    "693_J2KI.dcm": 44.3, "CT_small.dcm": 96.0, "ExplVR_BigEnd.dcm": 171.6, "GDCMJ2K_TextGBR.dcm": 124.4,
    "J2K_pixelrep_mismatch.dcm": 63.2, "JPEG2000.dcm": 40.4, "JPEGLSNearLossless_08.dcm": 55.6, "JPEGLSNearLossless_16.dcm": 46.7,
    "MR_small.dcm": 113.1, "MR_small_RLE.dcm": 113.1, "MR_small_bigendian.dcm": 113.1, "MR_small_expb.dcm": 113.1,
    "MR_small_implicit.dcm": 113.1, "MR_small_jp2klossless.dcm": 113.1, "MR_small_jpeg_ls_lossless.dcm": 113.1,
    "MR_small_padded.dcm": 113.1, "SC_jpeg_no_color_transform.dcm": 244.0, "SC_jpeg_no_color_transform_2.dcm": 245.6,
    "SC_rgb_dcmtk_+eb+cr.dcm": 127.7, "SC_rgb_dcmtk_+eb+cy+n1.dcm": 127.5, "SC_rgb_dcmtk_+eb+cy+n2.dcm": 127.7,
    "SC_rgb_dcmtk_+eb+cy+np.dcm": 127.5, "SC_rgb_dcmtk_+eb+cy+s2.dcm": 127.7, "SC_rgb_dcmtk_+eb+cy+s4.dcm": 127.7,
    "SC_rgb_gdcm_KY.dcm": 127.7, "SC_rgb_jls_lossy_line.dcm": 128.0, "SC_rgb_jls_lossy_sample.dcm": 128.0,
    "SC_rgb_jpeg_app14_dcmd.dcm": 245.6, "SC_rgb_jpeg_dcmd.dcm": 244.0, "SC_rgb_jpeg_dcmtk.dcm": 127.7, "SC_rgb_jpeg_gdcm.dcm": 127.7,
    "SC_rgb_jpeg_lossy_gdcm.dcm": 127.5, "SC_rgb_rle.dcm": 127.7, "SC_rgb_rle_16bit.dcm": 127.7, "SC_rgb_rle_16bit_2frame.dcm": 127.7,
    "SC_rgb_rle_2frame.dcm": 127.7, "SC_rgb_rle_32bit.dcm": 127.7, "SC_rgb_rle_32bit_2frame.dcm": 127.7, "SC_rgb_small_odd.dcm": 128.8,
    "SC_rgb_small_odd_big_endian.dcm": 128.8, "SC_rgb_small_odd_jpeg.dcm": 128.3, "SC_ybr_full_422_uncompressed.dcm": 127.7,
    "examples_jpeg2k.dcm": 34.5, "examples_overlay.dcm": 48.1, "examples_palette.dcm": 20.5, "examples_rgb_color.dcm": 34.3,
    "examples_ybr_color.dcm": 9.5, "image_dfl.dcm": 127.1, "liver_1frame.dcm": 35.2, "liver_expb_1frame.dcm": 35.2,
    "rtdose.dcm": 121.5, "rtdose_1frame.dcm": 121.5, "rtdose_expb.dcm": 121.5, "rtdose_expb_1frame.dcm": 121.5, "rtdose_rle.dcm": 121.5,
    "rtdose_rle_1frame.dcm": 121.5,
}
NOT_SHOWN = {
    "ExplVR_BigEndNoMeta.dcm": "holds no DICOM image; its SOP class is RT Ion Plan Storage",
    "ExplVR_LitEndNoMeta.dcm": "RT Ion Plan Storage",
    "JPEG-lossy.dcm": "12-bit precision", "JPGExtended.dcm": "12-bit precision",
    "JPEG2000-embedded-sequence-delimiter.dcm": "dcm has a compressed stream of 3722445056 x 1024 pixels",
    "MR_truncated.dcm": "pixel data are shorter than its rows",
    "SC_rgb_jpeg.dcm": "unexpected tag", "UN_sequence.dcm": "holds no DICOM image", "badVR.dcm": r"\(0028,0008\) Number of Frames '1A'",
    "meta_missing_tsyntax.dcm": "holds no DICOM image", "nested_priv_SQ.dcm": "holds no DICOM image", "no_meta.dcm": "holds no DICOM image",
    "no_meta_group_length.dcm": "holds no DICOM image", "priv_SQ.dcm": "holds no DICOM image",
    "empty_charset_LEI.dcm": "holds no DICOM image", "reportsi.dcm": "Basic Text SR",
    "reportsi_with_empty_number_tags.dcm": "Basic Text SR",
    "rtplan.dcm": "RT Plan", "rtplan_truncated.dcm": "RT Plan", "rtstruct.dcm": "RT Structure Set", "test-SR.dcm": "Comprehensive SR",
    "waveform_ecg.dcm": "12-lead ECG",
}  # fmt: skip


def test_rescale_and_linear_window():
    """PS3.3 C.11.2.1.2.1: ((x - (c - 0.5)) / (w - 1) + 0.5) of the way from black to white."""
    x = RAMP.astype(float) - 1024
    wanted = np.clip((x - 39.5) / 399 + 0.5, 0, 1) * 255
    assert np.abs(shown(dataset(RAMP, bits=12, WindowCenter=40, WindowWidth=400, **HOUNSFIELD)) - wanted).max() <= 0.5 + 1e-6
    several = dataset(RAMP, bits=12, WindowCenter=[40, 300], WindowWidth=[400, 1500], **HOUNSFIELD)
    assert np.abs(shown(several) - wanted).max() <= 0.5 + 1e-6, "the first window counts"
    doubled = dataset(RAMP, bits=12, WindowCenter=80, WindowWidth=799, RescaleSlope=2, RescaleIntercept=-2048)
    assert np.abs(shown(doubled) - np.clip((2 * x - 79.5) / 798 + 0.5, 0, 1) * 255).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("function, curve", [
    ("LINEAR_EXACT", lambda x: np.clip((x - 40) / 400 + 0.5, 0, 1)), ("SIGMOID", lambda x: 1 / (1 + np.exp(-4 * (x - 40) / 400)))])
def test_other_windows(function, curve):
    ds = dataset(RAMP, bits=12, WindowCenter=40, WindowWidth=400, VOILUTFunction=function, **HOUNSFIELD)
    assert np.abs(shown(ds) - 255 * curve(RAMP.astype(float) - 1024)).max() <= 0.5 + 1e-6


def test_a_window_is_absolute_and_not_stretched_to_the_frame():
    ds = dataset(np.full((4, 4), 1064, np.uint16), bits=12, WindowCenter=40, WindowWidth=400, **HOUNSFIELD)
    assert (shown(ds) == 128).all()


def test_monochrome1_is_inverted():
    for elements in ({}, dict(WindowCenter=2000, WindowWidth=3000)):
        two, one = (shown(dataset(RAMP, kind, bits=12, **elements)) for kind in ("MONOCHROME2", "MONOCHROME1"))
        np.testing.assert_array_equal(one, 255 - two)
        assert two[0, 0] == 0 and two[-1, -1] == 255


def test_without_a_window():
    eight = np.arange(40, 140, dtype=np.uint8).reshape(10, 10)
    np.testing.assert_array_equal(shown(dataset(eight)), eight)
    np.testing.assert_array_equal(shown(dataset(eight, RescaleSlope=1, RescaleIntercept=0)), eight)
    np.testing.assert_array_equal(shown(dataset(eight // 40, bits=2)), eight // 40 * 85)
    twelve = RAMP // 2 + 100
    spread = (twelve - twelve.min()) / (twelve.max() - twelve.min()) * 255
    assert np.abs(shown(dataset(twelve, bits=12)) - spread).max() <= 0.5 + 1e-6
    signed = dataset(RAMP.astype(np.int16) - 2000, bits=13)
    assert shown(signed)[0, 0] == 0 and shown(signed)[-1, -1] == 255
    assert (shown(dataset(np.full((4, 4), 700, np.uint16))) == 0).all()


def test_padding_does_not_count_for_the_spread():
    stored = RAMP.astype(np.int16) // 4 + 100
    stored[:2] = -2000
    wanted = np.clip((stored - stored[2:].min()) / (stored[2:].max() - stored[2:].min()), 0, 1) * 255
    assert np.abs(shown(dataset(stored, PixelPaddingValue=-2000)) - wanted).max() <= 0.5 + 1e-6
    assert np.abs(shown(dataset(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1500)) - wanted).max() <= 0.5 + 1e-6
    assert (shown(dataset(np.full((4, 4), -2000, np.int16), PixelPaddingValue=-2000)) == 0).all()


@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_lookup_tables(bits):
    """A VOI table, then a modality table, each from 12 bits; the table of values of eight bits has 4,096 entries too."""
    table = (np.arange(4096)[::-1] * ((2**bits - 1) / 4095)).astype(int)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [4096, 0, bits], table.tolist()
    item["LUTDescriptor"].VR = item["LUTData"].VR = "US"
    item.ModalityLUTType = "US"
    assert np.abs(shown(dataset(RAMP, bits=12, VOILUTSequence=[item])) - table[RAMP] / (2**bits - 1) * 255).max() <= 0.5 + 1e-6
    looked_up = dataset(RAMP, bits=12, ModalityLUTSequence=[item], WindowCenter=2 ** (bits - 1), WindowWidth=2**bits)
    assert np.abs(shown(looked_up) - table[RAMP] / (2**bits - 1) * 255).max() <= 1.5


def test_colours():
    rgb = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    np.testing.assert_array_equal(load_image(encoded(dataset(rgb, "RGB"))), rgb)
    wide = dataset(rgb.astype(np.uint16) * 257, "RGB")
    np.testing.assert_array_equal(load_image(encoded(wide)), rgb)
    grey = np.stack([rgb[..., 0], np.full((6, 8), 128), np.full((6, 8), 128)], -1).astype(np.uint8)
    np.testing.assert_array_equal(load_image(encoded(dataset(grey, "YBR_FULL"))), np.stack([rgb[..., 0]] * 3, -1))
    index, palette = rgb[..., 0], np.random.default_rng(1).integers(0, 256, (3, 256))
    for bits, scale in ((8, 1), (16, 257)):
        tables = {}
        for color, table in zip(("Red", "Green", "Blue"), palette):
            tables[f"{color}PaletteColorLookupTableDescriptor"] = [256, 0, bits]
            tables[f"{color}PaletteColorLookupTableData"] = (table * scale).astype(f"<u{bits // 8}").tobytes()
        np.testing.assert_array_equal(load_image(encoded(dataset(index, "PALETTE COLOR", **tables))), palette.T[index])


def test_frames():
    frames = np.stack([np.full((4, 4), 20 * i, np.uint8) for i in range(1, 5)])
    ds = dataset(frames, frames=4)
    for frame in range(1, 5):
        assert (shown(ds, frame) == 20 * frame).all()
    assert (shown(ds) == 20).all()
    with pytest.raises(UserError, match="has 4 frames, counted from 1; there is no frame 5"):
        shown(ds, 5)
    with pytest.raises(UserError, match="has 1 frame, counted from 1; there is no frame 2"):
        shown(dataset(frames[0]), 2)


def test_a_frame_has_its_own_window():
    """Enhanced files keep rescale and window in functional groups: those of all frames, over them those of each."""
    frames = np.stack([RAMP, RAMP])

    def group(center=None, intercept=None):
        item, voi, pixel = Dataset(), Dataset(), Dataset()
        if center is not None:
            voi.WindowCenter, voi.WindowWidth = center, 400
            item.FrameVOILUTSequence = [voi]
        if intercept is not None:
            pixel.RescaleSlope, pixel.RescaleIntercept, pixel.RescaleType = 1, intercept, "HU"
            item.PixelValueTransformationSequence = [pixel]
        return item

    ds = dataset(frames, bits=12, frames=2, SharedFunctionalGroupsSequence=[group(intercept=-1024)],
                 PerFrameFunctionalGroupsSequence=[group(center=40), group(center=1000)])
    for frame, center in ((1, 40), (2, 1000)):
        wanted = np.clip((RAMP - 1024.0 - (center - 0.5)) / 399 + 0.5, 0, 1) * 255
        assert np.abs(shown(ds, frame) - wanted).max() <= 0.5 + 1e-6


def test_how_a_path_or_a_call_names_a_frame(tmp_path):
    frames = np.stack([np.full((4, 4), 20 * i, np.uint8) for i in range(1, 4)])
    file = tmp_path / "scan.dcm"
    file.write_bytes(encoded(dataset(frames, frames=3)))
    processor = Processor(preset("small"), image_mode="square")
    third = processor.images_uint8([f"{file}#frame=3", str(file)])
    assert (third[0] == 60).all() and (third[1] == 20).all()
    np.testing.assert_array_equal(processor.images([file], frame=3)[0], processor.images([f"{file}#frame=3"])[0])
    with pytest.raises(UserError, match="scan.dcm has 3 frames, counted from 1; there is no frame 4"):
        processor.images([f"{file}#frame=4"])


def test_by_content_or_by_suffix(tmp_path):
    content = encoded(dataset(np.full((4, 4), 70, np.uint8)))
    (tmp_path / "scan.png").write_bytes(content)
    (tmp_path / "scan.DCM").write_bytes(content[132:])  # as before there were preambles
    for name in ("scan.png", "scan.DCM"):
        assert load_image(tmp_path / name).getpixel((0, 0)) == (70, 70, 70)
    with pytest.raises(UserError, match="is not an image that Pillow can read"):
        load_image(content[132:])


@pytest.mark.parametrize("change, sentence", [
    (dict(Rows=60000, Columns=60000), "has 60000 x 60000 pixels a frame; 1 to 178956970 were expected"), (dict(Rows=0), "has 4 x 0 pixels"),
    (dict(PhotometricInterpretation="HSV"), "photometric interpretation HSV; one of MONOCHROME1"),
    (dict(Rows=40), "pixel data are shorter than its rows"), (dict(NumberOfFrames=0), None),
    (dict(BitsAllocated=7), "cannot be read as a DICOM image")])
def test_headers_that_make_no_sense(change, sentence):
    ds = dataset(np.full((4, 4), 70, np.uint8), **change)
    if sentence is None:
        assert (shown(ds) == 70).all()
        return
    with pytest.raises(UserError, match=sentence) as error:
        shown(ds)
    assert "\n" not in str(error.value)


def compressed(syntax, stream):
    ds = dataset(np.full((4, 4), 70, np.uint8))
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].is_undefined_length = True
    return ds


@pytest.mark.parametrize("syntax, kind", [
    ("1.2.840.10008.1.2.4.102", "MPEG-4 AVC/H.264 High Profile / Level 4.1"), ("1.2.840.10008.1.2.4.94", "JPIP Referenced")])
def test_video_and_pixels_that_lie_elsewhere(syntax, kind):
    with pytest.raises(UserError) as error:
        load_image(encoded(compressed(syntax, b"1234")))
    assert f"is compressed as {kind}, which pydicom does not decode" in str(error.value)


def test_a_stream_of_more_pixels_than_its_header_says():
    data = bytearray((FOLDER / "MR_small_jp2klossless.dcm").read_bytes())
    start = data.find(b"\xff\x4f\xff\x51")
    for place in (8, 12, 24, 28):  # SIZ: the grid and the tile
        data[start + place:start + place + 4] = (50000).to_bytes(4, "big")
    with pytest.raises(UserError, match="has a compressed stream of 50000 x 50000 pixels; at most 178956970 were expected"):
        load_image(bytes(data))


def test_a_decoder_that_breaks_down_is_one_sentence(monkeypatch):
    """GDCM runs in a process of its own, which here ends as if by its own bug."""
    monkeypatch.setattr("llavamed_jax.images.dicom._APART", "import os; os.abort()")
    with pytest.raises(UserError, match="cannot be read as a DICOM image: its decoder crashed"):
        load_image(FOLDER / "SC_rgb_jpeg_gdcm.dcm")


def test_all_files_of_pydicom_are_in_the_tables():
    assert {f.name for f in FOLDER.glob("*.dcm")} == SHOWN.keys() | NOT_SHOWN.keys()


@pytest.mark.parametrize("name", SHOWN)
def test_pydicoms_files_are_shown(name):
    pytest.importorskip("gdcm", reason="python-gdcm, of the extra [medical], is not installed")
    image = load_image(FOLDER / name)
    header = pydicom.dcmread(FOLDER / name, stop_before_pixels=True)
    assert image.mode == "RGB" and image.size == (header.Columns, header.Rows)
    assert np.asarray(image).mean() == pytest.approx(SHOWN[name], abs=0.3)


@pytest.mark.parametrize("name", NOT_SHOWN)
def test_pydicoms_other_files_are_one_sentence(name):
    with pytest.raises(UserError, match=NOT_SHOWN[name]) as error:
        load_image(FOLDER / name)
    assert str(error.value).count(name) == 1 and "\n" not in str(error.value)


def test_pydicoms_other_folders_are_images_or_one_sentence():
    """Slices with and without their pixels, directories of them, one picture in many character sets, palettes alone."""
    outcomes = {"image": 0, "sentence": 0}
    for folder in ("test_files/dicomdirtests", "charset_files", "palettes"):
        for file in sorted(f for f in (FOLDER.parent / folder).rglob("*") if f.is_file()):
            try:
                assert load_image(file).mode == "RGB"
                outcomes["image"] += 1
            except UserError as error:
                outcomes["sentence"] += 1
                assert "\n" not in str(error) and file.name in str(error)
    assert outcomes["image"] > 40 and outcomes["sentence"] > 70


def test_encodings_of_one_image_are_one_image():
    """MR_small in ten transfer syntaxes and byte orders, and the colour bars in lossless ones."""
    reference = np.asarray(load_image(FOLDER / "MR_small.dcm"))
    for name in [n for n in SHOWN if n.startswith("MR_small_")]:
        np.testing.assert_array_equal(load_image(FOLDER / name), reference)
    bars = np.asarray(load_image(FOLDER / "SC_rgb_rle.dcm"))
    for name in ("SC_rgb_gdcm_KY.dcm", "SC_rgb_rle_16bit.dcm", "SC_rgb_rle_32bit.dcm", "SC_rgb_rle_2frame.dcm"):
        np.testing.assert_array_equal(load_image(FOLDER / name), bars)
    assert bars[5, 50].tolist() == [255, 0, 0] and bars[25, 50].tolist() == [0, 255, 0] and bars[45, 50].tolist() == [0, 0, 255]


@pytest.mark.parametrize("name", ["CT_small.dcm", "SC_rgb_rle.dcm", "SC_rgb_small_odd_jpeg.dcm", "rtdose_1frame.dcm", "liver_1frame.dcm"])
def test_damaged_files_are_an_image_or_one_sentence(name):
    rng, whole = np.random.default_rng(0), (FOLDER / name).read_bytes()
    damaged = [whole[:len(whole) * i // 15] for i in range(1, 15)]
    damaged += [changed(whole, rng.integers(132, min(len(whole), 3000), 5), rng.integers(0, 256, 5)) for _ in range(15)]
    sentences(damaged)


def test_deflated_files_are_read_up_to_a_size(tmp_path):
    whole = (FOLDER / "image_dfl.dcm").read_bytes()
    with pytest.raises(UserError, match="is a deflated file of .* bytes; at most 1048576 were expected"):
        load_image(whole + b"\0" * 2**20)


def test_the_size_of_deflated_files_is_checked_wherever_they_say_so(monkeypatch):
    """The version stands before the transfer syntax, and may be of any length."""
    monkeypatch.setattr(dicom_deflated, "MAX_DEFLATED", 20_000)
    monkeypatch.setattr(dicom_deflated, "MAX_INFLATED", 100_000)
    ds = dataset(np.zeros((300, 300), np.uint8), syntax=DeflatedExplicitVRLittleEndian)
    assert shown(ds).shape == (300, 300)
    ds.file_meta.FileMetaInformationVersion = b"\0" * 9_000
    assert shown(ds).shape == (300, 300)
    ds.file_meta.FileMetaInformationVersion = b"\0" * 30_000
    with pytest.raises(UserError, match=r"is a deflated file of 3\d{4} bytes; at most 20000 were expected"):
        shown(ds)
    with pytest.raises(UserError, match="is a deflated file of more than 100000 bytes"):
        shown(dataset(np.zeros((400, 400), np.uint8), syntax=DeflatedExplicitVRLittleEndian))
    assert shown(dataset(np.zeros((400, 400), np.uint8))).shape == (400, 400)


def test_a_header_without_types_may_say_that_a_file_is_deflated(monkeypatch):
    """pydicom reads such a header, against the standard."""
    uid = DeflatedExplicitVRLittleEndian.encode() + b"\0" * (len(DeflatedExplicitVRLittleEndian) % 2)
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    content = deflater.compress(b"\x28\x00\x10\x00US\x02\x00\x04\x00" + b"\0" * 10**6) + deflater.flush()
    file = io.BytesIO(bytes(128) + b"DICM" + struct.pack("<HHI", 2, 0x10, len(uid)) + uid + content)
    assert pydicom.dcmread(file).file_meta.TransferSyntaxUID == DeflatedExplicitVRLittleEndian
    dicom_deflated.check_deflated(file, "x.dcm")
    monkeypatch.setattr(dicom_deflated, "MAX_INFLATED", 100_000)
    with pytest.raises(UserError, match="x.dcm is a deflated file of more than 100000 bytes"):
        dicom_deflated.check_deflated(file, "x.dcm")


def test_without_pydicom_one_sentence_says_what_to_install(tmp_path):
    file = tmp_path / "scan.dcm"
    file.write_bytes(encoded(dataset(np.full((4, 4), 70, np.uint8))))
    code = ("import sys; sys.modules['pydicom'] = None\n"
            "from llavamed_jax.images.load import load_image\n"
            f"load_image({str(file)!r})")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert last.endswith("is DICOM, which needs pydicom: pip install 'llavamed-jax[medical]'") and "UserError" in last


def test_without_a_decoder_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("pydicom.pixels.decoders.base.Decoder.is_available", property(lambda self: False))
    with pytest.raises(UserError, match=r"as JPEG-LS Lossless .*needs another decoder: pip install 'llavamed-jax\[medical\]'"):
        load_image(FOLDER / "MR_small_jpeg_ls_lossless.dcm")


def test_what_is_returned_before_it_is_rgb():
    with open(FOLDER / "CT_small.dcm", "rb") as file:
        assert read_dicom(file, "x").mode == "L"
