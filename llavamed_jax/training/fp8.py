"""Trains with products in FP8 (`compute=fp8`), by qwix: the projections of the decoder's layers, forward and backward.

    y  = (x8 w8) sx sw           x8, w8: e4m3, sx = max|x| / 448, one scale for a whole array
    dx = (g8 w8ᵀ) sg             g8: e5m2 of g sw, sg = max|g sw| / 57344
    dw = (x8ᵀ g8) sg             g8: e5m2 of g sx

Parameters, optimizer and all other computation are as with bfloat16: attention, head, tower, projector, embedding and
norms. A device that multiplies FP8 is about twice as fast in these products.

qwix replaces `jax.lax.dot_general` while the model is traced, and says nothing where a product escapes it: `multiplied`
counts those that it took. Tried with qwix 0.1.8.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from llavamed_jax.config.adapter import is_factor
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.models.llava import Llava, abstract_params

# The modules whose product is taken, by path in the model; a stack of layers is one module.
MODULES = r"decoder/layers(_\d+)?/(self_attn/[qkvo]|mlp/(gate|up|down))_proj"
PROJECTIONS = 7  # of a layer
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2
# Machines without FP8 units. For an A100, XLA widens the rounded values and multiplies in bfloat16.
_WITHOUT = ("TPU v2", "TPU v3", "TPU v4", "TPU v4 lite", "TPU v5 lite", "TPU v5e", "TPU v5", "TPU v5p", "TPU v6 lite",
            "TPU v6e")
_LEAST_CAPABILITY = 8.9  # of a GPU: Ada; Hopper has 9.0


def multiplied(model: Llava) -> Llava:
    """Returns the model with the products of `MODULES` in FP8, in its method `hidden`.

    Raises:
      UserError: qwix is not installed, or does not take exactly the products of these modules.
    """
    try:
        import qwix
    except ImportError:
        raise UserError("the config key 'compute' is 'fp8', which qwix computes, and it is not installed: pip install "
                        "'llavamed-jax[quantize]'") from None
    found = qwix.quantize_model(model, provider(qwix), methods=("hidden",))
    wanted, taken = expected(model), products(found)
    if taken != wanted:
        raise UserError(f"the config key 'compute' is 'fp8', and qwix {qwix.__version__} took {taken} of the {wanted} "
                        "products of the decoder's layers; qwix 0.1.8 takes all of them")
    return found


def provider(qwix: Any) -> Any:
    """Returns qwix's provider of these products, given the module."""
    class Provider(qwix.QtProvider):
        def dot_general(self, lhs, rhs, *args, **kwargs):
            # cuBLASLt takes FP8 kernels transposed. Unless they lie by rows up to here, XLA for one GPU transposes the
            # float32 kernels of all layers before the loops, which takes as much memory again. Sharded kernels are
            # gathered within the loops; they would be gathered before this constraint, in float32 and not in FP8.
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty or mesh.shape["fsdp"] * mesh.shape["tp"] == 1:
                rhs = with_layout_constraint(rhs, Layout(major_to_minor=tuple(range(rhs.ndim))))
            return super().dot_general(lhs, rhs, *args, **kwargs)

    return Provider([qwix.QtRule(module_path=MODULES, weight_qtype=FORWARD, act_qtype=FORWARD, bwd_qtype=BACKWARD,
                                 disable_channelwise_axes=True)])


def expected(model: Llava) -> int:
    """Returns the number of products that FP8 takes in a forward pass: one for each projection of each layer."""
    return PROJECTIONS * model.cfg.decoder.num_layers


def products(model: Llava) -> int:
    """Counts the products of two FP8 arrays in a forward pass over text; a loop counts with its length."""
    model = model.clone(attention="xla")  # a kernel's shapes need not fit this short row
    jaxpr = jax.make_jaxpr(lambda params, ids: model.apply({"params": params}, ids, method="hidden"))(
        abstract_params(model.cfg, model.scan), jax.ShapeDtypeStruct((1, 8), jnp.int32))
    return sum(times for eqn, times in _equations(jaxpr.jaxpr) if eqn.primitive.name == "dot_general"
               and all(var.aval.dtype.itemsize == 1 for var in eqn.invars))


def _equations(jaxpr, times: int = 1) -> Iterator[tuple[Any, int]]:
    """Yields the equations of a program and of those inside it, and how often each runs."""
    for eqn in jaxpr.eqns:
        yield eqn, times
        inner = times * eqn.params.get("length", 1) if eqn.primitive.name == "scan" else times
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=_is_program):
            if _is_program(value):
                yield from _equations(getattr(value, "jaxpr", value), inner)


def _is_program(value: Any) -> bool:
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def check(params: Mapping[str, Any], trained: Mapping[str, Any], device: jax.Device) -> None:
    """Raises UsageError if FP8 gains nothing: for a frozen kernel, beside factors, or without FP8 units.

    Args:
      params: the model's parameters by name, layers stacked.
      trained: those of them that the recipe trains.
      device: a device of the run; on a CPU, the products are computed with the same roundings, slowly.
    """
    factor = next(filter(is_factor, params), None)
    if factor is not None:
        raise UsageError(f"the config key 'compute' is 'fp8', and the model has the factors of an adapter ({factor}); "
                         "FP8 is for training all of the decoder's kernels, and bfloat16 was expected")
    frozen = next((name for name in params if is_multiplied(name) and name not in trained), None)
    if frozen is not None:
        raise UsageError(f"the config key 'compute' is 'fp8', and 'trainable' leaves {frozen} frozen; FP8 is for "
                         "training all of the decoder's kernels, and bfloat16 was expected")
    if not has_units(device):
        raise UsageError(f"the config key 'compute' is 'fp8', and {device.device_kind} has no FP8 units, so the "
                         "products would lose digits and be no faster; bfloat16 was expected")


def is_multiplied(name: str) -> bool:
    """Returns whether a parameter is the kernel of an FP8 product."""
    return re.fullmatch(f"{MODULES}/kernel", name) is not None


def has_units(device: jax.Device) -> bool:
    """Returns whether FP8 makes sense on a device: it has FP8 units, or is a CPU, on which the numbers are tried."""
    if device.platform == "gpu":
        return float(getattr(device, "compute_capability", "0")) >= _LEAST_CAPABILITY
    return device.device_kind not in _WITHOUT
