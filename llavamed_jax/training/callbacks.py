"""The calls from outside that a run makes while it trains.

They generate and score; the trainer knows them as callables alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llavamed_jax.training.log import Sample
from llavamed_jax.training.program import Program
from llavamed_jax.training.rows import Data


@dataclass(frozen=True)
class Snapshot:
    """A run as evaluators see it, with no update under way.

    Attributes:
      step: updates done.
      params: nested, layers stacked; what is trained in float32, the rest in the dtype of the computation. The
        next update reuses their buffers: whoever needs them for longer copies them.
      program: model and mesh; `data`: processor and records.
    """

    step: int
    params: Mapping
    program: Program
    data: Data


# Named numbers, which are written beside the validation loss.
Evaluator = Callable[[Snapshot], Mapping[str, float]]
# Answers to look at.
Sampler = Callable[[Snapshot], Sequence[Sample]]


@dataclass(frozen=True)
class Callbacks:
    """What looks at a run from outside.

    Attributes:
      evaluators: are called whenever the validation loss is computed.
      sampler: is called every `samples_every` updates.
      profile: first and last update of a trace.
    """

    evaluators: Sequence[Evaluator] = ()
    sampler: Sampler | None = None
    profile: tuple[int, int] | None = None


NONE = Callbacks()
