"""Logs a run: `metrics.jsonl`, TensorBoard, and a progress bar on a terminal or lines in a pipe."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llavamed_jax.errors import UserError
from llavamed_jax.training.workdir import cut_back
from llavamed_jax.utils.event_files import Event, EventsWriter, SessionLog, Summary, summary
from llavamed_jax.utils.files import is_at


@dataclass(frozen=True)
class Sample:
    """A question that the model answered during training.

    Attributes:
      name: the sample's name in the log.
      images: uint8 [height,width,3] each, as the model sees them.
      question: the question's text.
      answer: the model's answer.
      wanted: the answer in the data.
    """

    name: str
    images: Sequence[np.ndarray]
    question: str
    answer: str
    wanted: str


class Board:
    """A TensorBoard event file that hides the values of earlier files after `step`.

    It writes on the calling thread. tensorboardX's SummaryWriter writes on a thread of its own, and waits forever for
    that thread once a full disk has ended it.

    Args:
      folder: the TensorBoard directory.
      step: updates done so far.
    """

    def __init__(self, folder: Path, step: int):
        folder.mkdir(exist_ok=True)
        others = set(folder.iterdir())
        self._events, self._flushed_at = EventsWriter(str(folder / "events")), time.monotonic()
        # None: the event file replaced one that was begun within the same second.
        self.path = next(iter(set(folder.iterdir()) - others), None)
        self._events.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def add(self, step: int, content: Summary) -> None:
        """Writes a summary of a step."""
        self._events.write_event(Event(wall_time=time.time(), step=step, summary=content))
        if time.monotonic() - self._flushed_at > 10:  # seldom, since a flush waits for the disk
            self._events.flush()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Closes the event file."""
        self._events.close()


