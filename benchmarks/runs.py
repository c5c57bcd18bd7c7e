"""Small runs of `train.py`, `eval.py` and `convert` as processes that can be ended, and what an ended one leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from llavamed_jax.utils.buckets import Bucket
from llavamed_jax.utils.child_processes import SEGMENT
from llavamed_jax.utils.paths import is_bucket

ROOT = Path(__file__).resolve().parent.parent
SAMPLE, SHM = ROOT / "samples" / "vqa_rad", Path("/dev/shm")
MARK = "LLAVAMED_ENDED_RUN"  # in the environment of a run and of every process that it starts
GRACE_S = 20.0  # after which a process or a segment counts as left behind
MEASURED = ("tokens_per_second", "memory_peak_bytes", "mfu")  # all else in metrics.jsonl follows from the run


def write_start(path: Path, vision=(16, 32, 2, 2, 16, 8), decoder=(16, 24, 1, 2, 1, 8)) -> Path:
    """A tiny checkpoint with the sample's tokenizer; `vision` and `decoder` are the first fields of their configs, V apart."""
    from llavamed_jax.checkpoints.random import random_checkpoint
    from llavamed_jax.checkpoints.tree.model import write_model
    from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
    from llavamed_jax.text.tokenizer import Tokenizer
    vocabulary = Tokenizer.load(SAMPLE / "tokenizer.model").vocab_size
    cfg = LlavaConfig(VisionConfig(*vision), DecoderConfig(vocabulary, *decoder, 1e-5, 1e4, 128, architecture="mistral"),
                      max_length=64, template="v1.5:mistral_instruct")
    write_model(path, random_checkpoint(cfg), files={"tokenizer.model": SAMPLE / "tokenizer.model"})
    return path


def train(start: Path, workdir: Path, updates: int, save_every: int, workers: int) -> list[str]:
    """Words of a training run in packed rows on the sample."""
    keys = {"init": start, "total_steps": updates, "batch_size": 8, "max_length": 64, "log_every": 1, "data.workers": workers,
            "data.packing": True, "data.row_length": 128, "checkpoint.every_steps": save_every, "checkpoint.keep": 2}
    return ["train.py", "--config", "configs/demo.py:vqa", "--workdir", str(workdir),
            *(f"--config.{key}={value}" for key, value in keys.items())]


def evaluate(start: Path, workdir: Path) -> list[str]:
    """Words of an evaluation on the sample, with its control."""
    return ["eval.py", "--config", "configs/eval/vqa_rad.py:demo", "--config.generation.max_new_tokens=8", "--checkpoint", str(start),
            "--workdir", str(workdir), "--control", "image"]


