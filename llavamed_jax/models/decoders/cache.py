"""The key/value cache: one LayerCache a layer, contiguous in the positions of each head.

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
    """

    k: jax.Array
    v: jax.Array

    def write(self, k, v, start) -> "LayerCache":
        """Writes k, v [B,K,T,H] at positions start[b]..start[b]+T-1 of each row; returns the new cache.

        Args:
          k: keys [B,K,T,H].
          v: values [B,K,T,H].
          start: int32 [B].
        """
        put = jax.vmap(lambda row, new, i: jax.lax.dynamic_update_slice(row, new, (0, i, 0)))
        return LayerCache(put(self.k, k.astype(self.k.dtype), start), put(self.v, v.astype(self.v.dtype), start))


def init_cache(cfg: DecoderConfig, rows: int, length: int, dtype=jnp.float32) -> tuple[LayerCache, ...]:
    """Returns empty caches of `rows` rows and `length` positions: L times keys and values [B,K,S,H].

    Args:
      cfg: the decoder's shapes.
      rows: B.
      length: S.
      dtype: dtype of keys and values.
    """

    def empty():
        return constrain(jnp.zeros((rows, cfg.num_kv_heads, length, cfg.head_dim), dtype), "act_batch", "act_heads",
                         None, None)

    return tuple(LayerCache(empty(), empty()) for _ in range(cfg.num_layers))


def cache_bytes(cfg: DecoderConfig, rows: int, length: int, dtype=jnp.float32) -> int:
    """Returns the bytes of the caches that `init_cache` makes: 2 L B K S H times the width of `dtype`.

    Args:
      cfg: the decoder's shapes.
      rows: B.
      length: S.
      dtype: dtype of keys and values.
    """
    return 2 * cfg.num_layers * rows * cfg.num_kv_heads * length * cfg.head_dim * jnp.dtype(dtype).itemsize
