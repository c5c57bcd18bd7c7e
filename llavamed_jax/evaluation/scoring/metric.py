"""The interface of metrics. `registry.py` lists all metrics; docs/architecture.md shows how to add one."""

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
      choice: for multiple choice, the index of the option that the answer names; None if it names no option or several.
    """

    sample: VqaSample
    text: str
    candidates: CandidateList | None = None
    choice: int | None = None


@dataclass(frozen=True)
class Metric:
    """Metrics that are computed from one answer and averaged over the questions of one kind.

    Attributes:
      family: the object of `metrics.json` that contains them: `paper`, `strict`, `captions`, or a new family.
      kind: the kind of question that they apply to: OPEN, CLOSED, CHOICE or CAPTION.
      names: the names in `metrics.json`; no two metrics share a name.
      values: the values of one answer by name, as fractions. A name that is left out does not apply to the answer.
      is_always_listed: whether `metrics.json` lists them, as null, for a data set without such questions.
      titles: name -> title and explanation, for the report; needed for a new family.
    """

    family: str
    kind: str
    names: tuple[str, ...]
    values: Callable[[Answered], Mapping[str, float]]
    is_always_listed: bool = False
    titles: Mapping[str, tuple[str, str]] = field(default_factory=dict)
