"""A run of several processes: what they agree on, and two real ones of four devices against one of eight, stopped, killed, gone on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree.store import newest_intact_step
from llavamed_jax.training import step_agreement as module
from llavamed_jax.training.step_agreement import StepAgreement
from tests.support import training_runs as runs
from tests.support import xla
from tests.support.several import Threads, ends, free_port, two
from tests.support.training_runs import ROOT, SAMPLE

# ---- what is agreed on


@pytest.fixture
def three(monkeypatch):
    threads = Threads(3)
    monkeypatch.setattr(module, "distributed", threads)
    return threads


def test_counts_are_added_up_in_the_first_and_equal_rows_count_once(three):
    """Process 2 has the rows of process 1, as where tensor parallelism spans both."""
    rows, counts = [[0, 1], [2, 3], [2, 3]], [{"samples": 2, "tokens": 5}, {"samples": 1, "tokens": 7}, {"samples": 1, "tokens": 7}]
    found = three.run(lambda k: StepAgreement(bool, 0, rows[k]).add_up(counts[k], [{"id": k}]))
    assert found == [({"samples": 3, "tokens": 12}, [{"id": 1}]), (counts[1], []), (counts[2], [])]


def test_all_stop_where_one_was_asked(three):
    def work(k):
        asked: list = []
        together, seen = StepAgreement(lambda: bool(asked), 0, [k]), []
        for update in range(3):
            seen.append(together.is_stopping)
            asked += [1] if k == 2 and update == 1 else []
            together.add_up({}, [])
        return [*seen, together.is_stopping]

    assert three.run(work) == [[False, False, True, True]] * 3


def test_all_stop_between_two_batches_of_a_validation_where_one_was_asked(three):
    def work(k):
        asked: list = []
        together, seen = StepAgreement(lambda: bool(asked), 0, [k]), []
        for batch in range(3):
            asked += [1] if k == 2 and batch == 1 else []
            seen.append(together.agree_to_stop())
        return [*seen, together.is_stopping]

    assert three.run(work) == [[False, True, True, True]] * 3


def test_a_save_is_due_by_the_clock_of_the_first(three, monkeypatch):
    clock = {0: 0.0, 1: 0.0, 2: 0.0}
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.get(getattr(three.here, "index", None), 0.0))

    def work(k):
        together, seen = StepAgreement(bool, 1.0, [k]), []
        for now in (59.0, 61.0, 62.0):
            clock[k] = now + 100 * k  # the clocks of others say nothing
            together.add_up({}, [])
            seen.append(together.is_save_due)
            if together.is_save_due:
                together.saved()
        return seen

    assert three.run(work) == [[False, True, False]] * 3


def test_alone_the_own_word_counts(monkeypatch):
    asked: list = []
    together = StepAgreement(lambda: bool(asked), 1.0, [0])
    assert together.add_up({"samples": 2}, [{"id": 1}]) == ({"samples": 2}, []) and not together.is_stopping
    asked.append(1)
    now = time.monotonic()
    assert together.is_stopping and not together.is_save_due
    monkeypatch.setattr(module.time, "monotonic", lambda: now + 61)
    assert together.is_save_due
    together.saved()
    assert not together.is_save_due


# ---- two processes

FOUR, EIGHT = ({"XLA_FLAGS": xla.flags(n)} for n in (4, 8))


def test_arrays_of_two_processes_lie_where_they_should():
    port = str(free_port())
    running = [subprocess.Popen([sys.executable, "-m", "tests.support.two_processes", port, str(k)], cwd=ROOT, env={**os.environ, **FOUR},
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for k in range(2)]
    for status, out, err in ends(running):
        assert status == 0 and out.splitlines()[-1] == "as expected", err


STEPS = 150
PATIENCE_S = 1800  # two minutes each on an idle machine of two cores, far more on a busy one


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """Rows that do not fill the mesh, samples that weigh alike, a broken image, validation, answers on the way: all that
    processes share out."""
    folder = tmp_path_factory.mktemp("together")
    data = runs.write_data(folder)
    records = json.loads((data / "train.json").read_text())
    shutil.copytree(SAMPLE / "images", folder / "images")
    broken = next(record["image"] for record in records if record["image"] != records[0]["image"])
    (folder / "images" / broken).write_bytes(b"no image")
    keys = {"init": runs.write_start(folder / "start"), "data.train": data / "train.json", "data.images": folder / "images",
            "data.validation": data / "validation.json", "mesh.data": 2, "mesh.fsdp": 4, "batch_size": 6, "batch_size_may_grow": True,
            "data.packing": True, "data.row_length": 64, "total_steps": STEPS, "max_length": 40, "log_every": 1, "samples_every": 75,
            "loss_weighting": "sample",
            "checkpoint.every_steps": 25, "checkpoint.keep": 9, "checkpoint.keep_best": True}
    return ["--config", "configs/demo.py:vqa", *(f"--config.{key}={value}" for key, value in keys.items())]


def started(command, workdir):
    return two("train", *command, "--workdir", str(workdir), **FOUR)


def waited_for(workdir, step, running, deadline=PATIENCE_S):
    """Returns when a step lies there whole, while the processes are at work."""
    manifest, until = workdir / "checkpoints" / str(step) / "manifest.json", time.monotonic() + deadline
    while not manifest.exists() and time.monotonic() < until:
        assert all(process.poll() is None for process in running)
        time.sleep(0.02)


def tensors(workdir):
    return {name: tensor.load() for name, tensor in open_checkpoint(workdir).tensors.items()}


@pytest.fixture(scope="module")
def whole(command, tmp_path_factory):
    """Two processes, uninterrupted."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    found = ends(started(command, workdir), PATIENCE_S)
    assert [status for status, *_ in found] == [0, 0], found
    return workdir, found


