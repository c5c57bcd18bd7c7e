"""FP8 products in a compiled program: counted in a text, and in a small update compiled for GPUs that are not here."""

import pytest

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.preflight import fp8_matmuls, report
from llavamed_jax.preflight.floor import floor_of
from llavamed_jax.preflight.peaks import Peaks
from llavamed_jax.preflight.topologies import Topology
from tests.preflight.test_preflight import CFG, FINETUNE, SMALL, common, compiled, programs
from tests.support.preflight_jobs import row

FP8 = 'custom_call_target="__cublas$lt$matmul$f8"'
BF16 = 'custom_call_target="__cublas$lt$matmul"'
FORWARD, BACKWARD = "jit(step)/jvp(Llava.hidden)/decoder/while/body", "jit(step)/transpose(jvp(Llava.hidden))/decoder/while/body"
TEXT = f"""HloModule m, num_partitions=8

%body (p: f32[8]) -> f32[8] {{
  %a = (bf16[8,8]{{1,0}}, s8[4]{{0}}) custom-call(%p, %p, %s), {FP8}, metadata={{op_name="{FORWARD}/layers/mlp/up_proj/dot_general"}}
  %b = (bf16[8,8]{{1,0}}, s8[4]{{0}}) custom-call(%p, %p, %s), {FP8}, metadata={{op_name="{BACKWARD}/checkpoint/rematted_computation/layers/mlp/up_proj/dot_general"}}
  %c = (bf16[8,8]{{1,0}}, s8[4]{{0}}) custom-call(%p, %p, %s), {FP8}, metadata={{op_name="{BACKWARD}/checkpoint/layers/self_attn/o_proj/dot_general"}}
  %d = (bf16[8,8]{{1,0}}, s8[4]{{0}}) custom-call(%p, %p), {BF16}, metadata={{op_name="{FORWARD}/layers/self_attn/BKGTH,BKSH->BKGTS/dot_general"}}
}}

ENTRY %main (p: f32[8]) -> f32[8] {{
  %w = f32[8] while(%t), condition=%c, body=%body, backend_config={{"known_trip_count":{{"n":"4"}}}}
  %e = (bf16[8,8]{{1,0}}, s8[4]{{0}}) custom-call(%p, %p), {BF16}, metadata={{op_name="{FORWARD}/layers/mlp/gate_proj/dot_general"}}
  %f = bf16[8,8]{{1,0}} dot(%p, %p), metadata={{op_name="{BACKWARD}/layers/mlp/gate_proj/dot_general"}}
  %g = (bf16[8,8]{{1,0}}, s8[4]{{0}}) custom-call(%p, %p, %s), {FP8}, metadata={{op_name="jit(step)/jvp(Llava.hidden)/projector/linear_0/dot_general"}}
  %h = (bf16[8,8]{{1,0}}, s8[4]{{0}}) custom-call(%p, %p, %s), {FP8}
}}
"""


def test_products_are_counted_by_pass_and_with_their_loops():
    assert fp8_matmuls.read(TEXT) == dict(forward=4, recomputed=4, backward=4, wide=2, elsewhere=2)
    assert not any(fp8_matmuls.read("").values())


@pytest.mark.parametrize("changes, is_warned", [
    ({}, False), (dict(forward=10, backward=24), False),  # products with one operand are one
    (dict(wide=1), True), (dict(elsewhere=1), True), (dict(forward=0), True), (dict(backward=0), True)])
def test_a_line_says_so(changes, is_warned):
    found = dict(projections=14, forward=14, recomputed=12, backward=28, wide=0, elsewhere=0) | changes
    (line,) = [line for line in report.remarks([row(30, fp8_matmuls=found, model="preset:small")]) if "FP8" in line]
    assert ("warning: " in line) == is_warned
    assert line == (f"h100-1: {'warning: ' * is_warned}FP8 products of an update: forward {found['forward']} for 14, recomputed 12, backward "
                    f"{found['backward']} for 28; in bfloat16 {found['wide']}, elsewhere {found['elsewhere']}")


def test_the_floor_takes_fp8_as_twice_as_fast_as_bfloat16():
    def floor(target):
        return floor_of("HloModule m\n\nENTRY %main (p: f8e4m3fn[512,4096], q: f8e4m3fn[512,4096]) -> bf16[512,512] {\n"
                        "  %p = f8e4m3fn[512,4096]{1,0} parameter(0)\n  %q = f8e4m3fn[512,4096]{1,0} parameter(1)\n"
                        f"  ROOT %a = bf16[512,512]{{1,0}} custom-call(%p, %q), {target}, lhs_contracting_dims={{1}}, rhs_contracting_dims={{1}}\n}}\n",
                        Peaks(1e12, 1e12, 1e10, 1e9), 8, 1.0)
    narrow, wide = floor(FP8), floor(BF16)
    assert narrow.matmul_flops == wide.matmul_flops == 2 * 512 * 512 * 4096
    assert wide.seconds == 2 * narrow.seconds == pytest.approx(wide.matmul_flops / 1e12)


def update(name, compute):
    cfg = common.load_config(f"{FINETUNE}:small", [*SMALL, f"compute={compute}"])
    machine = Topology.parse(name)
    try:
        machine.check_packages()
        devices = machine.devices()
    except UsageError:
        raise
    except UserError as error:
        pytest.skip(str(error))
    return programs.Training.of(cfg, CFG, devices, machine.memory), machine


def test_a_small_update_has_the_decoders_projections_in_fp8_and_no_other_product():
    """27 products a layer and micro-batch: each forward, all but the last of a layer again, and two backward."""
    training, machine = update("h100-8", "fp8")
    found = fp8_matmuls.of(training, compiled(training.lower(), machine).text)
    times = CFG.decoder.num_layers * training.micro_batches
    assert times == 6
    assert found == dict(projections=7 * times, forward=7 * times, recomputed=6 * times, backward=14 * times, wide=0, elsewhere=0)


def test_other_recipes_have_no_count():
    training, _ = update("cpu-8", "bfloat16")
    assert fp8_matmuls.of(training, TEXT) is None


def test_a_gpu_without_fp8_units_is_refused():
    with pytest.raises(UsageError, match="NVIDIA A100-SXM4-80GB has no FP8 units"):
        update("a100-80g-8", "fp8")


def test_kernels_of_fp8_products_are_gathered_in_one_byte():
    """Weights twice and gradients once a micro-batch: 6 bytes a value in bfloat16, 4 in FP8."""
    narrow, wide = (update("cpu-8", compute)[0] for compute in ("fp8", "bfloat16"))
    kernels = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)
    assert wide.least_traffic() - narrow.least_traffic() == pytest.approx(2 * 2 * kernels * 7 / 8)
