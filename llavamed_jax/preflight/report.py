"""Reports the results of `--preflight`: a verdict for each topology, as tables, as JSON, and as an exit status."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from llavamed_jax.errors import UsageError, UserError, short
from llavamed_jax.preflight import fp8_matmuls, search
from llavamed_jax.preflight.progress import Progress
from llavamed_jax.preflight.topologies import Topology
from llavamed_jax.utils import signals
from llavamed_jax.utils.files import write_text
from llavamed_jax.utils.nested import flatten

_GIB = 2**30
_NEEDED = 6 * _GIB  # memory of this machine for one compilation of a full-size model


def check(jobs: Sequence[Mapping[str, Any]], compiled: Callable, json_file: str | None = None,
          stop: Callable[[], None] = lambda: None) -> int:
    """Compiles jobs, prints the results, and writes them to a file.

    Args:
      jobs: jobs for `compile.Compiler`, one for each topology.
      compiled: a `compile.Compiler`.
      json_file: the file for the list of rows, written when all jobs are finished; until then the rows are in a file
        with the suffix `.part` beside it. None writes no file.
      stop: the method `stop` of the compiler.

    Returns:
      The exit status: 0, or 1 if the program fits on no topology or if XLA replicates arrays that should be sharded.

    Raises:
      UserError, UsageError: a job failed, or a signal arrived. The results so far are printed before.
    """
    out = None if json_file is None else Results(json_file)
    rows, failed, is_interrupted = {}, {}, False
    progress = Progress(len(jobs))
    with ThreadPoolExecutor(_at_once(len(jobs))) as pool:
        futures = {pool.submit(_judge, job, compiled, progress): i for i, job in enumerate(jobs)}
        try:
            for future in _as_they_end(futures, progress):
                name, error = jobs[futures[future]]["topology"], future.exception()
                if isinstance(error, UserError):
                    failed[futures[future]] = error
                    progress.settled(f"{name}: failed")
                    continue
                rows[futures[future]] = row = future.result()
                progress.settled(f"{name}: {verdict(row)}")
                if out is not None:  # after each job, because a job takes minutes
                    out.keep([rows[i] for i in sorted(rows)])
            is_interrupted = len(rows) + len(failed) < len(jobs)
        finally:
            stop()
            pool.shutdown(cancel_futures=True)
            progress.close()
    found = [rows[i] for i in sorted(rows)]
    said = _reasons(jobs, failed) + ([f"interrupted after {len(rows)} of {len(jobs)} topologies"]
                                     if is_interrupted else [])
    if out is not None:
        said += out.finish(is_whole=not said)
    if found:
        print("\n".join([*tables(found), *remarks(found)]), flush=True)
    if said:
        is_usage = not is_interrupted and failed and all(isinstance(error, UsageError) for error in failed.values())
        raise (UsageError if is_usage else UserError)("; ".join(said))
    return 0 if any(row["fits"] for row in found) and not any(row["warnings"] for row in found) else 1


def _as_they_end(futures: Mapping[Future, int], progress: Progress):
    waiting = set(futures)
    while waiting and not signals.is_asked():
        ended, waiting = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
        yield from sorted(ended, key=futures.get)
        progress.tick()


def _reasons(jobs, failed: Mapping[int, UserError]) -> list[str]:
    """Returns the reasons of failures, with all topologies that failed for the same reason in one sentence."""
    reasons: dict[str, list[str]] = {}
    for i in sorted(failed):
        reasons.setdefault(str(failed[i]), []).append(jobs[i]["topology"])
    return [f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]


class Results:
    """The file of `--preflight_json`. It is checked before compilation, which takes minutes.

    Rows are written to a file with the suffix `.part` beside it until all are there, so a preflight that fails does not
    destroy the results of an earlier one.

    Args:
      name: the name of the file.

    Raises:
      UsageError: the name is not that of a file.
      UserError: the file cannot be written.
    """

    def __init__(self, name: str):
        self.path = Path(os.path.realpath(name))
        self.part = Path(f"{self.path}.part")
        self._is_empty, self._trouble = True, ""
        if not name:
            raise UsageError("--preflight_json is empty; a file's name was expected")
        if not os.path.isdir(self.path.parent):
            raise UsageError(f"--preflight_json is {short(name)}, whose folder does not exist; a file in an existing "
                             "folder was expected")
        if os.path.exists(self.path) and not os.path.isfile(self.path):
            raise UsageError(f"--preflight_json is {short(name)}, which is not a file; a file's name was expected")
        if os.path.exists(self.path) and not os.access(self.path, os.W_OK):
            raise UserError(f"{self.path} cannot be written: it is read-only")
        self._write([])

    def keep(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes the rows so far. An error is kept and reported by `finish`, because the rows are printed too."""
        try:
            self._write(rows)
            self._is_empty = False
        except UserError as error:
            self._trouble = str(error)

    def finish(self, is_whole: bool) -> list[str]:
        """Renames the `.part` file if the rows are complete.

        Args:
          is_whole: whether all jobs gave a row.

        Returns:
          Sentences about errors and about rows that are left in the `.part` file.
        """
        if is_whole and not self._trouble:
            os.replace(self.part, self.path)
            return []
        if self._is_empty:
            self.part.unlink(missing_ok=True)
            return [self._trouble] if self._trouble else []
        return [*([self._trouble] if self._trouble else []), f"the results so far are in {self.part}"]

    def _write(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_text(self.part, json.dumps(list(rows), indent=1) + "\n")


def topologies(names: str, slices: int = 1) -> list[Topology]:
    """Parses a list of topologies such as `h100-8,v5e-64`; repeated names count once.

    Args:
      names: the list, separated by commas.
      slices: the number of slices of each TPU topology.

    Raises:
      UsageError: a topology is unknown, or the list is empty.
      UserError: the packages for compiling for a topology are not installed.
    """
    found = [Topology.parse(name, slices) for name in dict.fromkeys(name.strip() for name in names.split(",")) if name]
    if not found:
        raise UsageError("--preflight names no topology; a list such as h100-8,v5e-64 was expected")
    for topology in found:
        topology.check_packages()
    return found


def verdict(row: Mapping[str, Any]) -> str:
    """Returns the verdict on a topology in one or two words."""
    return "replicates" if row["warnings"] else "fits" if row["fits"] else "too small"


def tables(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats the rows as tables of at most 80 columns: memory in GiB per device, the compiled program, its floor."""
    gib = lambda n: number(n / _GIB)
    held = {"parameters": "parameters", **({"cache": "cache"} if "cache" in rows[0]["bytes"] else {
        "optimizer": "optimizer", "gradients": "gradients"}), "activations": "activations"}
    memory = [("topology", "verdict", "peak", "usable", *held)]
    program = [("topology", "rows", "mesh", "attention", "GFLOP/token", "traffic", "least", "compile")]
    for row in rows:
        memory.append((row["topology"], verdict(row), gib(row["bytes"]["peak"]), gib(row["memory_bytes"]),
                       *(gib(row["bytes"][name]) for name in held)))
        program.append((
            row["topology"], f"{row['rows']}x{row['row_length']}"
            + (f"/{row['micro_batches']}" if row["micro_batches"] > 1 else ""),
            ",".join(f"{axis}={n}" for axis, n in row["mesh"].items() if n > 1) or "1", row["attention"],
            number(row["model_flops_per_step"] / row["tokens_per_step"] / 1e9), number(row["traffic_bytes"] / 1e9),
            "" if row["least_traffic_bytes"] is None else number(row["least_traffic_bytes"] / 1e9),
            f"{row['compile_seconds']:.0f}"))
    return [_aligned(memory, 2), "", _aligned(program, 1), "", *_floors(rows)]


def _floors(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Formats the floors as a table, and the dearest parts of each program; nothing for CPUs."""
    floors = [(f"{row['topology']} {name}".strip(), each["floor"]) for row in rows
              for name, each in row.get("programs", {"": row}).items() if each.get("floor")]
    if not floors:
        return []
    lines = [("topology", "floor", "matmul", "memory", "network", "ceiling", "TFLOP", "GB", "kernels")]
    parts = []
    for name, floor in floors:
        ceiling = floor["mfu_ceiling"]
        lines.append((name, *(number(floor[f"{each}milliseconds"]) for each in ("", "matmul_", "memory_", "network_")),
                      "" if ceiling is None else f"{100 * ceiling:.0f}%", number(floor["matmul_flops"] / 1e12),
                      number(floor["memory_bytes"] / 1e9), str(floor["kernels"])))
        parts += ["", _aligned([(name, "ms", "TFLOP", "GB")] + [
            (each["part"], number(each["milliseconds"]), number(each["flops"] / 1e12), number(each["bytes"] / 1e9))
            for each in floor["dearest"]], 1)]
    return [_aligned(lines, 1), *parts, ""]


def number(n: float) -> str:
    """Formats a number with one decimal, or with one significant digit if it would be rounded to 0.0."""
    return f"{n:.1f}" if n >= 0.05 or n == 0 else f"{n:.1g}" if n >= 0.0005 else "<0.001"


def _aligned(lines: Sequence[Sequence[str]], words: int) -> str:
    """Aligns columns; the first `words` of them to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = [[cell.ljust(width) + " " if i < words else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths))]
               for line in lines]
    return "\n".join(" ".join(line).rstrip() for line in aligned)


def remarks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the lines below the tables: units, models, alternatives, other batch sizes, and warnings of XLA."""
    is_serving = "cache" in rows[0]["bytes"]
    lines = ["memory: GiB per device; compile: seconds; rows: " + (
        "of the cache x their length" if is_serving else "of an update x their length / micro-batches")]
    lines += ["traffic: GB that a device receives per prefill" if is_serving else
              "traffic: GB that a device receives per update, and the least possible"]
    if _floors(rows):
        lines.append("floor: the least milliseconds per device; ceiling: its share of the data sheet's FLOP/s")
    lines += sorted({f"{row['topology']}: the loss's loop counts {row['loss_rounds']} rounds a micro-batch, for rows "
                     "that are supervised throughout" for row in rows if row.get("floor")})
    lines += [f"{row['topology']}: remat is {row['remat']}" for row in rows if row.get("remat")]
    lines += sorted({f"model: {row['model']}" for row in rows})
    lines += sorted({f"tokens per sample: {row['mean_length']}, images per sample: {row.get('mean_images', 1.0):g} "
                     "(data.mean_… of the recipe)" for row in rows if row.get("mean_length")})
    lines += [f"{row['topology']}: rows have {row['longest_sample']} tokens; with a longer sample a run has other "
              "rows, or refuses the mesh" for row in rows if row.get("longest_sample")]
    for row in rows:
        if row.get("fp8_matmuls") is not None:
            lines.append(f"{row['topology']}: {fp8_matmuls.sentence(row['fp8_matmuls'])}")
        if row.get("fitting_batch_size") is not None:
            lines.append(f"{row['topology']}: an update has {row['fitting_batch_size']} samples on these devices, and "
                         "not batch_size (batch_size_may_grow)")
        if not row["fits"]:
            lines.append(_way_out(row))
        lines += [f"{row['topology']}: XLA replicates an array that should be sharded: {text[:300]}"
                  for text in row["warnings"]]
    return lines


def _way_out(row: Mapping[str, Any]) -> str:
    ways = " or ".join(_words(way, row) for way in row["would_fit"])
    if ways:
        return f"{row['topology']} is too small; it would fit {ways}"
    larger = (f", and up to {2**search.LARGER} times as many devices"
              if Topology.parse(row["topology"]).larger() is not None else "")
    return f"{row['topology']} is too small, and no alternative that was tried fits: other values of keys{larger}"


def _judge(job: Mapping[str, Any], compiled: Callable, progress: Progress) -> dict[str, Any]:
    def told(asked: Mapping[str, Any]) -> dict[str, Any]:
        name = _name(asked, job)
        progress.begin(name)
        try:
            return compiled(asked)
        except UserError as error:
            if asked is not job:
                progress.note(f"{name}: {error}")
            raise
        finally:
            progress.end(name)

    row = told(job)
    return row if row["fits"] else {**row, "would_fit": search.what_fits(job, row, told)}


def _name(asked: Mapping[str, Any], job: Mapping[str, Any]) -> str:
    """Describes a job: its topology, and its differences from the job that the user asked for."""
    before, now = flatten(job["config"]), flatten(asked["config"])
    changes = [f"{key}={value}" for key, value in now.items() if before[key] != value]
    changes += [f"--mesh {asked['mesh']}"] if asked.get("mesh") != job.get("mesh") else []
    where = asked["topology"] if asked["topology"] == job["topology"] else f"{asked['topology']} for {job['topology']}"
    return where + (f" with {' '.join(changes)}" if changes else "")


def _words(way: Mapping[str, Any], row: Mapping[str, Any]) -> str:
    changes = " and ".join(f"{key}={value}" for key, value in way["changes"].items())
    where = f"on {way['topology']}" if way["topology"] != row["topology"] else ""
    size = f"({way['peak'] / _GIB:.1f} of {way['memory_bytes'] / _GIB:.1f} GiB)"
    return " ".join(filter(None, ["with" if changes else "", changes, where, size]))


def _at_once(jobs: int) -> int:
    """Returns the number of compilations at a time: each needs two cores and `_NEEDED` bytes of memory."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(jobs, (os.cpu_count() or 1) // 2, free // _NEEDED))
