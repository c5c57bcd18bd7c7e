"""The CLIP vision transformer: pixels to the hidden state that LLaVA reads.

The module has only the blocks that the selected hidden state needs; CLIP-L's last block and `post_layernorm` are absent
(a checkpoint carries their tensors along, see `checkpoints/`).

Axis letters: B images, P patches, T = P + 1 with the class token, N heads, H head width, D model width.

Source: transformers' CLIPVisionModel.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from llavamed_jax.config import VisionConfig
from llavamed_jax.models.attention.backend import attention
from llavamed_jax.models.layers import ACTIVATIONS, LayerNorm, Linear
from llavamed_jax.models.stacking import layer_stack, run_layers
from llavamed_jax.models.towers.pixels import normalize
from llavamed_jax.parallel.mesh import constrain


class PatchEmbedding(nn.Module):
    """The patch convolution; its stride equals its size, so it is computed as a matrix product.

    Attributes:
      cfg: the tower's shapes.
      dtype: dtype of the computation.
      use_bias: whether the patches have a bias; CLIP's have none.
    """

    cfg: VisionConfig
    dtype: Any
    use_bias: bool = False

    @nn.compact
    def __call__(self, pixels):  # [B,height,width,C] -> [B,P,D]
        """Maps pixels [B,height,width,C] to patches [B,P,D]."""
        p, C, D = self.cfg.patch_size, self.cfg.num_channels, self.cfg.hidden_size
        kernel = self.param("kernel", nn.initializers.normal(0.02), (p, p, C, D))
        side = self.cfg.image_size // p
        # Pixels beyond the last whole patch are dropped, as in a convolution without padding.
        x = pixels[:, : side * p, : side * p].reshape(-1, side, p, side, p, C).astype(self.dtype)
        # BhpwqC,pqCD->BhwD; `dot_general` for the reason that `kernels.dot` states.
        x = jax.lax.dot_general(x, kernel.astype(self.dtype), (((2, 4, 5), (0, 1, 2)), ((), ())))
        if self.use_bias:
            x += self.param("bias", nn.initializers.zeros, (D,)).astype(self.dtype)
        return x.reshape(-1, side * side, D)


class PositionEmbedding(nn.Module):
    """The learned position embeddings, float32 [T,D].

    Attributes:
      length: T.
      width: D.
    """

    length: int
    width: int

    @nn.compact
    def __call__(self):
        """Returns the embeddings [T,D]."""
        return self.param("embedding", nn.initializers.normal(0.02), (self.length, self.width))


class Embeddings(nn.Module):
    """Patch, class and position embeddings.

    Attributes:
      cfg: the tower's shapes.
      dtype: dtype of the computation.
    """

    cfg: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, pixels):  # [B,height,width,C] -> [B,T,D], the class token first
        """Maps pixels [B,height,width,C] to [B,T,D], the class token first."""
        cfg = self.cfg
        cls = self.param("class_embedding", nn.initializers.normal(0.02), (cfg.hidden_size,)).astype(self.dtype)
        patches = PatchEmbedding(cfg, self.dtype, name="patch_embedding")(pixels)
        x = jnp.concatenate([jnp.broadcast_to(cls, (patches.shape[0], 1, cfg.hidden_size)), patches], axis=1)
        positions = PositionEmbedding(cfg.num_positions, cfg.hidden_size, name="position_embedding")()
        return x + positions.astype(self.dtype)


class Attention(nn.Module):
    """Self-attention without a mask.

    Attributes:
      cfg: the tower's shapes.
      dtype: dtype of the computation.
      backend: attention backend (`attention.backend_of`).
    """

    cfg: VisionConfig
    dtype: Any
    backend: str

    @nn.compact
    def __call__(self, x):  # [B,T,D] -> [B,T,D]
        """Maps [B,T,D] to [B,T,D]."""
        heads = (*x.shape[:2], self.cfg.num_heads, self.cfg.head_dim)

        def project(name):
            y = Linear(self.cfg.hidden_size, self.cfg.axes(f"self_attn/{name[0]}_proj"), dtype=self.dtype,
                       name=f"{name[0]}_proj")(x)
            return checkpoint_name(y, name).reshape(heads)

        q, k, v = map(project, ("query", "key", "value"))
        context = attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), backend=self.backend).reshape(x.shape)
        return Linear(self.cfg.hidden_size, self.cfg.axes("self_attn/out_proj"), dtype=self.dtype,
                      name="out_proj")(context)


class Mlp(nn.Module):
    """Two dense layers with an activation between them.

    Attributes:
      cfg: the tower's shapes.
      dtype: dtype of the computation.
    """

    cfg: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x):  # [B,T,D] -> [B,T,D]
        """Maps [B,T,D] to [B,T,D]."""
        x = Linear(self.cfg.intermediate_size, self.cfg.axes("mlp/fc1"), dtype=self.dtype, name="fc1")(x)
        x = ACTIVATIONS[self.cfg.hidden_act](x)
        return Linear(self.cfg.hidden_size, self.cfg.axes("mlp/fc2"), dtype=self.dtype, name="fc2")(x)


class Block(nn.Module):
    """A pre-norm transformer layer.

    Attributes:
      cfg: the tower's shapes.
      dtype: dtype of the computation.
      backend: attention backend (`attention.backend_of`).
    """

    cfg: VisionConfig
    dtype: Any
    backend: str

    @nn.compact
    def __call__(self, x, shared, cache):  # [B,T,D] -> [B,T,D]
        """Maps [B,T,D] to [B,T,D]; `shared` is not used, and `cache` is returned unchanged."""
        eps = self.cfg.layer_norm_eps
        h = LayerNorm(eps, self.dtype, name="layer_norm1")(x)
        x = checkpoint_name(x + Attention(self.cfg, self.dtype, self.backend, name="self_attn")(h), "middle")
        x = x + Mlp(self.cfg, self.dtype, name="mlp")(LayerNorm(eps, self.dtype, name="layer_norm2")(x))
        return constrain(x, "act_batch", None, None), cache


class VisionTower(nn.Module):
    """The first `num_layers` blocks of the tower that `cfg` describes.

    Attributes:
      cfg: the tower's shapes.
      num_layers: number of blocks; the following blocks are left out.
      dtype: dtype of the computation.
      scan: whether layers are stacked and scanned, for training.
      remat: `none`, `full`, `qkvo`, `attention` or `minimal` (models/stacking.py).
      attention: attention backend (`attention.backend_of`); all but `flash` are `xla` here.
    """

    cfg: VisionConfig
    num_layers: int
    dtype: Any = jnp.float32
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    def setup(self):
        """Creates the submodules."""
        self.embeddings = Embeddings(self.cfg, self.dtype)
        self.pre_layrnorm = LayerNorm(self.cfg.layer_norm_eps, self.dtype)  # sic: the checkpoint's spelling
        self.layers = self.blocks()

    def blocks(self):
        """Returns the blocks, scanned or one by one (`layer_stack`)."""
        return layer_stack(Block, self.num_layers, self.cfg, self.dtype, self.attention,
                           scan=self.scan and self.num_layers > 0, remat=self.remat)

    def __call__(self, pixels):
        """Returns the hidden state [B,P+1,D] after the last block; the class token is at 0.

        Args:
          pixels: float32 (normalised) or uint8 [B,height,width,C].
        """
        x = self.pre_layrnorm(self.embeddings(normalize(pixels, self.cfg)))
        return run_layers(self.layers, x, None)[0]
