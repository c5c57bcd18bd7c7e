"""Validates a run at the steps that are saved by count: computes the validation loss, and calls the evaluators."""

from __future__ import annotations

import collections
import contextlib
import math
from collections.abc import Callable, Sequence

import jax

from llavamed_jax.errors import UserError
from llavamed_jax.training.callbacks import Evaluator, Snapshot
from llavamed_jax.training.metrics_reader import IN_FLIGHT, read
from llavamed_jax.training.progress import Progress
from llavamed_jax.training.state import TrainState
from llavamed_jax.training.step import put_batch
from llavamed_jax.training.step_agreement import PATIENCE_S
from llavamed_jax.utils import signals


def judge(snapshot: Snapshot, state: TrainState, eval_step, evaluators: Sequence[Evaluator],
          progress: Progress, is_stopping: Callable[[], bool]) -> tuple[dict[str, float], bool]:
    """Computes the validation loss, weighted as the training loss, and the evaluators' numbers.

    It notes in `progress` which step has the lowest loss.

    Args:
      snapshot: the run as evaluators see it.
      state: the run's state.
      eval_step: as `make_eval_step` returns it.
      evaluators: called with the snapshot.
      progress: the run's counts.
      is_stopping: whether the run is to stop, asked before each batch and each evaluator; equal in all processes.

    Returns:
      The numbers by name, and whether they are complete: a loss or an evaluator that a stop has cut short has none.

    Raises:
      Stopped: the run was asked to stop while it waited for validation data.
    """
    found = {}
    if snapshot.data.validation is not None:
        loss = _validation_loss(snapshot, state, eval_step, is_stopping)
        if loss is None:
            return found, False
        found["validation_loss"] = loss
        best = progress.best["validation_loss"] if progress.best else math.inf
        if loss < best:  # never true for NaN
            progress.best = {"step": snapshot.step, "validation_loss": loss}
    for evaluate in evaluators:
        if is_stopping():
            return found, False
        try:
            found.update(evaluate(snapshot))
        except signals.Stopped:  # in all processes
            is_stopping()
            return found, False
    return found, True


def _validation_loss(snapshot: Snapshot, state: TrainState, eval_step, is_stopping: Callable[[], bool]) -> float | None:
    """Returns the loss of the validation data; None if the run is to stop before the last batch."""
    parts, under_way = [], collections.deque()
    with contextlib.closing(snapshot.data.validation_batches(snapshot.program.mesh, _on_wait)) as batches:
        for batch in batches:
            if is_stopping():
                return None
            while len(under_way) >= IN_FLIGHT:  # otherwise the devices would fill with queued batches
                parts.append(read(under_way.popleft()))
            under_way.append(eval_step(state, put_batch(batch, snapshot.program.mesh)))
    total, count = map(math.fsum, zip(*parts, *map(read, under_way), strict=True))
    if not count:
        raise UserError(f"no sample of the validation data {snapshot.data.cfg.data.validation} has a supervised token")
    return total / count


def _on_wait(seconds: float) -> None:
    """Stops the wait for a batch after a signal."""
    if signals.is_asked() and seconds > PATIENCE_S:
        is_alone = jax.process_count() == 1
        raise signals.Stopped("stopped while waiting for validation data") if is_alone else TimeoutError
