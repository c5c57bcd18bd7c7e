"""Elements of DICOM headers as scanners and anonymisers leave them: empty, padded, of several values, out of range, no numbers."""

import numpy as np
import pytest

pydicom = pytest.importorskip("pydicom", reason="pydicom, the extra [medical], is not installed")

from pydicom.dataset import Dataset  # noqa: E402
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian  # noqa: E402

from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.images.dicom import _KEYWORDS  # noqa: E402
from llavamed_jax.images.load import load_image  # noqa: E402
from tests.support.dicom_files import HOUNSFIELD, RAMP, dataset, encoded, shown  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # pydicom's, on values that are wrong on purpose
WINDOW = dict(WindowCenter=2000, WindowWidth=3000)
SYNTAXES = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
NEEDED = {"Rows": "holds no DICOM image", "Columns": "holds no DICOM image",
          "PhotometricInterpretation": r"has no \(0028,0004\) Photometric Interpretation; one of MONOCHROME1",
          "BitsAllocated": r"Missing required element: \(0028,0100\) 'Bits Allocated'"}


def linear(x, center, width):
    """PS3.3 C.11.2.1.2.1."""
    return np.clip((x - (center - 0.5)) / (width - 1) + 0.5, 0, 1) * 255


def near(found, wanted):
    return np.abs(found - wanted).max() <= 0.5 + 1e-6


def item(**elements):
    ds = Dataset()
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    for keyword in ("LUTDescriptor", "LUTData"):
        if keyword in elements:
            value = elements[keyword]
            ds[keyword].VR = "OW" if isinstance(value, bytes) else "US" if value is None or np.min(value) >= 0 else "SS"
    return ds


def without(keyword, **arguments):
    ds = dataset(RAMP, bits=12, **arguments)
    if keyword in ds:
        del ds[keyword]
    return ds


@pytest.mark.parametrize("keyword", _KEYWORDS)
@pytest.mark.parametrize("syntax", SYNTAXES)
def test_an_empty_element_is_as_one_that_is_absent(syntax, keyword):
    for elements in ({}, WINDOW, {**HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 400, "VOILUTFunction": "SIGMOID"}):
        arguments = dict(syntax=syntax, **elements)
        empty = dataset(RAMP, bits=12, **arguments)
        setattr(empty, keyword, [] if keyword.endswith("Sequence") else None)
        if keyword in NEEDED:
            for ds in (empty, without(keyword, **arguments)):
                with pytest.raises(UserError, match=NEEDED[keyword]):
                    shown(ds)
        else:
            np.testing.assert_array_equal(shown(empty), shown(without(keyword, **arguments)))


@pytest.mark.parametrize("keyword, written", [
    ("WindowCenter", 200), ("WindowWidth", 300), ("RescaleSlope", 2), ("RescaleIntercept", 10),
    ("VOILUTFunction", "SIGMOID"),
    ("NumberOfFrames", 1)])
@pytest.mark.parametrize("padding", [b" ", b"\0", b"\\"])
def test_a_text_of_padding_alone_is_empty(keyword, written, padding):
    elements = {**WINDOW, "RescaleSlope": 1, "RescaleIntercept": 0}
    text = ("12345678" if keyword != "VOILUTFunction" else "SIGMOIDS")
    content = encoded(dataset(RAMP, bits=12, **{**elements, keyword: text}))
    assert content.count(text.encode()) == 1
    np.testing.assert_array_equal(shown(content.replace(text.encode(), padding * 8)),
                                  shown(without(keyword, **elements)))
    value = str(written).encode()
    np.testing.assert_array_equal(shown(content.replace(text.encode(), value.ljust(8, b" "))),
                                  shown(dataset(RAMP, bits=12, **{**elements, keyword: written})))


