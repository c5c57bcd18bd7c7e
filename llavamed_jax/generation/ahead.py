"""Compiles the engine's programs before there are weights, into JAX's cache of compiled programs on disk.

An engine runs requests on shapes instead of arrays: its programs are compiled and not executed, and every request ends
after its first token. The real engine then finds these programs in the cache.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import is_derived
from llavamed_jax.generation.engine import STEPS, Engine
from llavamed_jax.generation.programs import Made, Programs
from llavamed_jax.generation.requests import Request
from llavamed_jax.models.llava import abstract_params


class Ahead(Programs):
    """Programs that compile for the arguments of a call, and return shapes; what the host reads is zeros."""

    def run(self, name: str, *args, **kwargs):
        """Compiles a program, and returns the shapes of its output."""
        lowered = self.lower(name, *args, **kwargs)
        lowered.compile()
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
        return jax.tree.map(lambda x: _read(x) if isinstance(x, Made) else x, shapes,
                            is_leaf=lambda x: isinstance(x, Made))

    def empty_features(self, places: int):
        """Returns the shape of the features."""
        return jax.ShapeDtypeStruct((places, self.cfg.tokens_per_image, self.cfg.decoder.hidden_size), self.dtype)


def _read(made: Made) -> Made:
    nothing = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), made)
    return nothing.replace(is_done=np.ones_like(nothing.is_done))


def weights(cfg: LlavaConfig, dtype) -> dict:
    """Returns the weights as shapes, in the dtypes that `checkpoints.load.load_params` gives them.

    Args:
      cfg: the model's shapes; it may have an adapter.
      dtype: of all weights but the scales of an adapter, which are float32.
    """
    flat = flatten_dict(abstract_params(cfg), sep="/")
    return unflatten_dict({name: jax.ShapeDtypeStruct(x.shape, np.float32 if is_derived(name) else dtype)
                           for name, x in flat.items()}, sep="/")


def compile_ahead(cfg: LlavaConfig, dtype, batches: Sequence[Sequence[Request]], batch_size: int,
                  cache_dtype=None) -> None:
    """Compiles what an engine needs for batches of requests, on one device and without rounded kernels.

    Args:
      cfg: the model's shapes, with the ids that end an answer.
      dtype: of weights, computation and cache.
      batches: lists of requests that run together.
      batch_size: the most rows that are decoded together.
      cache_dtype: of keys and values in the cache, such as int8; None is `dtype`.
    """
    programs = Ahead(cfg, dtype, None, STEPS, cache_dtype)
    engine = Engine(cfg, weights(cfg, dtype), dtype, batch_size=batch_size, programs=programs)
    for requests in batches:
        engine.generate(requests)
