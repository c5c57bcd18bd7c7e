"""The small pieces that tower, projector and decoder share.

Axis letters: B batch, T positions, H head width, D model width, L layers.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llavamed_jax.config import RopeScaling
from llavamed_jax.parallel.mesh import constrain_weight


class Linear(nn.Module):
    """`x @ kernel + bias`, computed in `dtype`; `out_dtype` keeps a wider result (the head's float32 logits).

    Attributes:
      axes: logical axes of the kernel, as the model's table of parameters has them.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: Any = jnp.float32
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., features]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
        kernel = constrain_weight(kernel.astype(self.dtype), *self.axes)
        # Not `jnp.matmul`: it is jitted, and quantisers that intercept `dot_general` do not see the product in its cached trace.
        y = jax.lax.dot_general(x.astype(self.dtype), kernel, (((x.ndim - 1,), (0,)), ((), ())),
                                preferred_element_type=self.out_dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """LLaMA's norm: `x / rms(x)`, the mean square in float32 whatever `dtype` is, then the scale."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., D]
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        return x.astype(self.dtype) * scale.astype(self.dtype)


class LayerNorm(nn.Module):
    """CLIP's norm, mean and variance in float32 (two passes: E[x²] - E[x]² loses digits on small activations)."""

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., D]
        norm = nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, use_fast_variance=False, parent=None)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x).astype(self.dtype)


def quick_gelu(x):
    """OpenAI CLIP's activation, `x * sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x):
    """The exact (erf) GELU of the projector."""
    return jax.nn.gelu(x, approximate=False)


def tanh_gelu(x):
    """GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


# By transformers' names (`config.ACTIVATIONS`).
ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "gelu": gelu, "gelu_new": tanh_gelu, "gelu_fast": tanh_gelu,
               "gelu_pytorch_tanh": tanh_gelu, "quick_gelu": quick_gelu, "relu": nn.relu}


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Inverse frequencies float32 [H/2], each power the float32 nearest to the exact one.

    Bit for bit what torch computes with the C library's power. Its vectorised power is one last bit off in a few places, other
    ones with AVX2 than with AVX-512 (docs/fidelity.md). Computed on the host and not under jit, whose power is off by more: one
    last bit of the highest frequencies is 8e-5 in a cosine at position 1,500.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return frequencies if scaling is None else _scaled(frequencies, scaling)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Scaled frequencies float32 [H/2], operation by operation as torch computes them (transformers' modeling_rope_utils). A number
    over a tensor is there the number times the reciprocal.
    """
    f32 = np.float32
    if scaling.rope_type == "linear":
        return frequencies / f32(scaling.factor)
    low, high, before = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    lengths = f32(2 * math.pi) * (f32(1) / frequencies)  # of a wave, in positions
    slow = np.where(lengths > f32(before / low), frequencies / f32(scaling.factor), frequencies)
    share = (f32(before) * (f32(1) / lengths) - f32(low)) / f32(high - low)
    between = (f32(1) - share) * slow / f32(scaling.factor) + share * slow
    return np.where((lengths < f32(before / high)) | (lengths > f32(before / low)), slow, between)


def rope_tables(positions, head_dim: int, theta: float, scaling: RopeScaling | None = None):
    """Cosine and sine, float32 [B,T,H/2] each, of `positions` int32 [B,T]."""
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x, rope):
    """Rotates x [B,T,N,H] by tables [B,T,H/2]: the two halves of H are the pairs (HF's convention, not interleaved)."""
    cos, sin = (t[:, :, None, :] for t in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)






