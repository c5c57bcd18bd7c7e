"""Compiles a program for a machine that is not here, in a separate process, and reads the memory it needs.

Example:
    python -m llavamed_jax.preflight.compile < job.json > result.json

The process is separate because libtpu, the CUDA plugin and the number of virtual CPU devices are fixed for a process,
because the compiler's memory is freed at its end, and because XLA's warnings go to its stderr.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError, UserError, cut
from llavamed_jax.preflight import collectives, fp8_matmuls, programs
from llavamed_jax.preflight.floor import floor_of, one_round
from llavamed_jax.preflight.peaks import near, peaks_of
from llavamed_jax.preflight.serving import Serving
from llavamed_jax.preflight.topologies import Topology
from llavamed_jax.training import settings
from llavamed_jax.training.throughput import peak_flops

# Beside the program's own flags (`parallel.xla`). Without a GPU, XLA cannot autotune Triton's tiles, and the default
# tiles do not fit every matrix product. So matrix products use cuBLAS here, which takes no more memory.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False}
# XLA's warnings that it replicates a sharded array because it finds no better way.
_WASTE = re.compile(r"involuntary full rematerialization|involuntarily replicat", re.IGNORECASE)
# libtpu's error about a program that does not fit: bytes of the program with its arguments and results. The wording
# depends on the stage that finds it.
_USED = re.compile(r"(?:Used |required for HLO temporaries \()([\d.]+)([BKMGT])(?: of |\) exceeds )")
# libtpu's log of a program that fits. It counts the gaps between temporaries once; `memory_analysis` counts them twice.
_FOUND = re.compile(r"Total hbm usage >= .*?\n\s+reserved\s+([\d.]+)([BKMGT])\s*\n\s+program\s+([\d.]+)([BKMGT])\s*\n"
                    r"\s+arguments\s+([\d.]+)([BKMGT])\s*\n\s*Output size ([\d.]+)([BKMGT]); shares ([\d.]+)([BKMGT])")
# The beginning of a fatal error of C++, which ends the process.
_FATAL = re.compile(r"F\d{4} [\d:.]+ +\d+ [\w./]+:\d+\] ")
# Variables of the user's environment that a compilation must not see: they choose devices, keep compiled programs (then
# the compiler does not repeat its warnings), or silence warnings.
_NOT_TAKEN = ("JAX_NUM_CPU_DEVICES", "JAX_COMPILATION_CACHE_DIR", "TF_CPP_MIN_LOG_LEVEL", "JAX_LOGGING_LEVEL")
_SIZES = {"B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Compiler:
    """Compiles jobs, each in a separate process that ends when this process ends, even by a signal. Thread-safe."""

    def __init__(self):
        self._lock, self._is_stopped = threading.Lock(), False
        self._running: set[subprocess.Popen] = set()

    def __call__(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Runs a job.

        Args:
          job: values of JSON types: `topology`, `slices`, and `config`, the values of a recipe; for an evaluation also
            `checkpoint`, `vision_tower`, `mesh` and `dtype`.

        Returns:
          The result of `run`, with `warnings`: XLA's warnings about replicated arrays.

        Raises:
          UserError, UsageError: `run` raised it, or the compiler ended without a result.
        """
        topology = Topology.parse(job["topology"], job["slices"])
        topology.check_packages()
        status, out, words = self._run(json.dumps(job), _environment(topology))
        if status or not out:
            raise UserError(_ended(status, words))
        result = json.loads(out.splitlines()[-1])
        if "error" in result:
            raise (UsageError if result["is_usage"] else UserError)(result["error"])
        return {**result, "warnings": sorted({line.strip() for line in words.splitlines() if _WASTE.search(line)})}

    def stop(self) -> None:
        """Kills all running compilations; later calls raise UserError."""
        with self._lock:
            self._is_stopped = True
            for process in self._running:
                _kill(process.pid)

    def _run(self, job: str, environment: Mapping[str, str]) -> tuple[int, str, str]:
        """Runs a job in a process, and returns its exit status, stdout and stderr.

        The process leads its own process group, so that Ctrl-C on a terminal reaches only the parent.
        """
        theirs, ours = _pipe()
        stderr = tempfile.TemporaryFile()  # a file, so that the process can read its own compiler's output
        try:
            with self._lock:
                if self._is_stopped:
                    raise UserError("the compilation was stopped before it began")
                # -P: the user's current folder may contain a jax.py.
                process = subprocess.Popen(
                    [sys.executable, "-P", "-X", "utf8", "-m", "llavamed_jax.preflight.compile", str(theirs)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, encoding="utf-8", errors="replace",
                    env=environment, pass_fds=[theirs], start_new_session=True)
                self._running.add(process)
            try:
                out, _ = process.communicate(job)
            finally:
                with self._lock:
                    self._running.remove(process)
                if process.poll() is None:
                    _kill(process.pid)
                    process.wait()
            stderr.seek(0)
            return process.returncode, out, stderr.read().decode(errors="replace")
        finally:
            stderr.close()
            os.close(theirs)
            os.close(ours)


def _pipe() -> list[int]:
    """Opens a pipe with descriptors above 2.

    If this process was started without stdin, a new pipe would get the numbers that the child uses for its streams.
    """
    ends = os.pipe()
    high = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 3) for end in ends]
    for end in ends:
        os.close(end)
    return high


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # the process has just ended
        os.killpg(group, signal.SIGKILL)


