"""`--preflight` when something goes wrong: rows that were found are shown, files are kept, no process is left, one sentence is said."""

import json
import os
import signal
import sys
import threading
import time
from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavamed_jax.cli import common
from llavamed_jax.cli.eval import main as evaluate
from llavamed_jax.cli.train import main as train
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.preflight import compile, report, search
from llavamed_jax.preflight.programs import Training, shapes_of
from llavamed_jax.preflight.topologies import Topology
from llavamed_jax.utils import signals
from tests.support import forks, preflight_jobs
from tests.support.preflight_jobs import GIB
from tests.support.words import instead

ROOT = Path(__file__).resolve().parents[2]
FINETUNE = f"{ROOT}/configs/finetune.py"
VQA_RAD = f"{ROOT}/configs/eval/vqa_rad.py"


def row(topology, peak=30, **changes):
    return {**preflight_jobs.row(peak, topology=topology), "mesh": dict(data=1, fsdp=8, tp=1), **dict(
        model="preset:x", mean_length=1080, attention="flash", model_flops_per_step=4e15, tokens_per_step=100_000, traffic_bytes=0,
        least_traffic_bytes=0, compile_seconds=1.0, fitting_batch_size=None), **changes}


def jobs(*names):
    return [{**preflight_jobs.job(), "topology": name} for name in names]


# ---- what was found before something went wrong

def some_fail(errors):
    def compiled(job):
        if job["topology"] in errors:
            raise errors[job["topology"]]
        return row(job["topology"])
    return compiled


@pytest.mark.parametrize("errors, kind, sentence", [
    ({"h100-2": UserError("the compiler broke")}, UserError, "h100-2: the compiler broke; the results so far are in "),
    ({"h100-2": UsageError("no"), "h100-4": UsageError("no")}, UsageError, "h100-2, h100-4: no; the results so far are in "),
    ({"h100-2": UsageError("no"), "h100-4": UserError("broke")}, UserError, "h100-2: no; h100-4: broke; the results so far are in")])
def test_rows_beside_a_failure_are_shown_and_an_older_file_stays(capsys, tmp_path, errors, kind, sentence):
    file = tmp_path / "found.json"
    file.write_text("older")
    with pytest.raises(UserError, match=sentence) as caught:
        report.check(jobs("h100-1", "h100-2", "h100-4", "h100-8"), some_fail(errors), str(file))
    assert type(caught.value) is kind
    said = capsys.readouterr()
    found = [name for name in ("h100-1", "h100-2", "h100-4", "h100-8") if name not in errors]
    assert [line.split()[0] for line in said.out.splitlines() if " fits " in line] == found
    assert "h100-2: failed (2 of 4)" in said.err and file.read_text() == "older"
    assert [each["topology"] for each in json.loads((tmp_path / "found.json.part").read_text())] == found


def test_where_nothing_was_found_no_file_is_left(tmp_path):
    with pytest.raises(UserError, match="^h100-2: broke$"):
        report.check(jobs("h100-2"), some_fail({"h100-2": UserError("broke")}), str(tmp_path / "found.json"))
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_is_said_after_the_rows(capsys, monkeypatch, tmp_path):
    def write(path, text):
        if "h100" in text:
            raise UserError(f"{path} cannot be written: No space left on device")
        path.write_text(text)
    monkeypatch.setattr(report, "write_text", write)
    with pytest.raises(UserError, match="No space left"):
        report.check(jobs("h100-1"), some_fail({}), str(tmp_path / "found.json"))
    assert "h100-1    fits" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_shows_what_was_found_and_stops_the_rest(capsys, monkeypatch, number):
    monkeypatch.setattr(report, "_at_once", lambda count: 2)
    monkeypatch.setattr(report, "wait", lambda futures, timeout, **how: wait(futures, timeout=timeout / 10, **how))
    stopped, asked = threading.Event(), []

    def compiled(job):
        asked.append(job["topology"])
        if job["topology"] == "h100-1":
            return row("h100-1")
        if asked.count("h100-2") == 1:  # a second signal could come when nobody waits for it any more
            timer = threading.Timer(0.05, os.kill, [os.getpid(), number])
            timer.start()
        assert stopped.wait(60)
        raise UserError("it was stopped")

    with signals.listening(signals.over(1)), pytest.raises(UserError, match="^interrupted after 1 of 4 topologies$"):
        report.check(jobs("h100-1", "h100-2", "h100-2", "h100-4"), compiled, stop=stopped.set)
    assert "h100-1    fits" in capsys.readouterr().out and "h100-4" not in asked