@pytest.mark.slow
def test_two_processes_train_as_one_of_eight_devices(command, whole, tmp_path):
    workdir, ((_, out, err), (_, *silent)) = whole
    assert silent == ["", ""] and f"finished at step {STEPS}" in out and err == ""
    done = subprocess.run([sys.executable, "train.py", *command, "--workdir", str(tmp_path / "run")], cwd=ROOT,
                          env={**os.environ, **EIGHT}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    two_lines, one_lines = (runs.log_lines(folder) for folder in (workdir, tmp_path / "run"))
    assert len(two_lines) == len(one_lines) > STEPS
    of_time = ("tokens_per_second", "loss", "grad_norm", "validation_loss")
    for here, there in zip(two_lines, one_lines, strict=True):
        assert {k: v for k, v in here.items() if k not in of_time} == {k: v for k, v in there.items() if k not in of_time}
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (two_lines, one_lines)]
    np.testing.assert_allclose(losses[0][:25], losses[1][:25], rtol=1e-6)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)  # later, what differs in the last bit has grown
    validation = [[line["validation_loss"] for line in lines if "validation_loss" in line] for lines in (two_lines, one_lines)]
    np.testing.assert_allclose(validation[0][:1], validation[1][:1], rtol=1e-6)
    assert max(line.get("samples_skipped", 0) for line in two_lines) > 0
    skipped = [sorted((folder / "skipped.jsonl").read_text().splitlines()) for folder in (workdir, tmp_path / "run")]
    assert skipped[0] == skipped[1]
    answers = [re.findall(r"vqa 75/150 · (.* -> .*)", text) for text in (out, done.stdout)]
    assert answers[0] == answers[1] and len(answers[0]) == 4


@pytest.mark.slow
def test_stopped_killed_and_gone_on_is_the_same_to_the_bit(command, whole, tmp_path):
    """A signal to one process stops both at one step; after a kill the other one is gone; in the end nothing differs."""
    workdir = tmp_path / "run"
    running = started(command, workdir)
    waited_for(workdir, 25, running)
    running[1].send_signal(signal.SIGTERM)
    (first, out, _), (second, *silent) = ends(running, PATIENCE_S)
    assert (first, second) == (75, 75) and silent[0] == "" and "SIGTERM" in silent[1]
    step, damaged = newest_intact_step(workdir)
    assert f"stopped and saved at step {step} of {STEPS}" in out and 25 < step < STEPS and not damaged

    running = started(command, workdir)
    waited_for(workdir, 75, running)
    begun = time.monotonic()
    running[1].kill()
    (first, _, err), _ = ends(running, PATIENCE_S)
    assert first == 1 and time.monotonic() - begun < 60
    assert err.splitlines()[-1].startswith("error: process 1 has ended or cannot be reached, so process 0 ends too")

    found = ends(started(command, workdir), PATIENCE_S)
    assert [status for status, *_ in found] == [0, 0], found
    assert STEPS > int(re.search(r"resuming from step (\d+)", found[0][1])[1]) >= 75
    kept, ours = (runs.log_lines(folder) for folder in (whole[0], workdir))
    strip = lambda lines: [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]
    assert strip(kept) == strip(ours)
    expected, got = tensors(whole[0]), tensors(workdir)
    assert expected.keys() == got.keys() and all((expected[name] == got[name]).all() for name in expected)


def test_the_launch_files_are_shell():
    for file in sorted(path for path in (ROOT / "docs" / "launch").iterdir() if path.suffix != ".yml"):
        assert subprocess.run(["bash", "-n", file], capture_output=True).returncode == 0, file
        assert "train.py" in file.read_text()
