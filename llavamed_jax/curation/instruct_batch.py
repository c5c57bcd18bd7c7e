"""Writes and reads the files of OpenAI's batch service, which `vllm run-batch` takes too.

A request file has one request a line, at most 50,000 and at most 200 MB. Its `custom_id` is the key of the question
(`InstructPrompt.key`) with a hash of the run's settings and of how many requests had the question before, so that a
result of another run, or of an earlier request, is not taken for this one's. A question that is in a request file is
pending until its result has been read: it is neither written again nor asked online, so nothing is paid for twice. A
failed result makes its question free again. A request file that was never sent is undone by removing it.

`failed.jsonl` and `replied.jsonl` name the results that were read, so that a result that is read again counts once.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llavamed_jax.curation.figure_file import Figure
from llavamed_jax.curation.instruct_cost import BYTES_A_TOKEN, answer_tokens, tokens_of
from llavamed_jax.curation.instruct_folder import Folder
from llavamed_jax.curation.instruct_ids import BATCH, identity, ids_in, key_of, request_files
from llavamed_jax.curation.instruct_lines import lines_of
from llavamed_jax.errors import UserError, count_of, cut, short, warn
from llavamed_jax.utils.files import write_whole
from llavamed_jax.utils.hashes import sha256

if TYPE_CHECKING:  # it imports openai, which takes a second
    from llavamed_jax.openai_client.replies import PassingError, Reply

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
_FAILED, _REPLIED = "failed.jsonl", "replied.jsonl"
_DAMAGED, _HAS_REPLY = "damaged lines", "of figures that have a reply"


class Batches:
    """The request files of a run, `batch/requests-NNNNN.jsonl`, and the results that failed.

    Args:
      folder: the folder of the run.
      settings: the settings of the run, of which each new `custom_id` has a hash.
      over: each `custom_id` since which the question is asked again with more tokens.

    Attributes:
      folder: the folder of the request files.

    Raises:
      UserError: a file cannot be read.
    """

    def __init__(self, folder: Path, settings: Mapping[str, object] | None = None,
                 over: Collection[str] = ()):
        self._run, self.folder, self._settings, self._over = folder, folder / BATCH, dict(settings or {}), over
        self._written: Counter[str] = Counter()  # by custom_id, as the failures
        self._of_key: dict[str, set[str]] = {}
        for file in self.files():
            for each in ids_in(file):
                if each is None:
                    warn(f"{file} has a damaged line; its figure counts as not asked")
                else:
                    self._add(each)
        self._failures = self._noted(_FAILED)  # hash of a result -> custom_id
        self._num_failures = Counter(self._failures.values())
        self._results: dict[str, set[str]] = {}  # key -> hashes of the results that had a reply
        for result, name in self._noted(_REPLIED).items():
            self._results.setdefault(key_of(name), set()).add(result)

    def _add(self, name: str) -> None:
        self._written[name] += 1
        self._of_key.setdefault(key_of(name), set()).add(name)

    def _new_id(self, key: str) -> str:
        """Returns a `custom_id` that no request of a question had, so that a result belongs to one request."""
        names = (identity(key, self._settings, number) for number in itertools.count())
        return next(name for name in names if not self._written[name] and not self._num_failures[name])

    def files(self) -> list[Path]:
        """Returns the request files in order."""
        return request_files(self._run)

    def is_pending(self, key: str) -> bool:
        """Returns whether a request with a key was written that has not failed."""
        return any(self._written[each] > self._num_failures[each] and each not in self._over
                   for each in self._of_key.get(key, ()))

    def keys(self) -> list[str]:
        """Returns the keys of all requests that were written."""
        return list(self._of_key)

    def write(self, figures: Iterable[tuple[str, Figure]], body: Callable[[Figure], dict],
              most_requests: int = MOST_REQUESTS, most_bytes: int = MOST_BYTES) -> list[tuple[Path, int]]:
        """Writes requests into as many files as they need. A file is complete or does not exist.

        Args:
          figures: the key of each question, and its figure.
          body: returns the body of a figure's request.
          most_requests: the most requests a file.
          most_bytes: the most bytes a file.

        Returns:
          The new files, and the number of requests in each.

        Raises:
          UserError: a file cannot be written, or one request alone is too large.
        """
        numbers = [int(file.stem.rpartition("-")[2]) for file in self.files() if file.stem[-1].isdigit()]
        number, made, lines, size = max(numbers, default=0), [], [], 0

        def flush():
            nonlocal number
            number += 1
            file = self.folder / f"requests-{number:05d}.jsonl"
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(file, lambda out: out.writelines(lines))
            except OSError as error:
                raise UserError(f"{file} cannot be written: {error.strerror or error}") from error
            made.append((file, len(lines)))

        for key, figure in figures:
            name = self._new_id(key)
            request = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body(figure)}
            line = json.dumps(request).encode() + b"\n"
            if len(line) > most_bytes:
                raise UserError(f"the request for {cut(figure.pair_id)} has {len(line):,} bytes; at most "
                                f"{most_bytes:,} were expected")
            if lines and (len(lines) == most_requests or size + len(line) > most_bytes):
                flush()
                lines, size = [], 0
            lines.append(line)
            size += len(line)
            self._add(name)
        if lines:
            flush()
        return made

    def read(self, files: Iterable[Path], kept: Folder) -> Counter[str]:
        """Reads files of results, adds the replies to the cache, and returns the number of results by outcome.

        A file may be read again: a result that was read before changes nothing.

        Args:
          files: the files of results and of errors, as the service wrote them.
          kept: the replies of the run, and what was lost.

        Raises:
          UserError: a file does not exist or cannot be read.
        """
        found: Counter[str] = Counter()
        for file in files:
            if not file.exists():
                raise UserError(f"the file of results {file} does not exist")
            of_file = Counter(self._result(line, kept) for line in lines_of(file))
            if of_file and not of_file.keys() - {_DAMAGED}:
                raise UserError(f"{file} has no result in its {count_of(of_file[_DAMAGED], 'line')}; a file of results "
                                "or of errors, each with its custom_id and a response or an error, was expected")
            found += of_file
        return found

    def _result(self, line: object, kept: Folder) -> str:
        if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
            return _DAMAGED
        response = line.get("response") if isinstance(line.get("response"), dict) else {}
        if not line.get("error") and "status_code" not in response:
            return _DAMAGED
        from llavamed_jax.openai_client.replies import PassingError  # imports openai, which takes a second

        name = line["custom_id"]
        if not self._written[name]:
            return "of questions that were not in a batch of this run"
        if name in self._over:
            return "of questions that were asked again with more tokens"
        try:
            reply = _reply(line.get("error"), response)
        except PassingError as error:
            return self._failed(line, name, kept, error)
        except RecursionError:
            return self._failed(line, name, kept, PassingError("nested", is_billed=True))
        return self._replied(line, name, kept, reply)

    def _replied(self, line: dict, name: str, kept: Folder, reply: Reply) -> str:
        """Keeps the reply of a result; counts it as lost if its question has a reply that another result gave."""
        key, result = key_of(name), _digest(line)
        before = self._results.setdefault(key, set())
        is_new, is_first = result not in before, key not in kept.replies
        is_paid = reply.text or reply.prompt_tokens or reply.finish_reason != "content_filter"
        # A kept reply without a noted result came online, or is of an earlier version.
        is_further = is_new and not is_first and is_paid and (before or reply != kept.replies.get(key))
        if is_further:
            most = self._most(name)
            kept.lose(key, reply.prompt_tokens or most[0], answer_tokens(reply))
        if is_new:  # before the reply is kept, so that a kill between them does not make a second one of it
            before.add(result)
            self._note(_REPLIED, result, name)
        if is_first:
            kept.replies.add(key, reply)
            return "replies"
        return "further replies, which count as paid for" if is_further else _HAS_REPLY

    def _failed(self, line: dict, name: str, kept: Folder, error: PassingError) -> str:
        result, has_reply = _digest(line), key_of(name) in kept.replies
        if result not in self._failures and (error.is_billed or not has_reply):
            if error.is_billed:
                kept.lose(key_of(name), *(error.counts or self._most(name)))
            self._failures[result] = name
            self._num_failures[name] += 1
            self._note(_FAILED, result, name)
        return _HAS_REPLY if has_reply else "failures"

    def _note(self, file: str, result: str, name: str) -> None:
        try:
            with open(self.folder / file, "a", encoding="utf-8") as out:
                out.write(json.dumps({"result": result, "custom_id": name}) + "\n")
        except OSError as why:
            raise UserError(f"{self.folder / file} cannot be written: {why.strerror or why}") from why

    def _noted(self, file: str) -> dict[str, str]:
        """Returns hash -> `custom_id` of the results that were noted in a file."""
        return {str(line["result"]): str(line["custom_id"]) for line in lines_of(self.folder / file)
                if isinstance(line, dict) and {"result", "custom_id"} <= line.keys()}

    def _most(self, name: str) -> tuple[int, int]:
        """Returns the tokens of a request that was written, and the most of its reply."""
        return self._asked.get(name, (0, self._settings.get("max_tokens", 0)))

    @functools.cached_property
    def _asked(self) -> dict[str, tuple[int, int]]:
        """`custom_id` -> tokens of the prompt, and the most of its reply, of each request; users may edit the files."""
        found = {}
        for line in itertools.chain.from_iterable(map(lines_of, self.files())):
            if isinstance(line, dict) and isinstance(line.get("custom_id"), str):
                body = line.get("body") if isinstance(line.get("body"), dict) else {}
                limit = body.get("max_completion_tokens", body.get("max_tokens"))
                found[line["custom_id"]] = _prompt_tokens(body.get("messages")), (
                    limit if type(limit) is int and limit > 0 else self._settings.get("max_tokens", 0))
        return found


def _reply(error: object, response: Mapping) -> Reply:
    """Returns the reply of a result; raises PassingError if it has none, and RecursionError as `json.dumps` does."""
    from llavamed_jax.openai_client.replies import PassingError, read_reply, withheld

    status, body = str(response.get("status_code", 400)), response.get("body")  # some services give the error alone
    if not error and status == "200":
        return read_reply(json.dumps(body).encode())
    for each in (error, body) if status == "400" else ():
        inner = each.get("error", each) if isinstance(each, dict) else None
        if isinstance(inner, dict) and (empty := withheld(400, inner.get("code"))) is not None:
            return empty
    raise PassingError("failed")


def _digest(line: dict) -> str:
    """Returns the hash by which a result is known when it is read again."""
    try:
        return sha256(json.dumps(line, sort_keys=True, default=str))
    except RecursionError:
        return sha256(f"{line['custom_id']} {short(line.get('id'))}")


def _prompt_tokens(messages: object) -> int:
    try:
        return tokens_of(messages)
    except (TypeError, KeyError, AttributeError, ValueError):  # messages of another form
        return math.ceil(len(json.dumps(messages)) / BYTES_A_TOKEN)
