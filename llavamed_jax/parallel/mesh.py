"""Sharding as data: a mesh of three axes, and one table from logical to mesh axes.

Other modules name logical axes and take shardings from here. Outside this file, mesh axes are named where rows, heads
or devices are counted, and `jax.shard_map` divides the loss and the embedding's gradient, which add up over devices.

The tables of a model's parts give the logical axes of its parameters (`models.llava.param_axes`); `param_shardings`
looks up every leaf, and raises an error that names the leaf if no rule or two rules match it, or if a dimension is not
divisible.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llavamed_jax.errors import UsageError, UserError

AXES = ("data", "fsdp", "tp")

# Names of parameter axes and of activation axes are disjoint, so that no array uses `fsdp` twice.
RULES: dict[str, str | tuple[str, ...] | None] = {
    "layers": None, "embed": "fsdp", "heads": "tp", "kv_heads": "tp", "mlp": "tp", "vocab": "tp",
    "act_batch": ("data", "fsdp"), "act_heads": "tp",
}

# From FIRST_STAGED TPUs on fsdp on, gradients are summed in two stages, the last of them over STAGE devices.
FIRST_STAGED, STAGE = 32, 4


def make_mesh(spec: str | Mapping[str, int] | None = None, devices: Sequence[jax.Device] | None = None,
              slices: int = 1) -> Mesh:
    """Makes a mesh with the axes data, fsdp and tp.

    Neighbours on tp and fsdp are close; those on data may be far apart.

    Args:
      spec: sizes as `"data=2,tp=4"` or a mapping; an absent axis has size 1; -1 on one axis takes the remaining
        devices. Sizes of fewer devices than there are take the first ones. None puts all devices on data.
      devices: default: all of them.
      slices: number of TPU slices, which are joined by a network that only data crosses.

    Returns:
      The mesh.

    Raises:
      UsageError: an axis is unknown or repeated, two axes are -1, the sizes need more devices than there are or leave a
        process without one, the devices do not form that many slices, or slices do not divide data.
    """
    devices = list(jax.devices() if devices is None else devices)
    if isinstance(spec, str):
        try:
            pairs = [(k.strip(), int(v)) for k, v in (part.split("=") for part in spec.split(","))]
        except ValueError:
            raise UsageError(f"the mesh {spec!r} cannot be read; sizes such as data=2,tp=4 were expected") from None
        if len(dict(pairs)) < len(pairs):
            raise UsageError(f"the mesh {spec!r} names an axis twice; sizes such as data=2,tp=4 were expected")
        spec = dict(pairs)
    sizes = {"data": -1} if spec is None else {k: int(v) for k, v in spec.items()}
    if set(sizes) - set(AXES):
        raise UsageError(f"the mesh has the unknown axes {sorted(set(sizes) - set(AXES))}; {', '.join(AXES)} were "
                         "expected")
    shape = [sizes.get(axis, 1) for axis in AXES]
    known = math.prod(n for n in shape if n != -1)
    is_open = -1 in shape
    if (shape.count(-1) > 1 or min(shape) < -1 or 0 in shape
            or (len(devices) % known if is_open else known > len(devices))):
        wanted = (f"one -1 and other sizes whose product divides {len(devices)}" if is_open
                  else f"sizes with a product of at most {len(devices)} (one may be -1)")
        raise UsageError(f"the mesh {dict(zip(AXES, shape))} does not fit {len(devices)} devices; {wanted} were "
                         "expected")
    shape = [len(devices) // known if n == -1 else n for n in shape]
    is_part = math.prod(shape) < len(devices)
    if is_part and len({device.process_index for device in devices}) > 1:
        raise UsageError(f"the mesh {dict(zip(AXES, shape))} uses {math.prod(shape)} of the {len(devices)} devices of "
                         f"several processes; sizes with a product of {len(devices)} were expected (one may be -1)")
    devices = devices[:math.prod(shape)]
    there = len({getattr(device, "slice_index", None) for device in devices}) if devices[0].platform == "tpu" else 1
    if there != slices:
        raise UsageError(f"the config key 'mesh.slices' is {slices}, but the devices form {there} slices; {there} was "
                         "expected")
    # Not `jax.make_mesh`: it refuses GPUs of several hosts, which jax calls slices, and TPU grids that an axis splits.
    if is_part:
        array = np.array(devices, dtype=object).reshape(shape)  # create_device_mesh needs a whole grid of TPUs
    elif slices == 1:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        if shape[0] % slices:
            raise UsageError(f"the config key 'mesh.data' is {shape[0]}; a multiple of mesh.slices ({slices}) was "
                             "expected")
        inside = (shape[0] // slices, *shape[1:])
        array = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * 3)


def auto_sizes(devices: Sequence[jax.Device], needed: int, memory: int, slices: int = 1) -> dict[str, int]:
    """Returns sizes for `make_mesh`: fsdp over the smallest group of devices that holds the state, data over groups.

    Groups are one device, the GPUs of a host, a slice of TPUs, and all devices. The state may take half of a device's
    memory; the other half is for the update. Communication over fsdp is 3/2 of that over data (two gathers and a
    scatter, against one sum), and grows with the group.

    Args:
      devices: the devices of the mesh.
      needed: bytes of parameters, gradients and optimizer.
      memory: bytes of one device.
      slices: number of TPU slices.

    Returns:
      Axis -> size, of data and fsdp.
    """
    number = len(devices)
    groups = [1, _host_size(devices) if devices[0].platform != "tpu" else 1, number // slices]
    fsdp = next((n for n in groups if number % n == 0 and needed / n <= memory / 2), groups[-1])
    return {"data": number // fsdp, "fsdp": fsdp}


def _host_size(devices: Sequence[jax.Device]) -> int:
    """Returns how many devices are on the first one's host.

    jax calls the GPUs that NVLink joins a slice; the processes of a host may each have a part of it.
    """
    slices = [getattr(device, "slice_index", None) for device in devices]
    hosts = slices if len(set(slices)) > 1 else [device.process_index for device in devices]
    return hosts.count(hosts[0])


def device_memory(devices: Sequence[jax.Device]) -> int:
    """Returns the bytes that programs may use on each device; for a CPU its share of this machine's memory."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    stats = local[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // len(local)


def spec_of(logical: Sequence[str | None], name: str = "an array") -> P:
    """Converts logical axes to a PartitionSpec. Raises UserError if one mesh axis would be used twice."""
    axes = [None if axis is None else RULES[axis] for axis in logical]
    used = [a for axis in axes if axis for a in ((axis,) if isinstance(axis, str) else axis)]
    if len(set(used)) != len(used):
        raise UserError(f"{name}: the logical axes {tuple(logical)} put one mesh axis on two dimensions ({axes})")
    return P(*axes)


def constrain(x, *logical: str | None):
    """Constrains `x` to the sharding of these logical axes; returns `x` itself if no mesh is set (`jax.set_mesh`)."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, spec_of(logical))


def constrain_weight(x, *logical: str | None):
    """Constrains a weight or its gradient to its parameter's sharding, so that the gradient is reduce-scattered.

    XLA for TPUs can reduce-scatter along one ring of a slice; over more devices it all-reduces, which is twice the
    traffic. There the gradient is first reduce-scattered into the parts of larger groups, which are then cut.

    Args:
      x: the weight or gradient.
      *logical: the parameter's logical axes.

    Returns:
      `x` with the constraint.
    """
    mesh = jax.sharding.get_abstract_mesh()
    x = constrain(x, *logical)
    fsdp = mesh.shape.get("fsdp", 1)
    if (mesh.empty or mesh.abstract_device is None or "TPU" not in mesh.abstract_device.device_kind
            or fsdp < FIRST_STAGED or fsdp % STAGE):
        return x
    sizes = tuple(mesh.shape[axis] for axis in ("data", "tp"))
    finer = AbstractMesh((sizes[0], fsdp // STAGE, STAGE, sizes[1]), ("data", "fsdp", "last", "tp"),
                         axis_types=(AxisType.Auto,) * 4)
    return jax.lax.with_sharding_constraint(x, NamedSharding(finer, spec_of(logical)))


def on_each_device(work: Callable, in_axes: Sequence[Sequence[str | None] | None],
                   out_axes: Sequence[Any]) -> Callable:
    """Divides work over the devices of the current mesh; without a mesh the work stays as it is.

    The parts must be independent: the devices do not communicate.

    Args:
      work: maps arrays to one array, or to several.
      in_axes: logical axes of each argument; None for an argument that is None.
      out_axes: logical axes of the result; of several results, those of each.

    Returns:
      The work, of which each device does its own part.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return work
    in_specs = tuple(None if axes is None else spec_of(axes) for axes in in_axes)
    out_specs = tuple(map(spec_of, out_axes)) if isinstance(out_axes[0], tuple) else spec_of(out_axes)
    return jax.shard_map(work, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def param_shardings(params: Any, rules: Sequence[tuple[str, tuple]], mesh: Mesh) -> Any:
    """Returns the NamedSharding of each leaf of a parameter tree.

    Stacked leaves (`…/layers/…`) have one more leading axis than their rule; this axis is not sharded.

    Args:
      params: arrays or ShapeDtypeStructs, nested or with flat names.
      rules: pairs of a regular expression for a leaf's whole name and its logical axes.
      mesh: the mesh.

    Returns:
      A tree of the same structure.

    Raises:
      UserError: no rule or several rules match a leaf, or a rule does not fit its shape; the error names the leaf.
      UsageError: a mesh axis does not divide a dimension of a leaf.
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
                raise UsageError(f"{name}: a dimension of {size} is not divisible by the mesh axis {axis} of "
                                 f"{mesh.shape[axis]}")
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(sharding, params)


def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """Copies an array of the host to devices. Of several processes, which all have the array, each copies its part."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding, may_alias=False)
    return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index]))