@pytest.mark.parametrize("one, several", [
    (dict(RescaleSlope=2), dict(RescaleSlope=[2, 3])), (dict(RescaleIntercept=-50), dict(RescaleIntercept=[-50, 7])),
    (dict(), dict(NumberOfFrames=["1", "1"])), (dict(), dict(Rows=[16, 99])), (dict(), dict(SamplesPerPixel=[1, 3])),
    (dict(VOILUTFunction="SIGMOID"), dict(VOILUTFunction=["SIGMOID", "LINEAR"])),
    (dict(VOILUTFunction="SIGMOID"), dict(VOILUTFunction="sigmoid")),
    (dict(), dict(PhotometricInterpretation=["MONOCHROME2", "RGB"])), (dict(), dict(BitsStored=[12, 8])),
    (dict(WindowCenter=300, WindowWidth=200), dict(WindowCenter=["", 300, 90], WindowWidth=[100, 200, 80])),
    (dict(WindowCenter=300, WindowWidth=200), dict(WindowCenter=[100, 300], WindowWidth=[0, 200])),
    (dict(WindowCenter=300, WindowWidth=200), dict(WindowCenter=[300, 100], WindowWidth=200)),
    (dict(), dict(PixelPaddingValue=[0, 5]))])
def test_of_several_values_the_first_usable_one_counts(one, several):
    plain = {} if "WindowCenter" in one else WINDOW
    rescale = {} if not {*one} & {"RescaleSlope", "RescaleIntercept"} else {"RescaleSlope": 1, "RescaleIntercept": 0}
    wanted = shown(dataset(RAMP, bits=12, **{**plain, **rescale, **one}))
    np.testing.assert_array_equal(shown(dataset(RAMP, bits=12, **{**plain, **rescale, **several})), wanted)


def test_slope_and_intercept_each_have_their_default():
    """One alone counts, and a slope of 0 counts for nothing, as viewers have it."""
    x = RAMP.astype(float)
    assert near(shown(dataset(RAMP, bits=12, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)),
                linear(x - 1024, 40, 400))
    assert near(shown(dataset(RAMP, bits=12, RescaleSlope=2, **WINDOW)), linear(2 * x, 2000, 3000))
    assert near(shown(dataset(RAMP, bits=12, RescaleSlope=0, RescaleIntercept=9, **WINDOW)), linear(x, 2000, 3000))
    assert near(shown(dataset(RAMP, bits=12, RescaleSlope=-1, RescaleIntercept=4095)),
                255 - shown(dataset(RAMP, bits=12)))


@pytest.mark.parametrize("elements", [
    dict(WindowWidth=0), dict(WindowWidth=-400), dict(WindowWidth="NaN"), dict(WindowWidth="inf"),
    dict(WindowCenter="NaN"),
    dict(WindowCenter="-inf"), dict(WindowWidth=None), dict(WindowCenter=None),
    dict(WindowWidth=0, VOILUTFunction="LINEAR_EXACT"),
    dict(WindowWidth=-1, VOILUTFunction="SIGMOID")])
def test_what_is_no_window_is_as_none(elements):
    with pydicom.config.disable_value_validation():
        ds = dataset(RAMP, bits=12, **{**WINDOW, **elements})
        np.testing.assert_array_equal(shown(ds), shown(dataset(RAMP, bits=12)))


@pytest.mark.parametrize("function, width, curve", [
    ("LINEAR", 1, lambda x: x > 0.1 - 0.5), (None, 0.999, lambda x: np.clip((x - 0.1) / 0.999 + 0.5, 0, 1)),
    ("LINEAR", 0.25, lambda x: np.clip((x - 0.1) / 0.25 + 0.5, 0, 1)),
    ("LINEAR_EXACT", 0.25, lambda x: np.clip((x - 0.1) / 0.25 + 0.5, 0, 1)),
    ("SIGMOID", 0.25, lambda x: 1 / (1 + np.exp(-4 * (x - 0.1) / 0.25))),
    ("LINEAR", 1.5, lambda x: np.clip((x + 0.4) / 0.5 + 0.5, 0, 1)),
    ("LINEAR", 1e12, lambda x: np.full(x.shape, 0.5)), ("SIGMOID", 1e-300, lambda x: x > 0.1)])
