"""Attention over a cache by the kernels for GPUs, interpreted, beside XLA's.

B rows, T query positions, S cache positions, N query heads, K key/value heads, H head width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.models.attention.backend import AttentionMask
from llavamed_jax.models.attention.cached import is_for
from llavamed_jax.models.decoders.cache import LayerCache
from llavamed_jax.models.decoders.llama import attend
from llavamed_jax.models.layers import rope_tables
from llavamed_jax.parallel.mesh import make_mesh

S, K, H = 128, 2, 16


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def both(T, N, starts, window=None, spoil=None, dtype=jnp.float32, backends=("xla", "flash_interpreted")):
    """Context and cache of XLA's attention and of the kernels; of these, `spoil` is written behind what a row holds."""
    B, starts = len(starts), np.asarray(starts)
    q, k, v = (drawn(i, B, T, heads, H).astype(dtype) for i, heads in enumerate((N, K, K)))
    cache = LayerCache(drawn(3, B, K, S, H).astype(dtype), drawn(4, B, K, S, H).astype(dtype))
    positions = np.int32(starts[:, None] + np.arange(T))
    rope = jax.jit(rope_tables, static_argnums=(1, 2))(positions, H, 1e4)
    mask = AttentionMask(positions, np.tile(np.arange(S, dtype=np.int32), (B, 1)), window=window)
    run, spoiled = jax.jit(attend, static_argnames="backend"), cache
    if spoil is not None:
        stale = (np.arange(S) >= (starts + T)[:, None])[:, None, :, None]
        spoiled = jax.tree.map(lambda x: np.where(stale, np.float32(spoil), x), cache)
    return [run(q, k, v, rope, mask, cache if backend == "xla" else spoiled, backend=backend) for backend in backends]


@pytest.mark.parametrize("T, N, window", [(1, 2, None), (1, 8, 20), (3, 6, 1), (40, 8, 20)])
def test_it_equals_xlas(T, N, window):
    """With one, three and four queries a key, at the ends of the cache and of tiles, within windows; T > 1 is another kernel."""
    (wanted, held), (found, ours) = both(T, N, [0, 63, 64, S - T], window)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)
    np.testing.assert_allclose(ours.k, held.k, rtol=0, atol=5e-7)
    np.testing.assert_array_equal(ours.v, held.v)


@pytest.mark.parametrize("T", [1, 3])
def test_what_lies_behind_a_row_is_not_read(T):
    (wanted, _), (found, _) = both(T, 6, [0, 5, 62, 70], spoil=np.nan)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)


def test_a_position_behind_the_cache_is_its_last_as_of_a_free_row_in_a_shorter_cache():
    (_, held), (_, ours) = both(1, 6, [S + 5, 3, 0, S])
    np.testing.assert_allclose(ours.k, held.k, rtol=0, atol=5e-7)
    np.testing.assert_array_equal(ours.v, held.v)


def test_bfloat16_is_as_near_as_its_digits():
    (wanted, held), (found, ours) = both(1, 6, [0, 63, 64, 100], dtype=jnp.bfloat16)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), np.asarray(wanted, np.float32), rtol=0, atol=0.03)
    np.testing.assert_array_equal(ours.v, held.v)


@pytest.mark.parametrize("T", [1, 3])
def test_devices_compute_their_rows_and_heads(T):
    ((wanted, held),) = both(T, 6, [0, 63, 64, 100], backends=["xla"])
    with jax.set_mesh(make_mesh("data=2,tp=2", jax.devices()[:4])):
        ((found, ours),) = both(T, 6, [0, 63, 64, 100], backends=["flash_interpreted"])
    np.testing.assert_allclose(found, wanted, rtol=0, atol=3e-6)
    np.testing.assert_allclose(ours.k, held.k, rtol=0, atol=5e-7)


def test_other_caches_and_heads_are_left_to_xla():
    empty = jnp.zeros((1, 1, S, H))
    assert is_for(LayerCache(empty, empty), H)
    assert not is_for(LayerCache(empty, empty, empty, empty), H) and not is_for(LayerCache(empty, empty), 80)
    assert not is_for(LayerCache(empty[:, :, :100], empty[:, :, :100]), H)
