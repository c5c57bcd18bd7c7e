"""The floor of programs whose work is known: products, loops, updates in place, norms, collectives."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from llavamed_jax.errors import UsageError
from llavamed_jax.models.attention import flash
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.preflight.floor import floor_of, one_round
from llavamed_jax.preflight.peaks import Peaks, near, peaks_of, read
from llavamed_jax.preflight.report import tables
from llavamed_jax.preflight.topologies import Topology

PEAKS = Peaks(flops=1e12, bytes_per_second=1e11, link_bytes_per_second=1e10, far_bytes_per_second=1e9)
CLOSE = dict(rel=0.02)


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def compiled(f, *args, **kwargs):
    return jax.jit(f, **kwargs).lower(*args).compile().as_text()


def floor(f, *args, rounds=1.0, **kwargs):
    return floor_of(compiled(f, *args, **kwargs), PEAKS, 8, rounds)


def test_a_product():
    found = floor(lambda a, b: a @ b, shape(512, 256), shape(256, 1024))
    assert found.matmul_flops == 2 * 512 * 256 * 1024
    assert found.memory_bytes == pytest.approx(4 * (512 * 256 + 256 * 1024 + 512 * 1024), **CLOSE)
    assert found.seconds == pytest.approx(max(found.matmul_flops / 1e12, found.memory_bytes / 1e11), rel=0.05)


@pytest.mark.parametrize("of_rows, of_columns", [
    (dict(pad=(5, 5)), dict()),  # of a window as wide as the row one position is inside, as where XLA for TPUs splits heads
    (dict(pad=(0, 0), stride=3), dict(pad=(1, 2), stride=2)), (dict(pad=(2, 1), rhs=2), dict(pad=(0, 3))),
    (dict(pad=(3, 2), lhs=3), dict(pad=(-1, 2), lhs=2, rhs=3)), (dict(pad=(9, 9), rhs=4), dict(pad=(7, 0)))])
def test_a_convolution_counts_what_lies_inside(of_rows, of_columns):
    axes = [{"pad": (0, 0), "stride": 1, "lhs": 1, "rhs": 1} | axis for axis in (of_rows, of_columns)]
    read, kernel = ((6, 7), (6, 3)) if not of_columns else ((9, 8), (3, 4))
    inside = 1
    for axis, width, taken in zip(axes, read, kernel):
        row = [at % axis["lhs"] == 0 for at in range((width - 1) * axis["lhs"] + 1)]
        low, high = axis["pad"]
        row = [False] * low + row + [False] * high if min(axis["pad"]) >= 0 else row[-low:] + [False] * high
        spread = (taken - 1) * axis["rhs"] + 1
        inside *= sum(sum(row[at:at + spread:axis["rhs"]]) for at in range(0, len(row) - spread + 1, axis["stride"]))

    def convolved(x, k):
        return jax.lax.conv_general_dilated(
            x, k, [axis["stride"] for axis in axes], [axis["pad"] for axis in axes], [axis["lhs"] for axis in axes],
            [axis["rhs"] for axis in axes], ("NHWC", "HWIO", "NHWC"))
    assert floor(convolved, shape(2, *read, 5), shape(*kernel, 5, 11)).matmul_flops == 2 * 2 * 5 * 11 * inside


def test_a_loop_counts_its_rounds_and_reads_the_slice_of_each():
    def stack(x, kernels):
        return jax.lax.scan(lambda x, kernel: (jnp.tanh(x @ kernel), None), x, kernels)[0]
    one, two = (floor(stack, shape(64, 512), shape(L, 512, 512)) for L in (10, 20))
    assert one.matmul_flops == 10 * 2 * 64 * 512 * 512 == two.matmul_flops / 2
    # The kernel's slice is read once, or copied out of the stack first; never is the stack read in each round.
    kernel, x = 4 * 512 * 512, 4 * 64 * 512
    assert 10 * (kernel + 4 * x) * 0.98 <= one.memory_bytes <= 10 * (3 * kernel + 6 * x)
    assert two.memory_bytes == pytest.approx(2 * one.memory_bytes, rel=0.05)


def dynamic(x, n):
    return jax.lax.fori_loop(0, n, lambda _, x: x * 2 + 1, x)


def test_a_loop_of_the_datas_rounds_counts_those_that_are_given():
    text = compiled(dynamic, shape(1000, 1000), shape(dtype=jnp.int32))
    none, some, more = (floor_of(text, PEAKS, 8, rounds).memory_bytes for rounds in (0, 1, 7))
    assert some - none == pytest.approx(2 * 4e6, **CLOSE) and more - none == pytest.approx(7 * 2 * 4e6, **CLOSE)
    assert one_round(text, PEAKS, 8).memory_bytes == pytest.approx(2 * 4e6, **CLOSE)


def test_an_update_in_place_touches_what_it_writes():
    def write(cache, new, at):
        return jax.vmap(lambda row, new, i: jax.lax.dynamic_update_slice(row, new, (i, 0)))(cache, new, at)
    found = floor(write, shape(4, 4096, 128), shape(4, 1, 128), shape(4, dtype=jnp.int32), donate_argnums=0)
    assert found.memory_bytes < 4 * 4096 * 128 * 4 * 0.02


def test_a_fused_norm_reads_and_writes_once():
    def norm(x, scale):
        return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale
    found = floor(norm, shape(2048, 1024), shape(1024))
    size = 4 * 2048 * 1024
    # XLA for CPUs fuses it to two passes: one sums, one scales.
    assert 2 * size <= found.memory_bytes <= 3.1 * size and found.matmul_flops == 0


@pytest.mark.parametrize("kind, sends", [("sum", 2 * 7 / 8), ("scatter", 7 / 8)])
def test_collectives_are_network_and_not_memory(kind, sends):
    mesh = make_mesh("data=8")
    rows = NamedSharding(mesh, P("data"))

    def total(x):
        return jax.shard_map(lambda x: jax.lax.psum(x, "data") if kind == "sum" else jax.lax.psum_scatter(x, "data", tiled=True),
                             mesh=mesh, in_specs=P("data"), out_specs=P() if kind == "sum" else P("data"), check_vma=False)(x)
    text = jax.jit(total, in_shardings=rows).lower(shape(8 * 80_000)).compile().as_text()
    near_by, far = (floor_of(text, PEAKS, near, 1) for near in (8, 4))
    assert near_by.network_seconds == pytest.approx(sends * 4 * 80_000 / 1e10, **CLOSE)
    assert far.network_seconds == pytest.approx(10 * near_by.network_seconds, **CLOSE)
    assert any(name.startswith("network: ") for name in near_by.parts)


GPU = """
HloModule jit_f, is_scheduled=true, num_partitions=8

