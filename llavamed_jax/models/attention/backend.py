"""Attention as one function, with a mask that is described by positions and segments and not as a dense array.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N/K, H head width.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llavamed_jax.errors import UsageError
from llavamed_jax.models.attention.xla import xla_attention

# Platform -> value of a recipe's `attention` -> backend. All backends compute the same function; the others are tested
# against `xla`. On a CPU the others run interpreted, for tests.
BACKENDS = {
    "cpu": {"auto": "xla", "xla": "xla", "splash": "splash_interpreted", "flash": "flash_interpreted"},
    "gpu": {"auto": "flash", "xla": "xla", "flash": "flash"},
    "tpu": {"auto": "splash", "xla": "xla", "splash": "splash"},
}
ELSEWHERE = {"auto": "xla", "xla": "xla"}


def flash_takes(head_dim: int) -> bool:
    """Returns whether the kernels of flash attention take heads of a width; they take powers of two from 16 on."""
    return head_dim >= 16 and head_dim & (head_dim - 1) == 0


def backend_of(choice: str, platform: str, head_dim: int = 128) -> str:
    """Returns the backend for a recipe's `attention`.

    Args:
      choice: the recipe's `attention`.
      platform: the devices' platform, such as `gpu`.
      head_dim: H; a head width that flash does not support makes `auto` choose XLA's attention.

    Raises:
      UsageError: the backend is not available on this platform, or does not support the head width.
    """
    there = BACKENDS.get(platform, ELSEWHERE)
    if there.get(choice) == "flash" and not flash_takes(head_dim):
        if choice == "auto":
            return "xla"
        raise UsageError(f"the config key 'attention' is {choice!r}, which needs heads of width 16, 32, 64, …, but "
                         f"the decoder's have width {head_dim}; auto or xla was expected")
    if choice not in there:
        raise UsageError(f"the config key 'attention' is {choice!r}, which is not for devices of the kind {platform}; "
                         f"{' or '.join(there)} was expected")
    return there[choice]


@flax.struct.dataclass
class AttentionMask:
    """Describes which keys a query attends to: those of its segment, at its own or earlier positions, in the window.

    Attributes:
      q_positions: int32 [B,T].
      k_positions: int32 [B,S].
      q_segments: int32 [B,T]; None if each row is one segment. Segment 0 is padding.
      k_segments: int32 [B,S]; None if each row is one segment.
      window: width of the sliding window (query i attends to keys i-window < j <= i); None for no window.
      wanted: int32 [B], the one query of each row whose output is wanted, in the last layer of a prefill; None for all.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)
    wanted: jax.Array | None = None

    def narrowed(self, x):
        """Returns what is wanted of [B,T,...], [B,1,...]; x itself if all is, or if it has been narrowed already."""
        if self.wanted is None or x.shape[1] == 1:
            return x
        return jnp.take_along_axis(x, self.wanted.reshape(-1, *[1] * (x.ndim - 1)), axis=1)

    def dense(self) -> jax.Array:
        """Returns the mask as bool [B,T,S], True where a query attends to a key."""
        q, k = self.q_positions[:, :, None], self.k_positions[:, None, :]
        seen = k <= q
        if self.window is not None:
            seen &= k > q - self.window
        if self.q_segments is not None:
            seen &= self.q_segments[:, :, None] == self.k_segments[:, None, :]
        return seen


def attention(q, k, v, mask: AttentionMask | None = None, backend: str = "xla", k_scale=None, v_scale=None):
    """Computes softmax attention with grouped queries; scores and softmax in float32.

    Args:
      q: [B,T,N,H].
      k: [B,K,S,H], the keys of a head contiguous, as in the cache.
      v: [B,K,S,H].
      mask: None lets every query attend to every key, for the towers; all but `flash` are `xla` then.
      backend: as `backend_of` returns it. `splash` and `flash` are for whole rows: queries and keys have the same
        positions, consecutive within a segment. `xla` follows the mask alone.
      k_scale: float32 [B,K,S,1], by which the keys are multiplied if they are int8 (XLA only); None for other keys.
      v_scale: likewise of the values.

    Returns:
      [B,T,N,H] in v's dtype, or in q's if v is int8; rematerialisation policies know it as `context`.
    """
    name, _, interpreted = backend.partition("_")
    if name == "flash" and mask is None:
        from llavamed_jax.models.attention.whole import whole_attention
        return checkpoint_name(whole_attention(q, k, v, bool(interpreted)), "context")
    if name == "xla" or mask is None:
        return checkpoint_name(xla_attention(q, k, v, mask, k_scale, v_scale), "context")
    if name == "flash":  # imported here, since Pallas takes a second to import
        from llavamed_jax.models.attention.flash import flash_attention as kernel
    else:
        from llavamed_jax.models.attention.splash import splash_attention as kernel
    return kernel(q, k, v, mask, interpret=bool(interpreted)).astype(v.dtype)
