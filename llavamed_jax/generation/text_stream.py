"""Decodes a growing list of token ids to a growing text: whole characters only, and no part of a stop string.

A finished text becomes a `Completion`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # an incomplete character decodes to it


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
      text: the answer without special tokens, stripped, up to a stop string.
      token_ids: all generated ids, including the end-of-sequence id.
      finish_reason: `stop` (end of sequence or a stop string) or `length`.
    """

    text: str
    token_ids: list[int]
    finish_reason: str


class TextStream:
    """The text of one answer while it is generated.

    Args:
      decode: ids -> text without special tokens.
      stop: texts that end the answer and are not part of it, in any number of tokens. An empty one is ignored: it would
        stop every answer at once (quirk Q2 of the original).
      stop_ids: tokens that end the answer and decode to no text, such as `</s>` for a model with another end token.

    Attributes:
      token_ids: all ids so far, up to the one that completed a stop.
      text: the text so far, stripped, up to a stop string.
      is_stopped: whether a stop was found; later ids are ignored.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: Iterable[str] = (), stop_ids: Iterable[int] = ()):
        self._decode, self._stop, self._stop_ids = decode, [s for s in stop if s], frozenset(stop_ids)
        self._given = 0
        self.token_ids: list[int] = []
        self.text, self.is_stopped = "", False

    def push(self, ids: Sequence[int]) -> str:
        """Takes new ids; returns the new text that later ids cannot change."""
        if self.is_stopped:
            return ""
        before = len(self.token_ids)
        self.token_ids += ids
        if self._has_stop(self.token_ids):
            # Ids come several at a time: those behind the stop are not part of the answer.
            end = next(n for n in range(before + 1, len(self.token_ids) + 1) if self._has_stop(self.token_ids[:n]))
            del self.token_ids[end:]
            self.is_stopped = True
        text = self._decode(self.token_ids)
        ends = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        text = text[: min(ends)] if ends else text
        self.text = text.strip()
        # White space at either end may belong to a stop string or precede it: it is stripped after the search.
        return self._give(self.text if self.is_stopped else text[: self._certain(text)].strip())

    def finish(self) -> str:
        """Returns the rest of the text at the end of the answer."""
        return self._give(self.text)

    def _has_stop(self, ids: Sequence[int]) -> bool:
        if not self._stop_ids.isdisjoint(ids):
            return True
        return bool(self._stop) and any(s in self._decode(ids) for s in self._stop)

    def _certain(self, text: str) -> int:
        """Returns the length of the text that later ids cannot change.

        The rest may be an incomplete character or the beginning of a stop string.
        """
        end = len(text)
        while end and text[end - 1] == _INCOMPLETE:
            end -= 1
        for s in self._stop:
            begun = next((n for n in range(min(len(s) - 1, end), 0, -1) if text[:end].endswith(s[:n])), 0)
            end -= begun
        return end

    def _give(self, text: str) -> str:
        piece = text[self._given :]
        self._given = max(self._given, len(text))
        return piece


def completion(stream: TextStream, eos: Collection[int]) -> Completion:
    """Builds the answer of a finished text stream.

    Args:
      stream: the finished stream.
      eos: the ids that end a sequence.

    Returns:
      The answer, with the reason why it ended.
    """
    ended = stream.is_stopped or any(i in eos for i in stream.token_ids[-1:])
    return Completion(stream.text, stream.token_ids, "stop" if ended else "length")
