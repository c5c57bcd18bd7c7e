"""What would fit where a recipe does not: other values of its keys on the same machine, or more devices of the kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llavamed_jax.errors import UserError
from llavamed_jax.preflight.topologies import Topology
from llavamed_jax.utils.nested import changed

Job, Row = Mapping[str, Any], dict[str, Any]
Try = Callable[[Job], Row | None]  # what compiling found, None of what does not fit

SHORTEST_ROW = 2048  # that the recipes' samples fit
LARGER = 3  # how often the number of devices is doubled


def what_fits(job: Job, row: Row, compiled: Callable[[Job], Row]) -> list[dict[str, Any]]:
    """At most two ways out, each compiled: by keys on the same machine, and by a larger machine as the recipe is.

    Args:
      job, row: what did not fit, and what it was found to need.
      compiled: compiles a job. What it refuses, such as heads that a mesh would cut, is no way out.
    Returns:
      `topology`, `changes` {key: value}, `peak` and `memory_bytes` of each.
    """
    def fitting(job: Job) -> Row | None:
        try:
            tried = compiled(job)
        except UserError:
            return None
        return tried if tried["fits"] and not tried["warnings"] else None

    found = _serving_way(job, row, fitting) if "checkpoint" in job else _training_way(job, row, fitting)
    topology = Topology.parse(job["topology"], job["slices"])
    for doubled in range(1, LARGER + 1):
        smaller, topology = topology, topology.larger()
        if topology is None or "checkpoint" in job and topology.host_devices == smaller.host_devices:
            break
        # What is spread over the devices halves with each doubling; what is not never fits.
        if _least(row, {}) / 2**doubled > row["memory_bytes"]:
            continue
        larger = {**job, "topology": topology.name}
        if "checkpoint" in job:
            ways = _over_a_host(larger, row, fitting)
        else:
            changes = _wider(job["config"]["mesh"], topology.num_devices)
            tried = fitting({**larger, "config": changed(job["config"], changes)})
            ways = [_way(tried, changes)] if tried else []
        if ways:
            return found + ways
    return found


def _training_way(job: Job, row: Row, fitting: Try) -> list[dict[str, Any]]:
    for changes in training_changes(job["config"], row):
        if _least(row, changes) > row["memory_bytes"]:
            continue
        if tried := fitting({**job, "config": changed(job["config"], changes)}):
            return [_way(tried, *_fewer(job, row, changes, tried, fitting))]
    return []


def _serving_way(job: Job, row: Row, fitting: Try) -> list[dict[str, Any]]:
    """Fewer rows, where the weights fit; else the model over several devices of a host."""
    held = row["bytes"]
    rows = job["config"]["generation"]["batch_size"]
    while rows > 1 and held["parameters"] < row["memory_bytes"]:
        rows //= 2
        if held["parameters"] + held["cache"] * rows / row["rows"] < 0.9 * row["memory_bytes"]:
            changes = {"generation.batch_size": rows}
            if tried := fitting({**job, "config": changed(job["config"], changes)}):
                return [_way(tried, changes)]
    return _over_a_host(job, row, fitting)


def _over_a_host(job: Job, row: Row, fitting: Try) -> list[dict[str, Any]]:
    """The least tensor parallelism that does it: each process of an evaluation has a model of its own on its devices, so that more hosts
    are no help."""
    there, held = Topology.parse(job["topology"], job["slices"]).host_devices, row["bytes"]
    for tp in (2**i for i in range(1, there.bit_length())):
        if there % tp == 0 and (held["parameters"] + held["cache"]) / tp <= row["memory_bytes"]:
            mesh = f"tp={tp}" if tp == there else f"data=-1,tp={tp}"
            if mesh != job["mesh"] and (tried := fitting({**job, "mesh": mesh})):
                return [_way(tried, {"--mesh": mesh})]
    return []


def _wider(mesh: Mapping[str, Any], number: int) -> dict[str, Any]:
    """What lays a recipe's mesh over so many devices: nothing, where it takes what is there."""
    if mesh["auto"] or -1 in (mesh["data"], mesh["fsdp"], mesh["tp"]):
        return {}
    return {"mesh.fsdp": number // (mesh["data"] * mesh["tp"])}


def training_changes(config: Mapping[str, Any], row: Row) -> Iterator[dict[str, Any]]:
    """Values of keys that take less memory, the mildest first: what costs speed alone before what changes numbers."""
    mesh = row["mesh"]
    if mesh["fsdp"] == 1 < mesh["data"] and not config["mesh"]["auto"]:
        yield {"mesh.data": config["mesh"]["slices"], "mesh.fsdp": -1}
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


def _least(row: Row, changes: Mapping[str, Any]) -> float:
    """Bytes without which no update runs, whatever it keeps for the backward pass."""
    held, mesh = row["bytes"], row["mesh"]
    saved = held["optimizer"] / 4 if changes.get("optimizer.mu_dtype") == "bfloat16" else 0
    return (held["parameters"] + held["optimizer"] - saved) / (mesh["data"] // changes.get("mesh.data", mesh["data"]))


def _fewer(job: Job, row: Row, changes: dict[str, Any], tried: Row, fitting: Try) -> tuple[dict[str, Any], Row]:
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
    again = fitting({**job, "config": changed(job["config"], fewer)})
    return (fewer, again) if again else (changes, tried)


def _way(tried: Row, changes: dict[str, Any], row: Row | None = None) -> dict[str, Any]:
    row = tried if row is None else row
    return dict(topology=row["topology"], changes=changes, peak=row["bytes"]["peak"], memory_bytes=row["memory_bytes"])
