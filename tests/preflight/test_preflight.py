"""Programs compiled for machines that are not here: what a small one sends and holds, ways out, the command line's answers."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import pytest

from llavamed_jax.cli import common
from llavamed_jax.cli.eval import program as evaluate
from llavamed_jax.cli.train import main
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.generation.engine import cache_length
from llavamed_jax.models.llava import abstract_params
from llavamed_jax.parallel.mesh import auto_sizes, make_mesh
from llavamed_jax.preflight import collectives, programs, report, search
from llavamed_jax.preflight.compile import Compiler, compiled
from llavamed_jax.preflight.serving import Serving
from llavamed_jax.preflight.topologies import KINDS, Topology
from llavamed_jax.training.settings import abstract_batch
from llavamed_jax.training.throughput import PEAK_FLOPS
from tests.support.preflight_jobs import GIB, job, row
from tests.support.training_runs import write_start

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = f"{ROOT}/configs/finetune.py"
CFG = LlavaConfig(VisionConfig(16, 32, 3, 2, 16, 8),
                  DecoderConfig(256, 64, 96, 3, 4, 2, 16, 1e-5, 1e4, 256, architecture="mistral"), max_length=64)
# The engine's programs have a copy of each layer: one of the decoder, and the one of the tower that is read, say what more would.
SHALLOW = CFG.replace(vision=dataclasses.replace(CFG.vision, num_layers=2), decoder=dataclasses.replace(CFG.decoder, num_layers=1))
SMALL = ["data.packing=true", "data.row_length=128", "data.mean_length=40", "batch_size=48", "micro_batches=2", "remat=full"]


def training(config=CFG, *changes):
    machine = Topology.parse("cpu-8")
    changed = {change.partition("=")[0] for change in changes}  # no key may have two values
    kept = [each for each in SMALL if each.partition("=")[0] not in changed]
    cfg = common.load_config(f"{FINETUNE}:small", [*kept, *changes])
    return programs.Training.of(cfg, config, machine.devices(), machine.memory)


# ---- what a program sends and holds

@pytest.fixture(scope="module")
def small():
    """An update over eight devices, what compiling it found, and the size of the program."""
    update = training()
    lowered = update.lower()
    return update, compiled(lowered, Topology.parse("cpu-8")), len(lowered.as_text())


def test_a_small_update_sends_what_its_sharding_needs(small):
    """Each layer's weights twice a micro-batch, and its gradients once. XLA for CPUs sums whole gradients where those for GPUs
    and TPUs sum into parts, so a sum counts half here."""
    update, found, _ = small
    sent = collectives.totals(collectives.read(found.text))
    trained = update.program.abstract_state().trainable
    layers = sum(x.size for name, x in trained.items() if name.startswith("decoder/layers/") and x.ndim == 3)
    whole = {op: each["bytes"] / (7 / 8) / 4 for op, each in sent.items()}  # float32 numbers
    assert 2 * 2 * layers <= whole["all-gather"]
    assert sum(each["bytes"] for each in sent.values()) - sent["all-reduce"]["bytes"] / 2 <= 1.15 * update.least_traffic()
    assert 2 * layers <= whole["all-reduce"] / 2 + whole["reduce-scatter"]


def test_no_weight_is_whole_on_a_device_longer_than_a_layer_takes(small):
    update, found, _ = small
    state = update.program.abstract_state()
    for name, x in {**state.trainable, **state.frozen}.items():
        if x.ndim > 1 + ("/layers/" in name):
            assert x.sharding.shard_shape(x.shape) != x.shape, name
    a_layer = sum(x.size // CFG.decoder.num_layers for name, x in state.trainable.items() if name.startswith("decoder/layers/"))
    table = 4 * CFG.decoder.vocab_size * CFG.decoder.hidden_size
    gathered = [each.array for each in collectives.read(found.text) if each.op == "all-gather"]
    assert max(gathered) == table
    assert max(each.array for each in collectives.read(found.text)) <= 4 * a_layer


def test_a_program_does_not_grow_with_depth(small):
    deep = CFG.replace(decoder=dataclasses.replace(CFG.decoder, num_layers=12))
    assert len(training(deep).lower().as_text()) <= 1.01 * small[2]


def test_bytes_of_a_device_add_up(small):
    update, found, _ = small
    held = update.bytes()
    trained = sum(x.size for name, x in abstract_flat().items() if not name.startswith("vision_tower"))
    norms = sum(x.size for name, x in abstract_flat().items() if not name.startswith("vision_tower") and is_whole(name))
    assert held["gradients"] == 4 * ((trained - norms) // 8 + norms)
    assert held["optimizer"] - 2 * held["gradients"] < 100  # and its counters
    batch = sum(x.size * x.dtype.itemsize // 8 for x in jax.tree.leaves(abstract_batch(update.program, update.layout)))
    assert abs(found.arguments - held["parameters"] - held["optimizer"] - batch) < 100
    assert found.arguments + found.temporaries <= found.peak


def abstract_flat():
    return {"/".join(str(p.key) for p in path): x for path, x in jax.tree_util.tree_leaves_with_path(abstract_params(CFG, scan=True))}


def is_whole(name):
    return name.endswith(("scale", "bias"))


def test_model_flops_of_a_full_size_update():
    """6 N and causal attention within samples, of LLaVA-Med v1.5: 43.9 GFLOPs a token."""
    config, _ = programs.shapes_of("preset:v15-7b")
    cfg = common.load_config(f"{FINETUNE}:v15,7b")
    machine = Topology.parse("cpu-8")
    update = programs.Training.of(cfg, config, machine.devices(), machine.memory)
    assert update.flops() / update.tokens == pytest.approx(43.85e9, rel=1e-3)
    assert (update.update.rows, update.update.row_length, update.image_slots) == (16, 8192, 8)
    assert update.bytes()["parameters"] == pytest.approx(30.2e9 / 8, rel=0.01)  # float32 on a CPU, the frozen tower too


# ---- machines

@pytest.mark.parametrize("name, devices, grid", [
    ("v5e-1", 1, (1, 1)), ("v5e-8", 8, (2, 4)), ("v5e-64", 64, (8, 8)), ("v6e-256", 256, (16, 16)), ("v5p-8", 4, (2, 2, 1)),
    ("v5p-32", 16, (2, 2, 4)), ("v4-128", 64, (4, 4, 4)), ("v5p-512", 256, (4, 8, 8)), ("h100-16", 16, None), ("a100-40g-8", 8, None),
    ("cpu-3", 3, None)])
def test_names_are_the_vendors(name, devices, grid):
    machine = Topology.parse(name)
    assert (machine.num_devices, machine.name) == (devices, name)
    assert grid is None or machine.grid() == grid


@pytest.mark.parametrize("name, sentence", [
    ("h100", "is unknown; KIND-COUNT .* a100-40g, .* was expected"), ("a100-8", "is unknown"), ("v5e-0", "count '0'"),
    ("v5e-x", "count 'x'"), ("v5e-2", "does not exist; v5e has slices of 1, 4, 8, 16, 32, 64, 128, 256 chips"),
    ("v5p-6", "TensorCores, two a chip"), ("v6e-512", "does not exist"), ("h100-12", "12 GPUs; at most 8, or a multiple")])
def test_names_that_are_none_are_one_sentence(name, sentence):
    with pytest.raises(UsageError, match=sentence):
        Topology.parse(name)


def test_a_gpu_has_no_slices():
    with pytest.raises(UsageError, match="'mesh.slices' is 2"):
        Topology.parse("h100-8", slices=2)


def test_every_gpu_has_a_peak():
    assert {kind.name for kind in KINDS.values() if hasattr(kind, "capability")} <= set(PEAK_FLOPS)


@pytest.mark.parametrize("name, number", [
    ("v5e-1", 1), ("v5e-64", 4), ("v5p-8", 4), ("v5p-16", 4), ("h100-2", 2), ("h100-16", 8), ("cpu-8", 8)])
def test_devices_of_a_host(name, number):
    machine = Topology.parse(name)
    assert machine.host_devices == machine.host().num_devices == number and machine.host().host() == machine.host()


def test_larger_machines():
    larger = [Topology.parse(name).larger().name for name in ("v5e-1", "v5p-2", "h100-1", "a100-40g-8")]
    assert larger == ["v5e-4", "v5p-8", "h100-2", "a100-40g-16"]
    assert Topology.parse("v5e-256").larger() is None


@pytest.mark.parametrize("needed, memory, sizes", [(10, 30, (8, 1)), (100, 30, (1, 8)), (10_000, 30, (1, 8))])
def test_auto_takes_the_smallest_group_that_holds_the_state(needed, memory, sizes):
    assert tuple(auto_sizes(jax.devices(), needed, memory).values()) == sizes


def test_slices_that_are_not_there_are_one_sentence():
    with pytest.raises(UsageError, match="'mesh.slices' is 2, but the devices form 1 slices"):
        make_mesh("data=-1", slices=2)


# ---- ways out

class Machine:
    """In place of the compiler: an update takes `fixed` and `activations` GiB over micro-batches and devices."""

    def __init__(self, fixed, activations):
        self.fixed, self.activations, self.tried = fixed, activations, []

    def __call__(self, job):
        config, devices = job["config"], int(job["topology"].rpartition("-")[2])
        self.tried.append((job["topology"], config["micro_batches"], config["optimizer"]["mu_dtype"]))
        share = self.activations / config["micro_batches"] * config["data"]["row_length"] / 8192
        fixed = self.fixed - 5 * (config["optimizer"]["mu_dtype"] == "bfloat16")
        return row((fixed + share) / devices, topology=job["topology"])


@pytest.mark.parametrize("fixed, activations, changes, larger", [
    (35, 32, {"micro_batches": 8}, "h100-2"),  # 35 + 32 / 8 is within 40, 35 + 32 / 4 is not
    (35, 100, {"micro_batches": 16, "data.row_length": 2048}, "h100-4"),
    (44, 8, {"micro_batches": 16, "optimizer.mu_dtype": "bfloat16"}, "h100-2"),
    (60, 8, None, "h100-2"), (500, 8, None, None)])
def test_ways_out_are_the_mildest_that_fit(fixed, activations, changes, larger):
    machine = Machine(fixed, activations)
    ways = search.what_fits(job(), machine(job()), machine)
    assert [way["changes"] for way in ways if way["topology"] == "h100-1"] == ([changes] if changes else [])
    assert [way["topology"] for way in ways if way["topology"] != "h100-1"] == ([larger] if larger else [])


def test_what_never_fits_is_not_compiled():
    machine = Machine(1000, 8)
    big = row(1008)
    big["bytes"].update(parameters=300 * GIB, optimizer=600 * GIB)
    assert search.what_fits(job(), big, machine) == [] and machine.tried == []


# ---- the command

def test_status_and_table(capsys, tmp_path):
    found = {"h100-1": row(30), "h100-2": row(50, topology="h100-2")}
    more = dict(model="preset:x", attention="flash", model_flops_per_step=4e15, tokens_per_step=100_000, traffic_bytes=0,
                least_traffic_bytes=0, compile_seconds=1.0, fitting_batch_size=None)
    compile_ = lambda asked: {**found[asked["topology"]], **more} if asked["topology"] in found else {**row(90), **more}
    jobs = [{**job(), "topology": name} for name in found]
    assert report.check(jobs, compile_, str(tmp_path / "out.json")) == 0
    out = capsys.readouterr().out
    assert "h100-1    fits" in out and "h100-2    too small" in out and "40.0" in out
    assert [each["topology"] for each in json.loads((tmp_path / "out.json").read_text())] == ["h100-1", "h100-2"]
    assert report.check(jobs[1:], compile_) == 1
    found["h100-1"]["warnings"] = ["Involuntary full rematerialization of %x"]
    assert report.check(jobs[:1], compile_) == 1
    assert "replicates" in capsys.readouterr().out


@pytest.mark.parametrize("flags, sentence", [
    (["--preflight", "h100"], "KIND-COUNT"), (["--preflight", ""], "names no topology"), ([], "required: --workdir"),
    (["--preflight", "cpu-1", "--config.remat=some"], "'remat'")])
def test_wrong_flags_exit_2_in_a_sentence(capsys, flags, sentence):
    assert main(["--config", f"{FINETUNE}:small", *flags]) == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("name, package", [("v5e-8", "libtpu"), ("h100-1", "the CUDA plugin")])
def test_missing_packages_are_one_sentence_with_the_pip_line(capsys, monkeypatch, name, package):
    monkeypatch.setattr("llavamed_jax.preflight.topologies._is_installed", lambda name: False)
    assert main(["--config", FINETUNE, "--preflight", name]) == 1
    error = capsys.readouterr().err
    assert package in error and 'pip install "llavamed-jax[preflight]"' in error and error.count("\n") == 1


def test_a_start_that_is_not_here_is_taken_by_the_recipes_name():
    config, where = programs.shapes_of("runs/none", "finetune v1-13b")
    assert config.decoder.num_layers == 40 and "because runs/none does not exist here" in where
    with pytest.raises(UsageError, match="'init' is 'runs/none'"):
        programs.shapes_of("runs/none", "my own")


def test_the_command_compiles_a_run_on_virtual_cpus(capfd, tmp_path):
    """In a process of its own, from a checkpoint's config."""
    start = write_start(tmp_path / "start")
    keys = [f"--config.init={start}", "--config.batch_size=2", "--config.max_length=64"]
    assert main(["--config", f"{FINETUNE}:small", "--preflight", "cpu-2", "--preflight_json", str(tmp_path / "out.json"), *keys]) == 0
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert (found["topology"], found["devices"], found["device_kind"], found["fits"]) == ("cpu-2", 2, "cpu", True)
    assert set(found["bytes"]) == {"parameters", "optimizer", "gradients", "activations", "arguments", "temporaries", "peak"}
    assert found["collectives"]["all-gather"]["count"] > 0 and found["tokens_per_step"] == 128 and found["mesh"]["fsdp"] == 2
    assert "cpu-2     fits" in capfd.readouterr().out


