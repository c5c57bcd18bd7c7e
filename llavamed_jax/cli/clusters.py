"""Finds a process's place among others on a cluster from its environment.

jax's own detection may wait for the other processes, so it is used only if there are other processes.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavamed_jax.errors import warn


@dataclass(frozen=True)
class Place:
    """A process's place among the others; jax finds the values that are None.

    Attributes:
      coordinator: HOST:PORT of process 0.
      count: the number of processes.
      index: the number of this process.
      local_devices: this process's GPUs among those of its host; empty for all.
      method: the name of jax's detection that finds the other values; None lets jax choose.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: Sequence[int] | None = None
    method: str | None = None


def detected(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Returns the place on a cluster that starts several processes; None elsewhere, so that no process waits in vain.

    On SLURM: a step of several tasks. With Open MPI's `mpirun`: several ranks, also inside a SLURM job. On Cloud TPU:
    several hosts, by GKE's variables or the machine's metadata. On GKE with GPUs: a pod of an indexed job; the package
    `kubernetes` finds its size.
    """
    ranks = environment.get("OMPI_COMM_WORLD_SIZE", "")
    if ranks.isdigit() and int(ranks) > 1:  # before SLURM, whose variables mpirun's helpers pass on
        return _open_mpi(environment, int(ranks))
    # The variables that jax reads.
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", ""))
    if all(name in environment for name in slurm) and tasks.isdigit() and int(tasks) > 1:
        here = environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", ""))
        return Place(count=int(tasks), index=int(environment["SLURM_PROCID"]), method="slurm",
                     local_devices=_share_of_devices(environment, _tasks_of(here, environment.get("SLURM_NODEID", "")),
                                                     environment["SLURM_LOCALID"]))
    if _is_tpu_host(environment) and _tpu_hosts(environment) > 1:
        return Place()
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is not None:
            return Place()
        warn("this pod of an indexed job runs alone; to join the other pods, pip install kubernetes or give "
             "--coordinator, --num_processes and --process_id")
    return None


def _open_mpi(environment: Mapping[str, str], count: int) -> Place | None:
    """Returns the place of a rank of `mpirun`; None, with a warning, if jax cannot find the first rank."""
    if "OMPI_MCA_orte_hnp_uri" not in environment or "OMPI_COMM_WORLD_RANK" not in environment:
        warn(f"this process is one of {count} of Open MPI and runs alone, because this version of Open MPI does not "
             "tell where the first one is; to join the others, give --coordinator, --num_processes and --process_id")
        return None
    devices = _share_of_devices(environment, environment.get("OMPI_COMM_WORLD_LOCAL_SIZE", ""),
                                environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    return Place(count=count, index=int(environment["OMPI_COMM_WORLD_RANK"]), local_devices=devices, method="ompi")


def _tasks_of(per_host: str, host: str) -> str:
    """Returns the number of tasks on a host of a SLURM step; "" if that is not known.

    Args:
      per_host: the numbers of all hosts, as SLURM writes them: `2(x3),1`.
      host: the number of the host in the step; without it all hosts must have the same number.
    """
    found: list[str] = []
    for part in per_host.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return ""
        found += [match[1]] * min(int(match[2] or 1), 10**6)
    if host.isdigit() and int(host) < len(found):
        return found[int(host)]
    return found[0] if len({*found}) == 1 else ""


def _share_of_devices(environment: Mapping[str, str], tasks_here: str, local_index: str) -> Sequence[int] | None:
    """Returns the GPUs of a task: an equal part of those that it sees; all if it is alone on its host or sees one.

    jax would take the GPU with the task's number on its host: the first of eight for a lone task.

    Args:
      environment: the environment variables.
      tasks_here: the number of tasks on this host; "" if it is not known.
      local_index: the number of this task on its host.
    """
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if "JAX_LOCAL_DEVICE_IDS" in environment or not tasks_here.isdigit():
        return None
    here, index = int(tasks_here), int(local_index)
    if here == 1 or len(visible) == 1:
        return []
    share = len(visible) // here
    return range(index * share, (index + 1) * share) if share and index < here else None


def _is_tpu_host(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None and any(
        path.read_text(encoding="ascii").strip() == "0x1ae0"  # Google's
        for path in Path("/sys/bus/pci/devices").glob("*/vendor"))


def _tpu_hosts(environment: Mapping[str, str]) -> int:
    names = (environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES")
             or _metadata("worker-network-endpoints"))
    return len([name for name in names.split(",") if name]) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)


def _metadata(key: str) -> str:
    """Returns an attribute of a Google virtual machine; an empty text if there is no such attribute."""
    import urllib.request  # slow to import, and needed on few machines

    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
                                     headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""
