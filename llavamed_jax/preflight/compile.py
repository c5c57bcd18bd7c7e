"""Compiles a program for a machine that is not here, in a process of its own, and reads what it needs.

    python -m llavamed_jax.preflight.compile < job.json > result.json

Of its own, because libtpu, the CUDA plugin and the number of virtual CPU devices are settled once a process, because memory
that a compiler took is given back, and because what XLA warns of comes on its stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.preflight import collectives, programs
from llavamed_jax.preflight.serving import Serving
from llavamed_jax.preflight.topologies import Topology

# Without a GPU there is nobody to try which of Triton's tiles is fastest, and untried defaults do not fit every product; the
# matrix products are cuBLAS's then, which take no more memory.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# What XLA says when it makes whole copies of arrays that are spread over devices, since it knows no better way.
_WASTE = re.compile(r"involuntary full rematerialization|involuntarily replicat", re.IGNORECASE)
# How a TPU's compiler says what a program that does not fit would take, arguments and results included, as late or early it sees it.
_USED = re.compile(r"(?:Used |required for HLO temporaries \()([\d.]+)([BKMGT])(?: of |\) exceeds )")
# What it says of one that fits. It counts the gaps between temporaries once, where `memory_analysis` counts them twice.
_FOUND = re.compile(r"Total hbm usage >= .*?\n\s+reserved\s+([\d.]+)([BKMGT])\s*\n\s+program\s+([\d.]+)([BKMGT])\s*\n"
                    r"\s+arguments\s+([\d.]+)([BKMGT])\s*\n\s*Output size ([\d.]+)([BKMGT]); shares ([\d.]+)([BKMGT])")
_SIZES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def in_process(job: Mapping[str, Any]) -> dict[str, Any]:
    """Runs a job in a process of its own.

    Args:
      job: as JSON has it: `topology`, `slices`, and `config`, a recipe's values; of an evaluation also `checkpoint`, `mesh` and `dtype`.
    Returns:
      What `run` returns, with `warnings`: what XLA said of arrays that it replicates.
    Raises:
      UserError, UsageError: as `run` does.
    """
    topology = Topology.parse(job["topology"], job["slices"])
    topology.check_packages()
    flags = os.environ.get("XLA_FLAGS", "")
    if topology.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        flags += f" --xla_force_host_platform_device_count={topology.num_devices}"
    root = str(Path(__file__).resolve().parent.parent.parent)
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0", "TPU_LOG_DIR": "disabled",  # libtpu says there what a program takes
        "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
    command = [sys.executable, "-m", "llavamed_jax.preflight.compile"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, env=environment)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "Error" in line), done.stderr.strip()[-300:])
        raise UserError(f"{topology.name}: the compiler ended with status {done.returncode}: {reason[:400]}")
    result = json.loads(lines[-1])
    if "error" in result:
        raise (UsageError if result["is_usage"] else UserError)(result["error"])
    return {**result, "warnings": sorted({line.strip() for line in done.stderr.splitlines() if _WASTE.search(line)})}


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles a job's program for devices that are not here; returns a row of preflight's JSON (INTERFACE.md)."""
    topology = Topology.parse(job["topology"], job["slices"])
    devices = topology.devices()
    found = train(ConfigDict(job["config"]), topology, devices) if "checkpoint" not in job else serve(job, topology, devices)
    return {"topology": topology.name, "devices": len(devices), "device_kind": devices[0].device_kind,
            "memory_bytes": topology.memory, **found, "fits": found["bytes"]["peak"] <= topology.memory}


def train(cfg: ConfigDict, topology: Topology, devices: Sequence) -> dict[str, Any]:
    """A recipe's update, compiled."""
    config, model = programs.shapes_of(cfg.init, cfg.name)
    training = programs.Training.of(cfg, config, devices, topology.memory)
    found = compiled(training.lower(), topology)
    held = training.bytes()
    sent = collectives.read(found.text)
    return dict(
        model=model, mesh=dict(training.program.mesh.shape), attention=training.program.model.attention, rows=training.update.rows,
        row_length=training.update.row_length, micro_batches=training.micro_batches, fitting_batch_size=training.update.fitting,
        compile_seconds=found.seconds, compile_cpu_seconds=found.cpu_seconds, program_bytes=len(found.text),
        bytes={**held, "activations": max(0, found.peak - sum(held.values())), **found.bytes()},
        collectives=collectives.totals(sent), traffic_bytes=round(sum(each.count * each.bytes for each in sent)),
        least_traffic_bytes=round(training.least_traffic()), largest_array_bytes=round(max((each.array for each in sent), default=0)),
        model_flops_per_step=training.flops(), tokens_per_step=training.tokens)


