"""The script that kills runs, in short."""

import os
import random
import signal
import subprocess
import sys
import threading
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


def wait_for(run, count):
    """Until it has so many workers."""
    deadline = time.monotonic() + 20
    while len(found := run.workers()) != count and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(found) == count
    return found


def test_a_process_and_a_segment_that_stay_are_found(tmp_path, monkeypatch):
    """A child that outlives its killed parent, and a file in shared memory that nobody has mapped."""
    child = "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)']); time.sleep(30)"
    monkeypatch.setattr(runs, "GRACE_S", 0.3)
    monkeypatch.setattr(runs, "SHM", tmp_path)
    run = runs.Run(["-c", child], tmp_path.parent / "log", None)
    wait_for(run, 1)
    assert run.kill_at(0.0)
    (tmp_path / "psm_left").write_bytes(b"x")
    (tmp_path / f"llavamed_{os.getpid()}_0a").write_bytes(b"x")  # of another run, which is alive
    found = run.leftovers()
    assert len(found) == 2 and found[0].startswith("process ") and found[1] == "segment psm_left"
    subprocess.run(["kill", found[0].split()[1].rstrip(":")], check=True)
    (tmp_path / "psm_left").unlink()
    monkeypatch.setattr(runs, "GRACE_S", 10.0)
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


def test_a_worker_that_is_stopped_ends_with_its_killed_parent(tmp_path):
    """It can look for nobody, and would stay with its shared memory until somebody lets it go on."""
    script, begun = tmp_path / "loader.py", tmp_path / "begun"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + LOADER)
    run = runs.Run([str(script), str(begun)], tmp_path / "log", None)
    while not begun.exists():
        assert run.wait_until(time.monotonic() - run.started + 0.05), (tmp_path / "log").read_text()
    now = time.monotonic() - run.started
    assert run.treat("stopped", now, now + 0.2, random.Random(0)) == 1
    assert run.kill_at(now + 0.2) and run.leftovers() == []


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def test_workers_are_starved_one_is_killed_and_a_run_without_workers_is_stopped_itself(tmp_path):
    child = "import subprocess, sys, time; [subprocess.Popen(['sleep', '30']) for _ in range(2)]; time.sleep(30)"
    run = runs.Run(["-c", child], tmp_path / "log", None)
    (one, _), now, counts, seen = wait_for(run, 2), time.monotonic() - run.started, [], []
    starving = threading.Thread(target=lambda: counts.append(run.treat("starved", now, now + 0.6, random.Random(0))))
    starving.start()
    while starving.is_alive():
        seen.append(state_of(one) == "T")
        time.sleep(0.001)
    changes = [now for now, before in zip(seen, [False, *seen]) if now != before]
    assert counts == [2] and changes[:3] == [True, False, True], "they are stopped, go on, and are stopped again"
    assert run.treat("killed", 0.0, 0.0, random.Random(0)) == 2
    (left,) = wait_for(run, 1)  # the other one may be on its way out
    assert run.treat("untouched", 0.0, 0.0, random.Random(0)) == 0 and run.kill_at(0.0)
    os.kill(left, signal.SIGKILL)
    run = runs.Run(["-c", "import time; time.sleep(30)"], tmp_path / "log", None)
    assert run.treat("stopped", 0.0, 0.3, random.Random(0)) == 0
    assert state_of(run.process.pid) == "T"
    assert run.kill_at(0.3) and run.leftovers() == []
