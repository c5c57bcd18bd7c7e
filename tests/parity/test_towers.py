"""Each kind of tower against transformers', float32: hidden states, logits of its exports, and mutants that this rejects."""

import dataclasses

import numpy as np
import pytest

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.models.layers import LayerNorm
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.towers import clip, tower_module
from tests.support import hf, towers
from tests.support.programs import apply

TOLERANCE = 2e-5
KINDS = [kind for kind in towers.KINDS if kind != "clip"]  # CLIP's: test_modules.py, test_parity.py


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    """(kind, transformers' tower, our checkpoint of it, images, all hidden states)."""
    model, checkpoint = towers.built(request.param, tmp_path_factory.mktemp(request.param))
    images = hf.images(2)
    return request.param, model, checkpoint, images, towers.hidden_states(model, images)


def tower_params(checkpoint, layer, scan=False):
    checkpoint = checkpoint.replace(config=checkpoint.config.replace(feature_layer=layer))
    return checkpoint.config, load_params(checkpoint, scan=scan)


def state(checkpoint, layer, images, scan=False, change=None):
    """Our hidden state, by LLaVA's index of it."""
    cfg, params = tower_params(checkpoint, layer, scan)
    vision = change(cfg.vision) if change else cfg.vision
    tower = tower_module(vision)(vision, cfg.num_vision_layers_used, scan=scan)
    return apply(tower, params["vision_tower"], images) if scan else tower.apply({"params": params["vision_tower"]}, images)


@pytest.mark.parametrize("layer", [0, 3, -1, -2, -3, -4])
def test_every_hidden_state(case, layer, measured):
    _, _, checkpoint, images, states = case
    measured(state(checkpoint, layer, images), states[layer], TOLERANCE)


def test_hidden_states_of_scanned_layers(case, measured):
    _, _, checkpoint, images, states = case
    measured(state(checkpoint, -1, images, scan=True), states[-1], TOLERANCE)


def test_exports_have_the_logits_of_transformers(case, tmp_path, measured):
    """LLaVA's modules joined by transformers: strategy `full` where there is no class token. And back into ours."""
    kind, _, checkpoint, images, _ = case
    layer = {"siglip": -1, "vit": -2}[kind]
    checkpoint = checkpoint.replace(config=checkpoint.config.replace(feature_layer=layer))
    cfg, ids = checkpoint.config, towers.row(checkpoint.config)
    ours = np.asarray(apply(Llava(cfg), load_params(checkpoint), ids, images[None, :1]))
    export(checkpoint, tmp_path / "out")
    theirs = towers.their_logits(tmp_path / "out", ids, images[:1])
    measured(ours, theirs[..., :ours.shape[-1]], TOLERANCE * max(1, np.abs(ours).max()))
    again = open_checkpoint(tmp_path / "out")
    assert (again.config.vision, again.config.select_strategy) == (cfg.vision, towers.KINDS[kind].strategy)
    back = np.asarray(apply(Llava(again.config), load_params(again), ids, images[None, :1]))
    np.testing.assert_array_equal(back, ours)


def other_activation(vision):
    return dataclasses.replace(vision, hidden_act="gelu" if vision.hidden_act != "gelu" else "gelu_pytorch_tanh")


def without_patch_bias(monkeypatch):
    real = clip.PatchEmbedding.__call__
    monkeypatch.setattr(clip.PatchEmbedding, "__call__", lambda self, x: real(self, x) - self.get_variable("params", "bias"))


def columns_before_rows(monkeypatch):
    """Patches counted down the columns."""
    real = clip.PatchEmbedding.__call__
    monkeypatch.setattr(clip.PatchEmbedding, "__call__", lambda self, x: real(self, x.swapaxes(1, 2)))


def last_norm(monkeypatch):
    """The norm behind the layers, which hidden states do not have."""
    real = clip.Block.__call__

    def wrong(self, x, shared, cache):
        x, cache = real(self, x, shared, cache)
        norm = LayerNorm(self.cfg.layer_norm_eps, parent=None)
        params = {"scale": np.ones(self.cfg.hidden_size, np.float32), "bias": np.zeros(self.cfg.hidden_size, np.float32)}
        return norm.apply({"params": params}, x), cache
    monkeypatch.setattr(clip.Block, "__call__", wrong)


# (mutant, feature layer, change of the config or None, change of the code or None)
MUTANTS = [
    ("the other GELU", -2, other_activation, None),
    ("quick GELU", -2, lambda v: dataclasses.replace(v, hidden_act="quick_gelu"), None),
    ("eps 1e-4 -> 1e-5", -2, lambda v: dataclasses.replace(v, layer_norm_eps=1e-5), None),
    ("half the heads", -2, lambda v: dataclasses.replace(v, num_heads=2), None),
    ("no bias of the patches", 0, None, without_patch_bias),
    ("patches by columns", 0, None, columns_before_rows),
    ("a norm behind the layers", 1, None, last_norm),
]


@pytest.mark.parametrize("name,layer,change_cfg,change_code", MUTANTS, ids=[m[0] for m in MUTANTS])
def test_mutants_fail_by_twice_the_tolerance(name, layer, change_cfg, change_code, case, monkeypatch):
    _, _, checkpoint, images, states = case
    if change_code:
        change_code(monkeypatch)
    assert np.abs(np.asarray(state(checkpoint, layer, images, change=change_cfg)) - states[layer]).max() >= 2 * TOLERANCE


def test_positions_shifted_by_one_fail(case):
    _, _, checkpoint, images, states = case
    table = next(name for name in checkpoint.tensors if "position_embedding" in name)
    shifted = np.roll(checkpoint.read(table), 1, axis=-2)
    wrong = checkpoint.replace(tensors={**checkpoint.tensors, table: Tensor(shifted.shape, shifted.dtype, lambda: shifted)})
    assert np.abs(np.asarray(state(wrong, 0, images)) - states[0]).max() >= 2 * TOLERANCE


@pytest.mark.parametrize("layer", [-1, -3])
def test_the_layer_beside_fails(layer, case):
    _, _, checkpoint, images, states = case
    assert np.abs(np.asarray(state(checkpoint, layer, images)) - states[-2]).max() >= 2 * TOLERANCE


def test_the_head_is_left_out_with_a_word(tmp_path, capsys):
    """SigLIP's attention pooling; of CLIP and ViT no tensor of the tower is left out."""
    towers.built("siglip", tmp_path)
    said = capsys.readouterr().err
    assert "11 tensors of the vision tower that LLaVA does not read are left out: head.attention.in_proj_bias" in said
    assert said.count("left out") == 1
