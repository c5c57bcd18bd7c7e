"""The numbers of preflight's rows beside what was counted by hand, and what decides a verdict."""

import itertools
import json
import os
from types import SimpleNamespace

import jax
import pytest

from llavamed_jax.cli import common
from llavamed_jax.config import preset
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.preflight import compile as compiling
from llavamed_jax.preflight import report, search
from llavamed_jax.preflight.topologies import KINDS, Topology
from llavamed_jax.training.settings import Settings, abstract_batch
from llavamed_jax.training.start import open_start
from llavamed_jax.training.update_rows import update_of
from tests.preflight.test_preflight import CFG, FINETUNE, ROOT, training
from tests.support.preflight_jobs import GIB, job, row

TOKENIZER = f"{ROOT}/samples/vqa_rad/tokenizer.model"
# Numbers of CFG's arrays, by how they lie.
LAYERS = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 96)  # fsdp and tp
ENDS = 2 * 256 * 64  # the table and the head: fsdp and tp
FIRST, SECOND = 16 * 64, 64 * 64  # of the projector: fsdp
WHOLE = 7 * 64 + 2 * 64  # norms and biases
TOWER, TOWER_ENDS = 2 * (4 * 16 * 16 + 2 * 16 * 32), 8 * 8 * 3 * 16 + 5 * 16  # the one fsdp and tp, the other fsdp


# ---- of an update

@pytest.mark.parametrize("data, fsdp, tp, micro_batches, remat, rounds", [
    (2, 2, 2, 2, "full", 3), (1, 4, 2, 1, "qkvo", 3), (2, 4, 1, 2, "full", 3), (8, 1, 1, 1, "full", 3), (4, 1, 2, 1, "none", 2)])
def test_the_least_traffic_is_what_a_hand_counts(data, fsdp, tp, micro_batches, remat, rounds):
    update = training(CFG, f"mesh.data={data}", f"mesh.fsdp={fsdp}", f"mesh.tp={tp}", f"micro_batches={micro_batches}", f"remat={remat}")
    assert update.program.mesh.size == 8
    gathered, summed = (fsdp - 1) / fsdp, 2 * (data - 1) / data
    if fsdp > 1:
        weights = 3 * (LAYERS / tp + SECOND) + 2 * (ENDS / tp + FIRST) + TOWER / tp + TOWER_ENDS  # the tower's forward pass alone
        numbers = weights * gathered + (LAYERS / tp + ENDS / tp + FIRST + SECOND) / fsdp * summed
    else:
        numbers = (LAYERS / tp + ENDS / tp + FIRST + SECOND) * summed
    numbers += WHOLE * (2 * gathered + summed)
    rows = update.update.rows / micro_batches / data / fsdp
    numbers += 2 * 3 * rounds * rows * 128 * 64 * 2 * (tp - 1) / tp  # two sums a layer of the activations, forward and backward
    assert update.least_traffic() == pytest.approx(4 * micro_batches * numbers, rel=1e-12)