# ---- the engine's programs

@pytest.mark.parametrize("new_tokens, length", [(32, 256), (860, 1024), (900, 1280), (1024, 1280)])
def test_the_cache_has_the_engines_length(new_tokens, length):
    config = dataclasses.replace(CFG, decoder=dataclasses.replace(CFG.decoder, max_position_embeddings=4096))
    serving = Serving.of(config, Topology.parse("cpu-1").devices(), None, "float32", rows=2, new_tokens=new_tokens)
    assert serving.prompt == 128 and serving.length == length == cache_length(128 + new_tokens)
    assert (serving.attended("prefill"), serving.attended("decode")) == (64.5, 128 + new_tokens / 2)


def test_the_engines_programs_are_compiled_from_shapes():
    """Each of the three for two rows on four devices; the decode loop copies no cache."""
    machine = Topology.parse("cpu-4")
    serving, deep = (Serving.of(each, machine.devices(), "data=2,tp=2", "float32", rows=2, new_tokens=40) for each in (SHALLOW, CFG))
    assert (serving.prompt, serving.length, serving.batch) == (128, 256, 4)
    cache = 2 * 2 * 2 * 256 * 16 * 4 // 4  # keys and values, rows, heads, positions, width, bytes, devices
    assert serving.bytes()["cache"] == cache and deep.bytes()["cache"] == 3 * cache
    found = {name: (compiled(lowered, machine), beside) for name, lowered, beside in serving.programs()}
    assert list(found) == ["encode", "prefill", "decode"]
    weights = serving.bytes()["parameters"]
    for name, (program, beside) in found.items():
        assert program.arguments <= weights + 3 * cache and (beside == cache or name == "decode"), name
    assert found["decode"][0].arguments >= cache
    assert found["decode"][0].peak < weights + 2 * cache + 2**20


