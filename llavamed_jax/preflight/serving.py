"""Lowers the programs of the generation engine for the shapes of a checkpoint: encode, prefill and decode.

Axis letters: R rows of the cache, B prompts of a prefill, T positions of a prompt, S cache positions, P positions per
image, F images with features in memory, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh

from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import is_derived
from llavamed_jax.generation.engine import STEPS, cache_length
from llavamed_jax.generation.image_features import BATCH, PLACES
from llavamed_jax.generation.programs import Programs, Prompts, Slots, cached_backend
from llavamed_jax.generation.rows import batch_size, bucket
from llavamed_jax.generation.sampling import Sampling
from llavamed_jax.generation.weights import placed
from llavamed_jax.models.decoders.cache import LayerCache, cache_bytes
from llavamed_jax.models.llava import abstract_params, check_heads, param_axes
from llavamed_jax.parallel.mesh import batch_sharding, batch_shards, make_mesh, param_shardings, replicated
from llavamed_jax.quantized.rounding import with_shapes
from llavamed_jax.training.program import bytes_a_device

TEXT = 64  # tokens of a prompt without its image: a question and the text of the template


@dataclass(frozen=True)
class Serving:
    """The programs that an engine compiles for prompts with one image each.

    Attributes:
      config: the shapes of the model.
      mesh: the mesh that the model is sharded over.
      dtype: dtype of the weights.
      rows: R.
      new_tokens: longest answer, in tokens. S has room for it; the engine's cache grows up to this length.
      quantize: how the decoder's kernels are rounded (`quantized.rounding.ROUNDINGS`); None if they are not.
      kv_cache: dtype of the cache; None is `dtype`.
    """

    config: LlavaConfig
    mesh: Mesh
    dtype: Any
    rows: int
    new_tokens: int
    quantize: str | None = None
    kv_cache: str | None = None

    @classmethod
    def of(cls, config: LlavaConfig, devices: Sequence[jax.Device], mesh: str | None, dtype: str, rows: int,
           new_tokens: int, quantize: str | None = None, kv_cache: str | None = None) -> Serving:
        """Chooses the mesh and rounds the number of rows, as an evaluation does.

        Args:
          config: the shapes of the model.
          devices: the devices of one process.
          mesh: the value of `--mesh`; None uses the first device only.
          dtype: dtype of the weights.
          rows: number of rows of the cache; rounded up to a multiple of the shards of the batch.
          new_tokens: longest answer, in tokens.
          quantize: how the decoder's kernels are rounded; None if they are not.
          kv_cache: dtype of the cache; None is `dtype`.
        """
        laid = make_mesh(mesh, devices) if mesh else make_mesh(None, devices[:1])
        check_heads(config, laid)
        shards = batch_shards(laid)
        return cls(config, laid, jnp.dtype(dtype), -(-rows // shards) * shards, new_tokens, quantize,
                   kv_cache)

    @property
    def prompt(self) -> int:
        """T: positions of a prompt."""
        return bucket(self.config.tokens_per_image + TEXT)

    @property
    def length(self) -> int:
        """S: positions of the cache."""
        most = self.config.decoder.max_positions
        return cache_length(min(self.prompt + self.new_tokens, most))

    @property
    def batch(self) -> int:
        """B: prompts of a prefill."""
        return batch_size(self.rows, shards=batch_shards(self.mesh))

    def params(self):
        """Returns the weights as shapes with shardings."""
        flat = flatten_dict(abstract_params(self.config), sep="/")
        flat = {name: jax.ShapeDtypeStruct(x.shape, jnp.float32 if is_derived(name) else self.dtype)
                for name, x in flat.items()}
        tree = unflatten_dict(with_shapes(flat, self.quantize), sep="/")
        tree = placed(tree, self.config, self.mesh)
        return jax.tree.map(lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), tree,
                            param_shardings(tree, param_axes(self.config), self.mesh))

    def programs(self) -> Iterator[tuple[str, Any, int]]:
        """Yields name, lowering, and further bytes on a device beside the arguments, for each program."""
        programs = Programs(self.config, self.dtype, self.mesh, STEPS, self._cache_dtype)
        params, vision = self.params(), self.config.vision
        features = self._array((PLACES, self.config.tokens_per_image, self.config.decoder.hidden_size), self.dtype,
                               replicated(self.mesh))
        cache = self._cache_bytes(self.rows, self.length)
        images = -(-BATCH // (shards := batch_shards(self.mesh))) * shards
        pixels = self._array((images, vision.image_size, vision.image_size, vision.num_channels), jnp.uint8)
        yield "encode", programs.lower("encode", params, features, pixels, self._array((images,), jnp.int32)), cache
        width = cache_length(self.prompt)
        yield "prefill", programs.lower("fill", params, self._caches(programs, self.batch, width), features,
                                        self._prompts()), cache
        number = jax.ShapeDtypeStruct((), jnp.int32)
        yield "decode", programs.lower("decode", params, self._slots(programs), number), bytes_a_device(features)

    def bytes(self) -> dict[str, int]:
        """Returns the bytes on each device of the parameters and of the cache of all rows."""
        return dict(parameters=bytes_a_device(self.params()), optimizer=0, gradients=0,
                    cache=self._cache_bytes(self.rows, self.length))

    def flops(self) -> float:
        """Returns the FLOPs of B images and their prompts."""
        return self.prefill_flops() + self.batch * self.config.vision_flops_per_image()

    def prefill_flops(self) -> float:
        """Returns the FLOPs of B prompts, whose images are encoded.

        Only the last position goes through the head, and through what stands behind the attention of the last layer.
        """
        decoder, T = self.config.decoder, self.prompt
        head = 2 * decoder.hidden_size * decoder.vocab_size
        behind = 2 * decoder.hidden_size * (decoder.num_heads * decoder.head_dim + 3 * decoder.intermediate_size)
        once = head + behind
        return self.batch * (T * (decoder.forward_flops_per_token(T) - once) + once)

    def attended(self, program: str) -> float:
        """Returns the keys that a query of the program attends to on average, over answers of `new_tokens`."""
        return self.prompt + self.new_tokens / 2 if program == "decode" else (self.prompt + 1) / 2

    @property
    def attention(self) -> str:
        """The backend of attention over the cache."""
        platform = self.mesh.devices.flat[0].platform
        return cached_backend(platform, self.config.decoder.head_dim, self._cache_dtype)

    @property
    def _cache_dtype(self):
        return self.dtype if self.kv_cache is None else jnp.dtype(self.kv_cache)

    def _cache_bytes(self, rows: int, length: int) -> int:
        return cache_bytes(self.config.decoder, rows, length, self._cache_dtype) // self.mesh.size

    def _array(self, shape, dtype, sharding=None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding or batch_sharding(self.mesh))

    def _caches(self, programs: Programs, rows: int, length: int) -> tuple[LayerCache, ...]:
        return jax.tree.map(lambda x, where: self._array(x.shape, x.dtype, where),
                            jax.eval_shape(lambda: programs.empty_caches(rows, length)), programs.cache_shardings())

    def _sampling(self, rows: int) -> Sampling:
        return Sampling(self._array((rows,), jnp.float32), self._array((rows,), jnp.int32),
                        self._array((rows,), jnp.float32), self._array((rows,), jnp.uint32))

    def _prompts(self) -> Prompts:
        number = self._array((self.batch,), jnp.int32)
        return Prompts(self._array((self.batch, self.prompt), jnp.int32), self._array((self.batch, 1), jnp.int32),
                       number, number, number, number, number, self._sampling(self.batch))

    def _slots(self, programs: Programs) -> Slots:
        number = self._array((self.rows,), jnp.int32)
        return Slots(number, number, number, number, self._array((self.rows,), jnp.bool_), self._sampling(self.rows),
                     self._caches(programs, self.rows, self.length))