def test_model_flops_are_what_a_hand_counts():
    """6 a weight and token, causal attention forward and twice backward, the frozen tower forward, for samples of 40 tokens."""
    update = training()
    assert update.tokens == update.update.rows * 128
    samples = update.tokens / 40
    attention = 3 * 4 * 3 * 64 * samples * 40 * 41 / 2
    blocks = 2 * 5 * (4 * 16 * 16 + 2 * 16 * 32) + 4 * 5 * 5 * 16  # five positions
    assert update.flops() == pytest.approx(6 * (LAYERS + ENDS // 2) * update.tokens + attention + samples * 2 * blocks, rel=1e-12)


def test_an_update_is_what_a_run_would_make():
    packed = training(CFG, "data.mean_length=50", "batch_size_may_grow=true")
    assert packed.image_slots == 3  # 128 / 50 samples, rounded up
    several = ["data.mean_length=none", "data.mean_text=46", "data.mean_images=2", "batch_size_may_grow=true"]
    packed = training(CFG, *several)  # two images of four positions
    assert (packed.mean_length, packed.image_slots) == (54, 5)  # 128 / 54 samples of two images each, rounded up
    alone = training(CFG, "data.mean_length=54", "batch_size_may_grow=true")
    pictures = packed.flops() - alone.flops()
    assert pictures == pytest.approx(packed.tokens / 54 * CFG.vision_flops_per_image(), rel=1e-9)
    assert training(CFG, *several, "data.packing=false", "max_length=64", "batch_size=64").image_slots == 2
    apart = training(CFG, "data.packing=false", "max_length=64", "batch_size=64", "micro_batches=2")
    assert (apart.update.rows, apart.update.row_length, apart.image_slots) == (64, 64, 1)
    pixels = abstract_batch(apart.program, apart.layout)["pixel_values"]
    assert pixels.shape == (64, 1, 16, 16, 3) and pixels.dtype == "uint8" and pixels.sharding.shard_shape(pixels.shape)[0] == 8


def test_preflight_takes_the_meshes_that_a_run_of_some_data_takes():
    """It has seen no data. It took samples of max_length for granted, and refused 32 devices for short ones."""
    def takes(cfg, shards, mean, longest):
        try:
            return update_of(cfg, SimpleNamespace(shape=dict(data=1, fsdp=shards, tp=1), size=shards), preset("v15-7b"), mean, longest)
        except UsageError:
            return None

    some = set()
    for batch_size, micro_batches in ((16, "auto"), (64, 1), (128, "auto"), (128, 4)):
        cfg = common.load_config(f"{FINETUNE}:v15", [f"batch_size={batch_size}", f"micro_batches={micro_batches}"])
        for shards, mean in itertools.product((1, 4, 8, 32, 64, 128), (302, 620, 762, 1080)):
            of_runs = [takes(cfg, shards, mean, longest) for longest in (mean, mean + 20, int(1.2 * mean), 2048)]
            planned = takes(cfg, shards, mean, None)
            assert (planned is not None) == any(of_runs) and (of_runs[-1] is None or planned == of_runs[-1]), (batch_size, shards, mean)
            some |= {(planned is not None, of_runs[-1] is not None)}
    assert some == {(True, True), (True, False), (False, False)}


def test_a_presets_vocabulary_is_that_of_its_tokenizer_as_in_a_run():
    """v1.0's 32,003 rows cannot be halved; the 1,024 that a run has with this tokenizer can."""
    cfg = common.load_config(f"{FINETUNE}:v1", ["init=preset:v1-7b", f"tokenizer={TOKENIZER}"])
    found, said = compiling.programs.shapes_of(cfg.init, cfg.name, None, tokenizer=cfg.tokenizer)
    assert said == f"preset:v1-7b with the tokens of {TOKENIZER}" and found.decoder.vocab_size == 1024
    small = common.load_config(f"{FINETUNE}:small", [])
    assert compiling.programs.shapes_of(small.init, small.name, None, tokenizer=small.tokenizer)[0].decoder == open_start(small).config.decoder
    assert compiling.programs.shapes_of(cfg.init, cfg.name, None, tokenizer="not/here")[0].decoder.vocab_size == 32003


# ---- of a compilation

class Lowered:
    """In place of a lowered program: what its compiler says of it."""

    def __init__(self, error=None, **sizes):
        self.error, self.sizes, self.options = error, sizes, "never asked"

    def compile(self, compiler_options):
        self.options = compiler_options
        if self.error is not None:
            raise jax.errors.JaxRuntimeError(self.error)
        memory = SimpleNamespace(**{f"{name}_size_in_bytes": size for name, size in self.sizes.items()})
        return SimpleNamespace(memory_analysis=lambda: memory, as_text=lambda: "HloModule m")


def test_a_peak_is_arguments_results_and_temporaries_and_what_is_donated_once():
    lowered = Lowered(argument=1000, output=300, alias=200, temp=50, generated_code=7)
    found = compiling.compiled(lowered, Topology.parse("h100-8"))
    assert found.bytes() == dict(arguments=1000, temporaries=50, peak=1157) and found.text == "HloModule m"
    assert lowered.options == {"xla_gpu_enable_triton_gemm": False}
    compiling.compiled(lowered, Topology.parse("v5e-8"))
    assert lowered.options is None


@pytest.mark.parametrize("message, peak", [
    ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 16.50G of 15.75G hbm. Exceeded "
     "hbm capacity by 768.00M.", 16.5 * 2**30),
    ("RESOURCE_EXHAUSTED: Total memory required for HLO temporaries (1.50T) exceeds available HBM (30.75G)", 1.5 * 2**40)])
def test_a_compiler_that_gives_up_says_how_much_it_would_have_been(message, peak):
    found = compiling.compiled(Lowered(message), Topology.parse("v5e-8"))
    assert found.bytes() == dict(arguments=None, temporaries=None, peak=peak) and found.text == ""


@pytest.mark.parametrize("message", ["RESOURCE_EXHAUSTED: of something else", "INTERNAL: Used 16.50G of 15.75G hbm"])
def test_other_errors_of_a_compiler_are_not_taken_for_that(message):
    with pytest.raises(jax.errors.JaxRuntimeError):
        compiling.compiled(Lowered(message), Topology.parse("v5e-8"))


HLO = """HloModule m, num_partitions=8

%body (p: f32[8]) -> f32[8] {
  %g = f32[64]{0} all-gather(%p), replica_groups=[1,8]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = f32[8] while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"4"}}
  %r = f32[16]{0} all-reduce(%t), replica_groups=[4,2]<=[8], to_apply=%add
}
"""


def found_of(peak, text=HLO):
    return compiling.Compiled(2.0, 3.0, peak, None if not text else peak - 10, None if not text else 10, text)


@pytest.fixture
def machine(monkeypatch):
    """h100-8 with CPU devices, so that nothing must be installed."""
    monkeypatch.setattr(Topology, "devices", lambda self: [SimpleNamespace(device_kind="NVIDIA H100 80GB HBM3")] * self.num_devices)
    monkeypatch.setattr(compiling.programs, "shapes_of", lambda *_, **__: (CFG, "preset:small"))
    return Topology.parse("h100-8").memory


@pytest.mark.parametrize("beyond, fits", [(0, True), (1, False)])
def test_a_row_is_what_the_interface_promises_and_its_peak_decides(monkeypatch, machine, beyond, fits):
    update = SimpleNamespace(
        candidates=lambda cfg: [Settings("full", 2)], having=lambda chosen: update, loss_rounds=3, lower=lambda: None, bytes=lambda: dict(parameters=100, optimizer=200, gradients=100), least_traffic=lambda: 900.4,
        flops=lambda: 5e15, tokens=2048, micro_batches=2, mean_length=40, mean_images=1.0, longest_sample=lambda cfg: None,
        update=SimpleNamespace(rows=16, row_length=128, is_close=False, samples=51.2),
        program=SimpleNamespace(mesh=SimpleNamespace(shape={"data": 1, "fsdp": 8, "tp": 1}, size=8), model=SimpleNamespace(attention="flash"), is_fp8=False))
    monkeypatch.setattr(compiling.programs.Training, "of", lambda *_: update)
    monkeypatch.setattr(compiling, "compiled", lambda *_: found_of(machine + beyond))
    found = compiling.run(dict(topology="h100-8", slices=1, config=dict(init="preset:small", name="small", vision_tower="")))
    promised = dict(
        topology="h100-8", devices=8, device_kind="NVIDIA H100 80GB HBM3", compile_seconds=2.0, memory_bytes=machine, fits=fits,
        bytes=dict(parameters=100, optimizer=200, gradients=100, activations=machine + beyond - 400, arguments=machine + beyond - 10,
                   temporaries=10, peak=machine + beyond),
        collectives={"all-gather": dict(count=4, bytes=4 * 224), "all-reduce": dict(count=1, bytes=64)}, model_flops_per_step=5e15,
        tokens_per_step=2048, samples_per_step=51.2, fitting_batch_size=51, remat="full", loss_rounds=3)
    assert promised.items() <= json.loads(json.dumps(found)).items()
    assert (found["traffic_bytes"], found["least_traffic_bytes"], found["largest_array_bytes"]) == (4 * 224 + 64, 900, 256)
    assert found["floor"]["peaks"] == dict(flops=770e12, bytes_per_second=3e12, link_bytes_per_second=360e9)
    assert found["floor"]["network_milliseconds"] == pytest.approx(1e3 * (4 * 224 + 64) / 360e9)


@pytest.mark.parametrize("beside, fits", [(99, True), (101, False)])
def test_the_largest_of_the_engines_programs_decides_with_what_lies_beside_it(monkeypatch, machine, beside, fits):
    serving = SimpleNamespace(
        programs=lambda: [("encode", 0, 0), ("prefill", 1, beside), ("decode", 2, 0)], bytes=lambda: dict(parameters=100, cache=50),
        mesh=SimpleNamespace(shape={"data": 1, "fsdp": 1, "tp": 8}, size=8), rows=8, length=256, batch=4, prompt=128, flops=lambda: 7.0, prefill_flops=lambda: 6.0, attention="xla",
        attended=lambda name: {"encode": 1.5, "prefill": 2.5, "decode": 3.5}[name])
    keys, peaks = [], [machine - 300, machine - 100, machine - 50]
    for of in ("floor_of", "one_round"):
        monkeypatch.setattr(compiling, of, lambda *given, of=of: keys.append((of, given[-1])))
    monkeypatch.setattr(compiling.Serving, "of", lambda *_: serving)
    monkeypatch.setattr(compiling, "compiled", lambda number, _: found_of(peaks[number], HLO if number == 1 else ""))
    found = compiling.run(dict(topology="h100-8", slices=1, checkpoint="preset:small", mesh="tp=8", dtype="bfloat16", vision_tower="",
                               config=dict(generation=dict(batch_size=8, max_new_tokens=64))))
    peak = max(machine - 50, machine - 100 + beside)
    assert (found["fits"], found["bytes"]["peak"], found["bytes"]["activations"]) == (fits, peak, peak - 150)
    assert (found["traffic_bytes"], found["compile_seconds"], found["tokens_per_step"]) == (4 * 224 + 64, 6.0, 512)
    assert found["programs"]["prefill"]["bytes"]["peak"] == machine - 100 + beside
    assert keys == [("floor_of", 1.5), ("floor_of", 2.5), ("one_round", 3.5)]


# ---- of the process that compiles

def compile_as(monkeypatch, out="", words="", status=0):
    """What a compiler's caller gets where its process wrote and ended so."""
    compiler = compiling.Compiler()
    monkeypatch.setattr(compiler, "_run", lambda job, environment: (status, out, words))
    return compiler(dict(topology="cpu-3", slices=1, config={}))


@pytest.mark.parametrize("said", ["[SPMD] Involuntary full rematerialization. The compiler cannot go from {devices=[8]} to {replicated}",
                                  "XLA involuntarily replicated %x"])
def test_what_xla_says_of_arrays_that_it_replicates_is_kept_once(monkeypatch, said):
    found = compile_as(monkeypatch, 'a library\'s word\n{"fits": true}\n', f"W1128 {said}\nE1128 harmless\n W1128 {said}\n")
    assert found == dict(fits=True, warnings=[f"W1128 {said}"])


@pytest.mark.parametrize("out, kind, sentence", [
    ('{"error": "the mesh does not fit", "is_usage": true}', UsageError, "the mesh does not fit"),
    ('{"error": "no rule matches", "is_usage": false}', UserError, "no rule matches")])
def test_an_error_of_a_job_keeps_its_kind(monkeypatch, out, kind, sentence):
    with pytest.raises(UserError) as raised:
        compile_as(monkeypatch, out)
    assert type(raised.value) is kind and str(raised.value) == sentence


# ---- of the table

MORE = dict(model="preset:x", attention="flash", model_flops_per_step=4.4e15, tokens_per_step=100_000, traffic_bytes=77.2e9,
            least_traffic_bytes=76.3e9, compile_seconds=12.4, fitting_batch_size=None)


def test_the_table_says_each_number_under_its_name():
    found = row(30, 40, **MORE)
    found["bytes"].update(parameters=1 * GIB, optimizer=2 * GIB, gradients=3 * GIB, activations=4 * GIB)
    found["mesh"] = dict(data=2, fsdp=4, tp=1)
    memory, _, program, _ = report.tables([found])
    head, line = (text.replace("too small", "too_small").split() for text in memory.splitlines())
    assert dict(zip(head, line, strict=True)) == {
        "topology": "h100-1", "verdict": "fits", "peak": "30.0", "usable": "40.0", "parameters": "1.0", "optimizer": "2.0",
        "gradients": "3.0", "activations": "4.0"}
    head, line = (text.split() for text in program.splitlines())
    assert dict(zip(head, line, strict=True)) == {
        "topology": "h100-1", "rows": "16x8192/2", "mesh": "data=2,fsdp=4", "attention": "flash", "GFLOP/token": "44.0",
        "traffic": "77.2", "least": "76.3", "compile": "12"}


def test_remarks_name_ways_out_and_batches_that_do_not_fit():
    ways = [dict(topology="h100-1", changes={"remat": "full", "micro_batches": 4}, peak=39 * GIB, memory_bytes=40 * GIB),
            dict(topology="h100-2", changes={}, peak=20 * GIB, memory_bytes=40 * GIB)]
    lines = report.remarks([{**row(50, **MORE), "fitting_batch_size": 120, "would_fit": ways}, {**row(50, **MORE), "would_fit": []}])
    assert lines[2] == "model: preset:x"
    assert lines[3] == "h100-1: an update has 120 samples on these devices, and not batch_size (batch_size_may_grow)"
    assert lines[4] == ("h100-1 is too small; it would fit with remat=full and micro_batches=4 (39.0 of 40.0 GiB) or on h100-2 "
                        "(20.0 of 40.0 GiB)")
    assert lines[5].endswith("and no alternative that was tried fits: other values of keys, and up to 8 times as many devices")


@pytest.mark.parametrize("cores, free_gib, at_once", [(16, 100, 5), (16, 13, 2), (5, 100, 2), (1, 1, 1)])
def test_compilations_stand_side_by_side_as_this_machine_has_room(monkeypatch, cores, free_gib, at_once):
    monkeypatch.setattr(report.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(report.os, "sysconf", {"SC_AVPHYS_PAGES": free_gib * 2**18, "SC_PAGE_SIZE": 4096}.get)
    assert report._at_once(5) == at_once


def test_one_that_fits_is_enough_wherever_it_stands(capsys):
    found = {"h100-1": {**row(50), **MORE}, "h100-2": {**row(30, topology="h100-2"), **MORE}}
    assert report.check([{**job(), "topology": name} for name in found], lambda asked: found.get(asked["topology"], found["h100-1"])) == 0
    assert "h100-1 is too small; it would fit on h100-2 (30.0 of 40.0 GiB)" in capsys.readouterr().out


# ---- of ways out

def test_changes_are_the_mildest_first():
    asked = job(remat="qkvo", batch_size=120)["config"]
    spread = {**row(50, rows=128), "mesh": dict(data=2, fsdp=4, tp=2)}
    # 16 rows a device, of which 15 divide the samples.
    assert list(search.training_changes(asked, spread)) == [
        {"remat": "full"}, {"micro_batches": 15, "remat": "full"}, {"micro_batches": 15, "remat": "full", "data.row_length": 2048},
        {"micro_batches": 15, "remat": "full", "optimizer.mu_dtype": "bfloat16"},
        {"micro_batches": 15, "remat": "full", "data.row_length": 2048, "optimizer.mu_dtype": "bfloat16"}]
    done = job(micro_batches=16, optimizer=dict(mu_dtype="bfloat16"), data=dict(packing=False, row_length=8192))["config"]
    assert list(search.training_changes(done, {**row(50), "micro_batches": 16})) == []
    assert {"remat": "full"} not in list(search.training_changes(job(remat="auto")["config"], row(50)))  # tried already


@pytest.mark.parametrize("slices, parameters, way", [
    (1, 60, {"mesh.data": 1, "mesh.fsdp": -1}), (2, 60, {"mesh.data": 2, "mesh.fsdp": -1}), (1, 400, None)])
def test_what_lies_whole_on_each_device_may_be_spread(slices, parameters, way):
    """Over all eight, or over the four of each slice; 400 GiB are too much for eight of 40."""
    def compiled(asked):
        spread = 8 // asked["config"]["mesh"]["data"] if asked["config"]["mesh"]["fsdp"] == -1 else 1
        return row(parameters / spread + 5, topology=asked["topology"])
    asked = {**job(mesh=dict(data=-1, fsdp=1, tp=1, auto=False, slices=slices)), "topology": "v5e-8", "slices": 1}
    found = {**row(parameters + 5, topology="v5e-8"), "mesh": dict(data=8, fsdp=1, tp=1)}
    found["bytes"].update(parameters=parameters * GIB, optimizer=0)
    assert [each["changes"] for each in search.what_fits(asked, found, compiled) if each["topology"] == "v5e-8"] == ([way] if way else [])


@pytest.mark.parametrize("optimizer, is_tried", [(39, True), (41, False)])
def test_a_first_moment_in_half_the_width_saves_a_quarter_of_the_optimizer(optimizer, is_tried):
    """10 + 39 * 3 / 4 is within 40, 10 + 41 * 3 / 4 is not."""
    tried, found = [], row(90, rows=2)
    found["bytes"]["optimizer"] = optimizer * GIB
    search.what_fits(job(), found, lambda asked: tried.append(asked) or row(90))
    here = [asked["config"]["optimizer"]["mu_dtype"] for asked in tried if asked["topology"] == "h100-1"]
    assert here == (["bfloat16"] * 2 if is_tried else [])


def test_a_state_that_is_too_large_here_may_fit_where_it_is_spread():
    found = row(90)
    found["bytes"]["optimizer"] = 60 * GIB
    ways = search.what_fits(job(), found, lambda asked: row(90 / int(asked["topology"][5:]), topology=asked["topology"]))
    assert ways == [dict(topology="h100-4", changes={}, peak=22.5 * GIB, memory_bytes=40 * GIB)]


@pytest.mark.parametrize("stated, tried, way", [
    (16, [(2, 16), (2, 8), (4, 16), (4, 4)], {"micro_batches": 4}), (3, [(2, 3), (2, 1), (4, 3), (8, 3)], None),
    ("auto", [(2, "auto"), (4, "auto"), (8, "auto")], None)])
def test_micro_batches_that_are_stated_become_fewer_where_a_larger_machine_makes_the_batch_too_large(stated, tried, way):
    seen = []

    def compiled(asked):
        devices, number = int(asked["topology"][5:]), asked["config"]["micro_batches"]
        seen.append((devices, number))
        if number == "auto" or devices * number > stated:
            raise UsageError("the batch is too large")
        return row(90 / devices, topology=asked["topology"])
    found = row(50)
    found["bytes"]["optimizer"] = 60 * GIB  # nothing helps on one device
    assert [each["changes"] for each in search.what_fits(job(micro_batches=stated), found, compiled)] == ([way] if way else [])
    assert [each for each in seen if each[0] > 1] == tried


def test_a_mesh_that_is_stated_grows_with_its_machine():
    meshes = []

    def compiled(asked):
        mesh = asked["config"]["mesh"]
        meshes.append((asked["topology"], mesh["fsdp"]))
        if mesh["data"] * mesh["fsdp"] != Topology.parse(asked["topology"]).num_devices:
            raise UsageError("the mesh does not fit")
        return row(90 if asked["topology"] != "h100-16" else 30, topology=asked["topology"])

    asked = {**job(mesh=dict(data=2, fsdp=4, tp=1, auto=False), optimizer=dict(mu_dtype="bfloat16")), "topology": "h100-8"}
    (way,) = search.what_fits(asked, row(90, topology="h100-8"), compiled)
    assert (way["topology"], way["changes"]) == ("h100-16", {"mesh.fsdp": 8}) and meshes[-1] == ("h100-16", 8)


def test_what_the_compiler_refuses_or_replicates_is_no_way_out():
    def refuses(asked):
        raise UserError("the decoder's 40 heads are not divisible by the mesh axis tp of 16")
    evaluation = dict(topology="h100-2", slices=1, checkpoint="preset:v1-13b", mesh=None, dtype="bfloat16",
                      config=dict(generation=dict(batch_size=1, max_new_tokens=64)))
    served = row(90)
    served["bytes"]["cache"] = 0
    assert search.what_fits(evaluation, served, refuses) == [] == search.what_fits(job(), row(90), refuses)
    assert search.what_fits(job(), row(90), lambda asked: {**row(30), "warnings": ["Involuntary full rematerialization"]}) == []


@pytest.mark.parametrize("mesh, tried", [
    (None, ["tp=2", "data=-1,tp=2", "tp=4", "data=-1,tp=2", "data=-1,tp=4", "tp=8"]),
    ("tp=2", ["data=-1,tp=2", "tp=4", "data=-1,tp=2", "data=-1,tp=4", "tp=8"])])
def test_a_model_is_laid_over_ever_more_devices_of_a_host(mesh, tried):
    """Of two, of four and of eight; a machine of sixteen has two hosts, and no process has more than one."""
    asked = dict(topology="h100-2", slices=1, checkpoint="preset:v15-7b", mesh=mesh, dtype="bfloat16",
                 config=dict(generation=dict(batch_size=1, max_new_tokens=64)))
    meshes = []
    found = row(90, rows=1)
    found["bytes"]["cache"] = 0
    search.what_fits(asked, found, lambda asked: meshes.append(asked["mesh"]) or row(90))
    assert meshes == tried


# ---- of machines

@pytest.mark.parametrize("name, gib", [("a100-40g-8", 37.42), ("a100-80g-8", 75.19), ("h100-8", 75.15), ("h200-1", 132.81), ("l4-1", 20.86),
                                       ("rtx4090-1", 22.47), ("v4-8", 30.75), ("v5e-64", 15.75), ("v5p-8", 95.74), ("v6e-8", 31.25)])
def test_usable_memory(name, gib):
    """95 % of what a CUDA driver says a GPU has, what libtpu's compiler grants."""
    assert Topology.parse(name).memory / 2**30 == pytest.approx(gib, abs=0.01)


@pytest.mark.parametrize("kind, capability, cores, shared, threads, extension", [
    ("a100-80g", "major: 8 minor: 0", 108, 166912, 2048, False), ("h100", "major: 9 minor: 0", 132, 232448, 2048, True),
    ("h200", "major: 9 minor: 0", 132, 232448, 2048, True), ("l4", "major: 8 minor: 9", 58, 101376, 1536, False)])
def test_a_gpu_is_described_as_its_data_sheet_has_it(kind, capability, cores, shared, threads, extension):
    text = KINDS[kind].describe()
    for words in (capability, f"core_count: {cores} ", f"shared_memory_per_block_optin: {shared}\n", f"threads_per_core_limit: {threads}\n",
                  f"device_memory_size: {KINDS[kind].memory}\n", f'device_description_str: "{KINDS[kind].name}"'):
        assert words in text, words
    assert ("ACCELERATED_FEATURES" in text) == extension


@pytest.mark.parametrize("name, slices, asked", [
    ("h100-4", 1, dict(topology="1x1x4")), ("h100-8", 1, dict(topology="1x1x8")), ("h100-64", 1, dict(topology="8x1x8")),
    ("v5e-64", 1, dict(topology_name="v5e:8x8")), ("v6e-1", 1, dict(topology_name="v6e:1x1", chips_per_host_bounds=(1, 1, 1))),
    ("v5p-32", 1, dict(topology_name="v5p:2x2x4")), ("v4-16", 1, dict(topology_name="v4:2x2x2", chip_config_name="megacore")),
    ("v5e-32", 2, dict(topology_name="v5e:4x8", num_slices=2))])
def test_what_xla_is_asked_for(monkeypatch, name, slices, asked):
    """NVLink joins a host, so of GPUs each host is what XLA calls a partition; TPUs by the shape of a slice."""
    from jax.experimental import topologies
    words = {}
    monkeypatch.setattr(topologies, "get_topology_desc", lambda *_, **given: words.update(given) or SimpleNamespace(devices=["device"]))
    monkeypatch.setattr(Topology, "check_packages", lambda self: None)
    machine = Topology.parse(name, slices)
    assert machine.devices() == ["device"] and asked.items() <= words.items() and ("num_slices" in words) == (slices > 1)
    assert machine.num_devices == slices * machine.count // (2 if name.startswith(("v4", "v5p")) else 1)


LIBTPU = """I1128 04:48:44.961883   25987 deepsea_compiler_backend.cc:2171] Total hbm usage >= 6.54G:
    reserved        258.00M
    program           4.76G
    arguments         1.28G

Output size 1.53G; shares 1.28G with arguments.

Total host usage >= 0B:
    reserved             0B
    program         unknown size
    arguments            0B

Output size 0B; shares 0B with arguments.
"""


def test_a_tpus_peak_is_what_its_compiler_counts():
    """Program, arguments and results that share nothing with these; what is reserved is not within the usable memory either."""
    assert compiling.tpu_peak("W first\n" + LIBTPU) == int((4.76 + 1.28 + 1.53 - 1.28) * 2**30)
    other = LIBTPU.replace("258.00M\n", "0B \n").replace("4.76G\n", "900.00K \n")  # it writes a space there
    assert compiling.tpu_peak(other) == int(900 * 2**10 + (1.28 + 1.53 - 1.28) * 2**30)
    assert compiling.tpu_peak("nothing of it") is None


def test_what_a_compiler_writes_is_read_where_stderr_is_a_file(tmp_path):
    """And stays there for whoever asked, also of a process that is ended in the middle."""
    stderr = os.dup(2)
    with open(tmp_path / "stderr", "w+") as file:
        os.dup2(file.fileno(), 2)
        try:
            os.write(2, b"before\n")
            begin = compiling._written()
            os.write(2, b"from C++\n")
            said = compiling._said_since(begin)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
    assert said == "from C++\n" and (tmp_path / "stderr").read_text() == "before\nfrom C++\n"
    assert compiling._said_since(None) == ""
