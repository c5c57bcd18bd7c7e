"""Kills a training run at moments uniform in time, and shows that nothing was lost and nothing is left.

    python benchmarks/kill.py [--kills 20] [--seed 0]

A tiny model is trained on the sample in packed rows, with two worker processes and a save every five steps. One run is left
alone. Each other one is ended by SIGKILL, at a moment anywhere between its start and its end (imports, data, compilation, the
first step and saves included), and started again. It has to go on to the same losses, gradients and counts at every step, and
to the same parameters, bit for bit; and of the killed one no process and no segment of shared memory may be left.
The last line is how many did so, such as 20/20; exit status 1 if not all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
SAMPLE, SHM = ROOT / "samples" / "vqa_rad", Path("/dev/shm")
UPDATES, SAVE_EVERY, WORKERS = 200, 5, 2
MARK = "LLAVAMED_KILLED_RUN"  # in the environment of a run and of every process that it starts
GRACE_S = 20.0  # after which a process or a segment counts as left behind
MEASURED = ("tokens_per_second", "memory_peak_bytes", "mfu")  # all else in metrics.jsonl follows from the run


def write_start(path: Path) -> None:
    """A tiny checkpoint with the sample's tokenizer."""
    from llavamed_jax.checkpoints.load import random_checkpoint
    from llavamed_jax.checkpoints.store import write_model
    from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
    from llavamed_jax.data.tokenizer import Tokenizer
    vocabulary = Tokenizer.load(SAMPLE / "tokenizer.model").vocab_size
    cfg = LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8),
                      DecoderConfig(vocabulary, 16, 24, 1, 2, 1, 8, 1e-5, 1e4, 128, architecture="mistral"),
                      max_length=64, template="v1.5:mistral_instruct")
    write_model(path, random_checkpoint(cfg), files={"tokenizer.model": SAMPLE / "tokenizer.model"})


def command(start: Path, workdir: Path) -> list[str]:
    keys = {"init": start, "total_steps": UPDATES, "batch_size": 8, "max_length": 64, "log_every": 1, "data.workers": WORKERS,
            "data.packing": True, "data.row_length": 128, "checkpoint.every_steps": SAVE_EVERY, "checkpoint.keep": 2}
    return [sys.executable, "train.py", "--config", "configs/demo.py:vqa", "--workdir", str(workdir),
            *(f"--config.{key}={value}" for key, value in keys.items())]


class Run:
    """One process of `train.py`, and the mark by which what it leaves behind is found."""

    def __init__(self, words: list[str], log: Path, cache: Path | None):
        self.mark, self.log = uuid.uuid4().hex, log
        environment = {**os.environ, MARK: self.mark, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        if cache is not None:
            environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        self.segments = segments()
        self.started = time.monotonic()
        with open(log, "a", encoding="utf-8") as out:
            self.process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=out, stderr=out)

    def finish(self) -> float:
        """Waits for the end; returns the seconds from the start."""
        if self.process.wait() != 0:
            said = self.log.read_text(encoding="utf-8", errors="replace")
            raise SystemExit(f"error: a run ended with {self.process.returncode}:\n{said[-2000:]}")
        return time.monotonic() - self.started

    def kill_at(self, moment: float) -> bool:
        """Whether it was still running when the moment came."""
        try:
            self.process.wait(max(0.0, self.started + moment - time.monotonic()))
            return False
        except subprocess.TimeoutExpired:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
            return True

    def leftovers(self) -> list[str]:
        """Processes and segments of this run that are still there after a while."""
        deadline = time.monotonic() + GRACE_S
        while (found := self._alive() + self._segments()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return found

    def _alive(self) -> list[str]:
        found = []
        for folder in Path("/proc").iterdir():
            try:
                is_ours = folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes()
                if is_ours:
                    found.append(f"process {folder.name}: {(folder / 'cmdline').read_bytes().decode().replace(chr(0), ' ')[:80]}")
            except OSError:
                continue  # ended, or somebody else's
        return found

    def _segments(self) -> list[str]:
        """New since this run began, and mapped by no living process: those of other programs are in use or were there."""
        new = segments() - self.segments
        mapped = set()
        for folder in Path("/proc").iterdir() if new else ():
            try:
                maps = (folder / "maps").read_text(encoding="utf-8", errors="replace") if folder.name.isdigit() else ""
            except OSError:
                continue
            mapped |= {name for name in new if f"{SHM}/{name}" in maps}
        return [f"segment {name}" for name in sorted(new - mapped)]


def segments() -> set[str]:
    return {path.name for path in SHM.iterdir()} if SHM.is_dir() else set()


def history(workdir: Path) -> list[dict]:
    """What `metrics.jsonl` says of each step, without what depends on the clock."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


def parameters(workdir: Path) -> dict[str, np.ndarray]:
    from llavamed_jax.checkpoints.reader import open_checkpoint
    checkpoint = open_checkpoint(workdir)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def reached(workdir: Path) -> str:
    """How far a killed run had come, in words."""
    log, checkpoints = workdir / "metrics.jsonl", workdir / "checkpoints"
    if not log.exists():
        return "before the first step" if (workdir / "recipe.json").exists() else "before its recipe was written"
    names = [path.name for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    saving = [name for name in names if name[0] != "." and not (checkpoints / name / "manifest.json").exists()]
    lines = log.read_text(encoding="utf-8", errors="replace").count("\n")
    return f"{lines} steps logged" + (f", saving {saving[0].split('.')[0]}" if saving else "") if lines else "compiling the first step"


def difference(workdir: Path, wanted: list[dict], tensors: dict[str, np.ndarray]) -> str | None:
    found = history(workdir)
    if found != wanted:
        step = next((b["step"] for a, b in zip(found, wanted) if a != b), "the number of lines")
        return f"metrics.jsonl differs at step {step}"
    ours = parameters(workdir)
    changed = [name for name, tensor in tensors.items() if not np.array_equal(ours[name], tensor)]
    return f"{changed[0]} differs" if changed else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    good, begun = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        base, draw = Path(folder), random.Random(args.seed)
        cache = base / "cache"
        write_start(base / "start")
        alone = base / "alone"
        Run(command(base / "start", alone), base / "log", cache).finish()  # fills the cache of those that go on
        wanted, tensors = history(alone), parameters(alone)
        length = Run(command(base / "start", base / "timed"), base / "log", None).finish()
        print(f"{UPDATES} updates, a save every {SAVE_EVERY}, {WORKERS} workers, packed rows; a run takes {length:.1f} s", flush=True)
        for number in range(args.kills):
            workdir, share = base / str(number), (number + draw.random()) / args.kills  # one kill in each stretch of the time
            words = command(base / "start", workdir)
            while not (killed := Run(words, base / "log", None)).kill_at(share * length):
                length *= 0.9  # the machine is faster now: this run was done before its moment came
                subprocess.run(["rm", "-rf", str(workdir)], check=True)
            state = reached(workdir)
            wrong = killed.leftovers()
            again = Run(words, base / "log", cache)
            again.finish()
            wrong += again.leftovers()
            wrong += [found] if (found := difference(workdir, wanted, tensors)) else []
            good += not wrong
            print(f"kill {number + 1} at {share * length:.1f} s: {state}; {'; '.join(wrong) or 'the same run, nothing left'}", flush=True)
    print(f"took {(time.monotonic() - begun) / 60:.1f} minutes\n{good}/{args.kills}")
    return 0 if good == args.kills else 1


if __name__ == "__main__":
    sys.exit(main())
