"""What every benchmark shares: random weights, medians of several runs, and a row that says where it was measured."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import resource
import statistics
import subprocess
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from llavamed_jax.config import LlavaConfig
from llavamed_jax.models.llava import abstract_params
from llavamed_jax.preflight.floor import Floor, floor_of
from llavamed_jax.preflight.peaks import near, peaks_of
from llavamed_jax.preflight.topologies import KINDS, Topology

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")
ROOT = Path(__file__).resolve().parent.parent


def as_loaded(params):
    """Parameters on this machine's device as an engine has them that loads them from files."""
    from llavamed_jax.generation import weights

    return weights.as_joined(params) if weights.joins(None) else params


def random_params(cfg: LlavaConfig, dtype=jnp.float32, scan: bool = False, seed: int = 0):
    """Weights drawn on the device, kernels with standard deviation fan_in^-1/2, norms' scales 1, biases 0."""
    draw = jax.jit(lambda key, shape, scale: (jax.random.normal(key, shape, jnp.float32) * scale).astype(dtype), static_argnums=(1, 2))

    def leaf(path, x):
        name = path[-1].key
        if name in ("scale", "bias"):
            return jnp.full(x.shape, name == "scale", dtype)
        fan_in = x.shape[-1] if name in ("embedding", "class_embedding") else x.shape[-2]
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(jax.tree_util.keystr(path).encode()) & 0x7FFFFFFF)
        return draw(key, x.shape, fan_in**-0.5)

    return jax.tree_util.tree_map_with_path(leaf, abstract_params(cfg, scan))


def median_seconds(run: Callable[[], object], repeats: int = 5, warmup: int = 1) -> float:
    """The median time of `run`, whose result is waited for; compilation belongs to the warm-up."""
    for _ in range(warmup):
        jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_memory() -> dict:
    """Bytes in use at their highest: the device's own count, or the process's where the device keeps none (a CPU)."""
    stats = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return {"peak_memory_bytes": stats["peak_bytes_in_use"], "peak_memory_of": "device"}
    return {"peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "peak_memory_of": "process"}


def this_machine() -> Topology | None:
    """What preflight calls a machine of one device like this one; None for a kind that it does not know."""
    kind = jax.devices()[0].device_kind
    name = next((name for name, what in KINDS.items() if kind == getattr(what, "name", name)), None)
    return name and Topology.parse(f"{name}-1")


def beside_floor(seconds: float, floors: Callable[[Callable], list[Floor | None]]) -> dict:
    """Floor of what was measured and how many times as long it took; empty on a machine whose peaks are not stated.

    Args:
      seconds: measured.
      floors: given a function (text, rounds, attended, of) that reads a program's floor on this machine, those of the programs
        that ran.
    """
    machine = this_machine()
    peaks = machine and peaks_of(machine)
    if peaks is None:
        return {}
    try:
        found = floors(lambda text, rounds=1.0, attended=0.0, of=floor_of: of(text, peaks, near(machine), rounds, attended))
    except Exception as error:  # what was measured is worth more than what could be said of it
        return dict(floor_error=str(error)[:300])
    floor = sum(each.seconds for each in found if each is not None)
    return dict(floor_seconds=floor, times_the_floor=seconds / floor, floor_kernels=round(sum(each.kernels for each in found if each)))


def circumstances(commit: str | None = None) -> dict:
    """Device, versions, commit and date of a row."""
    if commit is None:
        with contextlib.suppress(FileNotFoundError):  # a machine without git
            done = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, encoding="utf-8")
            commit = done.stdout.strip() or None
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return dict(device=jax.devices()[0].device_kind, versions=versions, commit=commit,
                date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))


def append_row(out: Path, row: dict) -> None:
    """Prints a row and appends it to the file `out`."""
    line = json.dumps(row)
    print(line, flush=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out, "a", encoding="utf-8") as file:
        file.write(line + "\n")
