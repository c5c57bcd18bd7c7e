"""LLaVA: images become runs of positions in the decoder's sequence.

    ids       [BOS] describe  -200 -200 ... -200  briefly      an image is P positions that hold IMAGE_TOKEN
    merged    [BOS] describe   i1   i2  ...  iP   briefly      its P projected features replace them

Features are gathered row by row: a row's n-th image position takes the n-th feature of that row's own images. No row
depends on another, so a batch shards over devices as it is and a text-only row consumes no image.

Axis letters: B batch, T positions, I images a row, P positions an image, D model width, V vocabulary.

Source: `llava/model/llava.py` of LLaVA-Med v1.0 and `llava/model/llava_arch.py` of v1.5, without v1.0's mixed-batch bug
(quirk Q8).
"""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llavamed_jax.config import IMAGE_TOKEN, LlavaConfig
from llavamed_jax.config.tensors import rows
from llavamed_jax.errors import UsageError
from llavamed_jax.models import joined, lora, projector
from llavamed_jax.models.attention.backend import flash_takes
from llavamed_jax.models.decoders import decoder_module
from llavamed_jax.models.towers import tower_module
from llavamed_jax.parallel.mesh import constrain
from llavamed_jax.quantized import kernels


def param_axes(cfg: LlavaConfig) -> list[tuple[str, tuple[str | None, ...]]]:
    """Returns (name pattern, logical axes) for a model's parameters, of which `parallel.mesh` makes shardings."""
    rules = [*projector.PARAM_AXES, ("decoder/lm_head/kernel", ("embed", "vocab"))]
    for part, table in (("vision_tower", cfg.vision.table), ("decoder", cfg.decoder.table)):
        rules += [(f"{part}/{row.name.replace('layers_#', 'layers(_[0-9]+)?')}", row.axes) for row in rows(table)]
    rules += joined.axes_of(rules)
    rules += kernels.axes_of([rule for rule in rules if rule[0].startswith("decoder/layers")])
    return rules + lora.axes_of(rules) if cfg.adapter else rules


class Llava(nn.Module):
    """Tower, projector and decoder.

    Attributes:
      cfg: the model's shapes.
      dtype: dtype of the computation; parameters are cast to it at use.
      scan: stacked parameters (`layers`, leading axis L) and scanned layers, for training; else `layers_{i}`.
      remat: `none`, `full`, `qkvo`, `attention` or `minimal` (models/stacking.py).
      attention: the decoder's backend (`attention.backend_of`); `splash` is for whole rows only. The tower uses XLA's,
        or `flash` where the decoder does and the tower's heads have a width that it takes.
    """

    cfg: LlavaConfig
    dtype: Any = jnp.float32
    scan: bool = False
    remat: str = "none"
    attention: str = "xla"

    def setup(self):
        """Creates the submodules."""
        cfg = self.cfg
        tower_attention = self.attention if flash_takes(cfg.vision.head_dim) else "xla"
        self.vision_tower = tower_module(cfg.vision)(cfg.vision, cfg.num_vision_layers_used, self.dtype, self.scan,
                                                     self.remat, tower_attention)
        self.projector = projector.Projector(cfg, self.dtype)
        self.decoder = decoder_module(cfg.decoder)(cfg.decoder, self.dtype, self.scan, self.remat, self.attention)

    def __call__(self, input_ids, pixel_values=None, positions=None, segment_ids=None):
        """Computes the logits of whole rows.

        Args:
          input_ids: int32 [B,T].
          pixel_values: [B,I,height,width,3], a row's images in order of appearance; unused slots may hold any values.
            float32 as CLIP's preprocessor returns them, or uint8, which is normalised on the device.
          positions: int32 [B,T], restarting with each segment; None counts from 0.
          segment_ids: int32 [B,T]; 0 is padding; None if each row is one sample without padding.

        Returns:
          float32 [B,T,V].
        """
        return self.logits(self.hidden(input_ids, pixel_values, positions, segment_ids))

    def hidden(self, input_ids, pixel_values=None, positions=None, segment_ids=None):
        """Computes as `__call__`, up to the decoder's last norm: [B,T,D].

        Args:
          input_ids: as in `__call__`.
          pixel_values: as in `__call__`.
          positions: as in `__call__`.
          segment_ids: as in `__call__`.
        """
        features = None if pixel_values is None else self.encode_images(pixel_values)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(input_ids.shape[1]), input_ids.shape)
        return self.decoder(self.embed(input_ids, features), positions, segment_ids)[0]

    def encode_images(self, pixel_values):
        """Maps float32 or uint8 pixels [B,I,height,width,3] to projected features [B,I,P,D]."""
        B, I = pixel_values.shape[:2]
        x = self.vision_tower(constrain(pixel_values.reshape(B * I, *pixel_values.shape[2:]), "act_batch", None, None,
                                        None))
        x = x[:, self.cfg.vision.class_tokens:] if self.cfg.feature_select == "patch" else x
        x = self.projector(x)
        return x.reshape(B, I, *x.shape[1:])

    def embed(self, input_ids, features=None):
        """Embeds int32 ids [B,T] as [B,T,D], with image features [B,I,P,D] (or None) at the image positions."""
        text = self.decoder.embed(input_ids)
        return text if features is None else merge(text, input_ids == IMAGE_TOKEN, features)

    def step(self, x, positions, caches, wanted=None):
        """Runs embeddings [B,T,D] at `positions` through the cached decoder; returns [B,T,D] and the caches.

        Args:
          x: embeddings [B,T,D].
          positions: int32 [B,T], consecutive in a row; keys and values are written at them.
          caches: a tuple of LayerCache, one a layer.
          wanted: int32 [B], the one place of each row whose output [B,1,D] is wanted; None for all of them.
        """
        return self.decoder(x, positions, None, caches, wanted)

    def logits(self, hidden):
        """Maps hidden states [..., D] to float32 logits [..., V]."""
        return self.decoder.logits(hidden)


