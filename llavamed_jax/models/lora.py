"""The low-rank factors beside a kernel (LoRA): their product with an input, and their shapes in a parameter tree.

Axis letters: D width of the input, F of the output, r rank, L layers.

Source: PEFT's `LoraLayer`; Hu et al., 2021; Kalajdzievski, 2023 (rsLoRA).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llavamed_jax.config.adapter import DROPOUT, FACTOR_A, FACTOR_B, KERNEL, SCALE, AdapterConfig
from llavamed_jax.parallel.mesh import constrain_weight
from llavamed_jax.quantized.kernels import dot


def product(layer: nn.Module, x, axes: tuple[str | None, str | None], dtype: Any):
    """Returns `scale (x A) B` [..., F] for x [..., D].

    The factors are never multiplied with each other: no array has the kernel's shape. The scale and the share that is
    kept are float32, as torch multiplies by a Python float: a product with them is rounded once to `dtype`. With the
    random stream `dropout`, which only training has, a share of x is set to 0 before A.

    Args:
      layer: the layer, with the factors in its parameters.
      x: the layer's input.
      axes: logical axes of the layer's kernel.
      dtype: dtype of the operands.
    """
    a, b, scale, rate = (layer.get_variable("params", name.removeprefix("/"))
                         for name in (FACTOR_A, FACTOR_B, SCALE, DROPOUT))
    if rate is not None and layer.has_rng("dropout"):
        is_kept = jax.random.uniform(layer.make_rng("dropout"), x.shape) >= rate
        x = jnp.where(is_kept, x.astype(jnp.float32) / (1 - rate), 0).astype(x.dtype)
    inner = dot(x.astype(dtype), constrain_weight(a.astype(dtype), axes[0], None))
    y = dot(inner, constrain_weight(b.astype(dtype), None, axes[1]))
    return (y.astype(jnp.float32) * scale).astype(dtype)


def add_shapes(params: Mapping[str, Any], adapter: AdapterConfig) -> dict[str, Any]:
    """Returns a flat dict of parameter shapes with those of the adapter's leaves.

    Args:
      params: ShapeDtypeStructs by name, layers stacked or not.
      adapter: the adapter.

    Raises:
      UserError: in stacked layers, the adapter differs between layers.
    """
    out = dict(params)
    for name, x in params.items():
        module, is_stack = name.removesuffix(KERNEL), "/layers/" in name
        if module == name or len(x.shape) != 2 + is_stack:
            continue
        rule = adapter.of_stack(module, x.shape[0]) if is_stack else adapter.rule(module)
        if rule is None:
            continue
        *layers, D, F = x.shape
        shapes = {FACTOR_A: (*layers, D, rule.rank), FACTOR_B: (*layers, rule.rank, F), SCALE: tuple(layers)}
        shapes |= {DROPOUT: tuple(layers)} if adapter.dropout else {}
        out |= {module + leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in shapes.items()}
    return out


def axes_of(rules: list[tuple[str, tuple[str | None, ...]]]) -> list[tuple[str, tuple[str | None, ...]]]:
    """Returns the logical axes of the adapter's leaves for those of the kernels: pairs of a name pattern and axes."""
    out = []
    for pattern, axes in rules:
        module = pattern.removesuffix(KERNEL)
        if module != pattern and len(axes) == 2:
            out += [(module + FACTOR_A, (axes[0], None)), (module + FACTOR_B, (None, axes[1])), (module + SCALE, ()),
                    (module + DROPOUT, ())]
    return out