%wide (p0: bf16[64,1024], p1: s32[]) -> bf16[1024] {
  %p0 = bf16[64,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = bf16[1,1024]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,1024}
  ROOT %b = bf16[1024]{0} bitcast(%slice)
}

%put (p0: bf16[64,1024], p1: bf16[1024], p2: s32[]) -> (bf16[64,1024], bf16[1024]) {
  %p0 = bf16[64,1024]{1,0} parameter(0)
  %p1 = bf16[1024]{0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %r = bf16[1,1024]{1,0} bitcast(%p1)
  %u = bf16[64,1024]{1,0} dynamic-update-slice(%p0, %r, %p2, %zero)
  %n = bf16[1024]{0} negate(%p1)
  ROOT %t = (bf16[64,1024]{1,0}, bf16[1024]{0}) tuple(%u, %n)
}

ENTRY %main (a: bf16[4096,4096], b: bf16[4096,4096], c: bf16[64,1024], i: s32[]) -> bf16[4096,4096] {
  %a = bf16[4096,4096]{1,0} parameter(0)
  %b = bf16[4096,4096]{1,0} parameter(1)
  %c = bf16[64,1024]{1,0} parameter(2)
  %i = s32[] parameter(3)
  %row = bf16[1024]{0} fusion(%c, %i), kind=kLoop, calls=%wide, metadata={op_name="jit(f)/decoder/layers_3/mlp/up_proj/slice"}
  %both = (bf16[64,1024]{1,0}, bf16[1024]{0}) fusion(%c, %row, %i), kind=kLoop, calls=%put, metadata={op_name="jit(f)/transpose(jvp(Llava.hidden))/decoder/norm/put"}
  %g = (bf16[512,4096]{1,0}, bf16[4096,4096]{1,0}) all-gather-start(%b), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(f)/decoder/embed/gather"}
  %m = (bf16[4096,4096]{1,0}, s8[4194304]{0}) custom-call(%a, %b), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(f)/jvp(Llava.hidden)/decoder/layers_3/mlp/up_proj/dot_general"}, backend_config={"gemm_backend_config":{"beta":0,"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}
  %e = bf16[4096,4096]{1,0} all-gather-done(%g)
  %k = bf16[2,512,4,128]{3,2,1,0} custom-call(%q, %b), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/self_attn/shard_map/flash_forward/pallas_call"}
  %q = bf16[2,512,4,128]{3,2,1,0} parameter(4)
  %room = bf16[64,1024]{1,0} custom-call(), custom_call_target="AllocateBuffer", metadata={op_name="jit(f)/decoder/broadcast"}
  ROOT %out = bf16[4096,4096]{1,0} get-tuple-element(%m), index=0
}
"""


def test_a_program_for_gpus():
    found = floor_of(GPU, PEAKS, 8, 1, attended=100.0)
    product, gather = 2 * 4096**3, 7 / 8 * 2 * 4096 * 4096
    attention = 2 * 2 * 2 * 512 * 4 * 128 * 100
    parts = found.parts
    assert parts["decoder/layers/mlp/up_proj"].flops == product  # of all layers, whatever their number
    assert parts["decoder/layers/mlp/up_proj"].bytes == 3 * 2 * 4096 * 4096 + 2 * 2 * 1024 + 4  # scratch memory left out
    assert parts["decoder/norm backward"].bytes == pytest.approx(3 * 2 * 1024, abs=20)  # row, update and its negative
    assert parts["network: decoder/embed"].bytes == gather
    assert parts["self_attn/flash_forward"].flops == attention
    assert found.matmul_flops == product + attention and found.kernels == 4  # memory that is only given is none
    assert "decoder" not in parts
    hidden = found.matmul_seconds - attention / 1e12  # the product runs while the gather does
    assert hidden == pytest.approx(product / 1e12, rel=0.01)
    assert found.network_seconds == pytest.approx(max(0.0, gather / 1e10 - product / 1e12), rel=0.01)
    assert found.seconds == pytest.approx(found.matmul_seconds + found.memory_seconds + found.network_seconds)
    made = found.to_json(PEAKS, model_flops=1e9, peak_flops=2e12)
    assert made["mfu_ceiling"] == pytest.approx(1e9 / found.seconds / 2e12)
    assert made["dearest"][0]["part"] == "decoder/layers/mlp/up_proj" and len(made["dearest"]) <= 10
    assert floor_of("", PEAKS, 8, 1) is None


@pytest.mark.parametrize("kernel, products", [("flash_forward", 2), ("flash_prefill", 2), ("flash_decode", 2), ("flash_backward_queries", 3), ("flash_backward_keys", 4), ("other", 0)])
def test_flash_says_what_it_computes(kernel, products):
    assert flash.flops(kernel, (2, 64, 4, 16), 10.0) == products * 2 * 2 * 64 * 4 * 16 * 10


def test_a_towers_attention_says_what_it_computes_whatever_the_decoder_attends_to():
    assert flash.flops("flash_whole", (2, 64, 4, 16), 10.0) == 2 * 2 * 2 * 64 * 4 * 16 * 64


def test_a_kernel_that_works_in_place_reads_what_it_updates_once():
    """And its products are those of its queries, not of the keys and values that come with them."""
    text = """HloModule f, num_partitions=1