@pytest.mark.parametrize("how, bits", [("int8", 8), ("int4", 4), ("nf4", 4)])
def test_rounded_kernels_are_counted_by_their_bits(how, bits):
    """And the programs take them as they are."""
    devices = Topology.parse("cpu-1").devices()
    deep, shallow = (each.replace(decoder=dataclasses.replace(each.decoder, intermediate_size=128)) for each in (CFG, SHALLOW))
    exact, rounded = (Serving.of(deep, devices, None, "bfloat16", 2, 32, quantize=each) for each in (None, how))
    layers = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128)  # weights: q and o, k and v, gate, up and down
    outputs = 3 * (64 * 2 + 32 * 2 + 128 * 2 + 64)
    groups = 3 * (64 * 2 + 32 * 2 + 128 * 2 + 64 * (1 if how == "int4" else 2))  # 128 inputs are one group of int4
    scales = {"int8": 4 * outputs, "int4": 5 * groups, "nf4": 4 * groups}[how]
    saved = exact.bytes()["parameters"] - rounded.bytes()["parameters"]
    assert saved == layers * (16 - bits) // 8 - scales
    element = {"int8": "xi8>", "int4": "xi4>", "nf4": "xui4>"}[how]
    for name, lowered, _ in Serving.of(shallow, devices, None, "bfloat16", 2, 32, quantize=how).programs():
        assert (element in lowered.as_text().partition("func.func public @main")[2].partition("{\n")[0]) == (name != "encode"), name


