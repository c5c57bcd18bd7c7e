"""Pixels against `CLIPImageProcessorPil` and against the original's."""

import base64
import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import PAD_COLOR, load_image, normalize, pad_to_square, preprocess_uint8
from tests.support.damage import changed, sentences


def preprocess(*args):
    return normalize(preprocess_uint8(*args))


def pattern(width=300, height=200):
    y, x, c = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray(((3 * x + 5 * y + 70 * c) % 256).astype(np.uint8))


def noise(width, height, mode="RGB"):
    rng = np.random.default_rng(0)
    shape = (height, width, {"L": 1, "RGB": 3, "RGBA": 4}[mode])
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8).squeeze(), mode)


@pytest.mark.parametrize("size, mode, total, squares, values", [
    (224, "square", 28259.9361, 175816.908, (0.397501, 2.074884, -0.200414, 1.711360)),
    (336, "pad", 41497.9946, 263764.691, (None, 2.074884, None, None))])
def test_known_answers(size, mode, total, squares, values):
    array = preprocess(pattern(), size, mode).astype(np.float64)
    assert array.shape == (size, size, 3)
    assert array.sum() == pytest.approx(total, abs=2e-3)
    assert (array**2).sum() == pytest.approx(squares, abs=2e-2)
    places = ((0, 0, 0), (size // 2, size // 2, 1), (size - 1, size - 1, 2), (17, 101, 0))
    for place, value in zip(places, values, strict=True):
        assert value is None or array[place] == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("width, height", [(300, 200), (200, 300), (512, 512), (37, 91), (336, 336), (1001, 333), (5, 400),
                                           (300, 211), (53, 97)])  # which resize to 477.7 and 614.9 pixels, rounded down
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_equal_to_transformers(width, height, mode, measured):
    transformers = pytest.importorskip("transformers")
    image = noise(width, height)
    reference = transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    source = pad_to_square(image) if mode == "pad" else image
    expected = reference(source, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    measured(preprocess(image, 336, mode), expected, 1e-6)


def to_lab(image):
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image.convert("RGB"), *profiles, outputMode="LAB")


MODES = {"L": "png", "LA": "png", "RGBA": "png", "P": "png", "CMYK": "tiff", "1": "png", "LAB": "tiff", "YCbCr": None, "PA": None,
         "HSV": None}


@pytest.mark.parametrize("mode", MODES)
def test_color_modes_as_the_original_opens_them(mode, tmp_path, measured):
    """`Image.open(path).convert("RGB")`, then CLIP's processor."""
    transformers = pytest.importorskip("transformers")
    image = noise(64, 48, "RGBA")
    image = to_lab(image) if mode == "LAB" else image.convert("RGB").convert(mode) if mode == "HSV" else image.convert(mode)
    if MODES[mode]:
        image.save(tmp_path / f"x.{MODES[mode]}")
        image = Image.open(tmp_path / f"x.{MODES[mode]}")
        assert image.mode == mode
        source = tmp_path / f"x.{MODES[mode]}"
    else:
        source = image
    reference = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = reference(image.convert("RGB"), return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    measured(preprocess(load_image(source), 28, "square"), expected, 1e-6)


def test_transparency_is_dropped_and_not_laid_over_a_colour(tmp_path):
    """In RGBA, in a palette (one entry, or one a colour) and in RGB with a colour key: what lies beneath is what is seen."""
    red = np.full((4, 4, 4), (200, 10, 20, 0), np.uint8)
    Image.fromarray(red).save(tmp_path / "rgba.png")
    palette = Image.fromarray(red[..., :3]).quantize(2)
    index = palette.getpixel((0, 0))
    palette.save(tmp_path / "entry.png", transparency=index)
    palette.save(tmp_path / "entries.png", transparency=bytes(2))
    palette.save(tmp_path / "entry.gif", transparency=index)
    Image.fromarray(red[..., :3]).save(tmp_path / "key.png", transparency=(200, 10, 20))
    for name in ("rgba.png", "entry.png", "entries.png", "entry.gif", "key.png"):
        image = load_image(tmp_path / name)
        assert image.mode == "RGB" and image.getpixel((2, 2)) == (200, 10, 20), name
    premultiplied = Image.new("RGBA", (2, 2), (100, 50, 0, 128)).convert("RGBa")
    assert load_image(premultiplied).getpixel((0, 0)) == premultiplied.convert("RGBA").convert("RGB").getpixel((0, 0))
    assert load_image(Image.new("LA", (2, 2), (100, 128)).convert("La")).getpixel((0, 0)) == (99, 99, 99)


def chunk(name, data, damage=0):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data) ^ damage)


@pytest.mark.parametrize("added", [
    chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**21))), chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(bytes(2**21))),
    chunk(b"iCCP", b"k\0\0" + zlib.compress(np.random.default_rng(0).bytes(2**21))), chunk(b"tEXt", b"k\0v", damage=1),
    chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20))) * 70, chunk(b"gAMA", b"1"), chunk(b"iCCP", b"k\0\0no zlib"),
    chunk(b"eXIf", b"nothing"), chunk(b"prVt", bytes(9))], ids=lambda added: f"{added[4:8].decode()}{len(added)}")