def _environment(topology: Topology) -> dict[str, str]:
    """Returns the environment of a compilation: the user's, without variables that choose devices or hide warnings."""
    flags = os.environ.get("XLA_FLAGS", "")
    if topology.platform == "cpu":
        flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", flags)
        flags += f" --xla_force_host_platform_device_count={topology.num_devices}"
    root = str(Path(__file__).resolve().parent.parent.parent)
    kept = {name: value for name, value in os.environ.items() if name not in _NOT_TAKEN}
    return {**kept, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip(), "TPU_SKIP_MDS_QUERY": "1",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            # libtpu logs the memory of a program; these three make it log to stderr.
            "TPU_MIN_LOG_LEVEL": "0", "TPU_STDERR_LOG_LEVEL": "0", "TPU_LOG_DIR": "disabled",
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}


def _ended(status: int, words: str) -> str:
    """Returns the error about a compiler that ended without a result, from its exit status and its stderr."""
    if status == -signal.SIGKILL:
        return "the compiler was killed by SIGKILL, which the system sends when memory runs out"
    lines = [line.strip() for line in words.splitlines() if line.strip()]
    # The stack trace of C++ follows the error message; that of Python precedes it.
    reason = (next((line for line in lines if _FATAL.match(line)), None)
              or next((line for line in reversed(lines) if "Error" in line), ""))
    reason = cut(_FATAL.sub("", reason or " ".join(lines[-3:])), 400)
    how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"the compiler {how}{f': {reason}' if reason else ''}"