def test_an_int8_cache_is_counted_and_given_to_the_programs():
    plain, small = (Serving.of(SHALLOW, Topology.parse("cpu-1").devices(), None, "bfloat16", 2, 32, kv_cache=each) for each in (None, "int8"))
    H = CFG.decoder.head_dim
    assert small.bytes()["cache"] * 2 * H == plain.bytes()["cache"] * (H + 4)
    for name, lowered, _ in small.programs():
        arguments = lowered.as_text().partition("func.func public @main")[2].partition("{\n")[0]
        kinds = set(re.findall(rf"x{CFG.decoder.num_kv_heads}x\d+x{H}x(\w+)>", arguments))
        assert kinds == (set() if name == "encode" else {"i8"}), name


@pytest.mark.parametrize("name, parameters, cache, ways", [
    ("h100-2", 20, 60, [{"generation.batch_size": 4}, {"--mesh": "data=-1,tp=2"}]),
    ("h100-2", 60, 4, [{"--mesh": "tp=2"}, {"--mesh": "data=-1,tp=2"}]),
    ("h100-8", 60, 4, [{"--mesh": "data=-1,tp=2"}]), ("h100-1", 100, 4, [{"--mesh": "tp=4"}]), ("v5e-64", 100, 4, [{"--mesh": "tp=4"}]),
    ("h100-16", 200, 100, [{"--mesh": "tp=8"}]), ("h100-16", 400, 4, []), ("v5e-16", 200, 4, [])])
