"""What a program sends, read from the text that each of XLA's compilers writes."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.preflight.collectives import read, totals

TPU = """
HloModule jit_step, num_partitions=8

%cond (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(32)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%until (p: (s32[], f32[8])) -> pred[] {
  %n = s32[] constant(32)
  ROOT %is_found = pred[] compare(%i, %n), direction=GT
}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.1 (p: bf16[16,4]) -> bf16[2,4] {
  %all-reduce.9 = bf16[16,4]{1,0} all-reduce(%p), channel_id=4, replica_groups=mesh['x'=2,'y'=8] {'y'}, to_apply=%add
  ROOT %slice = bf16[2,4]{1,0} dynamic-slice(%all-reduce.9, %o, %z), dynamic_slice_sizes={2,4}
}

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-gather-start.1 = (bf16[16,4]{1,0}, bf16[64,4]{1,0}) all-gather-start(%w), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %all-gather-done.1 = bf16[64,4]{1,0} all-gather-done(%all-gather-start.1)
  %a = bf16[8,4]{1,0} all-gather(%v), channel_id=7, replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="3"}
  %b = bf16[8,4]{1,0} all-gather(%v), channel_id=7, replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="3"}
  %c = bf16[4,4]{1,0} all-gather(%v), channel_id=8, replica_groups={{0,1},{2,3}}, frontend_attributes={chain_id="3"}
  %f = bf16[2,4]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.1
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

%search (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %e = u8[64]{0:T(128)(4,1)} all-to-all(%h), channel_id=9, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  ROOT %t = (s32[], f32[8]) tuple(%i, %x)
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t0), condition=%cond, body=%body
  %u = (s32[], f32[8]) while(%t0), condition=%until, body=%search
  %r = f32[4,4]{1,0} reduce-scatter(%q), replica_groups={{0,1,2,3}}, dimensions={0}, to_apply=%add
  %alone = f32[8]{0} all-reduce(%q), replica_groups={{0},{1}}, to_apply=%add
  ROOT %sum = (f32[8]{0}, f32[2]{0}) all-reduce(%q, %u), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}
"""
# Starts and their ends, several arrays at once, a loop in a loop, branches.
GPU = """
HloModule jit_step, is_scheduled=true, num_partitions=8

%inner.body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = ((bf16[16]{0}, bf16[64]{0}), (bf16[2]{0}, bf16[8]{0})) reduce-scatter-start(%a, %b), channel_id=2, replica_groups=mesh['x'=8] {'x'}
  %d = (bf16[2]{0}, bf16[8]{0}) reduce-scatter-done(%s), backend_config={"operation_queue_id":"0"}
}

%outer.body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%inner.body, backend_config={"known_trip_count":{"n":"3"},"dynamic_variable":false}
  %g = ((f32[2]{0}, s8[4]{0}), (f32[8]{0}, s8[16]{0})) all-gather-start(%a, %b), channel_id=3, replica_groups=[2,4]<=[2,4]T(1,0)
  %h = (f32[8]{0}, s8[16]{0}) all-gather-done(%g)
}

%yes (p: f32[8]) -> f32[8] {
  ROOT %x = f32[8]{0} collective-permute(%p), channel_id=4, source_target_pairs={{0,1},{1,0}}
}

%no (p: f32[8]) -> f32[8] {
  ROOT %y = f32[8]{0} copy(%p)
}

