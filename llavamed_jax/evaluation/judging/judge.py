"""A judge: a language model behind an API that reads answers and gives verdicts.

    judge = Judge(cfg.judge, read_prompt(cfg.judge.prompt, CHAT_PROMPT), read_scores, workdir)
    print(judge.estimate(texts))
    verdicts = judge.verdicts(texts)

Every reply is kept in a file under the hash of its request (`openai_client/cache.py`). If a reply cannot be read, the
judge is asked once more, with a reminder. If the second reply cannot be read either, the question stays unscored.
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.evaluation.judging.prompts import JudgePrompt
from llavamed_jax.openai_client.cache import ReplyCache, request_key
from llavamed_jax.utils import terminal
from llavamed_jax.utils.hashes import short_hash
from llavamed_jax.utils.progress import progress

if TYPE_CHECKING:
    from llavamed_jax.openai_client.replies import Reply

CACHE = "judge_cache.jsonl"
_BYTES_A_TOKEN = 4  # approximate value for English text; only for the estimate
_TOKENS_A_MESSAGE = 4  # role and separators


@dataclass(frozen=True)
class Verdict:
    """The verdict of a judge on one text.

    Attributes:
      value: what was read from the reply; None if the question stays unscored.
      text: the last reply, stripped.
      first_text: the first reply, stripped, if the judge was asked twice; else None.
      finish_reason: `stop`, `length`, …; shows whether the reply ended before its verdict.
      error: the reason why there is no reply; None if there is one.
      prompt_tokens: tokens of all prompts for this text, as the server counted them.
      completion_tokens: tokens of all replies for this text, as the server counted them.
      first_reply: the first reply as it came; "" if there is none.
      request: the key of the request, which equal texts share; "" if it is unknown.
    """

    value: Any = None
    text: str = ""
    first_text: str | None = None
    finish_reason: str = ""
    error: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_reply: str = ""
    request: str = ""

    @property
    def is_asked_again(self) -> bool:
        """Whether the judge was asked twice because its first reply could not be read."""
        return self.first_text is not None


@dataclass(frozen=True)
class Estimate:
    """An estimate of what judging will cost.

    Attributes:
      requests: number of requests to send.
      kept: number of replies that are on the disk already.
      prompt_tokens: approximate number of tokens of the prompts.
      answer_tokens: upper bound of the number of tokens of the replies.
      dollars: upper bound of the cost in US dollars; None if no price is given.
    """

    requests: int
    kept: int
    prompt_tokens: int
    answer_tokens: int
    dollars: float | None

    def __str__(self) -> str:
        if not self.requests:
            return f"no requests; {count_of(self.kept, 'reply is', 'replies are')} cached"
        cost = (f"at most {self.dollars:.2f} US dollars" if self.dollars is not None
                else "cost unknown (set judge.price_prompt and judge.price_answer)")
        kept = count_of(self.kept, "cached reply", "cached replies")
        return (f"{count_of(self.requests, 'request')} and {kept}; about {self.prompt_tokens:,} prompt tokens (one per "
                f"{_BYTES_A_TOKEN} bytes) and at most {self.answer_tokens:,} reply tokens, not counting repeated "
                f"requests: {cost}")


class Judge:
    """Asks a judge for verdicts, and keeps its replies.

    Args:
      cfg: the group `judge` of an eval config (`judging/settings.py`).
      prompt: the system message and the instruction.
      read: reads the verdict of a reply; returns None if it cannot be read.
      workdir: the folder where replies are kept, unless `cfg.cache` names a file.

    Attributes:
      n_kept: how many of the requested replies are on the disk.

    Raises:
      UsageError: a setting is invalid.
    """

    def __init__(self, cfg: ConfigDict, prompt: JudgePrompt, read: Callable[[str], Any], workdir: Path):
        from llavamed_jax.openai_client.client import Service  # imports openai, which takes a second

        _check(cfg)
        self.cfg, self.prompt, self._read = cfg, prompt, read
        self.settings = {"max_tokens": cfg.max_tokens, "temperature": cfg.temperature}
        self.service = Service(cfg.endpoint, cfg.model, api_key=os.environ.get("JUDGE_API_KEY") or None,
                               concurrency=cfg.concurrency, timeout=cfg.timeout, retries=cfg.retries,
                               azure_version=cfg.azure_version or None)
        self.cache = ReplyCache(Path(cfg.cache) if cfg.cache else workdir / CACHE)
        self.n_kept = 0

    def depends_on(self) -> dict[str, object]:
        """Returns what the verdicts depend on beside the config: the content of the prompt's file."""
        messages = [self.prompt.messages("", is_reminded) for is_reminded in (False, True)]
        return {"the judge's prompt": short_hash(self.prompt.wording, messages)}

    def estimate(self, texts: Sequence[str]) -> Estimate:
        """Estimates what it costs to judge these texts, without sending a request. Kept replies cost nothing."""
        to_send, kept = {}, set()
        for text in texts:
            messages = self.prompt.messages(text)
            reply = self.cache.get(self._key(messages))
            if reply is not None:
                kept.add(self._key(messages))
                if self._read(reply.text) is not None:
                    continue
                messages = self.prompt.messages(text, is_reminded=True)
            if self._key(messages) in self.cache:
                kept.add(self._key(messages))
            else:
                to_send[self._key(messages)] = messages
        prompt_tokens = sum(map(_tokens, to_send.values()))
        answer_tokens = len(to_send) * self.cfg.max_tokens
        return Estimate(len(to_send), len(kept), prompt_tokens, answer_tokens,
                        self._dollars(prompt_tokens, answer_tokens))

    def verdicts(self, texts: Sequence[str], title: str = "judged") -> list[Verdict]:
        """Asks the judge about each text. Equal texts are sent once.

        Args:
          texts: what the judge reads.
          title: what the progress bar says.

        Returns:
          One verdict for each text, in order.

        Raises:
          UserError: the judge cannot be reached at all. Earlier replies are kept.
        """
        requests = [self.prompt.messages(text) for text in texts]
        first = self._replies(requests, title)
        unread = [i for i, reply in enumerate(first) if not isinstance(reply, UserError)
                  and self._read(reply.text) is None]
        reminded = [self.prompt.messages(texts[i], is_reminded=True) for i in unread]
        again = dict(zip(unread, self._replies(reminded, f"{title}, asked again"), strict=True)) if unread else {}
        return [self._verdict(reply, again.get(i), self._key(requests[i])) for i, reply in enumerate(first)]

    def summary(self, verdicts: Sequence[Verdict]) -> dict:
        """Describes the judge and its cost for `metrics.json`. An interrupted and resumed run gives the same values.

        Equal texts are sent once, so their tokens count once.
        """
        sent = {verdict.request or number: verdict for number, verdict in enumerate(verdicts)}.values()
        prompt_tokens = sum(verdict.prompt_tokens for verdict in sent)
        completion_tokens = sum(verdict.completion_tokens for verdict in sent)
        return {
            "model": self.service.name, "endpoint": self.service.url, "temperature": self.cfg.temperature,
            "wording": self.prompt.wording,
            "n_asked_again": sum(verdict.is_asked_again for verdict in verdicts), "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens, "dollars": self._dollars(prompt_tokens, completion_tokens),
        }  # fmt: skip

    def _key(self, messages: Sequence[dict]) -> str:
        return request_key(self.cfg.model, messages, self.settings)

    def _dollars(self, prompt_tokens: int, answer_tokens: int) -> float | None:
        prices = self.cfg.price_prompt, self.cfg.price_answer
        return (prompt_tokens * prices[0] + answer_tokens * prices[1]) / 1e6 if any(prices) else None

    def _replies(self, requests: Sequence[list[dict]], title: str) -> list[Reply | UserError]:
        """Returns the reply to each request, kept or new, or the error."""
        keys = [self._key(messages) for messages in requests]
        wanted = dict(zip(keys, requests, strict=True))
        left = [key for key in wanted if key not in self.cache]
        failed: dict[str, UserError] = {}
        self.n_kept += len(wanted) - len(left)
        if left:
            advance, close = progress(len(wanted), len(wanted) - len(left), title)
            for key, reply in self._ask([(key, wanted[key]) for key in left]):
                if isinstance(reply, UserError):
                    failed[key] = reply
                else:
                    self.cache.add(key, reply)
                    self.n_kept += 1
                advance(1)
            close()
        return [failed[key] if key in failed else self.cache.get(key) for key in keys]

    def _ask(self, requests: Sequence[tuple[str, list[dict]]]) -> Iterator[tuple[str, Reply | UserError]]:
        numbered = ((number, messages) for number, (_, messages) in enumerate(requests))
        with contextlib.closing(self.service.each(numbered, **self.settings)) as found:
            for number, reply in found:
                yield requests[number][0], reply

    def _verdict(self, first: Reply | UserError, again: Reply | UserError | None, request: str) -> Verdict:
        replies = [reply for reply in (first, again) if reply is not None and not isinstance(reply, UserError)]
        error = next((str(reply) for reply in (first, again) if isinstance(reply, UserError)), None)
        if not replies:
            return Verdict(error=error, request=request)
        last = replies[-1]
        return Verdict(
            self._read(last.text), last.text.strip(), first.text.strip() if again is not None else None,
            last.finish_reason, error,
            sum(reply.prompt_tokens for reply in replies), sum(reply.completion_tokens for reply in replies),
            replies[0].text, request,
        )


