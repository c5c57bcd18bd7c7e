"""What a run is judged by on the way: validation loss, evaluators from outside, sample answers, a trace of a few updates."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax

from llavamed_jax.errors import UserError
from llavamed_jax.training import setup
from llavamed_jax.training.data import Data
from llavamed_jax.training.late import IN_FLIGHT, Progress, read
from llavamed_jax.training.log import MetricsWriter, Sample
from llavamed_jax.training.state import TrainState
from llavamed_jax.training.step import place
from llavamed_jax.training.together import PATIENCE_S
from llavamed_jax.utils import signals


@dataclass(frozen=True)
class Snapshot:
    """A run as evaluators see it, with no update under way.

    Attributes:
      step: updates done.
      params: nested, layers stacked; what is trained in float32, the rest in the dtype of the computation. They are given to
        the next update: whoever needs them for longer copies them.
      program: model and mesh; `data`: processor and records.
    """

    step: int
    params: Mapping
    program: setup.Program
    data: Data


# Named numbers, which are written beside the validation loss, and answers to look at. The trainer gets them as callables:
# they generate and score, of which it knows nothing.
Evaluator = Callable[[Snapshot], Mapping[str, float]]
Sampler = Callable[[Snapshot], Sequence[Sample]]


def judge(snapshot: Snapshot, state: TrainState, eval_step, evaluators: Sequence[Evaluator], progress: Progress) -> dict[str, float]:
    """The validation loss, weighted as the training loss is, and what the evaluators say; notes in `progress` which step is
    the best.

    Raises:
      Stopped: the run was asked to stop, and validation data do not come.
    """
    found = {}
    if snapshot.data.validation is not None:
        found["validation_loss"] = loss = _validation_loss(snapshot, state, eval_step)
        best = progress.best["validation_loss"] if progress.best else math.inf
        if loss < best:  # NaN never is
            progress.best = {"step": snapshot.step, "validation_loss": loss}
    for evaluate in evaluators:
        found.update(evaluate(snapshot))
    return found


def _validation_loss(snapshot: Snapshot, state: TrainState, eval_step) -> float:
    parts, under_way = [], collections.deque()
    with contextlib.closing(snapshot.data.validation_batches(snapshot.program.mesh, _on_wait)) as batches:
        for batch in batches:
            while len(under_way) >= IN_FLIGHT:  # else the devices would fill with batches that wait for their turn
                parts.append(read(under_way.popleft()))
            under_way.append(eval_step(state, place(batch, snapshot.program.mesh)))
    total, count = map(math.fsum, zip(*parts, *map(read, under_way), strict=True))
    if not count:
        raise UserError(f"no sample of the validation data {snapshot.data.cfg.data.validation} has a supervised token")
    return total / count


def _on_wait(seconds: float) -> None:
    """What comes is used, also after a signal: a run that goes on does not validate this step again."""
    if signals.is_asked() and seconds > PATIENCE_S:
        raise signals.Stopped("stopped while validation data were waited for") if jax.process_count() == 1 else TimeoutError


class Profiler:
    """Traces the updates `first` to `last` into the run's TensorBoard directory. As a context it ends a trace that is open."""

    def __init__(self, span: tuple[int, int] | None, workdir: Path, log: MetricsWriter):
        self._first, self._last = span or (0, 0)
        self._directory, self._log = workdir / "tensorboard", log
        self._is_on = self._is_done = False

    def __enter__(self) -> Profiler:
        return self

    def before(self, step: int, drain: Callable[[], None]) -> None:
        """To be called before an update is dispatched; `drain` waits for those under way, which are not to be in the trace."""
        if self._first <= step <= self._last and not self._is_on:
            drain()
            if jax.process_index() == 0:
                jax.profiler.start_trace(str(self._directory))
            self._is_on = True

    def after(self, step: int, drain: Callable[[], None]) -> None:
        """To be called when an update was dispatched."""
        if self._is_on and step >= self._last:
            drain()
            self._end()

    def __exit__(self, *_) -> None:
        if self._is_on:
            self._end()
        elif self._last and not self._is_done:
            self._log.say(f"none of the updates {self._first} to {self._last} was left to do, so nothing was profiled")

    def _end(self) -> None:
        if jax.process_index() == 0:
            jax.profiler.stop_trace()
        self._is_on, self._is_done = False, True
        self._log.say(f"a trace of the updates {self._first} to {self._last} lies in {self._directory}/plugins/profile")
