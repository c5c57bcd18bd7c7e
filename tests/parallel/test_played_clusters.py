"""Jobs of two hosts, played on one machine: what SLURM and Open MPI set for each process, and what they do to a job."""

import os
import socket
import subprocess
import sys

import pytest

from tests.support.several import ends
from tests.support.training_runs import ROOT

pytestmark = pytest.mark.slow
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