def check_model(job: Mapping[str, Any]) -> None:
    """Raises UserError or UsageError if the model's config cannot be read. Needs no separate process."""
    config = job["config"]
    if "checkpoint" in job:
        programs.shapes_of(job["checkpoint"], vision_tower=job["vision_tower"], adapter=job.get("adapter"))
        programs.few_bits_of(job["checkpoint"], job.get("quantize"), job["vision_tower"], job.get("adapter"))
    else:
        programs.shapes_of(config["init"], config["name"], config["vision_tower"], tokenizer=config.get("tokenizer"))


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles a job's program for devices that are not here; returns a row of preflight's JSON (docs/interface.md)."""
    topology = Topology.parse(job["topology"], job["slices"])
    if "checkpoint" in job:  # each process of an evaluation has its own copy of the model on its devices
        devices = topology.host().devices()
        found = serve(job, topology, devices)
    else:
        devices = topology.devices()
        found = train(ConfigDict(job["config"]), topology, devices, job.get("peak"))
    return {"topology": topology.name, "devices": topology.num_devices, "device_kind": devices[0].device_kind,
            "memory_bytes": topology.memory, **found, "fits": found["bytes"]["peak"] <= topology.memory}


def train(cfg: ConfigDict, topology: Topology, devices: Sequence, peak: str | None = None) -> dict[str, Any]:
    """Compiles the update of a recipe; returns its part of a row of preflight's JSON. `peak` is that of the flag."""
    config, model = programs.shapes_of(cfg.init, cfg.name, cfg.vision_tower, tokenizer=cfg.get("tokenizer"))
    training = programs.Training.of(cfg, config, devices, topology.memory)
    tried: dict[settings.Settings, Compiled] = {}

    def peak_of(chosen: settings.Settings) -> int:
        tried[chosen] = compiled(training.having(chosen).lower(), topology)
        return tried[chosen].peak

    chosen = settings.first_that_fits(training.candidates(cfg), peak_of, topology.memory)
    training = training.having(chosen)
    found = tried[chosen] if chosen in tried else compiled(training.lower(), topology)
    held = training.bytes()
    sent = collectives.read(found.text)
    peaks = peaks_of(topology, peak)
    floor = peaks and floor_of(found.text, peaks, near(topology), training.loss_rounds, (training.mean_length + 1) / 2)
    return dict(
        model=model, mesh=dict(training.program.mesh.shape), attention=training.program.model.attention,
        remat=chosen.remat,
        rows=training.update.rows, row_length=training.update.row_length, micro_batches=training.micro_batches,
        fitting_batch_size=None if training.update.is_close else round(training.update.samples),
        samples_per_step=training.update.samples, mean_length=training.mean_length,
        mean_images=training.mean_images, longest_sample=training.longest_sample(cfg),
        compile_seconds=found.seconds, compile_cpu_seconds=found.cpu_seconds, program_bytes=len(found.text),
        bytes={**held, "activations": max(0, found.peak - sum(held.values())), **found.bytes()},
        collectives=collectives.totals(sent), traffic_bytes=round(sum(each.count * each.bytes for each in sent)),
        least_traffic_bytes=round(training.least_traffic()),
        largest_array_bytes=round(max((each.array for each in sent), default=0)),
        fp8_matmuls=fp8_matmuls.of(training, found.text) if topology.platform == "gpu" else None,
        model_flops_per_step=training.flops(), tokens_per_step=training.tokens, loss_rounds=training.loss_rounds,
        floor=floor and floor.to_json(peaks, training.flops() / training.program.mesh.size,
                                      peak_flops(devices[0].device_kind)))


def serve(job: Mapping[str, Any], topology: Topology, devices: Sequence) -> dict[str, Any]:
    """Compiles the programs of the engine; returns their part of a row of preflight's JSON.

    The peak is that of the largest program, including data on the device that are not its arguments.
    """
    config, model = programs.shapes_of(job["checkpoint"], vision_tower=job["vision_tower"], adapter=job.get("adapter"))
    generation = job["config"]["generation"]
    dtype = job["dtype"] or ("float32" if topology.platform == "cpu" else "bfloat16")  # as `load` chooses it
    few_bits = programs.few_bits_of(job["checkpoint"], job.get("quantize"), job["vision_tower"], job.get("adapter"))
    serving = Serving.of(config, devices, job["mesh"], dtype, generation["batch_size"], generation["max_new_tokens"],
                         few_bits, job.get("kv_cache"))
    each: dict[str, Any] = {}
    peaks, model_flops = peaks_of(topology, job.get("peak")), serving.prefill_flops() / serving.mesh.size
    for name, lowered, beside in serving.programs():
        found = compiled(lowered, topology)
        sent = collectives.read(found.text)
        # A token of all rows is one round of the decode loop.
        of = one_round if name == "decode" else floor_of
        floor = peaks and of(found.text, peaks, near(topology), 1, serving.attended(name))
        each[name] = dict(compile_seconds=found.seconds, compile_cpu_seconds=found.cpu_seconds,
                          program_bytes=len(found.text),
                          bytes={**found.bytes(), "peak": found.peak + beside}, collectives=collectives.totals(sent),
                          traffic_bytes=round(sum(one.count * one.bytes for one in sent)),
                          floor=floor and floor.to_json(peaks, model_flops if name == "prefill" else None,
                                                        peak_flops(devices[0].device_kind)))
    largest = max(each.values(), key=lambda program: program["bytes"]["peak"])
    held = serving.bytes()
    return dict(
        model=model, mesh=dict(serving.mesh.shape), attention=serving.attention, rows=serving.rows,
        row_length=serving.length, micro_batches=1, fitting_batch_size=None, programs=each,
        collectives=each["prefill"]["collectives"], traffic_bytes=each["prefill"]["traffic_bytes"],
        least_traffic_bytes=None, compile_seconds=sum(one["compile_seconds"] for one in each.values()),
        compile_cpu_seconds=sum(one["compile_cpu_seconds"] for one in each.values()),
        bytes={**held, "activations": max(0, largest["bytes"]["peak"] - sum(held.values())), **largest["bytes"]},
        model_flops_per_step=serving.flops(), tokens_per_step=serving.batch * serving.prompt)


