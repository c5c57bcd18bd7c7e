"""Reads the metrics of updates two updates late, so that the host never blocks the devices."""

from __future__ import annotations

import collections
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax

from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UserError
from llavamed_jax.training import throughput
from llavamed_jax.training.log import MetricsWriter
from llavamed_jax.training.progress import UNMOVED, ZERO_GRADIENT, Progress
from llavamed_jax.training.step_agreement import StepAgreement
from llavamed_jax.training.workdir import write_text

# Updates in flight. One runs and one is queued, so the device is never idle, and the host never gets further ahead: the
# memory it allocates stays bounded, and a signal takes effect after two updates.
IN_FLIGHT = 2


def read(values: Any) -> Any:
    """Waits for a pytree of device scalars and returns it as Python floats."""
    return jax.tree.map(float, jax.device_get(values))


@dataclass(frozen=True)
class Update:
    """An update that was dispatched.

    With several processes, each has the counts, troubles and skipped samples of its own rows.

    Attributes:
      step: the update's number.
      metrics: device scalars, as `make_train_step` returns them.
      counts: the batch's counts (`throughput.batch_counts`).
      troubles: counts of skipped or cut samples and images, by the names of `Progress`.
      position: where the data stood before the batch (`Loader.state`), from which its samples can be named.
      at: when the update was dispatched (`time.monotonic`).
      skipped: the skipped samples (`Loader.skipped`).
    """

    step: int
    metrics: Mapping[str, jax.Array]
    counts: Mapping[str, int]
    troubles: Mapping[str, int]
    position: Mapping[str, int]
    at: float = field(default_factory=time.monotonic)
    skipped: Sequence[Mapping] = ()


