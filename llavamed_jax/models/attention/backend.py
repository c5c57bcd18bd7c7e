"""Attention: one function, and a mask that is described by data instead of being materialised by the caller.

Axis letters: B batch, T query positions, S key positions, N query heads, K key/value heads, G = N/K, H head width.
"""

from __future__ import annotations

import flax.struct
import jax
from jax.ad_checkpoint import checkpoint_name

from llavamed_jax.errors import UsageError
from llavamed_jax.models.attention.xla import xla_attention

# Platform -> what a recipe's `attention` may say there -> backend. All are the same function; `xla` is what the rest is tested
# against. On a CPU the others run interpreted, for tests.
BACKENDS = {
    "cpu": {"auto": "xla", "xla": "xla", "splash": "splash_interpreted", "flash": "flash_interpreted"},
    "gpu": {"auto": "flash", "xla": "xla", "flash": "flash"},
    "tpu": {"auto": "splash", "xla": "xla", "splash": "splash"},
}
ELSEWHERE = {"auto": "xla", "xla": "xla"}


def backend_of(choice: str, platform: str, head_dim: int = 128) -> str:
    """The backend for a recipe's `attention` on devices of a platform, with heads of a width that it takes.

    Raises:
      UsageError: one that the devices do not have, or that does not take the heads; `auto` takes XLA's then.
    """
    there = BACKENDS.get(platform, ELSEWHERE)
    if there.get(choice) == "flash" and (head_dim < 16 or head_dim & (head_dim - 1)):
        if choice == "auto":
            return "xla"
        raise UsageError(f"the config key 'attention' is {choice!r}, which takes heads of 16, 32, 64, … numbers, and the decoder's have "
                         f"{head_dim}; auto or xla was expected")
    if choice not in there:
        raise UsageError(f"the config key 'attention' is {choice!r}, which is not for devices of the kind {platform}; "
                         f"{' or '.join(there)} was expected")
    return there[choice]


@flax.struct.dataclass
class AttentionMask:
    """Who sees whom: a query sees a key of its own segment at its own or an earlier position, within the window.

    Attributes:
      q_positions: int32 [B,T].
      k_positions: int32 [B,S].
      q_segments, k_segments: int32 [B,T] and [B,S], or None where a row is one segment. Segment 0 is padding.
      window: keys further back than this are not seen (query i sees i-window < j <= i), or None.
    """

    q_positions: jax.Array
    k_positions: jax.Array
    q_segments: jax.Array | None = None
    k_segments: jax.Array | None = None
    window: int | None = flax.struct.field(pytree_node=False, default=None)

    def dense(self) -> jax.Array:
        """bool [B,T,S]."""
        q, k = self.q_positions[:, :, None], self.k_positions[:, None, :]
        seen = k <= q
        if self.window is not None:
            seen &= k > q - self.window
        if self.q_segments is not None:
            seen &= self.q_segments[:, :, None] == self.k_segments[:, None, :]
        return seen


def attention(q, k, v, mask: AttentionMask | None = None, backend: str = "xla"):
    """Softmax attention with grouped queries; scores and softmax in float32.

    Args:
      q: [B,T,N,H]
      k, v: [B,K,S,H], keys contiguous a head: the layout of the cache.
      mask: None lets every query see every key (the vision tower; XLA only).
      backend: as `backend_of` returns it. `splash` and `flash` are for whole rows: queries and keys are the same positions,
        consecutive in a segment. `xla` goes by the mask alone.

    Returns:
      [B,T,N,H] in v's dtype, which rematerialisation knows as `context`.
    """
    if backend == "xla":
        return checkpoint_name(xla_attention(q, k, v, mask), "context")
    name, _, interpreted = backend.partition("_")
    if name == "flash":  # Pallas takes a second to import
        from llavamed_jax.models.attention.flash import flash_attention as kernel
    else:
        from llavamed_jax.models.attention.splash import splash_attention as kernel
    return kernel(q, k, v, mask, interpret=bool(interpreted)).astype(v.dtype)


