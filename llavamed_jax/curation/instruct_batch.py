"""Writes and reads the files of OpenAI's batch service, which `vllm run-batch` takes too.

A request file has one request a line, at most 50,000 and at most 200 MB. Its `custom_id` is the key of the question
(`InstructPrompt.key`). A question that is in a request file is pending until its result has been read: it is neither
written again nor asked online, so nothing is paid for twice. A failed result makes its question free again. A request
file that was never sent is undone by removing it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llavamed_jax.curation.figure_file import Figure
from llavamed_jax.errors import UserError, cut, warn
from llavamed_jax.openai_client.cache import ReplyCache
from llavamed_jax.utils.files import open_file, recover_jsonl, write_whole
from llavamed_jax.utils.hashes import sha256

MOST_REQUESTS = 50_000
MOST_BYTES = 200_000_000
_FAILED = "failed.jsonl"
_LONGEST_LINE = 2**26  # bytes


class Batches:
    """The request files of a run, `batch/requests-NNNNN.jsonl`, and the results that failed.

    Args:
      folder: the folder of the run.

    Attributes:
      folder: the folder of the request files.

    Raises:
      UserError: a file cannot be read.
    """

    def __init__(self, folder: Path):
        self.folder = folder / "batch"
        self._written: Counter[str] = Counter()
        for file in self.files():
            self._written.update(_ids(file))
        self._failures = {line["result"]: str(line["custom_id"]) for line in _lines(self.folder / _FAILED)
                          if isinstance(line, dict) and {"result", "custom_id"} <= line.keys()}
        self._num_failures = Counter(self._failures.values())

    def files(self) -> list[Path]:
        """Returns the request files in order."""
        return sorted(self.folder.glob("requests-*.jsonl"))

    def is_pending(self, key: str) -> bool:
        """Returns whether a request with a key was written that has not failed."""
        return self._written[key] > self._num_failures[key]

    def keys(self) -> list[str]:
        """Returns the keys of all requests that were written."""
        return list(self._written)

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
            request = {"custom_id": key, "method": "POST", "url": "/v1/chat/completions",
                       "body": body(figure)}
            line = json.dumps(request).encode() + b"\n"
            if len(line) > most_bytes:
                raise UserError(f"the request for {cut(figure.pair_id)} has {len(line):,} bytes; at most "
                                f"{most_bytes:,} were expected")
            if lines and (len(lines) == most_requests or size + len(line) > most_bytes):
                flush()
                lines, size = [], 0
            lines.append(line)
            size += len(line)
            self._written[key] += 1
        if lines:
            flush()
        return made

    def read(self, files: Iterable[Path], cache: ReplyCache) -> Counter[str]:
        """Reads files of results, adds the replies to the cache, and returns the number of results by outcome.

        A file may be read again: a result that was read before changes nothing.

        Args:
          files: the files of results and of errors, as the service wrote them.
          cache: the replies of the run.

        Raises:
          UserError: a file does not exist or cannot be read.
        """
        found: Counter[str] = Counter()
        for file in files:
            if not file.exists():
                raise UserError(f"the file of results {file} does not exist")
            for line in _lines(file):
                found[self._result(line, cache)] += 1
        return found

    def _result(self, line: object, cache: ReplyCache) -> str:
        if not isinstance(line, dict) or not isinstance(line.get("custom_id"), str):
            return "damaged lines"
        from llavamed_jax.openai_client.replies import PassingError, read_reply  # imports openai, which takes a second

        name = line["custom_id"]
        if not self._written[name]:
            return "of figures that were not in a batch"
        if name in cache:
            return "of figures that have a reply"
        response = line.get("response") if isinstance(line.get("response"), dict) else {}
        try:
            if line.get("error") or response.get("status_code") != 200:
                raise PassingError("failed")
            cache.add(name, read_reply(json.dumps(response.get("body")).encode()))
        except (PassingError, RecursionError):
            return self._failed(line, name)
        return "replies"

    def _failed(self, line: dict, name: str) -> str:
        result = sha256(json.dumps(line, sort_keys=True, default=str))
        if result not in self._failures:
            self._failures[result] = name
            self._num_failures[name] += 1
            try:
                with open(self.folder / _FAILED, "a", encoding="utf-8") as file:
                    file.write(json.dumps({"result": result, "custom_id": name}) + "\n")
            except OSError as error:
                raise UserError(f"{self.folder / _FAILED} cannot be written: {error.strerror or error}") from error
        return "failures"


def _ids(file: Path) -> Iterator[str]:
    for line in _lines(file):
        if isinstance(line, dict) and isinstance(line.get("custom_id"), str):
            yield line["custom_id"]
        else:
            warn(f"{file} has a damaged line; its figure counts as not asked")


def _lines(path: Path) -> Iterator[object]:
    """Yields the value of each line of a JSONL file, None for a damaged one; yields nothing if there is no file."""
    try:
        with open_file(path) as file:
            while line := file.readline(_LONGEST_LINE):
                yield from recover_jsonl(line.decode("utf-8", "replace"))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
