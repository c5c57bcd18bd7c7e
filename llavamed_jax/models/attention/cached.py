"""Attention over a key/value cache for NVIDIA GPUs: Pallas kernels that read only the positions that a row holds.

A decode step is one kernel: it rotates a row's query and key, writes key and value into the cache in place, and walks
over the earlier positions. A prefill is flash attention over the cache. Both compute what `xla_attention` does with a
mask of positions; the largest difference is the order of the sums.

Axis letters: B rows, T query positions, S cache positions, N query heads, K key/value heads, G = N/K, H head width.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llavamed_jax.models.attention.backend import flash_takes
from llavamed_jax.models.attention.flash import FORWARD, LOG2_E, dot, flash_over, folded, tile
from llavamed_jax.models.layers import apply_rope
from llavamed_jax.parallel.mesh import on_each_device

WALK = 64  # positions of a tile of keys
_QUERIES, _KEYS = ("act_batch", None, "act_heads", None), ("act_batch", "act_heads", None, None)


def is_for(cache, H: int) -> bool:
    """Returns whether the kernels take a `LayerCache` and heads of H: not one of int8, nor of odd widths."""
    S = cache.k.shape[2]
    return cache.k_scale is None and flash_takes(H) and S > 0 and S % WALK == 0


def attend(q, k, v, rope, cache, positions, window: int | None, interpret: bool):
    """Writes keys and values into the cache and attends to it; scores and softmax in float32.

    Args:
      q: queries [B,T,N,H], before they are rotated.
      k: keys [B,T,K,H], before they are rotated.
      v: values [B,T,K,H].
      rope: tables of `layers.rope_tables`, [B,T,H/2].
      cache: a `LayerCache` that `is_for` takes.
      positions: int32 [B,T], consecutive in a row.
      window: width of the sliding window; None for no window.
      interpret: interprets the kernels, on platforms other than GPUs.

    Returns:
      [B,T,N,H] in the cache's dtype, and the cache with the new keys and values.
    """
    if q.shape[1] == 1:
        step = functools.partial(_step, window=window, interpret=interpret)
        rows = ("act_batch", None, None)
        out, keys, values = on_each_device(step, (_QUERIES, _QUERIES, _QUERIES, rows, rows, _KEYS, _KEYS,
                                                  ("act_batch", None)), (_QUERIES, _KEYS, _KEYS))(
            q, k, v, *rope, cache.k, cache.v, positions)
        return out, cache.replace(k=keys, v=values)
    cache = cache.write(apply_rope(k, rope).swapaxes(1, 2), v.swapaxes(1, 2), positions[:, 0])
    prefill = functools.partial(_prefill, window=window, interpret=interpret)
    out = on_each_device(prefill, (_QUERIES, _KEYS, _KEYS, ("act_batch", None)), _QUERIES)(
        apply_rope(q, rope).astype(cache.k.dtype), cache.k, cache.v, positions)
    return out, cache


def _prefill(q, k, v, positions, *, window, interpret):
    """Attends from q [B,T,N,H] at int32 positions [B,T] to k, v [B,K,S,H]."""
    T = q.shape[1]
    extra = -T % min(FORWARD, tile(T))
    q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
    rows = positions[:, :1] + jnp.arange(T + extra, dtype=jnp.int32)
    first = jnp.zeros_like(rows) if window is None else jnp.clip(rows - (window - 1), 0)
    return flash_over(interpret, q, k, v, first, positions[:, 0], "flash_prefill", T)[0][:, :T]


def _step(q, k, v, cos, sin, keys, values, positions, *, window, interpret):
    """Returns the context [B,1,N,H] of one position of each row, and the cache [B,K,S,H] with its keys and values."""
    B, _, N, H = q.shape
    K, S = keys.shape[1:3]
    G, half, dtype = N // K, H // 2, keys.dtype
    size = tile(G)  # rows of a tile of queries; those above G are empty
    # One array. Of joined kernels it is the product itself: XLA sees it in the shape in which the product was split.
    heads = jnp.concatenate([x.reshape(B, 1, -1) for x in (q, k, v)], axis=-1).reshape(B, N + 2 * K, H)

    def kernel(heads_ref, cos_ref, sin_ref, at_ref, keys_in, values_in, out_ref, keys_ref, values_ref):
        head, column = pl.program_id(1), jnp.arange(H)
        at = jnp.minimum(at_ref[0], S - 1)
        angle, sign = column % half, jnp.where(column < half, -1.0, 1.0)
        cos, sin = cos_ref[angle], sin_ref[angle] * sign
        group = jnp.arange(size)
        is_real = jnp.broadcast_to((group < G)[:, None], (size, H))
        row = head * G + group[:, None]

        def rotated(x, swapped):
            turned = x.astype(jnp.float32) * cos + swapped.astype(jnp.float32) * sin
            return turned.astype(dtype)

        def queries(column):
            return triton.load(heads_ref.at[row, column[None, :]], mask=is_real, other=0.0)

        q = rotated(queries(column), queries((column + half) % H))
        k = rotated(heads_ref[N + head, column], heads_ref[N + head, (column + half) % H])
        v = heads_ref[N + K + head, column].astype(dtype)
        keys_ref[at, column], values_ref[at, column] = k, v
        # The new position comes from here, not from the cache, which other threads are writing.
        scale = H**-0.5 * LOG2_E
        top = jnp.sum(q.astype(jnp.float32) * k.astype(jnp.float32)[None], axis=1) * scale
        start = jnp.broadcast_to(v.astype(jnp.float32)[None], (size, H)), top, jnp.ones(size, jnp.float32)
        begin = jnp.int32(0) if window is None else jnp.maximum(at - (window - 1), 0)

        def step(j, carry):
            here = pl.ds(j * WALK, WALK)
            seen = j * WALK + jnp.arange(WALK)
            is_seen = jnp.broadcast_to(((seen >= begin) & (seen < at))[None], (size, WALK))
            scores = dot(q, keys_in[here, :].T) * scale
            # Positions that are not seen may hold a NaN, which a weight of 0 would not mask.
            values = jnp.where((seen < at)[:, None], values_in[here, :], 0)
            return folded(carry, scores, is_seen, values)

        out, top, total = jax.lax.fori_loop(begin // WALK, (at + WALK - 1) // WALK, step, start)
        triton.store(out_ref.at[row, column[None, :]], (out / total[:, None]).astype(dtype), mask=is_real)

    row, cache = lambda b, k: (b, 0), pl.BlockSpec((None, None, S, H), lambda b, k: (b, k, 0, 0))
    out, keys, values = pl.pallas_call(
        kernel, grid=(B, K), interpret=interpret, name="flash_decode",
        in_specs=[pl.BlockSpec((None, N + 2 * K, H), lambda b, k: (b, 0, 0)), pl.BlockSpec((None, half), row),
                  pl.BlockSpec((None, half), row), pl.BlockSpec((None, 1), row), cache, cache],
        out_specs=[pl.BlockSpec((None, N, H), lambda b, k: (b, 0, 0)), cache, cache],
        out_shape=[jax.ShapeDtypeStruct((B, N, H), dtype), jax.ShapeDtypeStruct(keys.shape, dtype),
                   jax.ShapeDtypeStruct(values.shape, dtype)],
        input_output_aliases={4: 1, 5: 2},
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3))(
            heads, cos[:, 0], sin[:, 0], positions, keys, values)
    return out[:, None], keys, values