def test_narrow_and_wide_windows(function, width, curve):
    """Values from -1 to 1. Between 0 and 1 LINEAR has no width, and viewers take LINEAR_EXACT."""
    ds = dataset(RAMP, bits=12, RescaleSlope=2 / 4095, RescaleIntercept=-1, WindowCenter=0.1, WindowWidth=width,
                 VOILUTFunction=function)
    assert near(shown(ds), 255 * curve(RAMP * (2 / 4095) - 1).astype(float))


@pytest.mark.parametrize("elements, sentence", [
    (dict(VOILUTFunction="CUBIC"), r"has \(0028,1056\) VOI LUT Function 'CUBIC'; LINEAR, LINEAR_EXACT or SIGMOID"),
    (dict(RescaleSlope="NaN", RescaleIntercept=0), r"has \(0028,1053\) Rescale Slope nan; a finite number"),
    (dict(RescaleSlope=1, RescaleIntercept="-inf"), r"has \(0028,1052\) Rescale Intercept -inf; a finite number"),
    (dict(NumberOfFrames=-1), "has -1 frame"), (dict(BitsStored=99), r"\(0028,0101\) 'Bits Stored' value of '99'"),
    (dict(PixelRepresentation=7), r"\(0028,0103\) 'Pixel Representation' value of '7'"),
    (dict(BitsAllocated=7), r"\(0028,0100\) 'Bits Allocated' value of '7'"),
    (dict(SamplesPerPixel=2), r"\(0028,0002\) 'Samples per Pixel' value of '2'"),
    (dict(SamplesPerPixel=3), "shorter than its rows"), (dict(Rows=0), "has 16 x 0 pixels"),
    (dict(PixelData=b""), "cannot be read as a DICOM image: [^']*$")])
def test_what_cannot_be_shown_is_one_sentence_in_dicoms_words(elements, sentence):
    with pydicom.config.disable_value_validation(), pytest.raises(UserError, match=sentence) as error:
        shown(dataset(RAMP, bits=12, **{**WINDOW, **elements}))
    assert not any(word in str(error.value) for word in ("NoneType", "object", "operand", "invalid literal", "\n"))