def report_unscored(verdicts: Sequence[Verdict], names: Sequence[object], what: str) -> None:
    """Prints on stderr how many questions the judge was asked about twice, and which ones stay unscored.

    Args:
      verdicts: the verdicts.
      names: the ids of the questions, in the same order.
      what: a plural noun for what was judged.
    """
    again = sum(verdict.is_asked_again for verdict in verdicts)
    unscored = [terminal.sentence(str(name)) for name, verdict in zip(names, verdicts, strict=True)
                if verdict.value is None]
    if again:
        print(f"for {again} of {len(verdicts)} {what} the judge's reply could not be read, and the judge was asked "
              "again", file=sys.stderr)
    if unscored:
        print(f"warning: unscored, {len(unscored)} of {len(verdicts)} {what}: {', '.join(unscored)}", file=sys.stderr)


def check_answered(verdicts: Sequence[Verdict], what: str) -> None:
    """Raises UserError if requests failed: says how many, and gives the first error. A repeated run may succeed."""
    errors = [verdict.error for verdict in verdicts if verdict.error is not None]
    if errors:
        raise UserError(f"{len(errors)} of {len(verdicts)} {what} were not judged and are reported as unscored: "
                        f"{errors[0]}; run again to judge only these")


def _check(cfg: ConfigDict) -> None:
    if not cfg.model:
        raise UsageError("judge.model is empty; the name of the judge's model was expected: "
                         "--config.judge.model=NAME")
    if not cfg.endpoint:
        raise UsageError("judge.endpoint is empty; the address of the judge was expected: --config.judge.endpoint=URL")
    if cfg.max_tokens < 1:
        raise UsageError(f"judge.max_tokens is {cfg.max_tokens}; at least 1 was expected")
    for key in ("temperature", "price_prompt", "price_answer"):
        if not 0 <= cfg[key] < math.inf:  # a NaN raises too
            raise UsageError(f"judge.{key} is {cfg[key]}; a number of at least 0 was expected")


def _tokens(messages: Sequence[dict]) -> int:
    """Estimates the number of tokens of a request."""
    return sum(math.ceil(len(m["content"].encode("utf-8", "replace")) / _BYTES_A_TOKEN) + _TOKENS_A_MESSAGE
               for m in messages)
