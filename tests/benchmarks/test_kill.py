"""The script that kills runs, in short."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import runs
from tests.support.training_runs import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("command, ways", [("train", "stopped,killed"), ("train", "starved,untouched"), ("eval", "stopped,starved")])
def test_two_kills_lose_nothing(command, ways):
    done = subprocess.run([sys.executable, "benchmarks/kill.py", "--command", command, "--kills", "2", "--workers", ways], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "2/2", done.stdout + done.stderr


def test_a_process_and_a_segment_that_stay_are_found(tmp_path, monkeypatch):
    """A child that outlives its killed parent, and a file in shared memory that nobody has mapped."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)']); time.sleep(30)"
    monkeypatch.setattr(runs, "GRACE_S", 1.0)
    monkeypatch.setattr(runs, "SHM", tmp_path)
    run = runs.Run(["-c", child], tmp_path.parent / "log", None)
    assert run.kill_at(1.5)
    (tmp_path / "psm_left").write_bytes(b"x")
    (tmp_path / f"llavamed_{os.getpid()}_0a").write_bytes(b"x")  # of another run, which is alive
    found = run.leftovers()
    assert len(found) == 2 and found[0].startswith("process ") and found[1] == "segment psm_left"
    subprocess.run(["kill", found[0].split()[1].rstrip(":")], check=True)
    (tmp_path / "psm_left").unlink()
    assert run.leftovers() == []


LOADER = """
import sys
from llavamed_jax.pipeline.workers import in_order
if __name__ == "__main__":
    results = in_order(str, 1000, 1)
    next(results)
    open(sys.argv[1], "w").close()
    while True:
        next(results)
"""


@pytest.mark.parametrize("way", ["stopped", "starved"])
def test_a_worker_that_is_stopped_ends_with_its_killed_parent(tmp_path, way):
    """It can look for nobody, and would stay with its shared memory until somebody lets it go on."""
    script, begun = tmp_path / "loader.py", tmp_path / "begun"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + LOADER)
    run = runs.Run([str(script), str(begun)], tmp_path / "log", None)
    while not begun.exists():
        assert run.wait_until(time.monotonic() - run.started + 0.05), (tmp_path / "log").read_text()
    now = time.monotonic() - run.started
    assert run.treat(way, now, now + 0.5, random.Random(0)) == 1
    assert run.kill_at(now + 0.5) and run.leftovers() == []


def test_one_worker_is_killed_and_a_run_without_workers_is_stopped_itself(tmp_path):
    child = "import subprocess, sys, time; [subprocess.Popen(['sleep', '30']) for _ in range(2)]; time.sleep(30)"
    run = runs.Run(["-c", child], tmp_path / "log", None)
    assert run.treat("killed", 1.5, 2.0, random.Random(0)) == 2
    deadline = time.monotonic() + 20
    while len(left := run.workers()) > 1 and time.monotonic() < deadline:  # one of them is on its way out
        time.sleep(0.05)
    (left,) = left
    assert run.treat("untouched", 0.0, 2.0, random.Random(0)) == 0 and run.kill_at(2.0)
    os.kill(left, signal.SIGKILL)
    run = runs.Run(["-c", "import time; time.sleep(30)"], tmp_path / "log", None)
    assert run.treat("stopped", 0.5, 1.0, random.Random(0)) == 0
    assert Path(f"/proc/{run.process.pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "T"
    assert run.kill_at(1.0) and run.leftovers() == []
