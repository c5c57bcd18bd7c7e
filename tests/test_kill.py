"""The script that kills runs, in short."""

import subprocess
import sys

import pytest

from benchmarks import runs
from tests.training_runs import ROOT


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
    found = run.leftovers()
    assert len(found) == 2 and found[0].startswith("process ") and found[1] == "segment psm_left"
    subprocess.run(["kill", found[0].split()[1].rstrip(":")], check=True)
    (tmp_path / "psm_left").unlink()
    assert run.leftovers() == []