def test_what_a_png_says_beside_its_pixels_is_not_read(added):
    """Pillow refuses a file of a large text or colour profile (its issues 2445 and 8363), or of one that is damaged."""
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((8, 8, 3), shade, np.uint8)) for shade in (40, 90)]
    frames[0].save(buffer, "PNG", save_all=True, append_images=frames[1:])
    content = buffer.getvalue()
    for before in (33, len(content) - 12):  # behind the header, before the end
        found = content[:before] + added + content[before:]
        assert [load_image(found, frame).getpixel((0, 0))[0] for frame in (1, 2)] == [40, 90]
    transparent = io.BytesIO()
    frames[0].quantize(2).save(transparent, "PNG", transparency=0)
    assert load_image(transparent.getvalue()[:33] + added + transparent.getvalue()[33:]).getpixel((0, 0)) == (40, 40, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_an_orientation_in_exif_is_not_followed(orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pattern(30, 20).save(tmp_path / "x.jpg", exif=exif)
    assert Image.open(tmp_path / "x.jpg").getexif()[0x0112] == orientation
    np.testing.assert_array_equal(load_image(tmp_path / "x.jpg"), Image.open(tmp_path / "x.jpg").convert("RGB"))
    assert load_image(tmp_path / "x.jpg").size == (30, 20)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "I;16", "RGB"])
def test_the_orientation_of_a_tiff_is_followed(mode, orientation, tmp_path):
    """Pillow turns such an image while it reads, so the originals do."""
    values = np.random.default_rng(0).integers(0, 256, (20, 30, 3) if mode == "RGB" else (20, 30)).astype(np.uint8)
    stored = Image.fromarray(values.astype(np.uint16) * 257 if mode == "I;16" else values)
    stored.save(tmp_path / "x.tiff", tiffinfo={274: orientation})
    turned = ImageOps.exif_transpose(_tagged(Image.fromarray(values), orientation)).convert("RGB")
    assert turned.size == ((30, 20) if orientation < 5 else (20, 30))
    np.testing.assert_array_equal(load_image(tmp_path / "x.tiff"), turned)


def _tagged(image, orientation):
    image.getexif()[0x0112] = orientation
    return image


@pytest.mark.parametrize("width, height, offset", [(10, 7, (0, 1)), (7, 10, (1, 0)), (10, 10, (0, 0))])
def test_padding_floors_the_offset(width, height, offset):
    square = np.asarray(pad_to_square(Image.new("RGB", (width, height), (1, 2, 3))))
    inside = (square == (1, 2, 3)).all(-1)
    assert square.shape == (10, 10, 3) and inside.sum() == width * height
    assert inside[offset[1], offset[0]] and (square[~inside] == PAD_COLOR).all()


def test_a_grey_image_is_padded_with_the_colour():
    """As the original is trained; asked, v1.5 pads the modes L and LA with 114."""
    for mode in ("L", "LA", "I;16", "1"):
        pixels = preprocess_uint8(load_image(Image.new(mode, (28, 14))), 28, "pad")
        assert (pixels[:4] == PAD_COLOR).all() and (pixels[-4:] == PAD_COLOR).all() and (pixels[12:16] == 0).all(), mode


def test_a_device_can_normalise_later():
    image = pattern()
    raw = preprocess_uint8(image, 56, "pad")
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(normalize(raw), preprocess(image, 56, "pad"))