ENTRY %main (q: bf16[2,48,128], k: bf16[2,8,64,128]) -> bf16[2,32,128] {
  %q = bf16[2,48,128]{2,1,0} parameter(0)
  %k = bf16[2,8,64,128]{3,2,1,0} parameter(1)
  %step = (bf16[2,32,128]{2,1,0}, bf16[2,8,64,128]{3,2,1,0}) custom-call(%q, %k), custom_call_target="__gpu$xla.gpu.triton", output_to_operand_aliasing={{1}: (1, {})}, metadata={op_name="jit(f)/self_attn/flash_decode/pallas_call"}
  ROOT %out = bf16[2,32,128]{2,1,0} get-tuple-element(%step), index=0
}
"""
    found = floor_of(text, PEAKS, 8, 1, attended=10.0)
    assert found.memory_bytes == 2 * (2 * 48 * 128 + 2 * 8 * 64 * 128 + 2 * 32 * 128)
    assert found.matmul_flops == 2 * 2 * 2 * 32 * 128 * 10


def test_peaks():
    h100, h200 = (peaks_of(Topology.parse(name)) for name in ("h100-8", "h200-1"))
    assert (h100.flops, h100.bytes_per_second, h200.bytes_per_second) == (770e12, 3.0e12, 4.3e12)
    assert peaks_of(Topology.parse("cpu-1")) is None
    changed = peaks_of(Topology.parse("h100-8"), "flops=8e14,link=3e11")
    assert (changed.flops, changed.link_bytes_per_second, changed.bytes_per_second) == (8e14, 3e11, 3.0e12)
    assert (near(Topology.parse("h100-64")), near(Topology.parse("v5e-64", 2))) == (8, 64)
    assert h100.link(8, 8) == 360e9 and h100.link(64, 8) == 50e9
    for bad in ("", "flops", "flops=x", "flops=-1", "flops=nan", "flops=inf", "speed=1", "flops=1,,"):
        with pytest.raises(UsageError, match="--peak is .*; a list such as flops=8e14"):
            read(bad)


def test_the_report_has_a_table_of_floors_and_the_dearest_parts():
    floor = floor_of(GPU, PEAKS, 8, 1, attended=100.0).to_json(PEAKS, 1e9, 2e12)
    row = dict(topology="h100-8", warnings=[], fits=True, bytes=dict(peak=2**30, cache=1, parameters=2, activations=3), memory_bytes=2**31,
               rows=1, row_length=2, micro_batches=1, mesh={"fsdp": 8}, attention="flash", model_flops_per_step=1.0, tokens_per_step=1,
               traffic_bytes=1, least_traffic_bytes=None, compile_seconds=1.0)
    evaluation = dict(row, programs=dict(prefill=dict(floor=floor), decode=dict(floor={**floor, "mfu_ceiling": None})))
    for rows, names in ([dict(row, floor=floor)], ["h100-8 "]), ([evaluation], ["h100-8 prefill", "h100-8 decode"]):
        lines = "\n".join(tables(rows)).splitlines()
        assert any(line.split() == ["topology", "floor", "matmul", "memory", "network", "ceiling", "TFLOP", "GB", "kernels"] for line in lines)
        for name in names:
            assert [line.startswith(name) for line in lines].count(True) >= 2  # in the table, and above its dearest parts
        assert any(line.startswith("decoder/layers/mlp/up_proj") for line in lines)
        assert max(map(len, lines)) <= 90
    assert not any("floor" in line for line in tables([row]) + tables([dict(row, floor=None)]))
