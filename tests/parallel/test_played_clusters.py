"""Jobs of two hosts, played on one machine: what SLURM and Open MPI set for each process, and what they do to a job."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support import training_runs as runs
from tests.support import xla
from tests.support.several import ends
from tests.support.training_runs import ROOT

PATIENCE_S = 900
DEMO = ["--config", "configs/eval/vqa_rad.py:demo", "--checkpoint", "runs/x"]


def job():
    """A job's number whose port, as jax derives it from the number, is free."""
    for number in range(os.getpid() % 4096, os.getpid() % 4096 + 4096):
        with socket.socket() as found:
            if found.connect_ex(("127.0.0.1", 61440 + number % 4096)):
                return number
    pytest.fail("no port is free")


def slurm(number, task):
    """Two hosts with one task each, as `srun` tells a task. 127.0.0.1 is the first."""
    return {"SLURM_JOB_ID": str(number), "SLURM_STEP_NODELIST": "127.0.0.1,127.0.0.2", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_NNODES": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_PROCID": str(task), "SLURM_LOCALID": "0"}


def open_mpi(number, task):
    """Two ranks on two hosts, as `mpirun` of Open MPI 4 tells a rank."""
    return {"OMPI_MCA_orte_hnp_uri": f"{number * 4096}.0;tcp://127.0.0.1:9", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": str(task),
            "OMPI_COMM_WORLD_LOCAL_RANK": "0", "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}


def environment(**more):
    """This process's own, without proxies (gRPC would use them) and without what a cluster has set."""
    own = {name: value for name, value in os.environ.items()
           if "proxy" not in name.lower() and not name.startswith(("SLURM_", "OMPI_"))}
    return {**own, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **more}


def fake_mpi_in_a_step(number, task):
    """mpirun inside an allocation: SLURM's variables are those of its helper, one a host, which is alone in its own step."""
    return {**slurm(number, 0), "SLURM_STEP_NUM_TASKS": "1", **open_mpi(number, task)}


@pytest.mark.slow
@pytest.mark.parametrize("told", [slurm, open_mpi, fake_mpi_in_a_step])
def test_processes_of_an_evaluation_find_each_other(told, tmp_path):
    number = job()
    running = [subprocess.Popen([sys.executable, "-m", "tests.support.fake_eval", "0", "--", *DEMO, "--workdir", str(tmp_path)], cwd=ROOT,
                                env=environment(**told(number, task)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for task in range(2)]
    (first, out, said), (second, silent, err) = ends(running, PATIENCE_S)
    assert (first, second, silent, err) == (0, 0, "", ""), said + err
    assert "questions, process 0 of 2" in said and "report: " in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.json", "predictions.jsonl", "report.html", "tensorboard"]


SRUN = """#!{python}
import os, signal, subprocess, sys
from tests.parallel.test_played_clusters import slurm
tasks = [subprocess.Popen(sys.argv[1:], env={{**os.environ, **slurm(int(os.environ["SLURM_JOB_ID"]), k)}}) for k in range(2)]
signal.signal(signal.SIGTERM, lambda number, _: [task.send_signal(number) for task in tasks])
open("{folder}/srun.pid", "w").write(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""


def program(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


def logged(workdir: Path) -> list[int]:
    file = workdir / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [row["step"] for row in map(json.loads, lines) if "loss" in row]


@pytest.mark.slow
def test_a_job_whose_time_ends_saves_is_requeued_and_goes_on(tmp_path):
    """`docs/launch/slurm.sbatch` as it is. `srun` starts two tasks and passes on SIGTERM, as SLURM does 180 s before the end."""
    data, steps, work = runs.write_data(tmp_path), 60, tmp_path / "run"
    bin_, number = tmp_path / "bin", job()
    bin_.mkdir()
    program(bin_ / "srun", SRUN.format(python=sys.executable, folder=tmp_path))
    program(bin_ / "scontrol", f'#!/bin/sh\necho "$@" >> {tmp_path}/scontrol\n')
    program(bin_ / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    keys = {"total_steps": steps, "max_length": 40, "batch_size": 4, "log_every": 1, "checkpoint.every_steps": 1000}
    command = ["bash", "docs/launch/slurm.sbatch", *(f"--config.{key}={value}" for key, value in keys.items())]
    told = environment(PATH=f"{bin_}:{os.environ['PATH']}", SLURM_JOB_ID=str(number), SLURM_NNODES="2", XLA_FLAGS=xla.flags(2),
                       WORKDIR=str(work), RECIPE="configs/demo.py:vqa", INIT=str(runs.write_start(tmp_path / "start")),
                       DATA=str(data / "train.json"), IMAGES=str(runs.SAMPLE / "images"))

    def started():
        return subprocess.Popen(command, cwd=ROOT, env=told, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    running, until = started(), time.monotonic() + PATIENCE_S
    while len(logged(work)) < 3 and time.monotonic() < until and running.poll() is None:
        time.sleep(0.05)
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGTERM)
    ((status, out, said),) = ends([running], PATIENCE_S)
    assert status == 75, out + said
    done = logged(work)
    assert 3 <= len(done) < steps and (tmp_path / "scontrol").read_text() == f"requeue {number}\n"
    assert [path.name for path in (work / "checkpoints").iterdir() if path.name.isdecimal()] == [str(done[-1])]
    ((status, out, said),) = ends([started()], PATIENCE_S)
    assert status == 0, out + said
    assert logged(work) == list(range(1, steps + 1)) and (tmp_path / "scontrol").read_text() == f"requeue {number}\n"
