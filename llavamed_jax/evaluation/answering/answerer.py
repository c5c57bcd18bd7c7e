"""The interface between an evaluation and whatever answers its questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llavamed_jax.datasets.sample import Shown
from llavamed_jax.errors import UserError


@dataclass(frozen=True)
class Generation:
    """How answers are generated. The defaults are greedy decoding with the original's limit of 1,024 new tokens.

    Attributes:
      max_new_tokens: longest answer, in tokens.
      temperature: sampling temperature; 0 decodes greedily.
      num_beams: width of the beam search; 1 uses none.
      batch_size: questions at a time, for a loaded model.
      seed: seed of the sampling.
    """

    max_new_tokens: int = 1024
    temperature: float = 0.0
    num_beams: int = 1
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
      text: the generated text.
      finish_reason: `stop`, `length`, or what a server states.
      tokens_cut: number of tokens that were cut from the prompt because it was too long.
      has_question: whether the model saw any of the question's text; False if it was cut away completely, or if a
        server refused the prompt as too long.
    """

    text: str
    finish_reason: str
    tokens_cut: int = 0
    has_question: bool = True


class Answerer(Protocol):
    """Answers questions: a loaded model (`local.py`), or a model behind an API (`endpoint.py`).

    Attributes:
      name: the name of the model in predictions.
    """

    name: str

    def answers(self, questions: Sequence[tuple[str, Shown]], asked: Sequence[int], generation: Generation,
                failed: dict[int, UserError]) -> Iterator[tuple[int, Answer]]:
        """Answers some of the questions, and yields each answer as soon as it is there.

        Args:
          questions: all (question, paths of its images) pairs. If the text has as many `<image>` markers as there are
            images, the images stand at these places.
          asked: indices of the questions to answer; those about one image are adjacent. The other questions matter for
            sampling: equal questions use different seeds, by their number of earlier occurrences.
          generation: how answers are generated.
          failed: receives the errors of questions that cannot be answered, by index.

        Yields:
          Pairs of index and answer.
        """

    def facts(self) -> dict[str, str]:
        """Returns facts about the run for the report, such as the device."""

    def describe(self) -> dict[str, object]:
        """Describes the model for `asked` of `metrics.json`: the keys of `asked.KEYS` that are known, in JSON types."""

    def depends_on(self) -> dict[str, object]:
        """Returns everything about the model that answers depend on.

        Keys are names that fit into a sentence; values are of JSON types, for example the hash of a file.
        """

    def machine(self) -> dict[str, object]:
        """Returns what the last digits of a computation, and so a rare answer, may depend on, such as the devices."""