def test_ways_out_of_an_evaluation(name, parameters, cache, ways):
    """Fewer rows where the weights fit, the model over more devices of a host where they do not; more hosts are no help."""
    def machine(asked):
        rows = asked["config"]["generation"]["batch_size"]
        spread = int((asked["mesh"] or "tp=1").rpartition("tp=")[2])
        found = row((parameters + cache * rows / 16) / spread, topology=asked["topology"], rows=rows)
        found["bytes"].update(parameters=parameters * GIB, optimizer=0, cache=cache * rows / 16 * GIB)
        return found
    asked = dict(topology=name, slices=1, checkpoint="preset:v15-7b", mesh=None, dtype="bfloat16",
                 config=dict(generation=dict(batch_size=16, max_new_tokens=1024)))
    assert [way["changes"] for way in search.what_fits(asked, machine(asked), machine)] == ways


def test_an_evaluation_has_one_way_in():
    for flags in (["--checkpoint", "preset:small"], ["--predictions", "x.jsonl", "--preflight", "cpu-1"]):
        with pytest.raises(UsageError, match="--workdir|--preflight compiles the programs of a model"):
            evaluate(["--config", f"{ROOT}/configs/eval/vqa_rad.py", *flags])


# ---- at full size, with the compilers of machines that are not here

@pytest.mark.slow
@pytest.mark.parametrize("name, changes", [
    ("h100-8", []), ("h100-8", ["compute=fp8"]), ("h100-64", []), ("v5e-64", []), ("v5e-256", []), ("v5e-32", ["mesh.slices=2", "mesh.data=2"])])
def test_a_7b_update_is_compiled_for(name, changes):
    """It fits, sends within 15 % of the least, at once no more than the embedding table and the head, and XLA has no complaint."""
    cfg = common.load_config(f"{FINETUNE}:v15,7b", changes)
    machine = Topology.parse(name, cfg.mesh.slices)
    try:
        machine.check_packages()
    except UserError as error:
        pytest.skip(str(error))
    found = Compiler()(dict(topology=name, slices=cfg.mesh.slices, config=json.loads(cfg.to_json())))
    assert found["fits"] and not found["warnings"]
    assert found["traffic_bytes"] <= 1.15 * found["least_traffic_bytes"]
    assert found["largest_array_bytes"] <= 2 * 32000 * 4096 * 4
    assert 4.2e10 <= found["model_flops_per_step"] / found["tokens_per_step"] <= 5.2e10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v4-8", "v5e-1", "v5p-8", "v6e-8"])
def test_a_tpus_memory_is_what_its_compiler_says(name, monkeypatch):
    """And a program that does not fit is read from what the compiler says of it, at whichever stage."""
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    machine = Topology.parse(name)
    try:
        device = jax.sharding.SingleDeviceSharding(machine.devices()[0])
    except UserError as error:
        pytest.skip(str(error))
    doubled = jax.jit(lambda x: 2 * x, in_shardings=device, out_shardings=device)
    lowered = doubled.lower(jax.ShapeDtypeStruct((100 * 2**10, 2**18), "float32"))
    with pytest.raises(jax.errors.JaxRuntimeError, match=rf" exceeds available HBM \({machine.memory / 2**30:.2f}G\)"):
        lowered.compile()
    assert compiled(lowered, machine).peak == 200 * 2**30
