"""What a metric of one answer is. `registry.py` lists all of them; docs/architecture.md shows how to add one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.evaluation.metrics import CandidateList


@dataclass(frozen=True)
class Answered:
    """A question and the answer to it.

    Attributes:
      sample: the question with its gold answer.
      text: the predicted answer.
      candidates: open answers of the training rows; None if there are none.
      choice: for multiple choice, the place of the option that the answer names; None if it names no option or several.
    """

    sample: VqaSample
    text: str
    candidates: CandidateList | None = None
    choice: int | None = None


@dataclass(frozen=True)
class Metric:
    """Metrics that are computed from one answer and averaged over the questions of one kind.

    Attributes:
      family: the object of `metrics.json` that they stand in: `paper`, `strict`, `captions`, or a family of its own.
      kind: the kind of question that they apply to: OPEN, CLOSED, CHOICE or CAPTION.
      names: what `metrics.json` calls them; no two metrics share a name.
      values: the values of one answer by name, as fractions. A name that is left out does not apply to the answer.
      is_always_listed: whether `metrics.json` lists them, as null, for a data set without such questions.
      titles: name -> title and explanation, for the report of a family of its own.
    """

    family: str
    kind: str
    names: tuple[str, ...]
    values: Callable[[Answered], Mapping[str, float]]
    is_always_listed: bool = False
    titles: Mapping[str, tuple[str, str]] = field(default_factory=dict)