def local_rows(mesh: Mesh, rows: int) -> list[int]:
    """Returns the rows of a batch, ascending, that are on this process's devices (`batch_sharding`).

    Args:
      mesh: the mesh.
      rows: B, the number of rows.

    Returns:
      Row numbers.

    Raises:
      UsageError: data x fsdp does not divide the rows.
    """
    shards = batch_shards(mesh)
    if rows < 1 or rows % shards:
        raise UsageError(f"a batch of {rows} rows cannot be divided over the {shards} devices of the mesh's data x "
                         f"fsdp; a multiple of {shards} was expected")
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return sorted({row for (part,) in parts for row in range(*part.indices(rows))})


def local_view(mesh: Mesh) -> tuple[Mesh, Mesh]:
    """Returns two meshes with equal fsdp and tp for a mesh over several processes.

    The first has all devices, with consecutive indices of `data` on each process. The second has only this process's
    devices. An array that is sharded over fsdp and tp of the first, and not over `data`, is complete on every process,
    and equals the same array on the second. fsdp and tp divide those of `mesh`, so that dimensions that are divisible
    by those of `mesh` are divisible by these.

    Example: with 2 processes of 4 devices and `mesh` of fsdp=8, the first has data=2, fsdp=4, and the second data=1,
    fsdp=4.

    Args:
      mesh: a mesh over several processes.

    Returns:
      The mesh of all devices, and the mesh of this process's devices.
    """
    by_process: dict[int, list[jax.Device]] = {}
    for device in mesh.devices.flat:
        by_process.setdefault(device.process_index, []).append(device)
    here = len(by_process[jax.process_index()])
    tp = math.gcd(mesh.shape["tp"], here)
    fsdp = math.gcd(mesh.shape["fsdp"], here // tp)
    make = lambda devices: Mesh(np.array(devices).reshape(-1, fsdp, tp), AXES, axis_types=(AxisType.Auto,) * 3)
    return (make([device for _, devices in sorted(by_process.items()) for device in devices]),
            make(by_process[jax.process_index()]))


def batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of shards of a batch, data x fsdp; 1 without a mesh."""
    return 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over data and fsdp, all other dimensions unsharded."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())
