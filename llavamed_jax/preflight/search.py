"""What would fit where a recipe does not: other values of its keys on the same machine, or more devices of the kind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llavamed_jax.errors import UserError
from llavamed_jax.preflight.topologies import Topology

Job, Row = Mapping[str, Any], dict[str, Any]
Compile = Callable[[Job], Row]

SHORTEST_ROW = 2048  # that the recipes' samples fit
LARGER = 3  # how often the number of devices is doubled


def what_fits(job: Job, row: Row, compiled: Compile) -> list[dict[str, Any]]:
    """At most two ways out, each compiled: by keys on the same machine, and by a larger machine as the recipe is.

    Args:
      job, row: what did not fit, and what it was found to need.
      compiled: compiles a job.
    Returns:
      `topology`, `changes` {key: value}, `peak` and `memory_bytes` of each.
    """
    found = []
    if "checkpoint" in job:
        found += _serving_way(job, row, compiled)
    else:
        found += _training_way(job, row, compiled)
    topology = Topology.parse(job["topology"], job["slices"])
    for doubled in range(1, LARGER + 1):
        topology = topology.larger()
        if topology is None:
            break
        # What is spread over the devices halves with each doubling; what is not never fits.
        if _least(row, {}) / 2**doubled > row["memory_bytes"]:
            continue
        larger = {**job, "topology": topology.name}
        changes = {}
        if "checkpoint" in job:  # which lies on one device if not told otherwise
            changes = {"--mesh": f"tp={topology.num_devices}"}
            larger["mesh"] = changes["--mesh"]
        tried = _tried(larger, compiled)
        if tried is not None:
            found.append(_way(tried, changes))
            break
    return found


def _training_way(job: Job, row: Row, compiled: Compile) -> list[dict[str, Any]]:
    for changes in training_changes(job["config"], row):
        if _least(row, changes) > row["memory_bytes"]:
            continue
        tried = _tried({**job, "config": changed(job["config"], changes)}, compiled)
        if tried is not None:
            return [_way(tried, *_fewer(job, row, changes, tried, compiled))]
    return []


def _serving_way(job: Job, row: Row, compiled: Compile) -> list[dict[str, Any]]:
    """Fewer rows, where the weights fit; else the model over the devices that are there."""
    number, held = Topology.parse(job["topology"], job["slices"]).num_devices, row["bytes"]
    rows = job["config"]["generation"]["batch_size"]
    while rows > 1 and held["parameters"] < row["memory_bytes"]:
        rows //= 2
        if held["parameters"] + held["cache"] * rows / row["rows"] < 0.9 * row["memory_bytes"]:
            changes = {"generation.batch_size": rows}
            tried = _tried({**job, "config": changed(job["config"], changes)}, compiled)
            if tried is not None:
                return [_way(tried, changes)]
    if job["mesh"] is None and number > 1:
        tried = _tried({**job, "mesh": f"tp={number}"}, compiled)
        if tried is not None:
            return [_way(tried, {"--mesh": f"tp={number}"})]
    return []


def training_changes(config: Mapping[str, Any], row: Row) -> Iterator[dict[str, Any]]:
    """Values of keys that take less memory, the mildest first: what costs speed alone before what changes numbers."""
    mesh = row["mesh"]
    micro_batches = config["micro_batches"]
    most = row["rows"] // (mesh["data"] * mesh["fsdp"])  # a row of a device at a time
    while most > 1 and config["batch_size"] % most:
        most -= 1
    smaller: dict[str, Any] = {"micro_batches": most} if most > micro_batches else {}
    if config["remat"] != "full":
        yield {"remat": "full"}
        smaller["remat"] = "full"
    if smaller:
        yield smaller
    shorter = {"data.row_length": SHORTEST_ROW} if config["data"]["packing"] and row["row_length"] > SHORTEST_ROW else {}
    if shorter:
        yield {**smaller, **shorter}
    if config["optimizer"]["mu_dtype"] != "bfloat16":
        yield {**smaller, "optimizer.mu_dtype": "bfloat16"}
        if shorter:
            yield {**smaller, **shorter, "optimizer.mu_dtype": "bfloat16"}


def changed(config: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe's values with some keys changed, dots for levels."""
    config = copy.deepcopy(dict(config))
    for key, value in changes.items():
        *parents, leaf = key.split(".")
        node = config
        for part in parents:
            node = node[part]
        node[leaf] = value
    return config


def _least(row: Row, changes: Mapping[str, Any]) -> float:
    """Bytes without which no update runs, whatever it keeps for the backward pass."""
    held = row["bytes"]
    saved = held["optimizer"] / 4 if changes.get("optimizer.mu_dtype") == "bfloat16" else 0
    return held["parameters"] + held["optimizer"] - saved


def _fewer(job: Job, row: Row, changes: dict[str, Any], tried: Row, compiled: Compile) -> tuple[dict[str, Any], Row]:
    """Fewer micro-batches that fit too, where the two that were compiled say that there may be; what a row's share of the peak is
    falls as their number rises. Returns changes and what they need."""
    first, last = job["config"]["micro_batches"], changes.get("micro_batches", 0)
    if last <= 2 * first or set(changes) != {"micro_batches"}:
        return changes, tried
    share = (row["bytes"]["peak"] - tried["bytes"]["peak"]) / (1 / first - 1 / last)
    fixed = tried["bytes"]["peak"] - share / last
    number = 2 * first
    while number < last and (fixed + share / number > row["memory_bytes"] or job["config"]["batch_size"] % number):
        number *= 2
    if number >= last:
        return changes, tried
    fewer = {"micro_batches": number}
    again = _tried({**job, "config": changed(job["config"], fewer)}, compiled)
    return (fewer, again) if again is not None else (changes, tried)


def _tried(job: Job, compiled: Compile) -> Row | None:
    """What a job needs, where it fits. No way out is what cannot be compiled there (a mesh of fixed sizes on more devices, heads that tp
    does not divide), or only with copies of what should be spread."""
    try:
        row = compiled(job)
    except UserError:
        return None
    return row if row["fits"] and not row["warnings"] else None


def _way(tried: Row, changes: dict[str, Any], row: Row | None = None) -> dict[str, Any]:
    row = tried if row is None else row
    return dict(topology=row["topology"], changes=changes, peak=row["bytes"]["peak"], memory_bytes=row["memory_bytes"])