def test_what_no_terminal_should_be_sent_is_escaped():
    content = encoded(dataset(RAMP, bits=12, **WINDOW))
    for old, new, sentence in ((b"MONOCHROME2 ", b"MON\x1b[2JROME2", r"interpretation MON\\x1b\[2JROME2; one of"),
                               (b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2\x1b1\0", r"as 1.2.840.10008.1.2\\x1b1, which")):
        with pytest.raises(UserError, match=sentence) as error:
            shown(content.replace(old, new))
        assert str(error.value).isprintable()


@pytest.mark.parametrize("keyword, called", [
    ("WindowCenter", r"\(0028,1050\) Window Center"), ("WindowWidth", r"\(0028,1051\) Window Width"),
    ("RescaleSlope", r"\(0028,1053\) Rescale Slope"), ("NumberOfFrames", r"\(0028,0008\) Number of Frames")])
@pytest.mark.parametrize("written", [b"abcdefgh", b"1234,678", b"12 45678", b"--------"])
def test_texts_that_are_no_numbers_name_their_element(keyword, called, written):
    content = encoded(dataset(RAMP, bits=12,
                              **{**WINDOW, "RescaleSlope": 1, "RescaleIntercept": 0, keyword: "12345678"}))
    with pytest.raises(UserError, match=f"has {called} '{written.decode()}'; a number was expected"):
        shown(content.replace(b"12345678", written))


# ---- lookup tables

TABLE = (np.arange(4096) ** 2 // 4095).astype(int)
EMPTY_ITEMS = [item(), item(LUTDescriptor=None, LUTData=None), item(LUTDescriptor=[4096, 0, 12], LUTData=None),
               item(LUTDescriptor=None, LUTData=[1, 2]), item(LUTExplanation="nothing")]


@pytest.mark.parametrize("number", range(len(EMPTY_ITEMS)))
@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("keyword", ["ModalityLUTSequence", "VOILUTSequence"])
def test_an_item_without_a_table_is_passed_over(keyword, syntax, number):
    elements = dict(syntax=syntax, **HOUNSFIELD, WindowCenter=40, WindowWidth=400)
    empty = dataset(RAMP, bits=12, **{keyword: [EMPTY_ITEMS[number]]}, **elements)
    np.testing.assert_array_equal(shown(empty), shown(dataset(RAMP, bits=12, **elements)))
    table = item(LUTDescriptor=[4096, 0, 12], LUTData=TABLE.tolist(), ModalityLUTType="US")
    alone, behind = (dataset(RAMP, bits=12, syntax=syntax, **{keyword: tables})
                     for tables in ([table], [EMPTY_ITEMS[number], table]))
    np.testing.assert_array_equal(shown(behind), shown(alone))
    low, high = TABLE[RAMP].min(), TABLE[RAMP].max()
    assert near(shown(alone), (TABLE[RAMP] - low) / (high - low) * 255)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_how_the_entries_of_a_table_lie_in_a_file(syntax):
    """Words as US and as OW, bytes packed in words, fewer values than the frame has, and a bit depth that says nothing."""
    words = TABLE.astype("<u2" if syntax.is_little_endian else ">u2").tobytes()
    packed, wanted = (TABLE >> 4).astype("<u2"), TABLE[RAMP] / 4095 * 255

    def found(count, first, bits, entries):
        table = item(LUTDescriptor=[count, first, bits], LUTData=entries)
        return shown(dataset(RAMP, bits=12, syntax=syntax, VOILUTSequence=[table]))

    for entries in (TABLE.tolist(), words):
        assert near(found(4096, 0, 12, entries), wanted)
    assert near(found(4096, 0, 8, (packed[::2] | packed[1::2] << 8).tolist()), (TABLE >> 4)[RAMP])
    some = TABLE[np.clip(RAMP.astype(int) - 512, 0, 1023)] / 4095 * 255
    assert near(found(1024, 512, 12, TABLE[:1024].tolist()), some)
    for bits in (0, 255, 8):  # no depth, none that exists, and one that is too small for the entries
        assert near(found(4096, 0, bits, TABLE.tolist()), wanted)


@pytest.mark.parametrize("first", [-1024, 64512])
def test_a_table_of_values_below_zero(first):
    """The first mapped value of signed values, as SS and as US, which holds its bits."""
    table = item(LUTDescriptor=[4096, first, 12], LUTData=TABLE.tolist())
    table["LUTDescriptor"].VR = "SS" if first < 0 else "US"
    assert near(shown(dataset(RAMP, bits=12, VOILUTSequence=[table], **HOUNSFIELD)), TABLE[RAMP] / 4095 * 255)


@pytest.mark.parametrize("table, sentence", [
    (item(LUTDescriptor=[4096, 0], LUTData=TABLE.tolist()),
     r"has \(0028,3002\) LUT Descriptor \[4096, 0\]; three numbers"),
    (item(LUTDescriptor=[4096, 0, 12], LUTData=[1, 2, 3]),
     r"has 3 entries in \(0028,3006\) LUT Data; 4096 were expected")])
def test_tables_that_make_no_sense(table, sentence):
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        with pytest.raises(UserError, match=sentence):
            shown(dataset(RAMP, bits=12, **{keyword: [table]}))


# ---- functional groups


def group(voi=None, pixel=None):
    groups = dict(FrameVOILUTSequence=voi, PixelValueTransformationSequence=pixel)
    return item(**{keyword: items for keyword, items in groups.items() if items is not None})


HU = item(RescaleSlope=1, RescaleIntercept=-1024, RescaleType="HU")
BRAIN = item(WindowCenter=40, WindowWidth=400)
NO_WINDOW = item(WindowCenter=None, WindowWidth=None, VOILUTFunction=None)
NO_RESCALE = item(RescaleSlope=None, RescaleIntercept=None, RescaleType=None)


@pytest.mark.parametrize("own", [
    None, [], [group()], [group([], [])], [group([item()], [item()])],
    [group([NO_WINDOW], [NO_RESCALE])],
    [group([item(WindowCenter=700, WindowWidth=None)])], [group([item(WindowCenter=700, WindowWidth=0)])],
    [group([item(VOILUTSequence=[item()])])]])
@pytest.mark.parametrize("place", ["shared", "own"])
def test_empty_functional_groups_hide_nothing(own, place):
    """What a frame's own group lacks is in the group of all frames, and what both lack is in the file."""
    wanted = linear(RAMP - 1024.0, 40, 400)
    groups = {} if own is None else dict(PerFrameFunctionalGroupsSequence=own)
    if place == "shared":
        groups["SharedFunctionalGroupsSequence"] = [group([BRAIN], [HU])]
        assert near(shown(dataset(RAMP[None], bits=12, frames=1, **groups)), wanted)
    else:
        for shared in ({}, dict(SharedFunctionalGroupsSequence=own or [])):
            elements = {**groups, **shared, **HOUNSFIELD, "WindowCenter": 40, "WindowWidth": 400}
            assert near(shown(dataset(RAMP[None], bits=12, frames=1, **elements)), wanted)


def test_a_frames_own_group_goes_first():
    frames = np.stack([RAMP, RAMP])
    shared = group([item(WindowCenter=1000, WindowWidth=100)], [HU])
    own = [group([BRAIN]), group(pixel=[item(RescaleSlope=2, RescaleIntercept=0)])]
    ds = dataset(frames, bits=12, frames=2, SharedFunctionalGroupsSequence=[shared],
                 PerFrameFunctionalGroupsSequence=own, **WINDOW)
    assert near(shown(ds, 1), linear(RAMP - 1024.0, 40, 400))
    assert near(shown(ds, 2), linear(RAMP * 2.0, 1000, 100))
    table = item(LUTDescriptor=[4096, 0, 12], LUTData=TABLE.tolist())
    own = [group([item(VOILUTSequence=[table])])]
    ds = dataset(RAMP[None], bits=12, frames=1, PerFrameFunctionalGroupsSequence=own, **WINDOW)
    assert near(shown(ds), TABLE[RAMP] / 4095 * 255)


# ---- palettes


@pytest.mark.parametrize("change, sentence", [
    (dict(RedPaletteColorLookupTableDescriptor=None),
     r"has \(0028,1101\) Red Palette Color Lookup Table Descriptor None; three numbers"),
    (dict(GreenPaletteColorLookupTableData=None),
     r"is PALETTE COLOR without \(0028,1202\) Green Palette Color Lookup Table Data"),
    (dict(BluePaletteColorLookupTableData=b"12"), r"has 1 entries in \(0028,1203\) .* 256 were expected")])
def test_palettes_that_are_empty_or_short(change, sentence):
    with pytest.raises(UserError, match=sentence):
        shown(palette(**change))


def palette(scale=1, depth=16, count=256, index=None, **change):
    tables, colors = {}, np.random.default_rng(1).integers(0, 256, (3, count))
    for color, table in zip(("Red", "Green", "Blue"), colors):
        tables[f"{color}PaletteColorLookupTableDescriptor"] = [count, 0, depth]
        tables[f"{color}PaletteColorLookupTableData"] = (table * scale).astype("<u2" if depth == 16 else "u1").tobytes()
    index = np.arange(256, dtype=np.uint8).reshape(16, 16) if index is None else index
    return dataset(index, "PALETTE COLOR", **{**tables, **change})


def test_palettes_of_every_depth():
    """Sixteen bits in full; sixteen bits that hold eight, as many writers have it; eight bits, also of more than 256 colours."""
    colors = np.random.default_rng(1).integers(0, 256, (3, 256))
    for ds in (palette(257), palette(1), palette(1, 8),
               palette(1, 8, RedPaletteColorLookupTableDescriptor=[256, 0, 16])):
        np.testing.assert_array_equal(shown(ds).ravel(), colors[0])
    many, index = np.random.default_rng(1).integers(0, 256, (3, 4096)), RAMP
    np.testing.assert_array_equal(shown(palette(1, 8, 4096, index)), many[0][RAMP])
    segmented = {f"{color}PaletteColorLookupTableData": None for color in ("Red", "Green", "Blue")}
    segmented |= {f"Segmented{keyword}": np.array([0, 256, *range(0, 65536, 256)], "<u2").tobytes()
                  for keyword in segmented}
    np.testing.assert_array_equal(shown(palette(1, 16, **segmented)).ravel(), np.arange(256))


# ---- what stored values are


@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
@pytest.mark.parametrize("is_signed", [False, True])
@pytest.mark.parametrize("has_window", [False, True])
def test_polarity_and_depth(interpretation, bits, is_signed, has_window):
    """A ramp over all values of the bits is a ramp from black to white, or from white to black: 1 is the one whose 0 is white."""
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if is_signed else (0, 2**bits - 1)
    values = np.rint(np.linspace(low, high, 256)).reshape(16,
                                                          16).astype(("i" if is_signed else "u") + ("1" if bits == 8
                                                                                                    else "2"))
    window = dict(WindowCenter=(low + high + 1) / 2, WindowWidth=high - low + 1) if has_window else {}
    for syntax in SYNTAXES:
        found = shown(dataset(values, interpretation, bits=bits, syntax=syntax, **window))
        wanted = (values.astype(float) - low) / (high - low) * 255
        assert near(found, 255 - wanted if interpretation == "MONOCHROME1" else wanted)


@pytest.mark.parametrize("highest", [255, 1023, 4095, 65535])
def test_colours_of_sixteen_bits_are_those_that_are_used(highest):
    """As in PNG and TIFF, where the header says nothing but how the samples lie. One that says the depth is believed."""
    ramp = np.rint(np.linspace(0, highest, 256)).astype(np.uint16).reshape(16, 16)
    used = highest.bit_length()
    rgb = np.stack([ramp, ramp[::-1], ramp // 2], -1)
    np.testing.assert_array_equal(load_image(encoded(dataset(rgb, "RGB", bits=16))), rgb >> used - 8)
    tables = {f"{color}PaletteColorLookupTable{part}": value for color in ("Red", "Green", "Blue")
              for part, value in (("Descriptor", [256, 0, 16]), ("Data", ramp.astype("<u2").tobytes()))}
    index = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(shown(dataset(index, "PALETTE COLOR", **tables)), ramp >> used - 8)
    for stated in {10, 12} - set(range(used)):
        np.testing.assert_array_equal(load_image(encoded(dataset(rgb, "RGB", bits=stated))), rgb >> stated - 8)


@pytest.mark.parametrize("is_signed", [False, True])
def test_bits_beside_the_stored_ones_are_not_shown(is_signed):
    """HighBit 15 of 12 bits: values lie at the upper end of a word. HighBit 11: what stands above it is an overlay's."""
    values = (RAMP.astype(int) - 2048 * is_signed).astype(np.int16 if is_signed else np.uint16)
    wanted = shown(dataset(values, bits=12, **WINDOW))
    upper = dataset(values * 16, bits=12, HighBit=15, **WINDOW)
    np.testing.assert_array_equal(shown(upper), wanted)
    middle = dataset(values * 4, bits=12, HighBit=13, **WINDOW)
    np.testing.assert_array_equal(shown(middle), wanted)
    if not is_signed:
        np.testing.assert_array_equal(shown(dataset(values | 0xA000, bits=12, **WINDOW)), wanted)
    upper.compress(pydicom.uid.RLELossless)
    np.testing.assert_array_equal(shown(upper), wanted)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("interpretation", ["MONOCHROME1", "MONOCHROME2"])
def test_floating_point_pixels(kind, interpretation):
    values = np.linspace(-0.5, 1.5, 256).reshape(16, 16).astype(kind)
    turn = (lambda x: 255 - x) if interpretation == "MONOCHROME1" else (lambda x: x)
    assert near(shown(dataset(values, interpretation)), turn((values + 0.5) / 2 * 255))
    window = dict(WindowCenter=0.5, WindowWidth=0.5)
    assert near(shown(dataset(values, interpretation, **window)), turn(np.clip((values - 0.5) / 0.5 + 0.5, 0, 1) * 255))
    rescaled = dict(RescaleSlope=10, RescaleIntercept=5, WindowCenter=10, WindowWidth=5, VOILUTFunction="LINEAR_EXACT")
    assert near(shown(dataset(values, interpretation, **rescaled)),
                turn(np.clip((values - 0.5) / 0.5 + 0.5, 0, 1) * 255))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("window", [{}, dict(WindowCenter=0.5, WindowWidth=2),
                                    dict(RescaleSlope=2, RescaleIntercept=1)])
def test_values_that_are_not_finite(value, window):
    """Refused with and without a window, unless the file says that they stand for no pixel: then they are shown black."""
    values = np.linspace(-0.5, 1.5, 256).reshape(16, 16).astype(np.float32)
    wanted = shown(dataset(values, **window))
    values[:2] = value
    with pytest.raises(UserError, match="has pixel values that are NaN or infinite"):
        shown(dataset(values, **window))
    values[2:3, 0] = -0.5  # so that the rest spans the same
    found = shown(dataset(values, FloatPixelPaddingValue=float(value), **window))
    assert (found[:2] == 0).all() and (found[3:] == wanted[3:]).mean() > (0.9 if window.get("WindowWidth") else 0)


def test_padding_of_signed_values_written_as_unsigned():
    stored = RAMP.astype(np.int16) // 4 + 100
    stored[:2] = -2000
    for padding in (-2000, 63536):
        ds = dataset(stored, PixelPaddingValue=-2000)
        ds["PixelPaddingValue"].VR = "SS" if padding < 0 else "US"
        ds["PixelPaddingValue"].value = padding
        low, high = stored[2:].min(), stored[2:].max()
        assert near(shown(ds), np.clip((stored - low) / (high - low), 0, 1) * 255)
    for limit in (None, -1500):
        ds = dataset(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=limit)
        assert near(shown(ds), np.clip((stored - low) / (high - low), 0, 1) * 255)


def test_values_between_padding_and_its_limit_stand_for_no_pixel():
    """The two ends may be in either order, and the values between them are of no scale."""
    stored = RAMP.astype(np.int16) // 4 + 100
    low, high = stored[2:].min(), stored[2:].max()
    wanted = np.clip((stored - low) / (high - low), 0, 1) * 255
    wanted[:2] = 0
    stored[0], stored[1, ::2], stored[1, 1::2] = -2000, -1700, -1500
    for first, last in ((-2000, -1500), (-1500, -2000)):
        found = shown(dataset(stored, PixelPaddingValue=first, PixelPaddingRangeLimit=last))
        assert near(found[2:], wanted[2:]) and not found[:2].any()
    beyond = shown(dataset(stored, PixelPaddingValue=-2000, PixelPaddingRangeLimit=-1600))
    assert beyond[2:].min() > 100, "-1500 is a value like the others"


@pytest.mark.parametrize("window", [{}, WINDOW])
def test_a_frame_of_padding_alone_is_shown_as_it_is(window):
    stored = np.full((16, 16), 40, np.uint16)
    found = shown(dataset(stored, bits=12, PixelPaddingValue=40, **window))
    np.testing.assert_array_equal(found, shown(dataset(stored, bits=12, **window)))