def test_every_kind_of_source_gives_the_same_image(tmp_path):
    image = pattern(20, 10)
    image.save(tmp_path / "x.png")
    data = (tmp_path / "x.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in (tmp_path / "x.png", str(tmp_path / "x.png"), data, url, image, np.asarray(image)):
        loaded = load_image(source)
        assert loaded.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image))
    grey = np.asarray(image)[..., 0]
    for array in (grey, grey[..., None]):
        np.testing.assert_array_equal(np.asarray(load_image(array)), np.stack([grey] * 3, -1))


def test_sixteen_bits_keep_their_upper_half(tmp_path):
    values = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / "x.png")
    np.testing.assert_array_equal(np.asarray(load_image(tmp_path / "x.png"))[..., 0], values >> 8)


@pytest.mark.parametrize("highest, lost", [(1, 0), (255, 0), (256, 1), (1023, 2), (4095, 4), (30000, 7), (65535, 8)])
@pytest.mark.parametrize("kind", ["I;16 png", "I;16B tiff", "I tiff"])
def test_grey_of_many_bits_is_scaled_by_its_highest_value(highest, lost, kind, tmp_path):
    """Up to 255 as the original, which clips there; 12 bits in a 16-bit file are as bright as 8 in an 8-bit file."""
    mode, suffix = kind.split()
    values = np.linspace(0, highest, 64).reshape(8, 8).astype({"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode])
    Image.fromarray(values).save(tmp_path / f"x.{suffix}")
    opened = Image.open(tmp_path / f"x.{suffix}")
    assert opened.mode == mode
    grey = np.asarray(load_image(tmp_path / f"x.{suffix}"))
    np.testing.assert_array_equal(grey, np.stack([values >> lost] * 3, -1))
    if highest <= 255:
        np.testing.assert_array_equal(grey, opened.convert("RGB"))


@pytest.mark.parametrize("name", ["x.gif", "x.tiff", "x.webp", "x.png"])
def test_frames(name, tmp_path):
    pages = [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(1, 4)]
    pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:], lossless=True)
    near = lambda image, i: abs(image.getpixel((4, 4))[0] - 40 * i) <= 4
    assert near(load_image(tmp_path / name), 1) and near(load_image(tmp_path / name, frame=3), 3)
    assert near(load_image(f"{tmp_path / name}#frame=2"), 2) and near(load_image(f"{tmp_path / name}#frame=2", frame=3), 3)
    assert near(load_image((tmp_path / name).read_bytes(), frame=2), 2)
    for frame in (4, 100):
        with pytest.raises(UserError, match=f"has fewer than {frame} frames"):
            load_image(f"{tmp_path / name}#frame={frame}")
    with pytest.raises(UserError, match="names frame 0"):
        load_image(f"{tmp_path / name}#frame=0")
    pages[1].save(tmp_path / f"{name}#frame=3", "PNG")
    assert near(load_image(f"{tmp_path / name}#frame=3"), 2), "a file of that very name goes first"


@pytest.mark.parametrize("frame", [0, -1, 1.5, "2"])
def test_a_frame_is_counted_from_one(frame):
    with pytest.raises(UserError, match="a whole number of at least 1 was expected"):
        load_image(pattern(), frame)
    with pytest.raises(UserError, match="has one frame; there is no frame 2"):
        load_image(pattern(), 2)


