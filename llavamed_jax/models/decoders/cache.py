"""The key/value cache: one LayerCache a layer, contiguous in the positions of each head.

A cache of int8 stores a key or value as 255 values from -127 to 127 times a scale of its own, one for each row, head
and position.

Axis letters: B rows, K key/value heads, S positions, H head width, L layers.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp

from llavamed_jax.config import DecoderConfig
from llavamed_jax.parallel.mesh import constrain


@flax.struct.dataclass
class LayerCache:
    """Keys and values of one layer at positions 0..S-1 of every row.

    Attributes:
      k: keys [B,K,S,H].
      v: values [B,K,S,H].
      k_scale: float32 [B,K,S,1], by which int8 keys are multiplied; None if `k` holds the keys themselves.
      v_scale: likewise of the values.
    """

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None

    def write(self, k, v, start) -> "LayerCache":
        """Writes k, v [B,K,T,H] at positions start[b]..start[b]+T-1 of each row; returns the new cache.

        Args:
          k: keys [B,K,T,H].
          v: values [B,K,T,H].
          start: int32 [B].
        """
        if self.k_scale is None:
            new = LayerCache(k.astype(self.k.dtype), v.astype(self.v.dtype))
        else:
            (k, k_scale), (v, v_scale) = _to_int8(k), _to_int8(v)
            new = LayerCache(k, v, k_scale, v_scale)
        put = jax.vmap(lambda row, new, i: jax.lax.dynamic_update_slice(row, new, (0, i, 0)))
        return jax.tree.map(lambda old, new: put(old, new, start), self, new)


def _to_int8(x):
    """Rounds [B,K,T,H] to int8 and float32 scales [B,K,T,1]; a NaN or an infinity makes the scale a NaN."""
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1, keepdims=True) / 127
    scale = jnp.where(jnp.isinf(scale), jnp.nan, scale)
    return jnp.rint(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale


def init_cache(cfg: DecoderConfig, rows: int, length: int, dtype=jnp.float32) -> tuple[LayerCache, ...]:
    """Returns empty caches of `rows` rows and `length` positions: L times keys and values [B,K,S,H].

    Args:
      cfg: the decoder's shapes.
      rows: B.
      length: S.
      dtype: dtype of keys and values; int8 adds their scales.
    """

    def empty(width, dtype):
        zeros = jnp.zeros((rows, cfg.num_kv_heads, length, width), dtype)
        return constrain(zeros, "act_batch", "act_heads", None, None)

    def scale():
        return empty(1, jnp.float32) if jnp.dtype(dtype) == jnp.int8 else None

    return tuple(LayerCache(empty(cfg.head_dim, dtype), empty(cfg.head_dim, dtype), scale(), scale())
                 for _ in range(cfg.num_layers))


def cache_bytes(cfg: DecoderConfig, rows: int, length: int, dtype=jnp.float32) -> int:
    """Returns the bytes of the caches that `init_cache` makes.

    They are 2 L B K S H times the width of `dtype`, and with int8 2 L B K S times 4 for the scales.

    Args:
      cfg: the decoder's shapes.
      rows: B.
      length: S.
      dtype: dtype of keys and values.
    """
    bytes_each = cfg.head_dim * jnp.dtype(dtype).itemsize + (4 if jnp.dtype(dtype) == jnp.int8 else 0)
    return 2 * cfg.num_layers * rows * cfg.num_kv_heads * length * bytes_each
