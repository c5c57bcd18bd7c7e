"""The layers that tower, projector and decoder share.

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
from llavamed_jax.config.adapter import SCALE
from llavamed_jax.models import lora
from llavamed_jax.parallel.mesh import constrain_weight
from llavamed_jax.quantized import kernels

_FACTORS_SCALE = SCALE.removeprefix("/")


class Linear(nn.Module):
    """A dense layer, `x @ kernel + bias`, and the factors of an adapter if they stand beside the kernel (`lora`).

    The kernel among the parameters may be one of few bits (`quantized.kernels`).

    Attributes:
      features: width of the output.
      axes: logical axes of the kernel, as in the model's table of parameters.
      use_bias: whether the layer has a bias.
      dtype: dtype of the operands.
      out_dtype: dtype of the product; None for `dtype`. The head sets float32 for its logits.
    """

    features: int
    axes: tuple[str | None, str | None]
    use_bias: bool = True
    dtype: Any = jnp.float32
    out_dtype: Any = None

    @nn.compact
    def __call__(self, x, kernel=None):  # [..., D] -> [..., features]
        """Maps [..., D] to [..., features].

        Args:
          x: the input.
          kernel: the layer's kernel [D, features], as `backward.kernels_first` returns it; None to take it from the
            parameters.
        """
        if isinstance(given := self.get_variable("params", "kernel"), kernels.Kernel):
            y = given.product(x, self.dtype, self.out_dtype)
        else:
            if kernel is None:
                kernel = self.param("kernel", nn.initializers.lecun_normal(), (x.shape[-1], self.features))
            kernel = constrain_weight(kernel.astype(self.dtype), *self.axes)
            y = kernels.dot(x.astype(self.dtype), kernel, self.out_dtype)
        # qwix gives its own factors the same names, without a scale, and multiplies itself.
        if self.has_variable("params", _FACTORS_SCALE):
            y += lora.product(self, x, self.axes, self.dtype).astype(y.dtype)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(y.dtype)
        return y


class RMSNorm(nn.Module):
    """LLaMA's norm: `x / rms(x)`, with the mean square in float32 for every `dtype`, then the scale in `dtype`.

    Attributes:
      epsilon: added to the mean square before the root.
      dtype: dtype of the result.
      is_scaled_in_float32: whether a subclass multiplies by the scale in float32, and rounds once, to `dtype`.
    """

    epsilon: float
    dtype: Any = jnp.float32

    is_scaled_in_float32 = False

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., D]
        """Normalises [..., D] over its last axis."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.epsilon)
        dtype = jnp.float32 if self.is_scaled_in_float32 else self.dtype
        return (x.astype(dtype) * scale.astype(dtype)).astype(self.dtype)


class LayerNorm(nn.Module):
    """CLIP's norm; mean and variance in float32, in two passes: E[x²] - E[x]² loses digits on small activations.

    Attributes:
      epsilon: added to the variance before the root.
      dtype: dtype of the result.
    """

    epsilon: float
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):  # [..., D] -> [..., D]
        """Normalises [..., D] over its last axis."""
        norm = nn.LayerNorm(epsilon=self.epsilon, dtype=jnp.float32, use_fast_variance=False, parent=None)
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        return norm.apply({"params": {"scale": scale, "bias": bias}}, x).astype(self.dtype)


def quick_gelu(x):
    """Computes OpenAI CLIP's activation, `x * sigmoid(1.702 x)`."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x):
    """Computes the exact (erf) GELU of the projector."""
    return jax.nn.gelu(x, approximate=False)


def tanh_gelu(x):
    """Computes GELU by its tanh approximation."""
    return jax.nn.gelu(x, approximate=True)


# By the names of transformers (`config.ACTIVATIONS`).
ACTIVATIONS = {"silu": nn.silu, "swish": nn.silu, "gelu": gelu, "gelu_new": tanh_gelu, "gelu_fast": tanh_gelu,
               "gelu_pytorch_tanh": tanh_gelu, "quick_gelu": quick_gelu, "relu": nn.relu}


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> np.ndarray:
    """Returns the inverse frequencies, float32 [H/2], each power rounded correctly to float32.

    The values equal torch's, computed with the C library's power, bit for bit. Torch's vectorised power differs in the
    last bit of a few values, and with AVX2 in others than with AVX-512 (docs/fidelity.md). They are computed on the
    host and not under jit, since XLA's power differs by more: one last bit of the highest frequencies changes a cosine
    at position 1,500 by 8e-5.

    Args:
      head_dim: H.
      theta: base of the frequencies.
      scaling: the checkpoint's rope scaling; None for none.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = np.float32(1.0) / np.power(np.float64(theta), exponent.astype(np.float64)).astype(np.float32)
    return frequencies if scaling is None else _scaled(frequencies, scaling)


def _scaled(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Returns scaled frequencies float32 [H/2], with the operations of torch in their order.

    Torch computes a number over a tensor as the number times the reciprocal. Source: transformers' modeling_rope_utils.
    """
    f32 = np.float32
    if scaling.rope_type == "linear":
        return frequencies / f32(scaling.factor)
    low, high, before = scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_position_embeddings
    lengths = f32(2 * math.pi) * (f32(1) / frequencies)  # wavelengths, in positions
    slow = np.where(lengths > f32(before / low), frequencies / f32(scaling.factor), frequencies)
    share = (f32(before) * (f32(1) / lengths) - f32(low)) / f32(high - low)
    between = (f32(1) - share) * slow / f32(scaling.factor) + share * slow
    return np.where((lengths < f32(before / high)) | (lengths > f32(before / low)), slow, between)


def rope_tables(positions, head_dim: int, theta: float, scaling: RopeScaling | None = None):
    """Returns cosine and sine, float32 [B,T,H/2] each, of `positions` int32 [B,T].

    Args:
      positions: int32 [B,T].
      head_dim: H.
      theta: base of the frequencies.
      scaling: the checkpoint's rope scaling; None for none.
    """
    angles = positions.astype(jnp.float32)[..., None] * rope_frequencies(head_dim, theta, scaling)
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x, rope):
    """Rotates x [B,T,N,H] by tables [B,T,H/2]; the halves of H form the pairs (HF's convention, not interleaved)."""
    cos, sin = (t[:, :, None, :] for t in rope)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
