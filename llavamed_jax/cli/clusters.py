"""Where a process stands among others on a cluster, read from its environment. jax's own way to find them may wait for them: it is
asked only where there are others."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where a process stands among the others; what is None is found by jax.

    Attributes:
      coordinator, count, index: HOST:PORT of process 0, number of processes, number of this one.
      local_devices: of this host's GPUs those of this process, empty for all.
    """

    coordinator: str | None = None
    count: int | None = None
    index: int | None = None
    local_devices: Sequence[int] | None = None


def detected(environment: Mapping[str, str] = os.environ) -> Place | None:
    """The place on a cluster that starts more than one process; None elsewhere, so that nobody waits for processes that never come.

    SLURM: a step of several tasks. Cloud TPU: several hosts, by GKE's variables or the metadata of the machine. GKE with GPUs: a pod
    of an indexed job, whose size the package `kubernetes` asks for.
    """
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")  # what jax asks for
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", ""))
    if all(name in environment for name in slurm) and tasks.isdigit() and int(tasks) > 1:
        return Place(local_devices=_slurm_devices(environment))
    if _is_tpu_host(environment) and _tpu_hosts(environment) > 1:
        return Place()
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        if importlib.util.find_spec("kubernetes") is not None:
            return Place()
        print("this is a pod of an indexed job and runs alone: pip install kubernetes, or --coordinator, "
              "--num_processes and --process_id, would join it with the others", file=sys.stderr)
    return None


def _slurm_devices(environment: Mapping[str, str]) -> Sequence[int] | None:
    """The GPUs of a task, where jax would take the one that has the task's number on its host: of a lone task the first of eight.

    Each task takes an equal part of the GPUs that it sees; all of them where it is alone, or sees one that SLURM has given it.
    """
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", environment.get("SLURM_TASKS_PER_NODE", "")))
    visible = [name for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    if "JAX_LOCAL_DEVICE_IDS" in environment or tasks is None:
        return None
    here, index = int(tasks[0]), int(environment["SLURM_LOCALID"])
    if here == 1 or len(visible) == 1:
        return []
    share = len(visible) // here
    return range(index * share, (index + 1) * share) if share and index < here else None


def _is_tpu_host(environment: Mapping[str, str]) -> bool:
    platforms = environment.get("JAX_PLATFORMS", "tpu")
    return "tpu" in platforms and importlib.util.find_spec("libtpu") is not None and any(
        path.read_text(encoding="ascii").strip() == "0x1ae0" for path in Path("/sys/bus/pci/devices").glob("*/vendor"))  # Google's


def _tpu_hosts(environment: Mapping[str, str]) -> int:
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES") or _metadata("worker-network-endpoints")
    return len([name for name in names.split(",") if name]) * int(environment.get("MEGASCALE_NUM_SLICES") or 1)


def _metadata(key: str) -> str:
    """An attribute of a virtual machine at Google; empty where there is none."""
    import urllib.request  # takes a while, and few are asked

    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
                                     headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=2) as answer:
            return answer.read().decode()
    except OSError:
        return ""