ENTRY %main (p0: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%c, body=%outer.body, backend_config={"known_trip_count":{"n":"5"}}
  %r = (f32[8]{0}, f32[2]{0}) all-reduce-start(%q, %u), channel_id=5, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %z = (f32[8]{0}, f32[2]{0}) all-reduce-done(%r)
  %v = (s32[], f32[8]) while(%t), condition=%c, body=%inner.body, backend_config={"known_trip_count":{"n":"2"}}
  %k = (f32[6]{0}, f32[6]{0}, u32[], u32[]) collective-permute-start(%q), channel_id=6, source_target_pairs={{0,1},{1,0}}
  %l = f32[6]{0} collective-permute-done(%k)
  ROOT %i = f32[8]{0} conditional(%is, %a, %b), branch_computations={%yes, %no}
}
"""


def test_tpus():
    """Loops by their rounds, chains once, fused scatters as scatters, groups of one not at all, loops that seek as one round."""
    found = {(each.op, each.bytes, each.count, each.array) for each in read(TPU)}
    assert found == {("all-gather", 512 * 3 / 4, 32, 512), ("all-gather", 32.0, 32, 64), ("all-gather", 16.0, 32, 32),
                     ("reduce-scatter", 128 * 7 / 8, 32, 128), ("all-to-all", 64 * 7 / 8, 1, 64),
                     ("reduce-scatter", 256 * 3 / 4, 1, 256), ("all-reduce", 2 * 40 * 7 / 8, 1, 40)}
    assert totals(read(TPU))["all-gather"] == dict(count=96, bytes=32 * (384 + 32 + 16))


def test_gpus():
    """Of a start what it takes or makes, of all its arrays; a loop in a loop runs as often as both say, and one that is entered
    from two places as often as those together."""
    found = {(each.op, each.bytes, each.count, each.array) for each in read(GPU)}
    assert found == {("reduce-scatter", 160 * 7 / 8, 17, 160), ("all-gather", 48 * 3 / 4, 5, 48), ("all-reduce", 2 * 40 / 2, 1, 40),
                     ("collective-permute", 24.0, 1, 24), ("collective-permute", 32.0, 1, 32)}
    assert list(totals(read(GPU)).items()) == [  # the largest first
        ("reduce-scatter", dict(count=17, bytes=2380)), ("all-gather", dict(count=5, bytes=180)),
        ("collective-permute", dict(count=2, bytes=56)), ("all-reduce", dict(count=1, bytes=40))]


@pytest.mark.parametrize("groups, devices", [
    ("{{0,1},{2,3},{4,5},{6,7}}", 2), ("[2,4]<=[8]", 4), ("[4,2]<=[2,2,2]T(2,1,0)", 2), ("mesh['a'=2,'b'=4] {'b'}", 4),
    ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", 4), ("mesh['a'=1,'b'=2,'c'=4], device_ids=([2,2,2]T(1,0,2)) {'b'}", 2),
    ("mesh['a'=8] {'a':(2)4}", 4), ("{}", 8)])
def test_groups(groups, devices):
    text = ("HloModule m, num_partitions=8\n\nENTRY %main (p: f32[2]) -> f32[8] {\n"
            f"  ROOT %g = f32[8]{{0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}\n}}\n")
    (found,) = read(text)
    assert found.bytes == 32 * (devices - 1) / devices


@pytest.mark.parametrize("shape, size", [("f16[3,5]{1,0}", 30), ("f8e4m3fn[16]{0:T(128)(4,1)}", 16), ("u4[16]", 8), ("pred[]", 1),
                                         ("(s64[2]{0}, (f32[1], u32[]))", 24)])
def test_widths(shape, size):
    text = f"HloModule m, num_partitions=2\n\nENTRY %main (p: f32[2]) -> f32[2] {{\n  %g = {shape} all-reduce(%p), replica_groups={{}}\n}}"
    assert [each.array for each in read(text)] == [size]


def test_a_compiler_that_gave_up_wrote_nothing():
    assert read("") == [] and totals([]) == {}


def test_groups_within_a_mesh_as_this_compiler_writes_them():
    """Over fsdp of a data x fsdp mesh a gather in a loop of three and a scatter, over data a sum, over both an exchange."""
    mesh = make_mesh("data=2,fsdp=4")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(("data", "fsdp")), P("fsdp")), out_specs=P(("data", "fsdp")), check_vma=False)
    def work(x, w):  # [2,8], [4]
        def layer(x, scale):
            return jnp.tanh(x * jax.lax.all_gather(scale * w, "fsdp", tiled=True).sum()), None
        x, _ = jax.lax.scan(layer, x, jnp.arange(3.0))
        part = jax.lax.psum_scatter(x, "fsdp", scatter_dimension=1, tiled=True)  # [2,2]
        part = jnp.tile(jax.lax.psum(part, "data"), (4, 4))  # [8,8]
        return jax.lax.all_to_all(part, ("data", "fsdp"), 0, 0, tiled=True)[:2]

    give = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    found = totals(read(jax.jit(work).lower(give(16, 8), give(16)).compile().as_text()))
    assert found == {"all-to-all": dict(count=1, bytes=8 * 8 * 4 * 7 // 8), "all-gather": dict(count=3, bytes=3 * 16 * 4 * 3 // 4),
                     "reduce-scatter": dict(count=1, bytes=2 * 8 * 4 * 3 // 4), "all-reduce": dict(count=1, bytes=2 * 2 * 2 * 4 // 2)}
