"""The mesh and the one table from logical to mesh axes."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from llavamed_jax.config import PRESETS, preset
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.models import llava
from llavamed_jax.parallel import mesh as meshes
from llavamed_jax.parallel.mesh import AXES, RULES, constrain, constrain_weight, make_mesh, param_shardings, spec_of


@pytest.mark.parametrize("spec,shape", [
    (None, (8, 1, 1)), ("data=2,fsdp=2,tp=2", (2, 2, 2)), ("fsdp=-1", (1, 8, 1)), ({"data": -1, "tp": 4}, (2, 1, 4))])
def test_sizes(spec, shape):
    mesh = make_mesh(spec)
    assert mesh.axis_names == AXES and tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


@pytest.mark.parametrize("spec, shape", [
    ("data=1,tp=2", (1, 1, 2)), ("data=3", (3, 1, 1)), ({"data": 2, "fsdp": 1, "tp": 2}, (2, 1, 2)), (" tp = 1 ", (1, 1, 1)),
    ({}, (1, 1, 1))])
def test_sizes_of_fewer_devices_take_the_first_ones(spec, shape):
    mesh = make_mesh(spec)
    assert tuple(mesh.shape.values()) == shape and mesh.axis_names == AXES
    assert list(mesh.devices.flat) == jax.devices()[:mesh.size]


def test_of_several_processes_none_is_left_without_a_device():
    """Also where the processes are not here, as in preflight."""
    far = [SimpleNamespace(process_index=i // 4, platform="cpu", id=i) for i in range(8)]
    for spec in ("tp=2", "data=2,tp=2", {"data": 1, "fsdp": 1, "tp": 4}):
        with pytest.raises(UsageError, match="of the 8 devices of several processes; sizes with a product of 8 were expected"):
            make_mesh(spec, far)
    assert make_mesh("tp=2", jax.devices()).size == 2, "of this process alone"


@pytest.mark.parametrize("spec", ["data=3,tp=-1", "data=-1,tp=-1", "rows=8", "data=two", "data=0", "data=16", "data", "fsdp=-2", "", ",",
                                  "data=2,data=4", "tp=9", "data=4,tp=4", "tp=2,"])
def test_sizes_that_do_not_fit_are_one_sentence(spec):
    with pytest.raises(UsageError, match="expected"):
        make_mesh(spec)


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", PRESETS)
def test_every_leaf_of_every_preset_has_exactly_one_rule(name, scan):
    mesh, cfg = make_mesh("data=2,fsdp=2,tp=2"), preset(name)
    # A layer is as the next one, and under scan those of the decoder are one; numbers have up to two digits.
    cfg = cfg.replace(vision=replace(cfg.vision, num_layers=3 if scan else 11))
    if not scan:
        cfg = cfg.replace(decoder=replace(cfg.decoder, num_layers=11))
    params = llava.abstract_params(cfg, scan)
    if cfg.decoder.vocab_size % 2:  # v1.0's 32,003 rows do not divide
        with pytest.raises(UserError, match="embed_tokens/embedding: a dimension of 32003 is not divisible by the mesh axis tp of 2"):
            param_shardings(params, llava.param_axes(cfg), mesh)
        mesh = make_mesh("data=4,fsdp=2")
    shardings = param_shardings(params, llava.param_axes(cfg), mesh)
    spec = shardings["decoder"]["layers" if scan else "layers_0"]["mlp"]["down_proj"]["kernel"].spec
    assert spec == (P(None, "tp", "fsdp") if scan else P("tp", "fsdp"))


def test_errors_name_the_leaf():
    mesh = make_mesh("fsdp=8")
    leaf = lambda *shape: {"decoder": {"norm": {"scale": jax.ShapeDtypeStruct(shape, jnp.float32)}}}
    with pytest.raises(UserError, match="decoder/norm/scale: 0 sharding rules match"):
        param_shardings(leaf(4), [], mesh)
    with pytest.raises(UserError, match="decoder/norm/scale: 2 sharding rules match"):
        param_shardings(leaf(4), [("decoder/.*", (None,)), (".*scale", (None,))], mesh)
    with pytest.raises(UserError, match="a dimension of 12 is not divisible by the mesh axis fsdp of 8"):
        param_shardings(leaf(12), [(".*", ("embed",))], mesh)
    with pytest.raises(UserError, match=re.escape("does not fit the shape (8, 8)")):
        param_shardings(leaf(8, 8), [(".*", ("embed",))], mesh)
    with pytest.raises(UserError, match="decoder/norm/scale: the logical axes .* put one mesh axis on two dimensions"):
        param_shardings(leaf(8, 8), [(".*", ("embed", "embed"))], mesh)


@pytest.mark.parametrize("name,tp,of", [("small", 4, "tower's 6"), ("small", 8, "tower's 6"), ("v1-13b", 8, None), ("v15-7b", 8, None)])
def test_no_mesh_cuts_through_a_head(name, tp, of):
    mesh = make_mesh({"data": -1, "tp": tp})
    if of is None:
        return llava.check_heads(preset(name), mesh)
    with pytest.raises(UserError, match=f"the {of} heads are not divisible by the mesh axis tp of {tp}"):
        llava.check_heads(preset(name), mesh)


def test_parameter_and_activation_axes_are_disjoint():
    used = {axis for name in PRESETS for _, axes in llava.param_axes(preset(name)) for axis in axes if axis}
    assert used <= set(RULES) and not any(axis.startswith("act_") for axis in used)


def test_constrain_needs_a_mesh_in_context():
    x = jnp.ones((8, 4))
    assert constrain(x, "act_batch", None) is x
    mesh = make_mesh("data=4,fsdp=2")
    with jax.set_mesh(mesh):
        y = jax.jit(lambda x: constrain(x, "act_batch", None))(x)
    assert y.sharding.is_equivalent_to(NamedSharding(mesh, spec_of(("act_batch", None))), 2)


def test_the_sharded_gradient_is_compiled_with_collectives_and_without_replication(capfd):
    """XLA says "Involuntary full rematerialization" on stderr where it gives up and replicates."""
    cfg, mesh = preset("small"), make_mesh("data=2,fsdp=2,tp=2")
    cfg = cfg.replace(vision=replace(cfg.vision, num_layers=2))
    give = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    params = llava.abstract_params(cfg, scan=True)
    params = jax.tree.map(give, params, param_shardings(params, llava.param_axes(cfg), mesh))
    ids = jax.ShapeDtypeStruct((8, 64), jnp.int32, sharding=meshes.batch_sharding(mesh))
    pixels = jax.ShapeDtypeStruct((8, 1, 96, 96, 3), jnp.float32, sharding=meshes.batch_sharding(mesh))
    model = llava.Llava(cfg, scan=True, remat="full")
    with jax.set_mesh(mesh):
        loss = lambda p, i, x: model.apply({"params": p}, i, x).mean()
        text = jax.jit(jax.value_and_grad(loss)).lower(params, ids, pixels).compile().as_text()
    assert "all-gather" in text and ("all-reduce" in text or "reduce-scatter" in text)
    assert "rematerialization" not in capfd.readouterr().err


# ---- machines that are not here

class Device:
    """As jax describes one: where it lies, and what it is."""

    def __init__(self, number, kind="NVIDIA H100 80GB HBM3", process=0, piece=0, coords=()):
        self.id, self.device_kind, self.process_index, self.slice_index, self.coords = number, kind, process, piece, coords
        self.platform, self.core_on_chip = "tpu" if kind.startswith("TPU") else "gpu", 0

    def __repr__(self):
        return f"{self.id}"


def gpus(hosts, a_process=8):
    """Eight GPUs a host, which jax calls a slice; in no good order, as several processes of a host give them."""
    found = [Device(i, process=i // a_process, piece=i // 8) for i in range(8 * hosts)]
    return found[::2] + found[1::2]


def tpus(x, y, z, slices=1):
    grid = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
    return [Device(len(grid) * piece + n, "TPU v5", (len(grid) * piece + n) // 4, piece, at) for piece in range(slices)
            for n, at in enumerate(grid)]


def test_gpus_of_several_hosts_make_a_mesh_with_fsdp_inside_a_host():
    """To jax they are several slices, of which `jax.make_mesh` makes none."""
    mesh = make_mesh("data=2,fsdp=8", gpus(2))
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {1}]
    assert make_mesh("fsdp=-1", gpus(2)).shape["fsdp"] == 16 and set(mesh.axis_types) == {AxisType.Auto}


def test_an_axis_may_cut_a_side_of_a_tpus_grid():
    mesh = make_mesh("fsdp=32,tp=2", tpus(4, 4, 4))
    assert mesh.devices.shape == (1, 32, 2) and len({device.id for device in mesh.devices.flat}) == 64
    neighbours = mesh.devices[0, :, 0].tolist(), mesh.devices[0, :, 1].tolist()
    assert {sum(abs(p - q) for p, q in zip(a.coords, b.coords)) for a, b in zip(*neighbours)} == {1}


@pytest.mark.parametrize("spec", ["data=2,fsdp=-1", "data=4,fsdp=8"])
def test_data_alone_crosses_from_slice_to_slice(spec):
    mesh = make_mesh(spec, tpus(4, 4, 1, slices=2), slices=2)
    assert {len({device.slice_index for device in row.flat}) for row in mesh.devices} == {1}
    pieces = [row.flat[0].slice_index for row in mesh.devices]
    assert pieces == sorted(pieces) and set(pieces) == {0, 1}


def test_slices_divide_data():
    with pytest.raises(UsageError, match=re.escape("'mesh.data' is 1; a multiple of mesh.slices (2) was expected")):
        make_mesh("fsdp=-1", tpus(4, 4, 1, slices=2), slices=2)
    with pytest.raises(UsageError, match="'mesh.slices' is 1, but the devices form 2 slices"):
        make_mesh("fsdp=-1", tpus(4, 4, 1, slices=2))


@pytest.mark.parametrize("devices, slices, needed, sizes", [
    (gpus(1), 1, 15, (8, 1)), (gpus(1), 1, 16, (1, 8)),  # the state may take half of 30
    (gpus(4), 1, 120, (4, 8)), (gpus(4), 1, 121, (1, 32)),  # a host holds it, or all must
    (gpus(2, a_process=1), 1, 120, (2, 8)), (gpus(1, a_process=1), 1, 120, (1, 8)),  # a process a GPU
    (tpus(4, 4, 1), 1, 15, (16, 1)), (tpus(4, 4, 1), 1, 16, (1, 16)),  # whose hosts of four are no border
    (tpus(4, 4, 1, slices=2), 2, 16, (2, 16)),
    (tpus(4, 4, 1, slices=2), 2, 10_000, (2, 16)),  # over a slice at the most
])
def test_auto_takes_the_smallest_group_of_neighbours(devices, slices, needed, sizes):
    assert tuple(meshes.auto_sizes(devices, needed, 30, slices).values()) == sizes


def test_memory_is_what_jax_may_have_of_the_devices_here():
    here, there = Device(0), Device(1, process=1)
    here.memory_stats, there.memory_stats = lambda: {"bytes_limit": 123}, lambda: pytest.fail("this one is another host's")
    assert meshes.device_memory([there, here]) == 123
    here.memory_stats = lambda: None
    assert 2 * meshes.device_memory([here, here]) == meshes.device_memory([here])


@pytest.mark.parametrize("kind, shape, finer", [
    ("TPU v5 lite", (1, 64, 1), (1, 16, 4, 1)), ("TPU v5", (2, 128, 2), (2, 32, 4, 2)),
    ("TPU v5 lite", (1, 32, 1), (1, 8, 4, 1)), ("TPU v5 lite", (1, 16, 1), None),
    ("NVIDIA H200", (1, 64, 1), None), ("TPU v5 lite", (1, 66, 1), None)])
def test_gradients_of_many_tpus_are_summed_in_two_stages(monkeypatch, kind, shape, finer):
    """Laid as the weight, then as parts of groups of four whose members have the same part; elsewhere the first alone."""
    laid = []
    device = AbstractDevice(device_kind=kind, platform=kind.split()[0].lower(), num_cores=None)
    over = AbstractMesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, abstract_device=device)
    monkeypatch.setattr(jax.sharding, "get_abstract_mesh", lambda: over)
    monkeypatch.setattr(jax.lax, "with_sharding_constraint", lambda x, where: laid.append(where) or x)
    assert constrain_weight("weight", "embed", "mlp") == "weight"
    assert laid[0] == P("fsdp", "tp") and len(laid) == 1 + (finer is not None)
    if finer is not None:
        assert laid[1].spec == P("fsdp", "tp") and tuple(laid[1].mesh.shape.values()) == finer
        assert laid[1].mesh.axis_names == ("data", "fsdp", "last", "tp")
