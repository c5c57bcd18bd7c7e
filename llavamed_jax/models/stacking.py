"""Layers one by one, or stacked into one scanned layer; and rematerialisation.

A model has `num_layers` equal blocks. Training scans one block over parameters with a leading L axis, under the name `layers`. Decoding
and the files on disk have `layers_0 … layers_{L-1}`. Everything that converts between the two, and nothing else, is here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

# What a rematerialised block keeps for its backward pass beside its input, by the names given in the blocks (`checkpoint_name`):
# nothing; what attention takes and gives; every matrix product.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "qkvo": jax.checkpoint_policies.save_only_these_names("query", "key", "value", "context"),
    "minimal": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names("context")),
}


def layer_stack(block: type[nn.Module], num_layers: int, *args, scan: bool, remat: str):
    """`num_layers` blocks: one scanned module (parameters with a leading L axis) or a list of them.

    A block's `__call__` is `(x, shared, cache) -> (x, cache)`; `shared` is the same for all layers.
    """
    if remat != "none":
        # Inside a scan the loop already keeps the backward pass from being merged with the forward one.
        block = nn.remat(block, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if not scan:
        return [block(*args) for _ in range(num_layers)]
    scanned = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True},
                      in_axes=(nn.broadcast, 0), length=num_layers)
    return scanned(*args)


def run_layers(layers, x, shared, caches=None):
    """Runs what `layer_stack` made; returns x and the caches, a tuple with one entry a layer (None in training)."""
    if not isinstance(layers, (list, tuple)):
        return layers(x, shared, None)
    out = []
    for i, layer in enumerate(layers):
        x, cache = layer(x, shared, None if caches is None else caches[i])
        out.append(cache)
    return x, None if caches is None else tuple(out)


def stack(params):
    """`layers_0 … layers_{L-1}` -> `layers` with a leading axis L, in every part of the tree (arrays or numpy arrays)."""
    out = {}
    for key, value in params.items():
        if not isinstance(value, dict):
            out[key] = value
        elif not re.fullmatch(r"layers_\d+", key):
            out[key] = stack(value)
    layers = [params[f"layers_{i}"] for i in range(sum(bool(re.fullmatch(r"layers_\d+", k)) for k in params))]
    if layers:
        out["layers"] = jax.tree.map(lambda *x: (np if isinstance(x[0], np.ndarray) else jnp).stack(x), *layers)
    return out


def unstack(params: Mapping[str, Any]) -> dict[str, Any]:
    """The reverse of `stack` on names with slashes: arrays, or ShapeDtypeStructs with their shardings."""
    out: dict[str, Any] = {}
    for name, value in params.items():
        if "/layers/" not in name:
            out[name] = value
            continue
        for i in range(value.shape[0]):
            out[name.replace("/layers/", f"/layers_{i}/")] = _layer(value, i)
    return out


def _layer(value: Any, i: int) -> Any:
    if not isinstance(value, jax.ShapeDtypeStruct):
        return value[i]
    sharding = value.sharding
    if sharding is not None:
        sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    return jax.ShapeDtypeStruct(value.shape[1:], value.dtype, sharding=sharding)


def in_stack(name: str) -> tuple[str, int] | None:
    """`decoder/layers_3/mlp/up_proj/kernel` -> `decoder/layers/mlp/up_proj/kernel` and 3; None for what is not in a layer."""
    found = re.fullmatch(r"(.*/layers)_(\d+)(/.*)", name)
    return None if found is None else (found[1] + found[3], int(found[2]))
