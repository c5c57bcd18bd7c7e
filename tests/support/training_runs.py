"""Tiny runs on the sample, for whoever tests the trainer: a start, data, a shrunk recipe, and steps that compute nothing."""

import functools
import json
import shutil
import tempfile
import threading
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from benchmarks import runs
from llavamed_jax.cli.common import load_config

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"

write_start = runs.write_start  # a tiny checkpoint with the sample's tokenizer


def write_data(folder: Path) -> Path:
    """Twelve records of the sample, and five others to validate on."""
    records = json.loads((SAMPLE / "vqa_train.json").read_text())
    (folder / "train.json").write_text(json.dumps(records[:12]))
    (folder / "validation.json").write_text(json.dumps(records[20:25]))
    return folder


@functools.cache
def _thumbnails() -> tempfile.TemporaryDirectory:
    folder = tempfile.TemporaryDirectory(prefix="llavamed-images-")
    for path in sorted((SAMPLE / "images").iterdir()):
        with Image.open(path) as image:
            image.thumbnail((48, 48))
            image.save(Path(folder.name) / path.name)
    return folder


def images() -> Path:
    """The sample's images at 48 pixels: to decode and shrink the large ones would take most of a run that computes nothing."""
    return Path(_thumbnails().name)


def shrunk(start: Path, data: Path, **changes):
    """The demo's recipe on a tiny model and little data."""
    keys = {"init": start, "data.train": data / "train.json", "data.images": images(), "batch_size": 4,
            "total_steps": 8, "max_length": 40, "log_every": 1, "checkpoint.every_steps": 3, "checkpoint.keep": 9,
            # So little data seldom fills rows to a tenth of the batch.
            **({"batch_size_may_grow": True} if changes.get("data.packing") else {}), **changes}
    return load_config(f"{ROOT}/configs/demo.py:vqa", [f"{key}={value}" for key, value in keys.items()])


def log_lines(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def set_back(run: Path, target: Path, last: int, to: int) -> Path:
    """Copies a run as it was when it had saved step `to`: without step `last`, which it saved next, and its log."""
    shutil.copytree(run, target)
    shutil.rmtree(target / "checkpoints" / str(last))
    lines = (target / "metrics.jsonl").read_text().splitlines(True)
    (target / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] <= to))
    return target


@functools.cache
def _scalar(value: float) -> jax.Array:
    return jax.device_put(np.float32(value))


class FakeStep:
    """In place of `make_train_step`: the state stays as it is, and `state` is the last one; `skipped(step)` says which updates were
    not finite."""

    def __init__(self, skipped=lambda step: False):
        self.step, self.skipped, self.batches, self.state = 0, skipped, [], None

    def __call__(self, *_):  # what `make_train_step` is called with
        return self.update

    def update(self, state, batch):
        self.step += 1
        self.state = state
        self.batches.append(batch)
        return state, self.metrics(bool(self.skipped(self.step)))

    def metrics(self, is_skipped):
        values = dict(loss=1.0, tokens=4.0, grad_norm=1.0, learning_rate=1e-3, moved=1.0, skipped=float(is_skipped))
        return {name: _scalar(value) for name, value in values.items()}


class SlowStep(FakeStep):
    """An update is done when the next one has been dispatched, and not before: who waits for it earlier waits for ever."""

    def __init__(self, total_steps):
        super().__init__()
        self.total_steps, self.events = total_steps, []
        self.done = [threading.Event() for _ in range(total_steps + 1)]

    def metrics(self, is_skipped):
        self.events.append(f"dispatch {self.step}")
        self.done[self.step - 1].set()
        if self.step == self.total_steps:
            self.done[self.step].set()
        return {name: Pending(self, self.step, name, value) for name, value in super().metrics(is_skipped).items()}


class Pending:
    """A scalar that is not there yet, to `jax.device_get` an array."""

    def __init__(self, slow, step, name, value):
        self.slow, self.step, self.name, self.value = slow, step, name, value

    def is_ready(self):
        return self.slow.done[self.step].is_set()

    def __array__(self, *_, **__):
        assert self.slow.done[self.step].wait(timeout=20), f"update {self.step} was waited for before the next one was dispatched"
        if self.name == "loss":
            self.slow.events.append(f"read {self.step}")
        return np.asarray(self.value)


def implicit_transfer():
    """Moves an array to the device without having been asked to."""
    return jnp.add(np.ones(3, np.float32), np.ones(3, np.float32))
