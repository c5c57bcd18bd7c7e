"""Turns the replies of a model into training records, and counts what is dropped and why."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from llavamed_jax.curation.figure_file import Figure
from llavamed_jax.curation.original_rules import read_original
from llavamed_jax.curation.turns import read_turns
from llavamed_jax.datasets.records import normalize
from llavamed_jax.errors import UserError
from llavamed_jax.text.conversation import IMAGE_MARKER

if TYPE_CHECKING:  # it imports openai, which takes a second
    from llavamed_jax.openai_client.replies import Reply

RULES = ("ours", "original")
_WITHHELD, _EMPTY = "withheld by the server's filter", "empty reply"
_NO_TURNS, _ALL_DROPPED, _INVALID = "no turns in the reply", "no pair left", "not a valid training record"


@dataclass
class Tally:
    """Counts of a run.

    Attributes:
      figures: number of figures with a reply.
      records: number of records that were made.
      pairs: number of pairs in them.
      dropped_pairs: reason -> number of pairs.
      dropped_figures: reason -> number of figures.
      images_lost: number of records whose marker was lost with its pair, which the original's rules allow.
      prompt_tokens: tokens of the prompts, as the server counted them.
      completion_tokens: tokens of the replies, as the server counted them.
      lost: one object for each dropped pair and figure, for `dropped.jsonl`.
    """

    figures: int = 0
    records: int = 0
    pairs: int = 0
    dropped_pairs: Counter[str] = field(default_factory=Counter)
    dropped_figures: Counter[str] = field(default_factory=Counter)
    images_lost: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    lost: list[dict] = field(default_factory=list)

    def summary(self) -> str:
        """Returns what was made and what was dropped, one line each."""
        lines = [f"{self.records:,} conversations with {self.pairs:,} pairs, from {self.figures:,} replies"]
        for title, counts in (("pairs dropped", self.dropped_pairs), ("replies without a conversation",
                                                                      self.dropped_figures)):
            if counts:
                reasons = ", ".join(f"{reason}: {count:,}" for reason, count in counts.most_common())
                lines.append(f"{title}: {counts.total():,} ({reasons})")
        if self.images_lost:
            lines.append(f"{self.images_lost:,} conversations have lost their image marker, as in the original")
        return "\n".join(lines)


def conversations(figures: Iterable[Figure], reply_of: Callable[[Figure], Reply | None], rules: str, seed: int,
                  tally: Tally) -> Iterator[dict]:
    """Yields the training record of each figure that has a usable reply.

    Args:
      figures: the figures.
      reply_of: returns the reply about a figure, or None.
      rules: `ours` or `original`.
      seed: with the `pair_id` it draws whether the image stands before or after the first question.
      tally: is filled.
    """
    for figure in figures:
        reply = reply_of(figure)
        if reply is None:
            continue
        tally.figures += 1
        tally.prompt_tokens += reply.prompt_tokens
        tally.completion_tokens += reply.completion_tokens
        record, reason = _record(figure, reply, rules, random.Random(f"{seed} {figure.pair_id}"), tally)
        if record is None:
            tally.dropped_figures[reason] += 1
            tally.lost.append({"pair_id": figure.pair_id, "reason": reason, "reply": reply.text})
            continue
        tally.records += 1
        tally.pairs += len(record["conversations"]) // 2
        tally.images_lost += not any(IMAGE_MARKER in turn["value"] for turn in record["conversations"])
        yield record


def _record(figure: Figure, reply: Reply, rules: str, rng: random.Random, tally: Tally) -> tuple[dict | None, str]:
    """Returns the record, or None and the reason why there is none."""
    if not reply.text.strip():
        return None, _WITHHELD if reply.finish_reason == "content_filter" else _EMPTY
    is_ours = rules == "ours"
    turns = (read_turns(reply.text, reply.finish_reason == "length", figure.caption) if is_ours
             else read_original(reply.text, rng))
    for question, answer, reason in turns.lost:
        tally.dropped_pairs[reason] += 1
        tally.lost.append({"pair_id": figure.pair_id, "reason": reason, "question": question, "answer": answer})
    pairs = turns.pairs
    if not pairs:
        return None, _ALL_DROPPED if turns.lost else _NO_TURNS
    if is_ours:
        pairs = [(with_marker(pairs[0][0], rng), pairs[0][1]), *pairs[1:]]
    record = {"id": figure.pair_id, "image": figure.image}
    record |= {} if figure.domains is None else {"domain": figure.domains}
    record |= {"licence": figure.licence} if figure.licence is not None else {}
    record["conversations"] = [{"from": role, "value": value} for pair in pairs
                               for role, value in zip(("human", "gpt"), pair, strict=True)]
    try:
        normalize(record, Path(), "the record", 0)
    except UserError:
        return None, _INVALID
    return record, ""


def with_marker(text: str, rng: random.Random) -> str:
    """Returns a question with the image marker on a line after it (1 is drawn) or before it (0), as the original."""
    return f"{text}\n{IMAGE_MARKER}" if rng.getrandbits(1) else f"{IMAGE_MARKER}\n{text}"