def check_heads(cfg: LlavaConfig, mesh: Mesh) -> None:
    """Raises UsageError if tensor parallelism would split a head, for which XLA would replicate the computation."""
    tp, v, d = mesh.shape["tp"], cfg.vision, cfg.decoder
    for heads, of in ((v.num_heads, "tower's"), (d.num_heads, "decoder's"), (d.num_kv_heads, "decoder's key/value")):
        if heads % tp:
            raise UsageError(f"the {of} {heads} heads are not divisible by the mesh axis tp of {tp}")


def merge(text, is_image, features):
    """Puts a row's image features at its image positions.

    Args:
      text: embeddings [B,T,D].
      is_image: bool [B,T].
      features: [B,I,P,D]; a row uses as many as it has image positions, in order.

    Returns:
      [B,T,D].
    """
    B, _, D = text.shape
    flat = features.reshape(B, -1, D).astype(text.dtype)
    index = jnp.cumsum(is_image, axis=1) - 1
    gathered = jnp.take_along_axis(flat, jnp.clip(index, 0, flat.shape[1] - 1)[..., None], axis=1)
    return jnp.where(is_image[..., None], gathered, text)


def abstract_params(cfg: LlavaConfig, scan: bool = False):
    """Returns the parameter tree as ShapeDtypeStructs (float32), without computing any value.

    Raises:
      UserError: the config has an adapter that differs between the layers of a stack.
    """
    return unflatten_dict(_shapes(cfg, scan), sep="/")


@functools.lru_cache(maxsize=64)
def _shapes(cfg: LlavaConfig, scan: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns `abstract_params` by name; a run asks several times, and flax traces the whole model for it."""
    v = cfg.vision
    ids = jnp.zeros((1, cfg.tokens_per_image), jnp.int32)
    pixels = jnp.zeros((1, 1, v.image_size, v.image_size, v.num_channels))
    params = flatten_dict(jax.eval_shape(Llava(cfg, scan=scan).init, jax.random.key(0), ids, pixels)["params"], sep="/")
    return params if cfg.adapter is None else lora.add_shapes(params, cfg.adapter)
