"""Flash attention's kernels, interpreted: what they see, what they read, how exactly they sum.

B batch, T positions, N query heads, K key/value heads, H head width.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.models.attention.backend import AttentionMask
from llavamed_jax.models.attention.flash import flash_attention, seen
from llavamed_jax.models.attention.whole import whole_attention
from llavamed_jax.models.attention.xla import xla_attention
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import make_mesh
from tests.models.test_attention import draw, written_out
from tests.support.programs import apply

NAN = float("nan")


def flash(q, k, v, segments=None, window=None):
    at = jnp.broadcast_to(jnp.arange(q.shape[1]), q.shape[:2])
    return flash_attention(q, k, v, AttentionMask(at, at, segments, segments, window), interpret=True)


def test_the_first_key_and_the_last_query():
    segments = jnp.asarray([[1, 1, 1, 2, 2, 2, 2, 0, -1]])
    first, last = seen(segments, None)
    assert first.tolist() == [[0, 0, 0, 3, 3, 3, 3, 7, 8]] and last.tolist() == [[2, 2, 2, 6, 6, 6, 6, 7, 8]]
    first, last = seen(segments, 2)
    assert first.tolist() == [[0, 0, 1, 3, 3, 4, 5, 7, 8]] and last.tolist() == [[1, 2, 2, 4, 5, 6, 6, 7, 8]]
    assert seen(segments, 1)[0].tolist() == seen(segments, 1)[1].tolist() == [list(range(9))]


@pytest.mark.parametrize("T", [1, 17, 128])
def test_rows_of_any_length(T):
    """Also those that fill their tiles, and those of a few positions."""
    q, k, v = draw(T)
    wanted = written_out(q, k, v, None, None, None)
    np.testing.assert_allclose(jax.jit(flash)(q, k, v), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("T, padded", [(1, 16), (16, 16), (40, 64), (130, 256)])
def test_tiles_are_of_a_size_that_matrix_units_take(T, padded):
    program = jax.make_jaxpr(lambda q, k, v: flash(q, k, v))(*draw(T))
    shapes = re.findall(r"f32\[2,(\d+),4,8\] \w+:f32\[2,4,(\d+)\] = pallas_call", str(program))
    assert shapes == [(str(padded), str(padded))]


def blocks(T, *borders):
    return np.int32(np.searchsorted(borders, np.arange(T), side="right")[None].repeat(2, 0) + 1)


def spoiled(x, axis, where):
    x = np.moveaxis(np.array(x), axis, 0)
    x[where] = NAN
    return np.moveaxis(x, 0, axis)


@functools.partial(jax.jit, static_argnames="window")
def flash_and_gradients(q, k, v, weigh, segments, window):
    out, pull = jax.vjp(lambda q, k, v: flash(q, k, v, segments, window), q, k, v)
    return out, *pull(weigh)


@pytest.mark.parametrize("segments, window, near, far", [
    (blocks(256, 128), None, slice(128, 256), slice(0, 128)),  # samples that fill tiles
    (blocks(256), None, slice(0, 128), slice(128, 256)),  # a query and what comes later
    (blocks(256), 65, slice(128, 256), slice(0, 64)),  # what the window leaves behind: 128 sees 64 and on
])
def test_tiles_that_nobody_sees_are_not_read(segments, window, near, far):
    """What is far is no number there: one that was read would spoil what its weight of nought leaves out."""
    q, k, v = draw(256)
    weigh = draw(256, seed=1)[0]
    run = lambda k, v, weigh: flash_and_gradients(q, k, v, weigh, segments, window)
    out, by_q, by_k, by_v = map(np.asarray, run(k, v, weigh))
    bad_out, bad_by_q, *_ = run(spoiled(k, 2, far), spoiled(v, 2, far), weigh)
    assert np.array_equal(np.asarray(bad_out)[:, near], out[:, near]) and np.array_equal(np.asarray(bad_by_q)[:, near], by_q[:, near])
    *_, bad_by_k, bad_by_v = run(k, v, spoiled(weigh, 1, near))
    assert np.array_equal(np.asarray(bad_by_k)[:, :, far], by_k[:, :, far]) and np.array_equal(np.asarray(bad_by_v)[:, :, far], by_v[:, :, far])


def test_scores_that_are_not_seen_may_be_as_large_as_they_like():
    """Of a later key, and of another sample's: the largest score is taken of what is seen, else all weights are nought."""
    q, k, v = draw(64)
    segments = blocks(64, 20)
    k[:, :, [10, 50]] *= 1e4
    found = jax.jit(flash)(q, k, v, segments)
    np.testing.assert_allclose(found, written_out(q, k, v, None, np.asarray(segments), None), rtol=0, atol=1e-5)


def test_bfloat16_is_summed_in_float32():
    """Outputs and gradients are off by less than the rounding of a number, over 256 keys; sums in bfloat16 by more."""
    rounded = [x.astype(jnp.bfloat16) for x in (*draw(256), draw(256, seed=1)[0])]
    few, many = (flash_and_gradients(*(x.astype(dtype) for x in rounded), blocks(256), None) for dtype in (jnp.bfloat16, np.float32))
    for found, wanted in zip(few, many, strict=True):
        assert found.dtype == jnp.bfloat16
        off = np.asarray(found, np.float32) - np.asarray(wanted)
        assert np.sqrt(np.mean(off**2)) <= 2**-8 * np.sqrt(np.mean(np.square(wanted)))


# ---- every query and every key, as in a tower

@pytest.mark.parametrize("T", [16, 130])
def test_every_query_attends_to_every_key(T):
    """And padding to neither: output and gradients are XLA's, with a row that ends inside a tile or fills it."""
    def run(attention):
        def both(weigh, *args):
            out, pull = jax.vjp(attention, *args)
            return out, *pull(weigh)
        return jax.jit(both)(draw(T, seed=1)[0], *draw(T))
    ours, wanted = run(lambda *x: whole_attention(*x, interpret=True)), run(lambda *x: xla_attention(*x, None))
    for a, b in zip(ours, wanted, strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=3e-6 * np.abs(b).max())


def test_every_query_and_every_key_on_a_mesh():
    wanted = jax.jit(lambda *x: xla_attention(*x, None))(*draw(50))
    with jax.set_mesh(make_mesh("data=2,tp=2", jax.devices()[:4])):
        found = jax.jit(lambda *x: whole_attention(*x, interpret=True))(*draw(50))
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("width, backend, kernels", [(32, "flash_interpreted", 2), (16, "flash_interpreted", 0), (32, "splash_interpreted", 0), (32, "xla", 0)])
def test_a_tower_is_given_the_kernel_where_its_heads_are_wide_enough(width, backend, kernels):
    """Two heads, two layers; what comes out of it is the same."""
    cfg = LlavaConfig(VisionConfig(width, 32, 3, 2, 16, 8), DecoderConfig(64, 32, 48, 1, 2, 1, 16, 1e-5, 1e4, 128))
    params, pixels = load_params(random_checkpoint(cfg)), jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 16, 16, 3)), jnp.float32)
    encode = lambda backend: lambda pixels: apply(Llava(cfg, attention=backend), params, pixels, method="encode_images")
    assert str(jax.make_jaxpr(encode(backend))(pixels)).count("name=flash_whole") == kernels
    if kernels:
        np.testing.assert_allclose(encode(backend)(pixels), encode("xla")(pixels), rtol=0, atol=1e-5)
