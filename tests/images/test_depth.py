"""Ramps in every mode, depth and polarity: each is the picture that its format says, whatever Pillow makes of it."""

import base64
import io

import numpy as np
import PIL
import pytest
from PIL import Image

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image
from tests.support.damage import sentences
from tests.support.wide_files import png, pnm, tiff

RAMP = np.tile(np.arange(256), (20, 1))


def ramp(bits, kind="u"):
    """A ramp [20,256] over the values of so many bits, of signed kinds from 0."""
    highest = 2 ** (bits - (kind == "i")) - 1
    width = next(n for n in (8, 16, 32) if bits <= n) // 8
    return np.rint(RAMP / 255 * highest).astype(f"{kind}{width}")


def eight(values, bits):
    """What is shown of them: up to eight bits spread over 0 … 255, of more the upper eight of those that are used."""
    if bits < 8:
        return np.asarray(values).astype(int) * 255 // (2**bits - 1)
    return np.asarray(values).astype(np.int64) >> max(0, int(np.max(values)).bit_length() - 8)


def grey(content, **arguments):
    shown = np.asarray(load_image(content, **arguments)).astype(int)
    assert (shown == shown[..., :1]).all()
    return shown[..., 0]


TIFFS = [(1, "u"), (2, "u"), (4, "u"), (8, "u"), (12, "u"), (16, "u"), (32, "u"), (8, "i"), (16, "i"), (32, "i")]


@pytest.mark.parametrize("bits, kind", TIFFS)
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("layout", [dict(), dict(compression=8), dict(tile=16), dict(tile=16, compression=8),
                                    dict(is_big=True), dict(is_big=True, compression=8)])
def test_grey_tiff(bits, kind, photometric, order, layout):
    """PhotometricInterpretation 0: 0 is white. What Pillow has no mode for is one sentence, never another picture."""
    values = ramp(bits, kind)
    content = tiff(values, photometric, order, bits=bits, **layout)
    wanted = eight(values, bits) if photometric else 255 - eight(values, bits)
    has_no_mode = order == ">" and (layout.get("is_big") or (bits, kind) in ((12, "u"), (32, "u")))
    if has_no_mode or bits == 12 and layout.get("tile"):
        try:
            np.testing.assert_array_equal(grey(content), wanted)
        except UserError as error:
            assert "is not an image that Pillow can read" in str(error) or "is damaged" in str(error)
        return
    np.testing.assert_array_equal(grey(content), wanted)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_tiff_whose_bits_are_turned(bits, photometric):
    """FillOrder 2: the lowest bit of a byte is its first pixel's."""
    wanted = eight(ramp(bits), bits)
    found = grey(tiff(ramp(bits), photometric, bits=bits, fill=2))
    np.testing.assert_array_equal(found, wanted if photometric else 255 - wanted)


@pytest.mark.parametrize("highest, lost", [(1, 0), (255, 0), (256, 1), (4095, 4), (65535, 8)])
def test_a_negative_loses_the_bits_that_its_positive_loses(highest, lost):
    values = np.linspace(0, highest, 256).astype(np.uint16)[None].repeat(3, 0)
    positive, negative = (grey(tiff(values, photometric)) for photometric in (1, 0))
    np.testing.assert_array_equal(positive, values >> lost)
    np.testing.assert_array_equal(negative, 255 - positive)


def test_a_tiff_that_does_not_say_what_its_zero_is():
    """As Pillow takes it at eight bits: white."""
    for values in (ramp(8), ramp(16)):
        np.testing.assert_array_equal(grey(tiff(values, None)), 255 - RAMP)


@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("compression, mode", [
    ("group3", "1"), ("group4", "1"), ("tiff_lzw", "1"), ("packbits", "L"), ("tiff_lzw", "L"), ("tiff_deflate", "L"),
    ("jpeg", "L"),
    ("tiff_lzw", "I;16"), ("tiff_adobe_deflate", "I;16"), ("packbits", "I;16"), ("zstd", "I;16"), ("lzma", "I;16")])
