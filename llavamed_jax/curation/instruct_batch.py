"""Writes and reads the files of OpenAI's batch service, which `vllm run-batch` takes too.

A request file has one request a line, at most 50,000 and at most 200 MB. Its `custom_id` is the key of the question
(`InstructPrompt.key`) with a hash of the run's settings, so that a result of another run is not taken for this one's.
A question that is in a request file is pending until its result has been read: it is neither
written again nor asked online, so nothing is paid for twice. A failed result makes its question free again. A request
file that was never sent is undone by removing it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llavamed_jax.curation.figure_file import Figure
from llavamed_jax.curation.instruct_cost import tokens_of
from llavamed_jax.curation.instruct_folder import Folder
from llavamed_jax.curation.instruct_ids import BATCH, identity, ids_in, key_of, request_files
from llavamed_jax.curation.instruct_lines import lines_of
from llavamed_jax.errors import UserError, cut, warn
from llavamed_jax.utils.files import write_whole
from llavamed_jax.utils.hashes import sha256

if TYPE_CHECKING:  # it imports openai, which takes a second
    from llavamed_jax.openai_client.replies import PassingError

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
_FAILED = "failed.jsonl"


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
        self._failures = {line["result"]: str(line["custom_id"]) for line in lines_of(self.folder / _FAILED)
                          if isinstance(line, dict) and {"result", "custom_id"} <= line.keys()}
        self._num_failures = Counter(self._failures.values())

    def _add(self, name: str) -> None:
        self._written[name] += 1
        self._of_key.setdefault(key_of(name), set()).add(name)

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
            name = identity(key, self._settings)
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
            for line in lines_of(file):
                found[self._result(line, kept)] += 1
        return found

    def _result(self, line: object, kept: Folder) -> str:
        if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
            return "damaged lines"
        from llavamed_jax.openai_client.replies import PassingError, read_reply  # imports openai, which takes a second

        name = line["custom_id"]
        if not self._written[name]:
            return "of questions that were not in a batch of this run"
        if name in self._over:
            return "of questions that were asked again with more tokens"
        if key_of(name) in kept.replies:
            return "of figures that have a reply"
        response = line.get("response") if isinstance(line.get("response"), dict) else {}
        try:
            if line.get("error") or response.get("status_code") != 200:
                raise PassingError("failed")
            kept.replies.add(key_of(name), read_reply(json.dumps(response.get("body")).encode()))
        except PassingError as error:
            return self._failed(line, name, kept, error)
        except RecursionError:
            return self._failed(line, name, kept, PassingError("nested", is_billed=True))
        return "replies"

    def _failed(self, line: dict, name: str, kept: Folder, error: PassingError) -> str:
        result = sha256(json.dumps(line, sort_keys=True, default=str))
        if result not in self._failures:
            if error.is_billed:
                kept.lose(key_of(name), *(error.counts or self._most(name)))
            self._failures[result] = name
            self._num_failures[name] += 1
            try:
                with open(self.folder / _FAILED, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"result": result, "custom_id": name}) + "\n")
            except OSError as why:
                raise UserError(f"{self.folder / _FAILED} cannot be written: {why.strerror or why}") from why
        return "failures"

    def _most(self, name: str) -> tuple[int, int]:
        """Returns the tokens of a request that was written, and the most of its reply."""
        asked = next(line["body"] for file in self.files() for line in lines_of(file)
                     if isinstance(line, dict) and line.get("custom_id") == name)
        return tokens_of(asked["messages"]), asked["max_completion_tokens"]
