"""Callbacks that a run calls while it trains.

They generate and score; the trainer sees them only as callables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llavamed_jax.training.log import Sample
from llavamed_jax.training.program import Program
from llavamed_jax.training.rows import Data


@dataclass(frozen=True)
class Snapshot:
    """A run's state as evaluators see it, between two updates.

    Attributes:
      step: updates done.
      params: nested parameters with stacked layers; trained ones in float32, the others in the dtype of the
        computation. The next update reuses their buffers: copy them to keep them longer.
      program: model and mesh.
      data: processor and records.
    """

    step: int
    params: Mapping
    program: Program
    data: Data


# Returns named numbers, which are logged with the validation loss.
Evaluator = Callable[[Snapshot], Mapping[str, float]]
# Returns answers for the log and TensorBoard.
Sampler = Callable[[Snapshot], Sequence[Sample]]


@dataclass(frozen=True)
class Callbacks:
    """The callbacks of a run.

    Attributes:
      evaluators: called whenever the validation loss is computed.
      sampler: called every `samples_every` updates.
      profile: first and last update of a profiler trace; None for no trace.
    """

    evaluators: Sequence[Evaluator] = ()
    sampler: Sampler | None = None
    profile: tuple[int, int] | None = None


NONE = Callbacks()
