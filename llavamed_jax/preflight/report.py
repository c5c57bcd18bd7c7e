"""`--preflight`: a verdict a topology, as a table, as JSON, and as an exit status."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from llavamed_jax.errors import UsageError
from llavamed_jax.preflight import search
from llavamed_jax.preflight.topologies import Topology

_GIB = 2**30
_NEEDED = 6 * _GIB  # of this machine's memory, for a compilation at full size
_COLUMNS = ("topology", "verdict", "peak", "usable", "parameters", "optimizer", "gradients", "activations", "rows", "mesh", "attention",
            "GFLOP/token", "traffic GB", "least GB", "compile s")


def check(jobs: Sequence[Mapping[str, Any]], compiled: Callable, json_file: str | None = None) -> int:
    """Compiles jobs, prints what was found, and writes it.

    Args:
      jobs: as `compile.in_process` takes them, one a topology.
      compiled: `compile.in_process`.
      json_file: where the list of rows goes.
    Returns:
      0, or 1 where nothing fits, or where XLA replicates arrays that should be spread.
    """
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(_at_once(len(jobs))) as pool:
        for job, row in zip(jobs, pool.map(lambda job: _judge(job, compiled), jobs)):
            rows.append(row)
            print(f"{job['topology']}: {verdict(row)} ({len(rows)} of {len(jobs)})", file=sys.stderr, flush=True)
            if json_file is not None:  # after each, for they take minutes
                write(Path(json_file), rows)
    print(table(rows))
    for line in remarks(rows):
        print(line)
    return 0 if any(row["fits"] for row in rows) and not any(row["warnings"] for row in rows) else 1


def topologies(names: str, slices: int = 1) -> list[Topology]:
    """Reads `h100-8,v5e-64`. Raises UsageError."""
    found = [Topology.parse(name.strip(), slices) for name in names.split(",") if name.strip()]
    if not found:
        raise UsageError("--preflight names no topology; a list such as h100-8,v5e-64 was expected")
    for topology in found:
        topology.check_packages()
    return found


def verdict(row: Mapping[str, Any]) -> str:
    return "replicates" if row["warnings"] else "fits" if row["fits"] else "too small"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as text; bytes are GiB of one device."""
    lines = [_COLUMNS]
    for row in rows:
        held, gib = row["bytes"], lambda n: f"{n / _GIB:.1f}"
        lines.append((
            row["topology"], verdict(row), gib(held["peak"]), gib(row["memory_bytes"]),
            *(gib(held[name]) for name in ("parameters", "optimizer", "gradients", "activations")),
            f"{row['rows']}x{row['row_length']}" + (f"/{row['micro_batches']}" if row["micro_batches"] > 1 else ""),
            ",".join(f"{axis}={n}" for axis, n in row["mesh"].items() if n > 1) or "1", row["attention"],
            f"{row['model_flops_per_step'] / row['tokens_per_step'] / 1e9:.1f}",
            f"{row['traffic_bytes'] / 1e9:.1f}", "" if row["least_traffic_bytes"] is None else f"{row['least_traffic_bytes'] / 1e9:.1f}",
            f"{row['compile_seconds']:.0f}"))
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))] for line in lines]
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the table has no room for: ways out, rows that do not fit the batch, warnings."""
    lines = ["bytes in GiB a device; rows an update x their length / micro-batches; traffic received by a device in an update"]
    lines += sorted({f"model: {row['model']}" for row in rows})
    for row in rows:
        if row.get("fitting_batch_size") is not None:
            lines.append(f"{row['topology']}: its devices make an update of {row['fitting_batch_size']} samples; batch_size "
                         f"{row['fitting_batch_size']} would say so")
        if not row["fits"]:
            ways = " or ".join(_words(way, row) for way in row["would_fit"])
            tried = f"and so is what was tried: other values of keys, and up to {2**search.LARGER} times as many devices"
            lines.append(f"{row['topology']} is too small{f'; it would fit {ways}' if ways else f', {tried}'}")
        lines += [f"{row['topology']}: XLA replicates an array that is spread over devices: {text[:300]}" for text in row["warnings"]]
    return lines


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The rows as JSON, whole or not at all."""
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(list(rows), indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def _judge(job: Mapping[str, Any], compiled: Callable) -> dict[str, Any]:
    row = compiled(job)
    return row if row["fits"] else {**row, "would_fit": search.what_fits(job, row, compiled)}


def _words(way: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    changes = " and ".join(f"{key}={value}" for key, value in way["changes"].items())
    where = f"on {way['topology']}" if way["topology"] != row["topology"] else ""
    size = f"({way['peak'] / _GIB:.1f} of {way['memory_bytes'] / _GIB:.1f} GiB)"
    return " ".join(filter(None, ["with" if changes else "", changes, where, size]))


def _at_once(jobs: int) -> int:
    """Compilations side by side: two cores each, and memory for all."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(jobs, (os.cpu_count() or 1) // 2, free // _NEEDED))