@dataclass(frozen=True)
class Compiled:
    """The result of compiling a program.

    Attributes:
      seconds: wall time of the compilation.
      cpu_seconds: CPU time of the compilation, summed over cores.
      peak: bytes on a device, including arguments and results.
      arguments: bytes of the arguments; None if the compiler gave up.
      temporaries: bytes of temporary arrays; None if the compiler gave up.
      text: the program; empty if the compiler gave up.
    """

    seconds: float
    cpu_seconds: float
    peak: int
    arguments: int | None
    temporaries: int | None
    text: str

    def bytes(self) -> dict[str, int | None]:
        """Returns the numbers of bytes by name."""
        return dict(arguments=self.arguments, temporaries=self.temporaries, peak=self.peak)


def compiled(lowered, topology: Topology) -> Compiled:
    """Compiles a lowered program. The TPU compiler gives up on a program that does not fit, but states its size.

    Args:
      lowered: the program.
      topology: the machine that it was lowered for.
    """
    start, cpu_start, written = time.monotonic(), time.process_time(), _written()
    try:
        program = lowered.compile(compiler_options=_GPU_OPTIONS if topology.platform == "gpu" else None)
    except jax.errors.JaxRuntimeError as error:
        used = _USED.search(str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
            raise
        peak = int(float(used[1]) * _SIZES[used[2]])
        return Compiled(time.monotonic() - start, time.process_time() - cpu_start, peak, None, None, "")
    memory = program.memory_analysis()
    peak = settings.peak_bytes(memory)
    beside = peak - memory.temp_size_in_bytes
    if topology.platform == "tpu":
        peak = tpu_peak(_said_since(written)) or peak
    return Compiled(time.monotonic() - start, time.process_time() - cpu_start, peak, memory.argument_size_in_bytes,
                    max(0, peak - beside), program.as_text())


def tpu_peak(log: str) -> int | None:
    """Reads the bytes of a program with its arguments and results from libtpu's log; None if they are not stated."""
    found = _FOUND.search(log)
    if found is None:
        return None
    said = found.groups()
    _, program, arguments, results, shared = (float(number) * _SIZES[unit]
                                              for number, unit in zip(said[::2], said[1::2], strict=True))
    return int(program + arguments + results - shared)


def _written() -> int | None:
    """Returns the number of bytes on this process's stderr, including those of C++; None if stderr is not a file."""
    sys.stderr.flush()
    try:
        return os.lseek(2, 0, os.SEEK_CUR)
    except OSError:
        return None


def _said_since(begin: int | None) -> str:
    """Returns the text on stderr after its first `begin` bytes; "" if it cannot be read."""
    end = _written()
    if begin is None or end is None:
        return ""
    try:
        return os.pread(2, end - begin, begin).decode(errors="replace")
    except OSError:  # a file that is open only for writing
        return ""


def _end_with_parent(alive: int) -> None:
    os.read(alive, 1)  # returns when the other end is closed
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Runs the process: reads a job from stdin and writes its result as one line of JSON to stdout.

    The optional argument is the descriptor of a pipe. The process exits when the parent closes its end of the pipe.
    """
    if len(sys.argv) > 1:
        threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    out, sys.stdout = sys.stdout, sys.stderr  # output of libraries must not mix with the result
    try:
        result = run(json.load(sys.stdin))
    except UserError as error:
        result = dict(error=str(error), is_usage=isinstance(error, UsageError))
    print(json.dumps(result), file=out, flush=True)


if __name__ == "__main__":
    main()
