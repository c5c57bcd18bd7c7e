"""Estimates what generating conversations costs, and keeps a run within its budget.

Tokens are estimated from bytes, since the tokenizer of a served model is unknown. As soon as the server has counted the
tokens of prompts, the highest number of tokens a byte that it has counted takes the place of the estimate, if that is
higher.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavamed_jax.errors import count_of

if TYPE_CHECKING:  # it imports openai, which takes a second
    from llavamed_jax.openai_client.replies import Reply

BYTES_A_TOKEN = 4  # of English text; only for estimates
_TOKENS_A_MESSAGE = 4  # role and separators


@dataclass(frozen=True)
class Prices:
    """Prices in US dollars for a million tokens; None if unknown.

    Attributes:
      prompt: of a prompt.
      answer: of a reply.
    """

    prompt: float | None = None
    answer: float | None = None

    @property
    def is_known(self) -> bool:
        """Whether both prices are known."""
        return self.prompt is not None and self.answer is not None

    def dollars(self, prompt_tokens: float, answer_tokens: float) -> float:
        """Returns the cost of so many tokens."""
        return (prompt_tokens * (self.prompt or 0) + answer_tokens * (self.answer or 0)) / 1e6


def tokens_of(messages: Sequence[dict]) -> int:
    """Estimates the number of tokens of a request."""
    return sum(math.ceil(len(each["content"].encode()) / BYTES_A_TOKEN) + _TOKENS_A_MESSAGE for each in messages)


@dataclass
class Estimate:
    """What a run will cost.

    Attributes:
      requests: number of requests to send.
      kept: number of replies that are on the disk.
      pending: number of figures that are in batch files whose results have not been read.
      others: number of replies and requests in batches for questions that this run does not ask.
      lost: number of things that were paid for and gave no reply that is kept.
      prompt_tokens: estimated number of tokens of the prompts.
      max_tokens: the most tokens of a reply.
      prices: the prices.
    """

    requests: int = 0
    kept: int = 0
    pending: int = 0
    others: int = 0
    lost: int = 0
    prompt_tokens: int = 0
    max_tokens: int = 0
    prices: Prices = Prices()

    def __str__(self) -> str:
        kept = count_of(self.kept, "reply is kept", "replies are kept")
        kept += f", {count_of(self.pending, 'figure is', 'figures are')} in batches" if self.pending else ""
        kept += f", {self.others:,} to questions that this run does not ask" if self.others else ""
        kept += f", {self.lost:,} paid for without a reply" if self.lost else ""
        if not self.requests:
            return f"no requests; {kept}"
        answers = self.requests * self.max_tokens
        cost = (f"at most {self.prices.dollars(self.prompt_tokens, answers):,.2f} US dollars" if self.prices.is_known
                else "the cost is unknown without --price_prompt and --price_answer")
        return (f"{count_of(self.requests, 'request')}; {kept}; about {self.prompt_tokens:,} prompt tokens (one per "
                f"{BYTES_A_TOKEN} bytes) and at most {answers:,} reply tokens, not counting repeated requests: {cost}")


class Budget:
    """Says whether the next request fits into a budget, with the requests in flight at their highest cost.

    Args:
      dollars: the budget; None for no limit.
      prices: the prices.
      max_tokens: the most tokens of a reply.

    Attributes:
      spent: US dollars for the replies, and for attempts without a reply, so far.
    """

    def __init__(self, dollars: float | None, prices: Prices, max_tokens: int):
        self.dollars, self.prices, self.max_tokens = dollars, prices, max_tokens
        self.spent, self._rate = 0.0, 1.0
        self._in_flight: dict[object, int] = {}
        self._reserved = 0  # tokens of all prompts in flight; a batch may have 100,000
        self._lock = threading.Lock()  # attempts are lost in the thread that sends them

    def may_send(self, key: object, prompt_tokens: int) -> bool:
        """Reserves the highest cost of a request and returns True; returns False if that exceeds the budget."""
        with self._lock:
            if not self._fits(self._highest(prompt_tokens)):
                return False
            self._release(key)
            self._in_flight[key] = prompt_tokens
            self._reserved += prompt_tokens
            return True

    def _release(self, key: object) -> int:
        tokens = self._in_flight.pop(key, 0)
        self._reserved -= tokens
        return tokens

    def _fits(self, more: float) -> bool:
        if self.dollars is None:
            return True
        reserved = self.prices.dollars(self._reserved * self._rate, len(self._in_flight) * self.max_tokens)
        return self.spent + reserved + more <= self.dollars

    def _highest(self, prompt_tokens: int) -> float:
        return self.prices.dollars(prompt_tokens * self._rate, self.max_tokens)

    def settle(self, key: object, reply: Reply) -> None:
        """Replaces a reservation by the cost of the reply."""
        with self._lock:
            estimated = self._release(key)
            if reply.prompt_tokens:
                self._rate = max(self._rate, reply.prompt_tokens / estimated)
            tokens = math.ceil(estimated * self._rate)
        self.pay(reply, tokens)

    def lose(self, key: object, counts: tuple[int, int] | None) -> tuple[tuple[int, int], bool]:
        """Pays for an attempt without a reply, and keeps the reservation for another attempt.

        Args:
          key: the request.
          counts: tokens of prompt and reply as the server counted them; None takes those that were reserved.

        Returns:
          The tokens that are counted, and whether another attempt fits into the budget.
        """
        with self._lock:
            tokens = counts or (math.ceil(self._in_flight.get(key, 0) * self._rate), self.max_tokens)
            self.spent += self.prices.dollars(*tokens)
            return tokens, self._fits(0.0)

    def free(self, key: object) -> None:
        """Gives back the reservation of a request that failed."""
        with self._lock:
            self._release(key)

    def pay(self, reply: Reply, prompt_tokens: int) -> None:
        """Adds the cost of a reply; where the server did not count, `prompt_tokens` and the text's bytes do."""
        self.pay_tokens(reply.prompt_tokens or prompt_tokens, answer_tokens(reply))

    def pay_tokens(self, prompt_tokens: float, answer: float) -> None:
        """Adds the cost of so many tokens."""
        with self._lock:
            self.spent += self.prices.dollars(prompt_tokens, answer)

    def pay_pending(self, prompt_tokens: int) -> None:
        """Adds the highest cost of a request in a batch."""
        with self._lock:
            self.spent += self._highest(prompt_tokens)


def answer_tokens(reply: Reply) -> int:
    """Returns the tokens of a reply; those of its bytes where the server did not count."""
    return reply.completion_tokens or math.ceil(len(reply.text.encode("utf-8", "replace")) / BYTES_A_TOKEN)