class MetricsWriter:
    """Writes the metrics of a run that begins at `step`; removes what an interrupted run logged after that step.

    A file that the disk refuses raises nothing: the trainer saves the run's state first, and then raises `failure`.

    Args:
      workdir: gets `metrics.jsonl`, `tensorboard/`, and `skipped.jsonl` if samples are skipped.
      step: updates done so far.
      total_steps: updates of the whole run.
      name: the run's name, at the start of each progress line.
      check: called if a log file was removed; raises if the whole workdir was.

    Attributes:
      failure: the error of the first file that could not be written; None if all could.
    """

    def __init__(self, workdir: Path, step: int, total_steps: int, name: str, check: Callable[[], None] = lambda: None):
        for log in ("metrics.jsonl", "skipped.jsonl"):
            cut_back(workdir / log, step)
        self.failure: UserError | None = None
        self._skipped, self._path, self._check = workdir / "skipped.jsonl", workdir / "metrics.jsonl", check
        self._file, self._folder = open(self._path, "a", encoding="utf-8"), workdir / "tensorboard"
        self._board = Board(self._folder, step)
        self._total = total_steps
        self._name = name
        # A bar overwrites itself; outside a terminal it would be one endless line.
        self._bar = tqdm(total=total_steps, initial=step, desc=name, unit="step") if sys.stderr.isatty() else None

    def advance(self, step: int, loss: float) -> None:
        """Advances the progress bar."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Writes a line of `metrics.jsonl` and the same to TensorBoard; without a bar, also prints a line.

        Raises:
          UserError: the workdir is gone (`check`).
        """
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}
        with self._noting(self._path):
            self._find_again(step)
            self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")  # JSON has no NaN: null
            self._file.flush()
        self._show(step, (summary.scalar(key, value) for key, value in finite.items() if value is not None))
        if self._bar is None or "loss" not in metrics:  # the bar shows the training loss itself
            self.say(f"{self._name} {step}/{self._total} · " + " · ".join(_shown(metrics)))

    def _show(self, step: int, contents: Iterable[Summary]) -> None:
        """Writes summaries of a step to TensorBoard."""
        with self._noting(self._folder):
            for content in contents:
                self._board.add(step, content)

    @contextlib.contextmanager
    def _noting(self, path: Path) -> Iterator[None]:
        """Notes the first error of the disk inside the block as `failure`, with the file's path."""
        try:
            yield
        except OSError as error:
            self.failure = self.failure or UserError(
                f"{error.filename or path} cannot be written: {error.strerror or error}")

    def _find_again(self, step: int) -> None:
        """Reopens log files that were removed, since writes to an unlinked file are lost."""
        is_there, is_shown = is_at(self._file.fileno(), self._path), (
            self._board.path is None or self._board.path.exists())
        if is_there and is_shown:
            return
        self._check()
        if not is_there:
            self.say(f"warning: {self._path} was removed; a new file begins at step {step}, and the earlier lines are "
                     "lost")
            earlier, self._file = self._file, open(self._path, "a", encoding="utf-8")
            earlier.close()
        if not is_shown:
            self.say(f"warning: {self._board.path} was removed; a new file begins at step {step}, and the earlier "
                     "values are lost")
            earlier, self._board = self._board, Board(self._folder, step - 1)
            with contextlib.suppress(OSError):
                earlier.close()

    def samples(self, step: int, samples: Iterable[Sample]) -> None:
        """Prints a line for each answer, and writes text and images to TensorBoard."""
        for i, sample in enumerate(samples):
            self.say(f"{self._name} {step}/{self._total} · {_one_line(sample.name)} · {_one_line(sample.question)} -> "
                     f"{_one_line(sample.answer)} (wanted: {_one_line(sample.wanted)})")
            text = f"**Question** {sample.question}\n\n**Answer** {sample.answer}\n\n**Wanted** {sample.wanted}"
            text = text.encode("utf-8", "backslashreplace").decode()  # JSON can hold an unpaired surrogate
            self._show(step, [summary.text(f"samples/{i}", text), *(
                summary.image(f"samples/{i}/image_{j}", image, dataformats="HWC")
                for j, image in enumerate(sample.images))])

    def skipped(self, step: int, entries: Iterable[Mapping]) -> None:
        """Appends a line to `skipped.jsonl` for each sample that an update skipped."""
        for entry in entries:
            with self._noting(self._skipped), open(self._skipped, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")

    def say(self, text: str) -> None:
        """Prints a line on stdout above the bar."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        """Closes the files and the bar. What does not reach the disk is a `failure`, too."""
        for path, part in ((self._path, self._file), (self._folder, self._board)):
            with self._noting(path):
                part.close()
        if self._bar is not None:
            self._bar.close()


def troubles(metrics: Mapping[str, float | int | None]) -> list[str]:
    """Returns the counts of skipped or cut samples, images and updates in words; an empty list if all are 0."""
    words = dict(updates_skipped="updates skipped (not finite)", samples_skipped="samples skipped (see skipped.jsonl)",
                 images_skipped="images left out",
                 samples_truncated="samples cut at max_length",
                 samples_unsupervised="samples without a supervised token",
                 validation_samples_skipped="validation samples skipped (their image cannot be read)")
    return [f"{metrics[key]} {text}" for key, text in words.items() if metrics.get(key)]


def _shown(metrics: Mapping[str, float | int | None]) -> Iterable[str]:
    formats = dict(loss="loss {:.4f}", validation_loss="validation loss {:.4f}", learning_rate="learning rate {:.2e}",
                   grad_norm="gradient {:.3f}", tokens_per_second="{:,.0f} tokens/s", mfu="MFU {:.1%}")
    shown = [form.format(metrics[key]) for key, form in formats.items() if metrics.get(key) is not None]
    known = {*formats, "samples", "tokens", "padding_fraction", "image_padding_fraction"}
    evaluated = [f"{key} {value:.4g}" for key, value in metrics.items()
                 if key not in known and isinstance(value, float)]
    return [*shown, *evaluated, *troubles(metrics)]


def _one_line(text: str, most: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[:most]}…"


class SilentLog:
    """Replaces `MetricsWriter` in all processes but the first; writes nothing."""

    failure = None

    def advance(self, step: int, loss: float) -> None:
        """Does nothing."""

    def write(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """Does nothing."""

    def samples(self, step: int, samples: Iterable) -> None:
        """Does nothing."""

    def skipped(self, step: int, entries: Iterable[Mapping]) -> None:
        """Does nothing."""

    def say(self, text: str) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""