class Run:
    """One process of a command, and the mark by which what it leaves behind is found.

    Args:
      words: of the command, behind the name of the interpreter.
      log: gets stdout and stderr, behind what is there.
      cache: of compiled programs; None: nothing is kept.
    """

    def __init__(self, words: list[str], log: Path, cache: Path | None):
        self.mark, self.log = uuid.uuid4().hex, log
        environment = {**os.environ, MARK: self.mark, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_ENABLE_COMPILATION_CACHE": "0"}
        if cache is not None:
            environment |= {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_COMPILATION_CACHE_DIR": str(cache),
                            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.segments = segments()
        self.started = time.monotonic()
        with open(log, "a", encoding="utf-8") as out:
            self.process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=out, stderr=out,
                                            start_new_session=True)

    def finish(self) -> float:
        """Waits for the end; returns the seconds from the start."""
        if self.process.wait() != 0:
            said = self.log.read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"error: a run ended with {self.process.returncode}:\n{said[-2000:]}")
        return time.monotonic() - self.started

    def wait_until(self, moment: float) -> bool:
        """Whether it is still running when the moment, seconds after its start, has come."""
        try:
            self.process.wait(max(0.0, self.started + moment - time.monotonic()))
            return False
        except subprocess.TimeoutExpired:
            return True

    def kill_at(self, moment: float) -> bool:
        """Whether it was still running when the moment came, and is now killed."""
        if is_running := self.wait_until(moment):
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        return is_running

    def treat(self, how: str, since: float, moment: float, draw: random.Random) -> int:
        """Lets the worker processes do without the processor from one moment on, both in seconds after the start; the process itself, where
        it has none. Returns how many they were when it ended.

        Args:
          how: `stopped` (SIGSTOP), `killed` (one of them, SIGKILL), `starved` (stopped and let go on, many times a second), `untouched`.
        """
        count = 0
        if how == "untouched" or not self.wait_until(since):
            return count
        while True:
            workers = self.workers()
            count = len(workers)
            if how == "killed":
                _send(signal.SIGKILL, [draw.choice(workers)] if workers else [])
                return count
            _send(signal.SIGSTOP, workers or [self.process.pid])
            if not self.wait_until(min(moment, time.monotonic() - self.started + draw.uniform(0.02, 0.2))) or how == "stopped":
                return count
            if time.monotonic() - self.started >= moment:
                return count
            _send(signal.SIGCONT, workers or [self.process.pid])
            self.wait_until(min(moment, time.monotonic() - self.started + draw.uniform(0.005, 0.05)))

    def workers(self) -> list[int]:
        """Process ids of what it has started, without Python's resource tracker."""
        return [pid for pid, command in self._processes() if pid != self.process.pid and "resource_tracker" not in command]

    def leftovers(self) -> list[str]:
        """Processes and segments of this run that are still there after a while."""
        deadline = time.monotonic() + GRACE_S
        while (found := self._alive() + self._segments()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _alive(self) -> list[str]:
        return [f"process {pid}: {command[:80]}" for pid, command in self._processes()]

    def _processes(self) -> list[tuple[int, str]]:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found.append((int(folder.name), (folder / "cmdline").read_bytes().decode().replace(chr(0), " ")))
            except OSError:
                continue  # ended, or somebody else's
        return found

    def _segments(self) -> list[str]:
        """New since this run began, and neither mapped by a living process nor on the way between those of another run."""
        new = {name for name in segments() - self.segments if not _is_anothers(name)}
        mapped = set()
        for folder in Path("/proc").iterdir() if new else ():
            try:
                maps = (folder / "maps").read_text(encoding="utf-8", errors="replace") if folder.name.isdigit() else ""
            except OSError:
                continue
            mapped |= {name for name in new if f"{SHM}/{name}" in maps}
        return [f"segment {name}" for name in sorted(new - mapped)]


def _send(number: int, pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_anothers(segment: str) -> bool:
    """Whether the process is alive whose worker made a segment; one of the run itself counts as left behind anyway."""
    number = segment.removeprefix(SEGMENT).partition("_")[0]
    return segment.startswith(SEGMENT) and number.isdigit() and Path(f"/proc/{number}").exists()


def segments() -> set[str]:
    return {path.name for path in SHM.iterdir()} if SHM.is_dir() else set()


def history(workdir: Path | str) -> list[dict]:
    """What `metrics.jsonl` says of each step, without what depends on the clock; also of a workdir in a bucket."""
    read = Bucket(workdir).read if is_bucket(workdir) else lambda name: (workdir / name).read_bytes()
    lines = map(json.loads, read("metrics.jsonl").decode().splitlines())
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def parameters(workdir: Path | str) -> dict[str, np.ndarray]:
    from llavamed_jax.checkpoints.open import open_checkpoint
    checkpoint = open_checkpoint(workdir)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def difference(workdir: Path | str, wanted: list[dict], tensors: dict[str, np.ndarray]) -> str | None:
    """How a training run differs from another one's `history` and `parameters`; None where it does not."""
    found = history(workdir)
    if found != wanted:
        step = next((b["step"] for a, b in zip(found, wanted) if a != b), "the number of lines")
        return f"metrics.jsonl differs at step {step}"
    ours = parameters(workdir)
    changed = [name for name, tensor in tensors.items() if not np.array_equal(ours[name], tensor)]
    return f"{changed[0]} differs" if changed else None


PREDICTED = ("predictions.jsonl", "predictions_control_image.jsonl", "predictions_control_noise.jsonl", "metrics.json")


def predictions(workdir: Path) -> dict[str, bytes]:
    """The files of an evaluation that follow from what was asked alone."""
    return {name: (workdir / name).read_bytes() for name in PREDICTED}


def hidden(folder: Path) -> list[str]:
    """What looks half-written under a folder: temporary names of files, of directories, and pictures of noise."""
    def is_temporary(name: str) -> bool:
        return name.endswith(".tmp") or name.startswith("noise.") or name[0] == "." and name.endswith(".partial")

    return [path.relative_to(folder).as_posix() for path in folder.rglob("*") if is_temporary(path.name)]