def bomb():
    """A PNG of 20,000 x 20,000 pixels in a few hundred bytes, as far as its header says."""
    buffer = io.BytesIO()
    Image.new("1", (8, 8)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = struct.pack(">II", 20000, 20000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    return bytes(data)


@pytest.mark.parametrize("content, sentence", [
    (b"", "is empty"), (b"a", "is not an image that Pillow can read"), (b"just a text\n" * 20, "is not an image that Pillow can read"),
    (bomb(), "has more pixels than Pillow accepts"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n", "is PostScript")])
def test_bad_files_are_one_sentence(content, sentence, tmp_path):
    (tmp_path / "x.png").write_bytes(content)
    for source in (tmp_path / "x.png", content):
        with pytest.raises(UserError, match=sentence) as error:
            load_image(source)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "tiff", "webp", "jp2", "ppm", "ico", "tga"])
def test_damaged_files_are_an_image_or_one_sentence(suffix, tmp_path):
    """Cut at every fortieth of its length, and with bytes changed at random: no other error comes out."""
    rng, file = np.random.default_rng(0), tmp_path / f"x.{suffix}"
    noise(40, 30).save(file)
    whole = file.read_bytes()
    damaged = [whole[:len(whole) * i // 40] for i in range(40)]
    damaged += [changed(whole, rng.integers(0, min(len(whole), 200), 3), rng.integers(0, 256, 3)) for _ in range(40)]
    assert sentences(damaged) >= 10


@pytest.mark.parametrize("source, sentence", [
    ("a" * 5000, "cannot be opened: File name too long"), ("a" * 300 + "#frame=2", "cannot be opened: File name too long"),
    ("a\0b.png", "cannot be opened"), ("/dev/null", "is a pipe or a device")])
def test_strange_paths(source, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_image(source)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("there, asked, sentence", [
    ("scan.jpg", "scan.JPG", "does not exist; it exists with the suffix .jpg"), ("scan.PNG", "scan.png", "with the suffix .PNG"),
    ("a/scan.png", "a\\scan.png", "does not exist; it exists with / instead of \\\\"),
    ("Ro\u0308ntgen.png", "R\u00f6ntgen.png", "does not exist; it exists in Unicode's form NFD"),
    ("R\u00f6ntgen.png", "Ro\u0308ntgen.png", "does not exist; it exists in Unicode's form NFC"),
    ("scan.png", "scan", "does not exist$")])
def test_a_name_that_another_system_would_find(there, asked, sentence, tmp_path):
    (tmp_path / there).parent.mkdir(exist_ok=True)
    Image.new("L", (2, 2)).save(tmp_path / there)
    with pytest.raises(UserError, match=sentence):
        load_image(f"{tmp_path}/{asked}")


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png is a pipe or a device; a file was expected"):
        load_image(tmp_path / "x.png")


def truncated_jpeg():
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "JPEG")
    return buffer.getvalue()[:-800]


@pytest.mark.parametrize("source, sentence", [
    ("nowhere.png", "the image nowhere.png does not exist"), (".", "is a directory"), (b"no image", "not an image"),
    (truncated_jpeg(), "is damaged"), (np.zeros((4, 4, 3), np.float32), "float32 array of shape"),
    (np.zeros((4, 4, 2), np.uint8), "uint8 \\[H,W,3\\]"), (7, "the image is of type int;"),
    ("data:image/png,xyz", "base64, was expected"), ("data:image/png;base64,#", "holds invalid base64"),
    ("https://example.org/x.png", "is a web address"),
    ("HTTP://x/y.png", "is a web address"), ("file:///x.png", "is a web address"), ("", "the image '' does not exist"),
    (Image.new("F", (4, 4)), "floating-point pixels")])
def test_bad_sources_are_one_sentence(source, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_image(source)
    assert "\n" not in str(error.value)


def test_pillow_images_that_cannot_be_read_to_the_end(tmp_path):
    """Pillow opens a file without reading its pixels: what is wrong with them shows later."""
    (tmp_path / "x.jpg").write_bytes(truncated_jpeg())
    with pytest.raises(UserError, match="the image is damaged: .*truncated"):
        preprocess_uint8(load_image(Image.open(tmp_path / "x.jpg")), 28)
    closed = pattern()
    closed.close()
    with pytest.raises(UserError, match="the image is damaged: Operation on closed image"):
        load_image(closed)


def test_bad_modes_and_shapes():
    with pytest.raises(UserError, match="'anyres'; pad or square was expected"):
        preprocess(pattern(), 28, "anyres")
    with pytest.raises(UserError, match="aspect ratio of at most 200"):
        preprocess(Image.new("RGB", (1, 3000)), 336, "square")
    with pytest.raises(UserError, match="20000 x 200 pixels; at most 13377 on a side were expected, because it is padded"):
        preprocess(Image.new("RGB", (20000, 200)), 28, "pad")
    assert preprocess(Image.new("RGB", (20000, 200)), 28, "square").shape == (28, 28, 3)
    for mode in ("pad", "square"):
        with pytest.raises(UserError, match="the image is 0 x 5 pixels"):
            preprocess(Image.new("RGB", (0, 5)), 28, mode)
        with pytest.raises(UserError, match="the image is 1 x 60000 pixels"):
            preprocess(Image.new("L", (1, 60000)), 28, mode)
