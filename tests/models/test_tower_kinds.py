"""Every kind of tower inside a whole model: gradients on a mesh and in scanned layers, places of parameters, our own files."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import IMAGE_TOKEN, KNOWN_TOWERS, DecoderConfig, LlavaConfig, VisionConfig, preset
from llavamed_jax.config.towers import TOWERS
from llavamed_jax.models.llava import Llava, abstract_params, param_axes
from llavamed_jax.models.stacking import stack
from llavamed_jax.models.towers import MODULES
from llavamed_jax.parallel.mesh import make_mesh, param_shardings
from llavamed_jax.training.losses import cross_entropy

DECODER = DecoderConfig(64, 32, 48, 1, 4, 2, 8, 1e-5, 1e4, 128, architecture="mistral")
KINDS = list(dict.fromkeys(TOWERS.values()))


def small(kind):
    """Feature layer -2: two of three layers are used."""
    return LlavaConfig(kind(16, 32, 3, 2, 16, 8), DECODER)


@functools.cache
def step(cfg, scan):
    """A jitted function of parameters: loss and gradients of rows with an image each."""
    model = Llava(cfg, scan=scan, remat="minimal" if scan else "none")
    ids = jnp.asarray([[1, *[IMAGE_TOKEN] * cfg.tokens_per_image, 5 + row, 9, 33] for row in range(8)])
    pixels = np.random.default_rng(0).integers(0, 256, (8, 1, 16, 16, 3), np.uint8)

    def loss(params):
        total, count = cross_entropy(model.apply({"params": params}, ids, pixels), jnp.where(ids < 0, -100, ids), jnp.ones_like(ids))
        return total / count

    return jax.jit(jax.value_and_grad(loss))


def assert_close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max())), got, wanted)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.model_type)
def single(request):
    cfg = small(request.param)
    params = load_params(random_checkpoint(cfg))
    return cfg, params, step(cfg, scan=False)(params)


def test_every_parameter_is_trained_and_the_loss_falls(single):
    cfg, params, (before, gradients) = single
    after, _ = step(cfg, scan=False)(jax.tree.map(lambda p, g: p - np.float32(0.1) * np.asarray(g), params, gradients))
    assert after < before
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_scanned_layers_train_as_unrolled_ones(single):
    cfg, params, (before, gradients) = single
    found = step(cfg, scan=True)(stack(params))
    assert_close(found, (before, stack(jax.tree.map(np.asarray, gradients))))


def test_a_mesh_trains_as_one_device(single):
    cfg, params, wanted = single
    mesh = make_mesh("data=2,fsdp=2,tp=2")
    where = param_shardings(abstract_params(cfg), param_axes(cfg), mesh)
    placed = jax.tree.map(jax.device_put, params, where)
    with jax.set_mesh(mesh):
        found = step(cfg, scan=False)(placed)
    assert_close(found, wanted)
    tower = where["vision_tower"]["layers_0"]
    assert tower["self_attn"]["q_proj"]["kernel"].spec == P("fsdp", "tp") and tower["mlp"]["fc2"]["kernel"].spec == P("tp", "fsdp")
    assert isinstance(found[1]["vision_tower"]["layers_0"]["mlp"]["fc1"]["kernel"].sharding, NamedSharding)


def test_our_own_tree_keeps_the_kind(single, tmp_path):
    cfg, _, _ = single
    checkpoint = random_checkpoint(cfg)
    write_model(tmp_path / "out", checkpoint)
    again = open_checkpoint(tmp_path / "out")
    assert again.config == cfg and type(again.config.vision) is type(cfg.vision)
    assert LlavaConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(again.read(name), checkpoint.read(name))


@pytest.mark.parametrize("name, tower, tokens, positions", [
    ("siglip-so400m-patch14-384", "google/siglip-so400m-patch14-384", 729, 729),
    ("siglip2-so400m-patch14-384", "google/siglip2-so400m-patch14-384", 729, 729),
    ("biomedclip", "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224", 196, 197)])
def test_presets_of_full_size(name, tower, tokens, positions):
    cfg = preset(name)
    assert cfg.vision == KNOWN_TOWERS[tower]
    assert (cfg.tokens_per_image, cfg.vision.num_positions) == (tokens, positions)
    table = next(x for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(cfg, scan=True)["vision_tower"]["embeddings"])
                 if "position" in str(path))
    assert table.shape[-2:] == (positions, cfg.vision.hidden_size)


# As in the published config.json: width, feed-forward width, layers, heads, edge, patch.
@pytest.mark.parametrize("name, numbers", [
    ("siglip-so400m-patch14-384", (1152, 4304, 27, 16, 384, 14)), ("siglip-base-patch16-224", (768, 3072, 12, 12, 224, 16)),
    ("siglip-large-patch16-256", (1024, 4096, 24, 16, 256, 16)), ("siglip2-giant-opt-patch16-384", (1536, 6144, 40, 16, 384, 16)),
    ("siglip2-so400m-patch16-512", (1152, 4304, 27, 16, 512, 16)), ("siglip2-base-patch32-256", (768, 3072, 12, 12, 256, 32))])
def test_published_shapes_of_siglip(name, numbers):
    found = KNOWN_TOWERS[f"google/{name}"]
    assert (found.hidden_size, found.intermediate_size, found.num_layers, found.num_heads, found.image_size, found.patch_size) == numbers
    assert (found.layer_norm_eps, found.hidden_act, found.num_channels) == (1e-6, "gelu_pytorch_tanh", 3)


def test_every_kind_is_here():
    assert set(KINDS) == set(MODULES) and VisionConfig in KINDS
