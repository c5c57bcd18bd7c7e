"""A tower at another image size than its own: its position table interpolated as by transformers, or one sentence."""

import json

import jax
import numpy as np
import pytest

from llavamed_jax.checkpoints.assemble.build import build
from llavamed_jax.checkpoints.assemble.positions import interpolated
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.cli.convert import main
from llavamed_jax.config import ImageSettings
from llavamed_jax.errors import UserError
from llavamed_jax.models.towers import tower_module
from tests.support import hf, tiny, towers

torch = hf.torch


@pytest.mark.parametrize("old, new", [(4, 6), (4, 3), (4, 1), (3, 7), (16, 24), (1, 4)])
@pytest.mark.parametrize("class_tokens", [0, 1])
def test_the_table_is_torchs(old, new, class_tokens):
    """Of torch in float64: in float32 its weights alone are off by 1e-6."""
    table = np.random.default_rng(0).standard_normal((old**2 + class_tokens, 5)).astype(np.float32)
    grid = torch.tensor(table[class_tokens:]).reshape(1, old, old, 5).permute(0, 3, 1, 2).double()
    wanted = torch.nn.functional.interpolate(grid, size=(new, new), mode="bicubic", align_corners=False)
    wanted = np.concatenate([table[:class_tokens], wanted.permute(0, 2, 3, 1).reshape(-1, 5).numpy()])
    np.testing.assert_allclose(interpolated(table, class_tokens, new), wanted, atol=3e-7, rtol=0)
    np.testing.assert_allclose(interpolated(table[None], class_tokens, new)[0], wanted, atol=3e-7, rtol=0)


@pytest.mark.parametrize("kind, size", [("clip", 42), ("siglip", 21), ("vit", 42)])
def test_features_are_transformers_with_interpolate_pos_encoding(kind, size, tmp_path, measured):
    model, _ = towers.built(kind, tmp_path)
    checkpoint, said = build(tmp_path / "decoder", tmp_path / "tower", "linear", tmp_path, image_size=size)
    assert f"image size: {size}, for which the position table of 28 pixels is interpolated" in said
    cfg, images = checkpoint.config, hf.images(2, size)
    assert cfg.vision.num_patches == (size // 7) ** 2
    with torch.no_grad():
        states = model(torch.tensor(images).permute(0, 3, 1, 2), output_hidden_states=True, interpolate_pos_encoding=True).hidden_states
    tower = tower_module(cfg.vision)(cfg.vision, cfg.num_vision_layers_used)
    measured(jax.jit(tower.apply)({"params": load_params(checkpoint)["vision_tower"]}, images), states[-2].numpy(), 2e-5)


def test_the_command_writes_it_and_images_follow(tmp_path, capsys):
    towers.built("siglip", tmp_path)
    args = ["build", "--decoder", tmp_path / "decoder", "--vision", tmp_path / "tower", "--projector", "linear"]
    assert main([*map(str, args), "--image_size", "42", "--out", str(tmp_path / "out")]) == 0
    vision = open_checkpoint(tmp_path / "out").config.vision
    assert (vision.image_size, vision.images) == (42, ImageSettings((42, 42), is_cropped=False))
    assert "interpolated" in capsys.readouterr().out
    for size, sentence in (("6", "the image size is 6; a whole number of at least 7"), ("-1", "the image size is -1")):
        assert main([*map(str, args), "--image_size", size, "--out", str(tmp_path / "bad")]) == 2
        assert sentence in capsys.readouterr().err and not (tmp_path / "bad").exists()


@pytest.mark.parametrize("kind, positions", [("clip", (17, 37)), ("siglip", (16, 36)), ("vit", (17, 37))])
def test_a_table_of_another_size_is_one_sentence(kind, positions, tmp_path):
    towers.built(kind, tmp_path)
    file = tmp_path / "tower" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_size": 42}))
    with pytest.raises(UserError, match=f"image_size is 42, for which the vision tower has {positions[1]} positions, and its position "
                                        f"table has {positions[0]}, which is that of 28 pixels; `convert build --image_size N`"):
        build(tmp_path / "decoder", tmp_path / "tower", "linear", tmp_path)


def test_a_table_that_is_no_square_is_one_sentence(tmp_path):
    tiny.save(tmp_path / "tower", tiny.CLIP, {**tiny.drawn(tiny.clip_shapes()), "vision_model.embeddings.position_embedding.weight":
                                              np.ones((7, 32), np.float16)})
    with pytest.raises(UserError, match="its position table has 7; `convert build"):
        build(towers.decoder_directory(tmp_path / "decoder"), tmp_path / "tower", "linear", tmp_path)
