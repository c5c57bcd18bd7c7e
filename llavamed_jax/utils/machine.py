"""The processor that this process runs on: what XLA's programs for CPUs, and so their last bits, depend on."""

from __future__ import annotations

import contextlib
import os
import platform

from llavamed_jax.utils.hashes import sha256

_CPUINFO = "/proc/cpuinfo"


def cpu_cores() -> int:
    """The cores among which XLA cuts the work of a program for CPUs, and with it the sums that it adds up.

    XLA takes `PJRT_NPROC` or `NPROC` of the environment, and else the cores that the scheduler lets this process have (`taskset`,
    SLURM's and Docker's cpusets), which may be fewer than the machine has (`xla/pjrt/utils.cc`, `DefaultThreadPoolSize`).
    """
    for name in ("PJRT_NPROC", "NPROC"):
        with contextlib.suppress(KeyError, ValueError):
            return max(0, int(os.environ[name]))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # a system without affinity


def cpu_model() -> str:
    """The processor's name, and a short name for its instructions, of which a hypervisor may hide some: LLVM compiles for these."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open(_CPUINFO, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or found.get("CPU part") or platform.processor() or platform.machine()
    instructions = " ".join(sorted((found.get("flags") or found.get("Features") or "").split()))
    return f"{name}, instructions {sha256(instructions.encode())[:6]}" if instructions else name