def test_an_output_that_is_closed_is_one_sentence_and_the_file_is_written(tmp_path):
    """As of `| head -1`."""
    def run():
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        sys.stdout = open(1, "w")
        return common.run(lambda _: report.check(jobs("cpu-1"), some_fail({}), f"{tmp_path}/found.json"))
    status, error = forks.Command(run).finish()
    assert status == 1 and error.splitlines()[-1] == "error: the output was closed before everything was written"
    assert "Traceback" not in error and json.loads((tmp_path / "found.json").read_text())[0]["topology"] == "cpu-1"


def stand_in(tmp_path, monkeypatch, script):
    """A compiler's process that does as the shell is told."""
    file = tmp_path / "compiler"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    monkeypatch.setattr(compile.sys, "executable", str(file))


def wait_for_end(pid, seconds=30):
    """Waits until a process that was killed has ended; a zombie, which its new parent may keep, has ended."""
    state, until = Path(f"/proc/{pid}/stat"), time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            if state.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] == "Z":
                return
        except (FileNotFoundError, ProcessLookupError):
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} still runs")


def test_a_compiler_that_is_stopped_leaves_no_process(tmp_path, monkeypatch):
    """Neither itself nor what it started."""
    stand_in(tmp_path, monkeypatch, f"sleep 300 & echo $! > {tmp_path}/child.new; mv {tmp_path}/child.new {tmp_path}/child; wait")
    compiler, said = compile.Compiler(), []

    def call():
        with pytest.raises(UserError) as caught:
            compiler(jobs("cpu-1")[0])
        said.append(str(caught.value))

    thread = threading.Thread(target=call)
    thread.start()
    while not (tmp_path / "child").exists():
        thread.join(0.02)
    compiler.stop()
    thread.join(30)
    assert said == ["the compiler was killed by SIGKILL, which the system sends when memory runs out"]
    wait_for_end(int((tmp_path / "child").read_text()))
    with pytest.raises(UserError, match="stopped before it began"):
        compiler(jobs("cpu-1")[0])


def test_a_command_line_without_stdin_compiles(tmp_path, monkeypatch):
    """The child's end of the pipe takes no number of its own streams."""
    stand_in(tmp_path, monkeypatch, 'test "$6" -gt 2 || exit 9; cat; echo')
    assert forks.Command(lambda: compile.Compiler()(jobs("cpu-1")[0])["topology"] != "cpu-1", 0).finish() == (0, "")


def test_a_compiler_ends_with_the_process_that_asked_for_it(monkeypatch):
    theirs, ours = os.pipe()

    def run():  # it waits for its job
        os.setsid()
        os.close(ours)
        monkeypatch.setattr(sys, "argv", ["compile", str(theirs)])
        monkeypatch.setattr(sys, "stdin", open(nothing))
        compile.main()
    nothing, job = os.pipe()
    command = forks.Command(run)
    os.close(theirs)
    os.close(ours)
    assert command.finish()[0] == -signal.SIGKILL
    os.close(nothing)
    os.close(job)


@pytest.mark.parametrize("script, sentence", [
    ("echo 'Traceback' >&2; echo 'ValueError: no such thing' >&2; exit 1", "ended with status 1: ValueError: no such thing"),
    ("echo 'F1128 05:02:11.12345    99 parse.cc:12] Unknown flags in XLA_FLAGS: --foo' >&2; echo '  @ 0x1 Error()' >&2; kill -ABRT $$",
     "was killed by SIGABRT: Unknown flags in XLA_FLAGS: --foo"),
    ("kill -SEGV $$", "the compiler was killed by SIGSEGV$"), ("exit 0", "the compiler ended with status 0$"),
    ("echo '{\"error\": \"told\", \"is_usage\": true}'", "^told$"),
    ("printf 'ended\\nin pieces' >&2; exit 3", "status 3: ended in pieces")])
def test_how_a_compiler_ended_is_one_sentence(tmp_path, monkeypatch, script, sentence):
    stand_in(tmp_path, monkeypatch, f"cat > /dev/null; {script}")
    with pytest.raises(UserError, match=sentence):
        compile.Compiler()(jobs("cpu-1")[0])


def test_the_users_environment_neither_hides_warnings_nor_picks_devices(monkeypatch):
    users = {"TF_CPP_MIN_LOG_LEVEL": "3", "JAX_COMPILATION_CACHE_DIR": "/cache", "JAX_NUM_CPU_DEVICES": "5", "JAX_PLATFORMS": "tpu",
             "XLA_FLAGS": "--xla_dump_to=/dump --xla_force_host_platform_device_count=3"}
    for name, value in users.items():
        monkeypatch.setenv(name, value)
    passed = compile._environment(Topology.parse("cpu-4"))
    assert not set(users) - {"XLA_FLAGS", "JAX_PLATFORMS"} & set(passed)
    assert passed["JAX_PLATFORMS"] == "cpu"
    assert passed["XLA_FLAGS"].split() == ["--xla_dump_to=/dump", "--xla_force_host_platform_device_count=4"]