def test_compressed_tiff(photometric, compression, mode):
    """As Pillow writes them; the tag is then changed in the file, so that the same values have the other meaning."""
    values = {"1": RAMP > 127, "L": RAMP.astype(np.uint8), "I;16": (RAMP * 257).astype(np.uint16)}[mode]
    buffer = io.BytesIO()
    try:
        Image.fromarray(values).save(buffer, "TIFF", compression=compression)
    except (OSError, RuntimeError, KeyError):
        pytest.skip(f"this Pillow does not write {compression}")
    content = bytearray(buffer.getvalue())
    place = content.index(b"\x06\x01\x03\x00\x01\x00\x00\x00") + 8
    wanted = {"1": values * 255, "L": values, "I;16": values >> 8}[mode].astype(int)
    wanted = wanted if content[place] == photometric else 255 - wanted
    content[place] = photometric
    assert np.abs(grey(bytes(content)) - wanted).max() <= (3 if compression == "jpeg" else 0)


def test_pages_of_different_kinds():
    """Each page is shown by its own tags, also where the first one is of a kind that Pillow does not open."""
    pages = [(ramp(8), 0), (ramp(16), 0), (ramp(16), 1), (ramp(8), 1), (ramp(32, "i"), 0)]
    for order in "<>":
        for first in range(len(pages)):
            turned = pages[first:] + pages[:first]
            content = tiff([values for values, _ in turned], 1, order)
            places = [i for i in range(len(content)) if content[i:i + 8] == tiff_entry(order)]
            content = bytearray(content)
            for place, (_, photometric) in zip(places, turned, strict=True):
                content[place + 8:place + 10] = photometric.to_bytes(2, "little" if order == "<" else "big")
            for i, (_, photometric) in enumerate(turned):
                found = grey(bytes(content), frame=i + 1)
                np.testing.assert_array_equal(found, RAMP if photometric else 255 - RAMP)
            with pytest.raises(UserError, match="has fewer than 6 frames"):
                load_image(bytes(content), 6)


def tiff_entry(order):
    return b"".join(n.to_bytes(size, "little" if order == "<" else "big") for n, size in ((262, 2), (3, 2), (1, 4)))


@pytest.mark.parametrize("photometric", [0, 1])
def test_grey_with_alpha_in_tiff(photometric):
    values = np.stack([RAMP, np.full(RAMP.shape, 255)], -1).astype(np.uint8)
    np.testing.assert_array_equal(grey(tiff(values, photometric, extra=2)), RAMP if photometric else 255 - RAMP)
    with pytest.raises(UserError, match="is not an image that Pillow can read"):
        load_image(tiff(values.astype(np.uint16) * 257, photometric, extra=2))


