"""Runs layers one by one or stacked into one scanned layer, with or without rematerialisation.

A model has `num_layers` equal blocks. Training scans one block over parameters with a leading L axis, under the name
`layers`. Decoding and the files on disk have `layers_0 … layers_{L-1}`. All conversions between the two are here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# The values that a rematerialised block saves for its backward pass besides its input, by `checkpoint_name`. `full`
# saves no value, `qkvo` the inputs and the output of attention, `attention` also the sum behind it (`middle`), so that
# only the feed-forward network's products are computed again, `minimal` every matrix product. Where a product is only
# rotated, or only added to the block's input, the result is saved in its place: a value that the backward pass does not
# use is not saved.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "qkvo": jax.checkpoint_policies.save_only_these_names("query", "key", "value", "context"),
    "attention": jax.checkpoint_policies.save_only_these_names("query", "key", "value", "context", "middle"),
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("query", "key", "value", "context", "middle")),
}


def layer_stack(block: type[nn.Module], num_layers: int, *args, scan: bool, remat: str):
    """Returns `num_layers` blocks: one scanned module (parameters with a leading L axis) or a list of modules.

    A block's `__call__` is `(x, shared, cache) -> (x, cache)`; `shared` is the same for all layers.

    Args:
      block: the class of a block.
      num_layers: L.
      *args: the arguments of each block's constructor.
      scan: whether the layers are scanned.
      remat: `none`, or a key of `REMAT_POLICIES`.
    """
    if remat != "none":
        # Inside a scan the loop already prevents XLA from merging the backward pass with the forward pass.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if not scan:
        return [block(*args) for _ in range(num_layers)]
    scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True},
                      in_axes=(nn.broadcast, 0), length=num_layers)
    return scanned(*args)


def run_layers(layers, x, shared, caches=None):
    """Runs the layers of `layer_stack`; returns x and a tuple of caches, one a layer (None in training).

    Args:
      layers: as `layer_stack` returns them.
      x: the input of the first layer.
      shared: the second argument of every layer.
      caches: one cache a layer (unscanned layers only), or None.

    Raises:
      ValueError: caches for scanned layers.
    """
    if not isinstance(layers, (list, tuple)):
        if caches is not None:
            raise ValueError("scanned layers take no caches; build the model with scan=False to pass caches")
        return layers(x, shared, None)
    out = []
    for i, layer in enumerate(layers):
        x, cache = layer(x, shared, None if caches is None else caches[i])
        out.append(cache)
    return x, None if caches is None else tuple(out)


def is_layer(name: str) -> bool:
    """Returns whether a name among the parameters is that of an unrolled layer, `layers_3`."""
    return re.fullmatch(r"layers_\d+", name) is not None


def stack(params):
    """Stacks `layers_0 … layers_{L-1}` into `layers` with a leading axis L, in the whole tree (jax or numpy arrays)."""
    out = {}
    for key, value in params.items():
        if not isinstance(value, dict):
            out[key] = value
        elif not is_layer(key):
            out[key] = stack(value)
    layers = [params[f"layers_{i}"] for i in range(sum(map(is_layer, params)))]
    if layers:
        out["layers"] = jax.tree.map(lambda *x: (np if isinstance(x[0], np.ndarray) else jnp).stack(x), *layers)
    return out


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """Reverses `stack` on names with slashes: arrays, or ShapeDtypeStructs with their shardings, or trees of them."""
    out: dict[str, Any] = {}
    for name, value in params.items():
        if "/layers/" not in name:
            out[name] = value
            continue
        for i in range(value.shape[0]):
            out[name.replace("/layers/", f"/layers_{i}/")] = jax.tree.map(functools.partial(_layer, i), value)
    return out


def _layer(i: int, value: Any) -> Any:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value[i]
    sharding = value.sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(value.shape[1:], value.dtype, sharding=sharding)


def in_stack(name: str) -> tuple[str, int] | None:
    """Maps `decoder/layers_3/mlp/up_proj/kernel` to (`decoder/layers/mlp/up_proj/kernel`, 3); None outside a layer."""
    found = re.fullmatch(r"(.*/layers)_(\d+)(/.*)", name)
    return None if found is None else (found[1] + found[3], int(found[2]))