# ---- ways out that are none

@pytest.mark.parametrize("larger", [UsageError("the mesh does not fit 2 devices"), row("h100-2", 20, warnings=["Involuntary full"])])
def test_what_cannot_be_compiled_or_replicates_is_no_way_out(larger):
    """And does not cost the row that was found."""
    def compiled(job):
        if job["topology"] == "h100-1":
            return row("h100-1", 50)
        if isinstance(larger, Exception):
            raise larger
        return {**larger, "topology": job["topology"]}
    assert search.what_fits(jobs("h100-1")[0], row("h100-1", 50), compiled) == []


def test_what_is_tried_is_said(capsys):
    def compiled(job):
        if job["topology"] == "h100-1" and job["config"]["micro_batches"] == 16:
            raise UserError("broke")
        return row(job["topology"], 50 if job["topology"] == "h100-1" else 20, mesh=dict(data=1, fsdp=1, tp=1))
    changed = "h100-1 with micro_batches=16"
    assert report.check(jobs("h100-1"), compiled) == 1
    said = capsys.readouterr()
    assert said.err.splitlines()[:3] == ["h100-1: compiling", f"{changed}: compiling", f"{changed}: broke"]
    assert said.err.splitlines()[-2:] == ["h100-2 for h100-1: compiling", "h100-1: too small (1 of 1)"]
    assert "h100-1 is too small; it would fit on h100-2 (20.0 of 40.0 GiB)" in said.out


@pytest.mark.parametrize("name, tail", [("cpu-2", "keys"), ("v5e-256", "keys"), ("h100-1", "keys, and up to 8 times as many devices")])
def test_larger_machines_are_named_where_there_are_any(name, tail):
    assert report.remarks([row(name, 50, would_fit=[])])[-1] == f"{name} is too small, and no alternative that was tried fits: other values of {tail}"


# ---- tables

FIRST = ["topology", "verdict", "peak", "usable"]


def test_tables_fit_80_columns():
    large = row("a100-40g-16", 164, mesh=dict(data=2, fsdp=8, tp=1), rows=32, traffic_bytes=87.9e9, least_traffic_bytes=86.9e9)
    found = report.tables([row("cpu-1"), large])
    assert max(len(line) for table in found for line in table.splitlines()) <= 80
    memory, _, program, _ = found
    assert memory.splitlines()[0].split() == [*FIRST, "parameters", "optimizer", "gradients", "activations"]
    assert memory.splitlines()[2].split() == ["a100-40g-16", "too", "small", "164.0", "40.0", "10.0", "20.0", "10.0", "0.0"]
    assert program.splitlines()[2].split() == ["a100-40g-16", "32x8192/2", "data=2,fsdp=8", "flash", "40.0", "87.9", "86.9", "1"]


def test_an_evaluations_columns_are_its_own():
    served = row("h100-1", least_traffic_bytes=None)
    served["bytes"].update(cache=3 * GIB, optimizer=0, gradients=0)
    assert report.tables([served])[0].splitlines()[0].split() == [*FIRST, "parameters", "cache", "activations"]
    assert "per prefill" in report.remarks([served])[1]


@pytest.mark.parametrize("number, text", [(0, "0.0"), (43.91, "43.9"), (0.05, "0.1"), (0.049, "0.05"), (0.0031, "0.003"), (1e-5, "<0.001")])
def test_small_numbers_are_not_shown_as_none(number, text):
    assert report.number(number) == text


def test_the_mean_length_is_printed():
    assert "tokens per sample: 1080, images per sample: 2 (data.mean_… of the recipe)" in report.remarks([{**row("cpu-1"), "mean_images": 2.0}])


# ---- command lines

@pytest.mark.parametrize("flags, status, sentence", [
    (["--preflight", "cpu-257"], 2, "from 1 to 256"), (["--preflight", "h100-999999"], 2, "from 1 to 8192"),
    (["--preflight", "x" * 5000 + "-1"], 2, "x…"), (["--preflight_json", "x.json"], 2, "--preflight NAMES was expected"),
    (["--peak", "flops=8e14"], 2, "--preflight NAMES was expected too"), (["--preflight", "cpu-1", "--peak", "8e14"], 2, "--peak is '8e14'"),
    (["--preflight", "cpu-1", "--preflight_json", ""], 2, "empty"), (["--preflight", "cpu-1", "--preflight_json", "/"], 2, "is not a file"),
    (["--preflight", "cpu-1", "--preflight_json", "/dev/null"], 2, "is not a file"),
    (["--preflight", "cpu-1", "--preflight_json", "missing/x.json"], 2, "folder does not exist"),
    (["--preflight", "cpu-1", "--preflight_json", "x" * 300], 1, "cannot be written: File name too long"),
    (["--preflight", "cpu-1", "--config.data.mean_length=0"], 2, "'data.mean_length' is 0; more than 0"),
    (["--preflight", "cpu-1", "--config.mesh.auto=true", "--config.mesh.tp=2"], 2, "'mesh.tp' is 2, but mesh.auto"),
    (["--preflight", "cpu-1", "--config.mesh.auto=true", "--config.mesh.fsdp=4"], 2, "'mesh.fsdp' is 4, but mesh.auto"),
    (["--preflight", "h100-8", "--config.mesh.slices=2"], 2, "'mesh.slices' is 2")])
