"""Kernels with the same input, joined into one: q, k and v of a layer, and gate and up.

A decoder multiplies by them once where it finds them among the parameters, and by each of their parts otherwise. Files
and training know the parts only. The engine joins them as it places the parameters on a GPU, where a product of one row
with few columns is otherwise written out and then summed, and where XLA joins kernels again for every token.

    self_attn/{q,k,v}_proj   self_attn/qkv_proj
    mlp/{gate,up}_proj       mlp/gate_up_proj

Axis letters: D width of the input, F of an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llavamed_jax.models.layers import Linear

# Block of a layer -> name of the joined kernel, and its parts.
PARTS = {"self_attn": ("qkv_proj", ("q_proj", "k_proj", "v_proj")), "mlp": ("gate_up_proj", ("gate_proj", "up_proj"))}


def products(module: nn.Module, block: str, x, widths: Sequence[int],
             kernels: Mapping[str, jax.Array] | None = None) -> list[jax.Array]:
    """Returns the products of x [..., D] with the parts of a block's joined kernel, [..., F] each.

    Args:
      module: the block, inside its compact method. It has `cfg`, a DecoderConfig, and `dtype`.
      block: a key of `PARTS`.
      x: the input.
      widths: F of each part.
      kernels: kernels by part, for `Linear`; a part that is not among them takes its own.
    """
    name, parts = PARTS[block]
    of = {part: (module.cfg.axes(f"{block}/{part}"), module.cfg.has_bias(f"{block}/{part}")) for part in parts}
    if not module.has_variable("params", name):
        return [Linear(F, *of[part], module.dtype, name=part)(given, (kernels or {}).get(part))
                for F, part, given in zip(widths, parts, shared(x, len(parts)), strict=True)]
    y = Linear(sum(widths), *of[parts[0]], module.dtype, name=name)(x)
    return jnp.split(y, np.cumsum(widths)[:-1], axis=-1)


def shared(x, users: int) -> list[jax.Array]:
    """Returns x once for each user; the gradients of the users are summed from the last to the first.

    Each gradient is the first operand of a sum, and what has been summed so far the second. So XLA for GPUs lets each
    product of the backward pass add to that sum; in JAX's order it leaves the last of three to other kernels.

    Args:
      x: an array.
      users: how many times it is used.
    """
    if users == 1:
        return [x]
    first, others = _twice(x)
    return [first, *shared(others, users - 1)]


@jax.custom_vjp
def _twice(x):
    return x, x


_twice.defvjp(lambda x: ((x, x), None), lambda _, by: (by[0] + by[1],))


def join(layer: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a layer's parameters with kernels joined where they can be.

    Parts stay apart if one has an adapter, or if they differ in dtype, in how they are rounded or in having a bias.

    Args:
      layer: nested dicts of arrays or of ShapeDtypeStructs; a kernel may be one of few bits.
    """
    out = dict(layer)
    for block, (name, parts) in PARTS.items():
        inside = layer.get(block, {})
        if set(parts) <= set(inside) and _is_alike([inside[part] for part in parts]):
            out[block] = {key: value for key, value in inside.items() if key not in parts}
            out[block][name] = jax.tree.map(_side_by_side, *(dict(inside[part]) for part in parts))
    return out


def axes_of(rules: Sequence[tuple[str, tuple[str | None, ...]]]) -> list[tuple[str, tuple[str | None, ...]]]:
    """Returns the logical axes of joined kernels and biases for those of their first parts.

    Args:
      rules: pairs of a name pattern and logical axes.
    """
    out = []
    for block, (name, (part, *_)) in PARTS.items():
        out += [(pattern.replace(f"/{block}/{part}/", f"/{block}/{name}/"), axes) for pattern, axes in rules
                if f"/{block}/{part}/" in pattern and pattern.startswith("decoder/")]
    return out


def _is_alike(parts: Sequence[Mapping[str, Any]]) -> bool:
    if any(set(part) - {"kernel", "bias"} for part in parts):
        return False
    kinds = {(jax.tree.structure(dict(part)), *((x.shape[:-1], x.dtype) for x in jax.tree.leaves(dict(part))))
             for part in parts}
    return len(kinds) == 1


def _side_by_side(*parts):
    """Joins arrays of one kind, or ShapeDtypeStructs, along their last axis, on which the outputs are."""
    first = parts[0]
    if isinstance(first, jax.ShapeDtypeStruct):
        shape = (*first.shape[:-1], sum(part.shape[-1] for part in parts))
        return jax.ShapeDtypeStruct(shape, first.dtype)
    return (np if isinstance(first, np.ndarray) else jnp).concatenate(parts, axis=-1)
