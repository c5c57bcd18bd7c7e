"""A prefill of which one position of each row is wanted: equal to all positions, and without computing the others."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.config.decoders.olmo import Olmo2Config
from llavamed_jax.config.decoders.qwen import Qwen3Config
from llavamed_jax.models.decoders.cache import init_cache
from llavamed_jax.models.llava import Llava

VISION = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, image_size=28, patch_size=14)
SHAPES = dict(vocab_size=96, hidden_size=64, intermediate_size=136, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5,
              rope_theta=1e4, max_position_embeddings=256)
PLAIN = DecoderConfig(**SHAPES)
B, T = 3, 8
LAST, START = np.array([7, 0, 4]), np.array([0, 5, 8])


@functools.cache
def inputs(decoder):
    """Parameters, embeddings [B,T,D], and caches that hold prefixes."""
    params, rng = load_params(random_checkpoint(LlavaConfig(VISION, decoder), 2)), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_cache(decoder, B, 64, np.float32))
    caches = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), shapes)
    return params, rng.standard_normal((B, T, decoder.hidden_size)).astype(np.float32), caches


def step(decoder, backend="xla"):
    """A function of the inputs and of the wanted positions, or None for all, that runs embeddings behind prefixes."""
    model = Llava(LlavaConfig(VISION, decoder), attention=backend)
    return lambda params, x, caches, wanted: model.apply(
        {"params": params}, x, START[:, None] + np.arange(T), caches, wanted, method="step")


@pytest.mark.parametrize("decoder, backend", [
    (PLAIN, "xla"), (dataclasses.replace(PLAIN, num_layers=1, sliding_window=6), "flash_interpreted"),
    (Qwen3Config(**{**SHAPES, "num_layers": 1}), "xla"), (Olmo2Config(**{**SHAPES, "num_layers": 1}), "xla")], ids=["llama", "one layer, a window", "qwen3", "olmo2"])
def test_one_wanted_position_is_what_all_positions_have_there(decoder, backend):
    run = step(decoder, backend)
    both = jax.jit(lambda params, x, caches, wanted: (run(params, x, caches, None), run(params, x, caches, wanted)))
    (everything, caches), (wanted, kept) = jax.device_get(both(*inputs(decoder), LAST))
    assert wanted.shape == (B, 1, decoder.hidden_size)
    np.testing.assert_allclose(wanted[:, 0], everything[np.arange(B), LAST], atol=2e-6)
    jax.tree.map(np.testing.assert_array_equal, kept, caches)  # keys and values are those of all positions


@pytest.mark.parametrize("decoder", [PLAIN, Olmo2Config(**SHAPES)], ids=["llama", "olmo2"])
def test_the_last_layer_multiplies_what_is_wanted_alone(decoder):
    def rows_of_products(wanted):
        text = str(jax.make_jaxpr(step(decoder))(*inputs(decoder), wanted))
        return sorted(int(T) for T in re.findall(rf"f32\[{B},(\d+),{decoder.intermediate_size}\] = dot_general", text))

    assert rows_of_products(None) == [T] * 4  # gate and up of two layers
    assert rows_of_products(jnp.asarray(LAST)) == [1] * 2 + [T] * 2