def test_wrong_training_command_lines(capsys, flags, status, sentence):
    assert train(["--config", f"{FINETUNE}:small", *flags]) == status
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and len(error) < 600


@pytest.mark.parametrize("flags, sentence", [
    (["--config", VQA_RAD, "--config.generation.num_beams=4"], "does not compile beam search"),
    (["--config", VQA_RAD, "--config.generation.batch_size=0"], "generation.batch_size is 0"),
    (["--config", VQA_RAD, "--config.generation.max_new_tokens=none"], "generation.max_new_tokens is none"),
    (["--config", f"{FINETUNE}:small"], "has no 'generation'"),
    (["--config", VQA_RAD, "--checkpoint="], "--checkpoint is empty")])
def test_wrong_evaluation_command_lines(capsys, flags, sentence):
    assert evaluate(instead(["--checkpoint", "preset:small", "--preflight", "cpu-1"], flags)) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_compiler_that_cannot_be_opened_names_the_versions(monkeypatch):
    def fail(**_):
        raise NotImplementedError("topology not implemented for cuda\nmore")
    monkeypatch.setattr("llavamed_jax.preflight.topologies._is_installed", lambda name: True)
    monkeypatch.setattr("jax.experimental.topologies.get_topology_desc", fail)
    with pytest.raises(UserError, match=r"jax [\d.]+ cannot load the compiler for .* \(NotImplementedError: topology not implemented for cuda\); pip install .* that fit$"):
        Topology.parse("h100-8").devices()


def test_a_name_that_is_given_twice_counts_once():
    assert [each.name for each in report.topologies(" cpu-2,cpu-1 ,, cpu-2")] == ["cpu-2", "cpu-1"]


@pytest.mark.parametrize("changes, sentence", [
    (["batch_size=4"], "'batch_size' is 4; a multiple of 8 was expected"), (["micro_batches=2"], "'batch_size' is 8; a multiple of 16"),
    (["max_length=4097"], "at most 4096 was expected"), (["data.packing=true", "data.row_length=50"], "'data.row_length' is 50"),
    (["mesh.tp=8", "mesh.fsdp=1"], "the tower's 6 heads are not divisible"), (["mesh.data=3"], "does not fit 8 devices")])
def test_what_a_run_would_refuse_preflight_refuses(changes, sentence):
    machine = Topology.parse("cpu-8")
    cfg = common.load_config(f"{FINETUNE}:small", changes)
    with pytest.raises(UsageError, match=sentence):
        Training.of(cfg, shapes_of("preset:small")[0], machine.devices(), machine.memory)


@pytest.mark.parametrize("init", ["preset:none", "preset:", f"{ROOT}/README.md", "/dev/null", "x" * 5000])
def test_a_start_that_is_none_is_one_sentence(capsys, init):
    keys = [f"--config.init={init}", "--config.name=mine" if init[0] == "x" else "--config.name=finetune small"]
    assert train(["--config", f"{FINETUNE}:small", "--preflight", "cpu-1", *keys]) == 2
    error = capsys.readouterr().err
    assert "'init' is" in error and "is not a directory here" in error and error.count("\n") == 1 and len(error) < 500


def test_the_tower_that_is_asked_for_is_the_one_that_is_compiled(monkeypatch):
    asked = []
    monkeypatch.setattr("llavamed_jax.preflight.programs.open_model", lambda *names: asked.append(names) or shapes)
    shapes = SimpleNamespace(config="config")
    assert shapes_of(str(ROOT), "finetune small", "clip") == ("config", str(ROOT)) and asked == [(str(ROOT), "clip")]
    assert shapes_of("gs://b/run", "finetune small") == ("config", "gs://b/run") and asked[1:] == [("gs://b/run", None)]
    assert shapes_of("preset:small", "x", "clip")[1] == "preset:small, with its own tower instead of clip"


def test_samples_are_no_longer_than_they_are_cut():
    machine = Topology.parse("cpu-8")
    cfg = common.load_config(f"{FINETUNE}:small", ["data.packing=true", "data.mean_length=9999", "data.row_length=320", "batch_size_may_grow=true"])
    update = Training.of(cfg, shapes_of("preset:small")[0], machine.devices(), machine.memory)
    assert (update.mean_length, update.image_slots) == (160, 2)
