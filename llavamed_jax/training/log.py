"""What a run says while it trains: `metrics.jsonl`, TensorBoard, a bar on a terminal or lines in a pipe."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tqdm import tqdm

from llavamed_jax.training.workdir import cut_back
from llavamed_jax.utils.files import is_at


@dataclass(frozen=True)
class Sample:
    """A question that the model was asked while it was trained.

    Attributes:
      images: uint8 [height,width,3] each, as the model sees them.
      wanted: the answer of the data.
    """

    name: str
    images: Sequence[np.ndarray]
    question: str
    answer: str
    wanted: str


class Board:
    """A file for TensorBoard, which hides there what earlier files hold of steps after `step`.

    It is written here and now: tensorboardX's SummaryWriter has a thread for it, and without a word waits for that thread for
    ever once a full disk has ended it.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        others = set(folder.iterdir())
        self._events, self._flushed_at = EventsWriter(str(folder / "events")), time.monotonic()
        self.path = next(iter(set(folder.iterdir()) - others), None)  # None: it took the place of one of the same second
        self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, content: Summary) -> None:
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))
        if time.monotonic() - self._flushed_at > 10:  # which waits for the disk
            self._events.flush()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        self._events.close()


class MetricsWriter:
    """Writes the metrics of a run that begins at `step`; what an interrupted run logged after that is taken back.

    Args:
      workdir: gets `metrics.jsonl`, `tensorboard/`, and `skipped.jsonl` where there is something to put in it.
      step: updates done so far.
      total_steps: of the whole run.
      name: in front of the progress.
      check: is called where a log was removed, and raises where the whole workdir was.
    """

    def __init__(self, workdir: Path, step: int, total_steps: int, name: str, check: Callable[[], None] = lambda: None):
        for log in ("metrics.jsonl", "skipped.jsonl"):
            cut_back(workdir / log, step)
        self._skipped, self._path, self._check = workdir / "skipped.jsonl", workdir / "metrics.jsonl", check
        self._file = open(self._path, "a", encoding="utf-8")
        self._board = Board(workdir / "tensorboard", step)
        self._total = total_steps
        self._name = name
        # A bar overwrites itself; where nobody watches, that would be one endless line.
        self._bar = tqdm(total=total_steps, initial=step, desc=name, unit="step") if sys.stderr.isatty() else None

    def advance(self, step: int, loss: float) -> None:
        """Moves the bar on."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """One line of `metrics.jsonl`, the same in TensorBoard, and where there is no bar a line for whoever reads along."""
        self._find_again(step)
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")  # JSON has no NaN: null
        self._file.flush()
        for key, value in finite.items():
            if value is not None:
                self._board.add(step, summary.scalar(key, value))
        if self._bar is None or "loss" not in metrics:  # the bar shows the training loss itself
            self.say(f"{self._name} {step}/{self._total} · " + " · ".join(_shown(metrics)))

    def _find_again(self, step: int) -> None:
        """Begins the logs anew that were removed: what is written to a file without a name nobody will read.

        Raises:
          UserError: the workdir is gone (`check`).
        """
        is_there, is_shown = is_at(self._file.fileno(), self._path), self._board.path is None or self._board.path.exists()
        if is_there and is_shown:
            return
        self._check()
        if not is_there:
            self.say(f"warning: {self._path} was removed; it begins anew, without the lines before step {step}")
            self._file.close()
            self._file = open(self._path, "a", encoding="utf-8")
        if not is_shown:
            self.say(f"warning: {self._board.path} was removed; another file begins, without what it showed before step {step}")
            with contextlib.suppress(OSError):
                self._board.close()
            self._board = Board(self._path.parent / "tensorboard", step - 1)

    def samples(self, step: int, samples: Iterable[Sample]) -> None:
        """A line for each answer; text and picture in TensorBoard."""
        for i, sample in enumerate(samples):
            self.say(f"{self._name} {step}/{self._total} · {_one_line(sample.name)} · {_one_line(sample.question)} -> "
                     f"{_one_line(sample.answer)} (wanted: {_one_line(sample.wanted)})")
            text = f"**Question** {sample.question}\n\n**Answer** {sample.answer}\n\n**Wanted** {sample.wanted}"
            text = text.encode("utf-8", "backslashreplace").decode()  # JSON can hold half a surrogate pair
            self._board.add(step, summary.text(f"samples/{i}", text))
            for j, image in enumerate(sample.images):
                self._board.add(step, summary.image(f"samples/{i}/image_{j}", image, dataformats="HWC"))

    def skipped(self, step: int, entries: Iterable[Mapping]) -> None:
        """A line of `skipped.jsonl` for each sample that an update had to do without."""
        for entry in entries:
            with open(self._skipped, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")

    def say(self, text: str) -> None:
        """A line on stdout that leaves the bar whole."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        with self._file, contextlib.closing(self._board):
            if self._bar is not None:
                self._bar.close()


def troubles(metrics: Mapping[str, float | int | None]) -> list[str]:
    """What a run had to do without, in words; nothing where there was nothing."""
    words = dict(updates_skipped="updates skipped (not finite)", samples_skipped="samples skipped (see skipped.jsonl)",
                 images_skipped="images left out",
                 samples_truncated="samples cut at max_length", samples_unsupervised="samples without a supervised token",
                 validation_samples_skipped="validation samples skipped (their image cannot be read)")
    return [f"{metrics[key]} {text}" for key, text in words.items() if metrics.get(key)]


def _shown(metrics: Mapping[str, float | int | None]) -> Iterable[str]:
    formats = dict(loss="loss {:.4f}", validation_loss="validation loss {:.4f}", learning_rate="learning rate {:.2e}",
                   grad_norm="gradient {:.3f}", tokens_per_second="{:,.0f} tokens/s", mfu="MFU {:.1%}")
    shown = [form.format(metrics[key]) for key, form in formats.items() if metrics.get(key) is not None]
    known = {*formats, "samples", "tokens", "padding_fraction", "image_padding_fraction"}
    evaluated = [f"{key} {value:.4g}" for key, value in metrics.items() if key not in known and isinstance(value, float)]
    return [*shown, *evaluated, *troubles(metrics)]


def _one_line(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


class SilentLog:
    """In place of `log.MetricsWriter` in all processes but the first."""

    def advance(self, step: int, loss: float) -> None:
        pass

    def write(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        pass

    def samples(self, step: int, samples: Iterable) -> None:
        pass

    def skipped(self, step: int, entries: Iterable[Mapping]) -> None:
        pass

    def say(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass
