"""What an evaluation asks for and gets, and who may answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from llavamed_jax.errors import UserError


@dataclass(frozen=True)
class Generation:
    """How answers are generated. The defaults are greedy decoding with the original's limit of 1,024 new tokens."""

    max_new_tokens: int = 1024
    temperature: float = 0.0
    num_beams: int = 1
    batch_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """`text` as generated; `finish_reason` is `stop`, `length`, or what a server says; `tokens_cut` were lost of a prompt too long."""

    text: str
    finish_reason: str
    tokens_cut: int = 0


class Answerer(Protocol):
    """Whoever answers questions: a model that is loaded here (`local.py`), or one behind an address (`endpoint.py`).

    Attributes:
      name: what predictions call it.
    """

    name: str

    def answers(self, questions: Sequence[tuple[str, str]], asked: Sequence[int], generation: Generation,
                failed: dict[int, UserError]) -> Iterator[tuple[int, Answer]]:
        """The answers to some of the (question, image path) pairs, by their place, each as it comes.

        Args:
          asked: places of `questions`, those of one image next to each other. The others count where equal questions must
            draw apart.
          failed: where the errors of questions that could not be answered go, by their place.
        """

    def facts(self) -> dict[str, str]:
        """What the report says of how the answers came about."""

    def describe(self) -> dict[str, object]:
        """Who answers, for `asked` of `metrics.json`: the keys of `asked.KEYS` that are known, in JSON's types."""

    def depends_on(self) -> dict[str, object]:
        """What of who answers the answers follow from: its name in a sentence -> a value in JSON's types, such as a file's hash."""

    def machine(self) -> dict[str, object]:
        """What the last digits, and so a rare answer, may follow from: the kind and number of devices, and the like."""