def serve(job: Mapping[str, Any], topology: Topology, devices: Sequence) -> dict[str, Any]:
    """The engine's programs, compiled; the peak is that of the largest, with what lies beside its arguments."""
    config, model = programs.shapes_of(job["checkpoint"])
    generation = job["config"]["generation"]
    serving = Serving.of(config, devices, job["mesh"], job["dtype"], generation["batch_size"], generation["max_new_tokens"])
    each: dict[str, Any] = {}
    for name, lowered, beside in serving.programs():
        found = compiled(lowered, topology)
        sent = collectives.read(found.text)
        each[name] = dict(compile_seconds=found.seconds, compile_cpu_seconds=found.cpu_seconds, program_bytes=len(found.text),
                          bytes={**found.bytes(), "peak": found.peak + beside}, collectives=collectives.totals(sent),
                          traffic_bytes=round(sum(one.count * one.bytes for one in sent)))
    largest = max(each.values(), key=lambda program: program["bytes"]["peak"])
    held = serving.bytes()
    return dict(
        model=model, mesh=dict(serving.mesh.shape), attention="xla", rows=serving.rows, row_length=serving.length, micro_batches=1,
        fitting_batch_size=None, programs=each, collectives=each["prefill"]["collectives"],
        traffic_bytes=each["prefill"]["traffic_bytes"], least_traffic_bytes=None,
        compile_seconds=sum(one["compile_seconds"] for one in each.values()),
        compile_cpu_seconds=sum(one["compile_cpu_seconds"] for one in each.values()),
        bytes={**held, "activations": max(0, largest["bytes"]["peak"] - sum(held.values())), **largest["bytes"]},
        model_flops_per_step=serving.flops(), tokens_per_step=serving.batch * serving.prompt)


@dataclass(frozen=True)
class Compiled:
    """What compiling a program found.

    Attributes:
      seconds, cpu_seconds: that it took, by the clock and of all cores together.
      peak: bytes of a device, arguments and results included. arguments, temporaries: parts of it, None where the compiler gave up.
      text: the program, empty where the compiler gave up.
    """

    seconds: float
    cpu_seconds: float
    peak: int
    arguments: int | None
    temporaries: int | None
    text: str

    def bytes(self) -> dict[str, int | None]:
        return dict(arguments=self.arguments, temporaries=self.temporaries, peak=self.peak)


def compiled(lowered, topology: Topology) -> Compiled:
    """Compiles. A compiler for TPUs gives up on what does not fit, and says how much it would have been."""
    start, cpu_start = time.monotonic(), time.process_time()
    try:
        with _stderr_read() as said:
            program = lowered.compile(compiler_options=_GPU_OPTIONS if topology.platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        peak = int(float(used[1]) * _SIZES[used[2]])
        return Compiled(time.monotonic() - start, time.process_time() - cpu_start, peak, None, None, "")
    memory = program.memory_analysis()
    beside = (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
              + memory.generated_code_size_in_bytes)
    peak = beside + memory.temp_size_in_bytes
    if topology.platform == "tpu":
        peak = tpu_peak("".join(said)) or peak
    return Compiled(time.monotonic() - start, time.process_time() - cpu_start, peak, memory.argument_size_in_bytes,
                    max(0, peak - beside), program.as_text())


def tpu_peak(log: str) -> int | None:
    """Bytes of a program, its arguments and its results in what libtpu logs of it; None where the log has no such account."""
    found = _FOUND.search(log)
    if found is None:
        return None
    said = found.groups()
    _, program, arguments, results, shared = (float(number) * _SIZES[unit] for number, unit in zip(said[::2], said[1::2], strict=True))
    return int(program + arguments + results - shared)


@contextlib.contextmanager
def _stderr_read() -> Iterator[list[str]]:
    """What is written to the process's stderr within, C++ included, is in the list afterwards, and on stderr too."""
    said: list[str] = []
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        stderr = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield said
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            file.seek(0)
            said.append(file.read().decode(errors="replace"))
            os.write(2, said[0].encode())


def main() -> None:
    """The process: a job on stdin, its result as one line of JSON on stdout."""
    out, sys.stdout = sys.stdout, sys.stderr  # what libraries print is not the result
    try:
        result = run(json.load(sys.stdin))
    except UserError as error:
        result = dict(error=str(error), is_usage=isinstance(error, UsageError))
    print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