def colors(highest):
    """Three ramps [20,256,3] up to `highest`, of which the last is half as high."""
    return np.rint(np.stack([RAMP, RAMP[:, ::-1], RAMP // 2], -1) / 255 * highest).astype(np.uint16)


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("highest", [255, 1023, 4095, 65535])
@pytest.mark.parametrize("extra", [None, 0, 2])
@pytest.mark.parametrize("layout", [dict(), dict(compression=8), dict(planar=2), dict(tile=16),
                                    dict(tile=16, compression=8)])
def test_colour_tiff_of_sixteen_bits(order, highest, extra, layout):
    """As grey: 12 bits in 16 are as bright as 8 in 8; sixteen bits by their upper eight, as the originals show them."""
    values = colors(highest)
    stored = values if extra is None else np.concatenate([values, np.full_like(values[..., :1], 65535)], -1)
    try:
        shown = np.asarray(load_image(tiff(stored, 2, order, extra=extra, **layout)))
    except UserError:
        assert extra == 0 and int(PIL.__version__.partition(".")[0]) < 12, "older ones do not know every kind of padding"
        return
    np.testing.assert_array_equal(shown, eight(values, 16))


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey_png(bits, is_interlaced):
    np.testing.assert_array_equal(grey(png(ramp(bits), 0, bits, is_interlaced)), eight(ramp(bits), bits))
    transparent = png(ramp(bits), 0, bits, is_interlaced, [(b"tRNS", b"\0\1")])
    np.testing.assert_array_equal(grey(transparent), eight(ramp(bits), bits))


@pytest.mark.parametrize("is_interlaced", [False, True])
@pytest.mark.parametrize("alpha", [0, 257, 65535])
@pytest.mark.parametrize("highest", [255, 1023, 4095, 65535])
def test_png_of_sixteen_bits(highest, alpha, is_interlaced):
    """Grey, grey with alpha, colour and colour with alpha of the same values are the same picture; alpha is dropped."""
    values, rgb = colors(highest)[..., 0], colors(highest)
    opaque = np.full((*values.shape, 1), alpha, np.uint16)
    wanted = eight(values, 16)
    np.testing.assert_array_equal(grey(png(values, 0, 16, is_interlaced)), wanted)
    np.testing.assert_array_equal(grey(png(np.concatenate([values[..., None], opaque], -1), 4, 16, is_interlaced)),
                                  wanted)
    np.testing.assert_array_equal(grey(png(np.stack([values] * 3, -1), 2, 16, is_interlaced)), wanted)
    np.testing.assert_array_equal(load_image(png(rgb, 2, 16, is_interlaced)), eight(rgb, 16))
    np.testing.assert_array_equal(load_image(png(np.concatenate([rgb, opaque], -1), 6, 16, is_interlaced)),
                                  eight(rgb, 16))


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_palettes(bits):
    table = np.random.default_rng(0).integers(0, 256, (2**bits, 3), dtype=np.uint8)
    index = np.tile(np.arange(2**bits), (4, 3)).astype(np.uint8)
    for extra in ([], [(b"tRNS", bytes(2**bits))]):
        found = load_image(png(index, 3, bits, False, [(b"PLTE", table.tobytes()), *extra]))
        np.testing.assert_array_equal(found, table[index])


@pytest.mark.parametrize("is_plain", [False, True])
@pytest.mark.parametrize("highest", [1, 15, 255, 1023, 4095, 65535])
def test_pgm_and_ppm(highest, is_plain):
    """White is the highest value that the file names."""
    values, rgb = np.rint(RAMP / 255 * highest).astype(int), colors(highest).astype(int)
    assert np.abs(grey(pnm(values, highest, is_plain)) - values * 255 / highest).max() <= 1
    assert np.abs(np.asarray(load_image(pnm(rgb, highest, is_plain))) - rgb * 255 / highest).max() <= 1
    twelve = np.rint(RAMP / 255 * 4095).astype(int)
    np.testing.assert_array_equal(grey(pnm(twelve, 65535, is_plain)), twelve >> 4)
    np.testing.assert_array_equal(grey(pnm(np.stack([twelve] * 3, -1), 65535, is_plain)), twelve >> 4)


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_jpeg_2000(bits):
    values = ramp(bits)
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "JPEG2000", irreversible=False)
    np.testing.assert_array_equal(grey(buffer.getvalue()), eight(values, bits))


@pytest.mark.parametrize("bits", [10, 12, 16])
def test_jpeg_2000_says_how_many_bits_it_has(bits):
    openjpeg = pytest.importorskip("openjpeg.utils",
                                   reason="pylibjpeg-openjpeg, of the extra [medical], is not installed")
    values = np.tile(ramp(bits), (4, 1))
    content = openjpeg.encode_array(values, bits_stored=bits)
    assert np.abs(grey(content) - RAMP[:1]).max() <= 1
    content = openjpeg.encode_array(np.stack([values] * 3, -1), bits_stored=bits, photometric_interpretation=1)
    assert np.abs(grey(content) - RAMP[:1]).max() <= 1


def test_jpeg_2000_of_signed_colours():
    """The lowest value that a component can have is black."""
    openjpeg = pytest.importorskip("openjpeg.utils",
                                   reason="pylibjpeg-openjpeg, of the extra [medical], is not installed")
    values = np.tile(ramp(12).astype(np.int16) - 2048, (4, 1))
    content = openjpeg.encode_array(np.stack([values] * 3, -1), bits_stored=12, photometric_interpretation=1)
    np.testing.assert_array_equal(grey(content), (values.astype(int) + 2048) >> 4)


@pytest.mark.parametrize("layout", [dict(), dict(is_big=True)])
def test_a_tiff_whose_pages_go_round_in_a_circle_has_an_end(layout):
    """The one page says that itself is the next one."""
    content = bytearray(tiff(ramp(32), 0, **layout))
    size, start = (8, 8) if layout else (4, 4)
    first = int.from_bytes(content[start:start + size], "little")
    count = int.from_bytes(content[first:first + (8 if layout else 2)], "little")
    place = first + (8 + 20 * count if layout else 2 + 12 * count)
    assert not any(content[place:place + size])  # there was none
    content[place:place + size] = content[start:start + size]
    np.testing.assert_array_equal(grey(bytes(content)), 255 - RAMP)


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_each_frame_of_an_animated_png(mode):
    frames = [Image.fromarray(RAMP.astype(np.uint8)).convert(mode), Image.fromarray(255 - RAMP.astype(np.uint8)).convert(mode)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    for number, frame in enumerate(frames, 1):
        np.testing.assert_array_equal(load_image(buffer.getvalue(), frame=number), frame.convert("RGB"))
    with pytest.raises(UserError, match="has fewer than 3 frames"):
        load_image(buffer.getvalue(), frame=3)


@pytest.mark.parametrize("content", [
    tiff(ramp(16), 0), tiff(ramp(16), 0, ">"), tiff(ramp(12), 0, bits=12), tiff(colors(4095), 2),
    tiff(ramp(16, "i"), 1, ">", compression=8), png(colors(4095), 2, 16),
    png(np.stack([ramp(12), ramp(12)], -1), 4, 16),
    pnm(colors(4095), 65535)])
def test_every_kind_of_source_gives_the_same_picture(content, tmp_path):
    (tmp_path / "x").write_bytes(content)
    wanted = np.asarray(load_image(tmp_path / "x"))
    assert len(np.unique(wanted)) >= 200
    url = "data:image/x;base64," + base64.b64encode(content).decode()
    for source in (str(tmp_path / "x"), content, bytearray(content), url):
        np.testing.assert_array_equal(load_image(source), wanted)
    np.testing.assert_array_equal(load_image(Image.fromarray(wanted)), wanted)
    np.testing.assert_array_equal(load_image(wanted), wanted)
    try:
        lazy = [Image.open(tmp_path / "x"), Image.open(io.BytesIO(content))]
    except OSError:  # Pillow opens it by no means
        return
    for image in lazy:
        np.testing.assert_array_equal(load_image(image), wanted)


@pytest.mark.parametrize("kind, bits", [("i1", 8), ("i2", 16), ("i4", 32)])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("compression", [1, 8])
def test_values_below_zero_are_refused(kind, bits, photometric, order, compression):
    """Nobody knows what is black there. Of eight bits Pillow would show them as bright."""
    content = tiff((RAMP // 2 - 1).astype(kind), photometric, order, compression)
    with pytest.raises(UserError, match="has grey values below 0; 0 and more were expected"):
        load_image(content)


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("order", "<>")
def test_floating_point_tiff_is_refused(kind, photometric, order):
    with pytest.raises(UserError, match="has floating-point pixels|is not an image that Pillow can read"):
        load_image(tiff(RAMP.astype(kind), photometric, order))


def test_damaged_tiff_of_many_bits_is_an_image_or_one_sentence():
    rng = np.random.default_rng(0)
    for whole in (tiff(ramp(16), 0, ">"), tiff(colors(4095), 2, compression=8), tiff([ramp(12), ramp(12)], 0, bits=12)):
        damaged = [whole[:len(whole) * i // 20] for i in range(20)]
        for _ in range(60):
            data, places = bytearray(whole), rng.integers(0, len(whole), 3)
            data[-200 + int(places[0]) % 200], data[int(places[1]) % 8], data[places[2]] = rng.integers(0, 256,
                                                                                                        3).tolist()
            damaged.append(bytes(data))
        sentences(damaged)
