"""Finds alternatives for a recipe that does not fit: other config values on the same machine, or a larger machine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llavamed_jax.errors import UserError
from llavamed_jax.preflight.topologies import Topology
from llavamed_jax.utils.nested import changed

Job, Row = Mapping[str, Any], dict[str, Any]
Try = Callable[[Job], Row | None]  # compiles a job; returns None if it does not fit

SHORTEST_ROW = 2048  # tokens; no sample of the recipes is longer
LARGER = 3  # how many times the number of devices is doubled


def what_fits(job: Job, row: Row, compiled: Callable[[Job], Row]) -> list[dict[str, Any]]:
    """Finds at most two alternatives: other config values on the same machine, and a larger machine.

    Each alternative is compiled, so it is known to fit.

    Args:
      job: the job that did not fit.
      row: the result of compiling it.
      compiled: compiles a job. A job that it refuses, for example because a mesh would split heads, is no alternative.

    Returns:
      `topology`, `changes` {key: value}, `peak` and `memory_bytes` (bytes per device) of each alternative.
    """
    refused: list[Job] = []

    def fitting(job: Job) -> Row | None:
        try:
            tried = compiled(job)
        except UserError:
            refused.append(job)
            return None
        return tried if tried["fits"] and not tried["warnings"] else None

    found = _serving_way(job, row, fitting) if "checkpoint" in job else _training_way(job, row, fitting)
    topology = Topology.parse(job["topology"], job["slices"])
    for doubled in range(1, LARGER + 1):
        smaller, topology = topology, topology.larger()
        if topology is None or "checkpoint" in job and topology.host_devices == smaller.host_devices:
            break
        # Sharded bytes halve with each doubling, so skip a machine that is too small even if all bytes are sharded.
        if _least(row, {}) / 2**doubled > row["memory_bytes"]:
            continue
        larger = {**job, "topology": topology.name}
        if "checkpoint" in job:
            ways = _over_a_host(larger, row, fitting)
        else:
            changes = _wider(job["config"]["mesh"], topology.num_devices)
            asked = {**larger, "config": changed(job["config"], changes)}
            tried, stated = fitting(asked), job["config"]["micro_batches"]
            if tried is None and asked in refused and stated != "auto" and stated >= 2**doubled:
                changes = {**changes, "micro_batches": stated // 2**doubled}  # as many rows of a device at a time
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
    """Tries fewer rows if the weights fit, then tensor parallelism over several devices of a host."""
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
    """Finds the smallest tensor parallelism that fits on one host.

    More hosts do not help, because each process of an evaluation has its own copy of the model on its devices.
    """
    there, held = Topology.parse(job["topology"], job["slices"]).host_devices, row["bytes"]
    for tp in (2**i for i in range(1, there.bit_length())):
        if there % tp == 0 and (held["parameters"] + held["cache"]) / tp <= row["memory_bytes"]:
            mesh = f"tp={tp}" if tp == there else f"data=-1,tp={tp}"
            if mesh != job["mesh"] and (tried := fitting({**job, "mesh": mesh})):
                return [_way(tried, {"--mesh": mesh})]
    return []


def _wider(mesh: Mapping[str, Any], number: int) -> dict[str, Any]:
    """Returns the change that extends the mesh to `number` devices; empty if the mesh takes all devices anyway."""
    if mesh["auto"] or -1 in (mesh["data"], mesh["fsdp"], mesh["tp"]):
        return {}
    return {"mesh.fsdp": number // (mesh["data"] * mesh["tp"])}


def training_changes(config: Mapping[str, Any], row: Row) -> Iterator[dict[str, Any]]:
    """Yields config changes that save memory: first those that only cost speed, then those that change numbers.

    Args:
      config: the values of the recipe.
      row: the result of compiling it.
    """
    mesh = row["mesh"]
    if mesh["fsdp"] == 1 < mesh["data"] and not config["mesh"]["auto"]:
        yield {"mesh.data": config["mesh"]["slices"], "mesh.fsdp": -1}
    micro_batches = row["micro_batches"]
    most = row["rows"] // (mesh["data"] * mesh["fsdp"])  # one row per device at a time
    while most > 1 and config["batch_size"] % most:
        most -= 1
    smaller: dict[str, Any] = {"micro_batches": most} if most > micro_batches else {}
    if config["remat"] not in ("auto", "full"):  # auto has tried full
        yield {"remat": "full"}
        smaller["remat"] = "full"
    if smaller:
        yield smaller
    shorter = ({"data.row_length": SHORTEST_ROW}
               if config["data"]["packing"] and row["row_length"] > SHORTEST_ROW else {})
    if shorter:
        yield {**smaller, **shorter}
    if config["optimizer"]["mu_dtype"] != "bfloat16":
        yield {**smaller, "optimizer.mu_dtype": "bfloat16"}
        if shorter:
            yield {**smaller, **shorter, "optimizer.mu_dtype": "bfloat16"}


def _least(row: Row, changes: Mapping[str, Any]) -> float:
    """Returns the bytes of parameters and optimizer on a device, a lower bound of the memory of an update."""
    held, mesh = row["bytes"], row["mesh"]
    saved = held["optimizer"] / 4 if changes.get("optimizer.mu_dtype") == "bfloat16" else 0
    return (held["parameters"] + held["optimizer"] - saved) / (mesh["data"] // changes.get("mesh.data", mesh["data"]))


def _fewer(job: Job, row: Row, changes: dict[str, Any], tried: Row, fitting: Try) -> tuple[dict[str, Any], Row]:
    """Tries a smaller number of micro-batches, between the recipe's and the one that fits.

    The memory of activations is inversely proportional to the number of micro-batches. So the two compiled programs
    predict the smallest number that fits; it is compiled to make sure.

    Returns:
      The changes, and the result of compiling with them.
    """
    first, last = row["micro_batches"], changes.get("micro_batches", 0)
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
