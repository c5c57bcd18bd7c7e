"""The order of the backward pass: on a GPU the feed-forward network's kernels have their gradients before its input.

L layers, B batch, T positions, D model width, F feed-forward width.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.config import DecoderConfig
from llavamed_jax.models import backward
from llavamed_jax.models.decoders.llama import Decoder
from llavamed_jax.models.decoders.olmo import Olmo2Decoder
from llavamed_jax.models.decoders.qwen import Qwen3Decoder
from llavamed_jax.models.layers import Linear

L, B, T, D, F = 3, 2, 8, 40, 56
CFG = DecoderConfig(64, D, F, L, 4, 2, 8, 1e-5, 1e4, 128)


@functools.cache
def arguments(kind):
    """Parameters and input of a decoder, and positions."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(T), (B, T))
    shapes = jax.eval_shape(kind(CFG, scan=True).init, jax.random.key(0), x, positions)["params"]
    return jax.tree.map(lambda s: jnp.asarray(rng.standard_normal(s.shape) * 0.2, jnp.float32), shapes), x, positions


def gradient(kind, remat, *of):
    """The gradient of a decoder in its parameters, its input or both, and arguments for it."""
    decoder, (params, x, positions) = kind(CFG, scan=True, remat=remat), arguments(kind)
    loss = lambda params, x: jnp.sum(jnp.sin(decoder.apply({"params": params}, x, positions)[0]))
    return jax.jit(jax.grad(loss, argnums=tuple(("params", "x").index(each) for each in of))), (params, x)


def program(function, args, platform):
    """The text of the program for a platform."""
    return function.trace(*args).lower(lowering_platforms=(platform,)).as_text()


def barriers(function, args, platform):
    """The types of what each barrier of a program holds back."""
    text = program(function, args, platform)
    lines = [line for line in text.splitlines() if "optimization_barrier" in line]
    return [sorted(line.partition(" : ")[2].replace("tensor<", "").replace("xf32>", "").split(", ")) for line in lines]


@pytest.mark.parametrize("kind, remat", [(Decoder, "none"), (Decoder, "full"), (Qwen3Decoder, "attention"),
                                         (Olmo2Decoder, "minimal")])
def test_the_input_s_gradient_waits_for_those_of_all_three_kernels_on_a_gpu(kind, remat):
    one = sorted([f"{B}x{T}x{D}", f"{D}x{F}", f"{D}x{F}", f"{F}x{D}"])
    assert barriers(*gradient(kind, remat, "params"), "cuda") == [one]


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_other_platforms_keep_their_own_order(platform):
    assert barriers(*gradient(Decoder, "minimal", "params"), platform) == []


@pytest.mark.parametrize("remat", ["none", "minimal"])
def test_frozen_kernels_have_no_gradient(remat, monkeypatch):
    """No product and no saved array more than without the order, and nothing is held back."""
    ordered = program(*gradient(Decoder, remat, "x"), "cuda")
    monkeypatch.setattr(backward, "_kernels_first", lambda x, kernels: (x, kernels))
    left = program(*gradient(Decoder, remat, "x"), "cuda")
    counts = lambda text: [text.count(word) for word in ("dot_general", "dynamic_update_slice", "optimization_barrier")]
    assert counts(ordered) == counts(left)


def test_gradients_are_the_same_numbers(monkeypatch):
    function, args = gradient(Decoder, "minimal", "params", "x")
    ordered = function(*args)
    monkeypatch.setattr(backward, "_kernels_first", lambda x, kernels: (x, kernels))
    jax.tree.map(np.testing.assert_array_equal, ordered, gradient(Decoder, "minimal", "params", "x")[0](*args))


def test_a_kernel_that_is_given_is_the_one_that_is_multiplied():
    x = jnp.eye(2)
    layer = Linear(3, (None, None), False)
    own, given = jnp.ones((2, 3)), jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(layer.apply({"params": {"kernel": own}}, x, given), given)
    np.testing.assert_array_equal(layer.apply({"params": {"kernel": own}}, x), own)
