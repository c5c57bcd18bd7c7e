"""Pixels against `CLIPImageProcessorPil` and against the original's (spec A7)."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.data.images import PAD_COLOR, load_image, normalize, pad_to_square, preprocess, preprocess_uint8
from llavamed_jax.errors import UserError


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


@pytest.mark.parametrize("width, height", [(300, 200), (200, 300), (512, 512), (37, 91), (336, 336), (1001, 333), (5, 400)])
@pytest.mark.parametrize("mode", ["pad", "square"])
def test_equal_to_transformers(width, height, mode, measured):
    transformers = pytest.importorskip("transformers")
    image = noise(width, height)
    reference = transformers.CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size={"height": 336, "width": 336})
    source = pad_to_square(image) if mode == "pad" else image
    expected = reference(source, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    measured(preprocess(image, 336, mode), expected, 1e-6)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "CMYK", "1"])
def test_color_modes_equal_transformers(mode, measured):
    transformers = pytest.importorskip("transformers")
    image = noise(64, 48, "RGBA").convert(mode)
    reference = transformers.CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    expected = reference(image, return_tensors="np")["pixel_values"][0].transpose(1, 2, 0)
    measured(preprocess(load_image(image), 28, "square"), expected, 1e-6)


@pytest.mark.parametrize("width, height, offset", [(10, 7, (0, 1)), (7, 10, (1, 0)), (10, 10, (0, 0))])
def test_padding_floors_the_offset(width, height, offset):
    square = np.asarray(pad_to_square(Image.new("RGB", (width, height), (1, 2, 3))))
    inside = (square == (1, 2, 3)).all(-1)
    assert square.shape == (10, 10, 3) and inside.sum() == width * height
    assert inside[offset[1], offset[0]] and (square[~inside] == PAD_COLOR).all()


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


def truncated_jpeg():
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, "JPEG")
    return buffer.getvalue()[:-800]


@pytest.mark.parametrize("source, sentence", [
    ("nowhere.png", "the image nowhere.png does not exist"), (".", "is a directory"), (b"no image", "not an image"),
    (truncated_jpeg(), "is damaged"), (np.zeros((4, 4, 3), np.float32), "float32 array of shape"),
    (np.zeros((4, 4, 2), np.uint8), "uint8 \\[H,W,3\\]"), (7, "is a int"), ("data:image/png,xyz", "base64, as was expected"),
    ("data:image/png;base64,#", "holds no base64"), ("https://example.org/x.png", "is a web address"),
    (Image.new("F", (4, 4)), "floating-point pixels")])
def test_bad_sources_are_one_sentence(source, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        load_image(source)
    assert "\n" not in str(error.value)


def test_bad_modes_and_shapes():
    with pytest.raises(UserError, match="'anyres'; pad or square was expected"):
        preprocess(pattern(), 28, "anyres")
    with pytest.raises(UserError, match="aspect ratio of at most 200"):
        preprocess(Image.new("RGB", (1, 3000)), 336, "square")
