"""Describes the processor that this process runs on; the rounding of XLA's programs for CPUs depends on it."""

from __future__ import annotations

import contextlib
import os
import platform

from llavamed_jax.utils.hashes import sha256

_CPUINFO = "/proc/cpuinfo"


def cpu_cores() -> int:
    """Returns the number of cores among which XLA divides a program for CPUs, and with it the order of sums.

    XLA takes `PJRT_NPROC` or `NPROC` of the environment, and else the cores that the scheduler allows this process
    (`taskset`, SLURM's and Docker's cpusets), which may be fewer than the machine has (`xla/pjrt/utils.cc`,
    `DefaultThreadPoolSize`).
    """
    for name in ("PJRT_NPROC", "NPROC"):
        with contextlib.suppress(KeyError, ValueError):
            return max(0, int(os.environ[name]))
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # a system without processor affinity


def cpu_model() -> str:
    """Returns the processor's name and a hash of its instruction sets, for which LLVM compiles.

    The hash is needed because a hypervisor may hide some instruction sets of a processor.
    """
    found: dict[str, str] = {}
    with contextlib.suppress(OSError), open(_CPUINFO, encoding="utf-8", errors="replace") as file:
        for line in file:
            name, _, value = line.partition(":")
            found.setdefault(name.strip(), value.strip())
    name = found.get("model name") or found.get("CPU part") or platform.processor() or platform.machine()
    instructions = " ".join(sorted((found.get("flags") or found.get("Features") or "").split()))
    return f"{name}, instructions {sha256(instructions.encode())[:6]}" if instructions else name