class MetricsReader:
    """Takes updates as they are dispatched, and reads and writes their metrics two updates late.

    Throughput is measured between the times at which updates were done. The clock starts after the first update, which
    compiles, and again after every pause.

    Args:
      progress: its counters are increased.
      log: gets a line every `log_every` updates and for the last one.
      workdir: gets `not_finite.json` if updates are not finite.
      config: the model's shapes, for MFU (`throughput.training_flops`).
      trained: the size of each trained parameter by name, for MFU.
      num_devices: devices of the mesh, for MFU.
      log_every: updates between lines of the log.
      total_steps: updates of the whole run.
      nan_limit: the run ends after this many consecutive updates that are not finite or have a gradient of exactly 0,
        or if none of this many first updates moves the parameters.
      name_samples: position in the data -> ids of the samples of the batch there.
      agreed: adds up the counts of several processes.
    """

    def __init__(self, progress: Progress, log: MetricsWriter, workdir: Path, *, config: LlavaConfig,
                 trained: Mapping[str, int], num_devices: int, log_every: int, total_steps: int, nan_limit: int,
                 name_samples: Callable[[Mapping], list],
                 agreed: StepAgreement):
        self._progress, self._log, self._workdir = progress, log, workdir
        self._config, self._trained = config, trained
        peak = throughput.peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * num_devices
        self._log_every, self._total_steps = log_every, total_steps
        self._nan_limit, self._name_samples, self._agreed = nan_limit, name_samples, agreed
        self._queue: collections.deque[Update] = collections.deque()
        self._not_finite: list[Update] = []  # the newest updates, while they are consecutive
        self._is_first = True
        self.restart_clock()

    def restart_clock(self, at: float | None = None) -> None:
        """Restarts the measurement of throughput, at the time `at` (`time.monotonic`), None for now."""
        self._since = self._done_at = time.monotonic() if at is None else at
        self._tokens, self._flops = 0, 0.0

    def make_room(self) -> None:
        """Waits until one more update may be dispatched, which is when fewer than `IN_FLIGHT` are unread."""
        while len(self._queue) >= IN_FLIGHT:
            self._read_oldest()

    def add(self, update: Update) -> None:
        """Queues an update that was dispatched."""
        self._queue.append(update)

    def drain(self) -> None:
        """Waits for all updates, so that a checkpoint includes their counts."""
        while self._queue:
            self._read_oldest()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Waits for all updates; the time spent inside the block does not count as training."""
        self.drain()
        yield
        self.restart_clock()

    def _read_oldest(self) -> None:
        update = self._queue.popleft()
        values = read(update.metrics)
        self._done_at = self._when_done(update)
        update = self._of_all(update)
        self._count(update, values)
        self._log.advance(update.step, values["loss"])
        is_logged = update.step % self._log_every == 0 or update.step == self._total_steps
        if is_logged:
            self._log.write(update.step, self._line(update, values, max(self._done_at - self._since, 1e-9)))
        if is_logged or self._is_first:
            self.restart_clock(self._done_at)
        self._is_first = False
        if self._progress.skipped_in_a_row >= self._nan_limit:
            self._end_as_not_finite()
        self._check_something_is_learnt(update, values)

    def _of_all(self, update: Update) -> Update:
        """Returns the update; in process 0, with the counts of all processes."""
        sums, skipped = self._agreed.add_up({**update.counts, **update.troubles}, update.skipped)
        self._log.skipped(update.step, skipped)
        return replace(update, counts={name: sums[name] for name in update.counts},
                       troubles={name: sums[name] for name in update.troubles})

    def _when_done(self, update: Update) -> float:
        """Estimates when an update that was just read was done; only an upper bound is observed.

        Updates that are done by now share the time since the last one evenly; none was done before it was dispatched.
        """
        done = 1 + sum(all(value.is_ready() for value in other.metrics.values()) for other in self._queue)
        return max(update.at, self._done_at + (time.monotonic() - self._done_at) / done)

    def _count(self, update: Update, values: Mapping[str, float]) -> None:
        progress, counts = self._progress, update.counts
        progress.samples += counts["samples"]
        progress.tokens += int(values["tokens"])
        for name, count in update.troubles.items():
            setattr(progress, name, getattr(progress, name) + count)
        if values["skipped"]:
            progress.updates_skipped += 1
            progress.skipped_in_a_row += 1
            self._not_finite.append(update)
        else:
            progress.skipped_in_a_row = 0
            self._not_finite.clear()
            self._count_still(values)
        self._tokens += counts["tokens"]
        self._flops += throughput.training_flops(self._config, self._trained, counts["tokens"], counts["attended"],
                                                 counts["images"])

    def _count_still(self, values: Mapping[str, float]) -> None:
        """Counts whether an update had a gradient and moved the parameters, unless it had no supervised token."""
        progress = self._progress
        if not values["tokens"]:
            return
        is_zero = values["grad_norm"] == 0
        progress.zero_gradients += is_zero
        progress.zero_gradients_in_a_row = progress.zero_gradients_in_a_row + 1 if is_zero else 0
        if values["learning_rate"] > 0:  # the first update of a warm-up moves nothing
            is_moved = bool(values["moved"])
            progress.updates_moved += is_moved
            progress.updates_unmoved += not is_moved

    def _line(self, update: Update, values: Mapping[str, float], seconds: float) -> dict:
        progress, counts = self._progress, update.counts
        return dict(
            loss=values["loss"], learning_rate=values["learning_rate"], grad_norm=values["grad_norm"],
            samples=progress.samples,
            tokens=progress.tokens, tokens_per_second=self._tokens / seconds,
            padding_fraction=1 - counts["tokens"] / counts["positions"],
            image_padding_fraction=1 - counts["images"] / counts["image_slots"] if counts["image_slots"] else 0.0,
            mfu=None if self._peak is None else self._flops / seconds / self._peak,
            memory_peak_bytes=throughput.peak_memory(),
            **{name: count for name, count in vars(progress).items()
               if name.endswith(("skipped", "truncated", "unsupervised"))})

    def _end_as_not_finite(self) -> None:
        """Ends the run, and writes the ids of the samples whose updates were not finite to a file."""
        process = f".{jax.process_index()}" if jax.process_count() > 1 else ""
        path = self._workdir / f"not_finite{process}.json"
        listed = f"the ids of their samples are in {path}"
        try:
            write_text(path, json.dumps([{"step": u.step, "ids": self._name_samples(u.position)}
                                         for u in self._not_finite], indent=1) + "\n")
        except (UserError, OSError) as error:
            reason = (error.strerror if isinstance(error, OSError) else None) or error
            listed = f"the ids of their samples could not be written to {path}: {reason}"
        raise UserError(f"{self._progress.skipped_in_a_row} updates in a row, up to step {self._not_finite[-1].step}, "
                        f"had a loss, gradient or update that was not finite (nan_limit is {self._nan_limit}); "
                        f"{listed}")

    def _check_something_is_learnt(self, update: Update, values: Mapping[str, float]) -> None:
        """Raises UserError if `nan_limit` updates had a gradient of 0 or did not move the parameters."""
        progress, limit = self._progress, self._nan_limit
        if progress.zero_gradients_in_a_row >= limit:
            raise UserError(f"{progress.zero_gradients_in_a_row} updates in a row, up to step {update.step}, had a "
                            f"gradient of exactly 0 (nan_limit is {limit}){ZERO_GRADIENT}")
        if not progress.updates_moved and progress.updates_unmoved >= limit:
            raise UserError(f"none of the first {progress.updates_unmoved} updates, up to step {update.step}, changed "
                            f"the parameters (nan_limit is {limit}); the last had a gradient norm of "
                            f"{values['grad_norm']:.3g} and a learning rate of {values['learning_rate']:.3g}{UNMOVED}")
