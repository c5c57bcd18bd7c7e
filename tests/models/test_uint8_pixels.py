"""uint8 pixels are normalised on the device, and give what float32 pixels from the host give."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import llavamed_jax as lm
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.config import IMAGE_TOKEN, ImageSettings, LlavaConfig
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.generation.requests import Request
from llavamed_jax.images import load
from llavamed_jax.models.towers.pixels import normalize
from llavamed_jax.processor import Processor
from tests.support import tiny

CONFIG = llava_from_hf({"model_type": "llava", "text_config": {**tiny.MISTRAL, "num_hidden_layers": 1},
                        "vision_config": {**tiny.CLIP, "num_hidden_layers": 2}, "vision_feature_layer": -2})
STATISTICS = [(load.CLIP_MEAN, load.CLIP_STD), ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.1, 0.6, 0.9), (0.2, 0.3, 0.25))]


def with_statistics(config, mean, std):
    return config.replace(vision=dataclasses.replace(config.vision, image_mean=mean, image_std=std))


def assistant(config):
    return lm.LlavaMed(config, load_params(random_checkpoint(CONFIG, seed=3)), Processor(config))


@pytest.fixture(scope="module")
def model():
    return assistant(with_statistics(CONFIG, *STATISTICS[2]))


@pytest.fixture(scope="module")
def pictures():
    size = CONFIG.vision.image_size
    return np.random.default_rng(0).integers(0, 256, (3, size, size, 3), dtype=np.uint8)


def prompt(*texts):
    """Token ids with an image before each text but the first."""
    image = [IMAGE_TOKEN] * CONFIG.tokens_per_image
    return [1, *texts[0], *[token for text in texts[1:] for token in [*image, *text]]]


@pytest.mark.parametrize("mean, std", STATISTICS)
def test_every_value_on_the_device_equals_the_host(mean, std, measured):
    every = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 3, axis=1)
    on_device = jax.jit(normalize, static_argnums=1)(every, with_statistics(CONFIG, mean, std).vision)
    assert on_device.dtype == np.float32
    measured(on_device, load.normalize(every, mean, std), 1e-6)
    measured(on_device, (every / 255 - mean) / std, 1e-6)


def test_logits_of_uint8_pixels_equal_those_of_float32(model, pictures, measured):
    rows = [prompt([], [5, 6], [7]), prompt([8, 9], [10])]
    ids = np.full((2, max(map(len, rows))), -1)
    for i, row in enumerate(rows):
        ids[i, :len(row)] = row
    floats = load.normalize(pictures, *STATISTICS[2])
    expected = model.logits(ids, floats)
    measured(np.where(ids[..., None] == -1, 0, model.logits(ids, pictures) - expected), np.zeros_like(expected), 1e-5)
    assert np.abs(model.logits(ids, load.normalize(pictures, *STATISTICS[0])) - expected).max() > 1e-3, "another mean must show"


@pytest.mark.parametrize("settings", [
    ImageSettings(is_normalized=False), ImageSettings(scale=1 / 127.5), ImageSettings(scale=1.0), ImageSettings(scale=1.0, is_normalized=False)])
def test_every_scale_is_the_models_too(settings, pictures, measured):
    """Whole rows and beams normalise uint8 as the host does; the engine's rows do in the test below."""
    config = CONFIG.replace(vision=dataclasses.replace(CONFIG.vision, images=settings, image_mean=(0.1, 0.6, 0.9)))
    asked, floats = assistant(config), load.normalize(pictures, *config.vision.normalization)
    rows = [prompt([], [5, 6], [7])]
    expected = asked.logits(rows, floats[:2])
    measured(asked.logits(rows, pictures[:2]), expected, 1e-5 * max(1, np.abs(expected).max()))
    assert np.abs(asked.logits(rows, load.normalize(pictures[:2], *CONFIG.vision.normalization)) - expected).max() > 1e-3
    wanted = asked.generate_tokens(rows, [list(floats[:2])], max_new_tokens=6, num_beams=2)
    assert asked.generate_tokens(rows, [list(pictures[:2])], max_new_tokens=6, num_beams=2) == wanted


def test_tokens_of_uint8_pixels_equal_those_of_float32(model, pictures):
    rows = [prompt([], [5, 6], [7]), prompt([8, 9], [10])]
    split = lambda all_of_them: [list(all_of_them[:2]), list(all_of_them[2:])]
    floats = load.normalize(pictures, *STATISTICS[2])
    expected = model.generate_tokens(rows, split(floats), max_new_tokens=8)
    assert model.generate_tokens(rows, split(pictures), max_new_tokens=8) == expected
    mixed = [[pictures[0], floats[1]], [pictures[2]]]
    assert model.generate_tokens(rows, mixed, max_new_tokens=8) == expected


def test_uint8_pixels_go_to_the_device_as_such(model, pictures, monkeypatch):
    programs, sent = model.engine.programs._programs, []
    encode = programs["encode"]
    monkeypatch.setitem(programs, "encode", lambda *args: sent.append(args[2]) or encode(*args))
    model.engine.generate([Request(prompt([], [5]), [255 - image], 1) for image in pictures[:2]])
    assert [(pixels.dtype, pixels.nbytes) for pixels in sent] == [(np.uint8, 2 * pictures[0].nbytes)]


def test_a_checkpoints_own_statistics_reach_the_model(tmp_path):
    """Of its preprocessor, and they stay in this project's own config."""
    directory = tiny.save(tmp_path / "model", {"model_type": "llava", "text_config": tiny.MISTRAL, "vision_config": tiny.CLIP})
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    vision = read_config(directory).vision
    assert vision.image_mean == (0.5,) * 3 and vision.image_std == (0.25,) * 3
    assert LlavaConfig.from_dict(json.loads(json.dumps(read_config(directory).to_dict()))).vision == vision
    white = np.full((4, 4, 3), 255, np.uint8)
    assert (Processor.load(directory, image_mode="square").images([white]) == 2).all()
    assert read_config("preset:small").vision.image_mean == load.CLIP_MEAN


def test_statistics_of_the_towers_own_directory(tmp_path):
    """The originals read the preprocessor there; a file beside the checkpoint's config goes before it."""
    directory = tiny.save(tmp_path / "model", tiny.V1)
    tower = tiny.save(directory / "tiny-tower", tiny.CLIP)
    (tower / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.25] * 3}))
    assert read_config(directory).vision.image_std == (0.25,) * 3
    (directory / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.75] * 3}))
    assert read_config(directory).vision.image_std == (0.75,) * 3
