"""What one of two processes of four devices checks about meshes: `python -m tests.support.two_processes PORT INDEX`."""

import sys

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from llavamed_jax.parallel import distributed
from llavamed_jax.parallel.mesh import AXES, batch_sharding, local_rows, local_view, make_mesh, put
from llavamed_jax.training.step import put_batch

INDEX = int(sys.argv[2])
distributed.initialize(f"127.0.0.1:{sys.argv[1]}", 2, INDEX)
assert (distributed.process_index(), distributed.process_count(), jax.local_device_count()) == (INDEX, 2, 4)

# data outside, fsdp inside a host
mesh = make_mesh("data=2,fsdp=4")
assert [{device.process_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
assert local_rows(mesh, 16) == list(range(8 * INDEX, 8 * INDEX + 8))

# A slice's mesh may give a process rows that do not follow each other; they reach their devices all the same.
order = np.array(jax.devices())[[0, 4, 1, 5, 2, 6, 3, 7]]
mixed = Mesh(order.reshape(2, 4, 1), AXES, axis_types=(AxisType.Auto,) * 3)
mine = local_rows(mixed, 16)
assert mine == [row for shard in range(8) if shard % 2 == INDEX for row in (2 * shard, 2 * shard + 1)]
whole = np.arange(32, dtype=np.int32).reshape(16, 2)
placed = put_batch({"input_ids": whole[mine]}, mixed)["input_ids"]
assert placed.shape == (16, 2) and placed.sharding == batch_sharding(mixed)
assert all((shard.data == whole[shard.index]).all() for shard in placed.addressable_shards)

# What every process has is laid without being sent; over one process's devices alone it is whole again.
values = np.arange(64, dtype=np.float32).reshape(8, 8)
for spec, there in ((P("fsdp", "tp"), make_mesh("fsdp=8")), (P("fsdp", "tp"), make_mesh("data=2,fsdp=2,tp=2")), (P(None, "fsdp"), mixed)):
    array = put(values, NamedSharding(there, spec))
    assert not array.is_fully_addressable and all((shard.data == values[shard.index]).all() for shard in array.addressable_shards)
    everywhere, here = local_view(there)
    assert set(here.devices.flat) == set(jax.local_devices()) and there.shape["fsdp"] % here.shape["fsdp"] == 0
    copies = jax.device_put(array, NamedSharding(everywhere, spec))
    local = jax.make_array_from_single_device_arrays(values.shape, NamedSharding(here, spec), [x.data for x in copies.addressable_shards])
    assert local.is_fully_addressable and (np.asarray(local) == values).all()
assert put(np.int32(7), NamedSharding(mesh, P())).shape == ()

distributed.leave()
print("as expected")
