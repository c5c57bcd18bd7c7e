"""Sharding as data: a mesh of three axes, one table from logical to mesh axes, and nothing else that knows about it.

Each model file lists the logical axes of its parameters (`PARAM_AXES`); `param_shardings` looks every leaf up, and a
leaf that no rule or two rules match, or that does not divide, is an error that names it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llavamed_jax.errors import UsageError, UserError

AXES = ("data", "fsdp", "tp")

# Names of parameter axes and of activation axes are disjoint on purpose: one array must not meet `fsdp` twice.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None, "embed": "fsdp", "heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp",
    "act_batch": ("data", "fsdp"), "act_heads": "tp",
}


def make_mesh(spec: str | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tp.

    Args:
      spec: sizes as `"data=2,tp=4"` or a mapping; an axis that is absent is 1; -1 on one axis takes what is left.
        None puts all devices on data.
      devices: default: all of them.
    Raises:
      UsageError: an unknown axis, two -1, or sizes that do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if isinstance(spec, str):
        try:
            spec = {k.strip(): int(v) for k, v in (part.split("=") for part in spec.split(",") if part.strip())}
        except ValueError:
            raise UsageError(f"the mesh {spec!r} cannot be read; sizes such as data=2,tp=4 were expected") from None
    sizes = {"data": -1} if spec is None else {k: int(v) for k, v in spec.items()}
    if set(sizes) - set(AXES):
        raise UsageError(f"the mesh has the unknown axes {sorted(set(sizes) - set(AXES))}; {', '.join(AXES)} were expected")
    shape = [sizes.get(axis, 1) for axis in AXES]
    known = math.prod(n for n in shape if n != -1)
    if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape or len(devices) % known or (-1 not in shape and known != len(devices)):
        raise UsageError(f"the mesh {dict(zip(AXES, shape))} does not fit {len(devices)} devices; sizes that multiply to that "
                         "number were expected (one may be -1)")
    shape = [len(devices) // known if n == -1 else n for n in shape]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def spec_of(logical: Sequence[str | None], name: str = "an array") -> P:
    """Logical axes -> PartitionSpec. Raises UserError where one mesh axis would be used twice."""
    axes = [None if axis is None else RULES[axis] for axis in logical]
    used = [a for axis in axes if axis for a in ((axis,) if isinstance(axis, str) else axis)]
    if len(set(used)) != len(used):
        raise UserError(f"{name}: the logical axes {tuple(logical)} put one mesh axis on two dimensions ({axes})")
    return P(*axes)


def constrain(x, *logical: str | None):
    """`x`, told to be sharded so; without a mesh in context (`jax.set_mesh`) it is `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec_of(logical))


def param_shardings(params: Any, rules: Sequence[tuple[str, tuple]], mesh: Mesh) -> Any:
    """The NamedSharding of each leaf of a parameter tree (arrays or ShapeDtypeStructs; nested or flat names).

    Stacked leaves (`…/layers/…`) have one leading axis more than their rule, which stays whole.
    Raises:
      UserError: naming the leaf that matches no rule or several, or has a dimension that its mesh axis does not divide.
    """
    def sharding(path, leaf):
        name = "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)
        matches = [axes for pattern, axes in rules if re.fullmatch(pattern, name)]
        if len(matches) != 1:
            raise UserError(f"{name}: {len(matches)} sharding rules match; exactly one was expected")
        axes = (("layers",) if "/layers/" in name else ()) + tuple(matches[0])
        if len(axes) != len(leaf.shape):
            raise UserError(f"{name}: the rule {axes} does not fit the shape {tuple(leaf.shape)}")
        spec = spec_of(axes, name)
        for size, axis in zip(leaf.shape, spec):
            if axis is not None and size % mesh.shape[axis]:
                raise UserError(f"{name}: a dimension of {size} is not divisible by the mesh axis {axis} of {mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """An array of the host laid over devices, in memory of its own. Of several processes, which all have it, each lays its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding, may_alias=False)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index]))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Which of the rows of a batch, ascending, lie on the devices of this process (`batch_sharding`).

    Raises:
      UsageError: the devices cannot share them evenly.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows < 1 or rows % shards:
        raise UsageError(f"a batch of {rows} rows cannot lie over data x fsdp = {shards} of the mesh; a multiple was expected")
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(rows))})


def local_view(mesh: Mesh) -> tuple[Mesh, Mesh]:
    """For a mesh over several processes: one of all its devices, of which each process has a whole column of `data`, and one of
    this process's devices alone, with the same fsdp and tp: what lies over the first without `data` is whole in the second.

    Both fsdp and tp divide the mesh's own, so that what divides by these divides by them.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in mesh.devices.flat:
        by_process.setdefault(device.process_index, []).append(device)
    here = len(by_process[jax.process_index()])
    tp = math.gcd(mesh.shape["tp"], here)
    fsdp = math.gcd(mesh.shape["fsdp"], here // tp)
    make = lambda devices: Mesh(np.array(devices).reshape(-1, fsdp, tp), AXES, axis_types=(AxisType.Auto,) * 3)
    return make([device for _, devices in sorted(by_process.items()) for device in devices]), make(by_process[jax.process_index()])


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over data and fsdp; all other dimensions whole."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, P())
