"""OpenAI's batch file format, which `vllm run-batch` takes too: requests and results, one JSON object a line."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamed_jax.errors import UserError, short, some, warn
from llavamed_jax.serving.remote import UNAVAILABLE
from llavamed_jax.utils import locks
from llavamed_jax.utils.files import open_file, parse_json, read_bytes, recover_jsonl, to_jsonl, write_whole

URLS = ("/v1/chat/completions", "/v1/responses")
_LONGEST_LINE = 2**28  # bytes


@dataclass(frozen=True)
class BatchRequest:
    """A line of a request file.

    Attributes:
      custom_id: its name, which is unique in the file.
      url: the route that it would be sent to.
      body: the request.
    """

    custom_id: str
    url: str
    body: Mapping[str, Any]


def requests_of(path: Path) -> Iterator[BatchRequest]:
    """Reads a request file line by line.

    Args:
      path: the file.

    Yields:
      The requests.

    Raises:
      UserError: a line is not a request, or two lines have one name; the sentence names the line.
    """
    seen: dict[str, int] = {}
    for number, where, value in _values(path):
        name = value.get("custom_id") if isinstance(value, dict) else None
        if not isinstance(name, str) or not name:
            raise UserError(f"{where} has the custom_id {short(name)}; an object with a text as custom_id was expected")
        if name in seen:
            raise UserError(f"{where} repeats the custom_id {short(name)} of line {seen[name]}; another one was "
                            "expected")
        seen[name] = number
        if value.get("method", "POST") != "POST" or value.get("url") not in URLS:
            raise UserError(f"{where} has the method {short(value.get('method'))} and the url "
                            f"{short(value.get('url'))}; POST and {' or '.join(URLS)} were expected")
        if not isinstance(value.get("body"), dict):
            raise UserError(f"{where} has the body {short(value.get('body'))}; an object was expected")
        yield BatchRequest(name, value["url"], value["body"])


def _values(path: Path) -> Iterator[tuple[int, str, Any]]:
    try:
        file = open_file(path)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; a file of batch requests was expected") from None
    with file:
        for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
            where = f"{path}, line {number}"
            try:
                text = line.decode()
            except UnicodeDecodeError as error:
                raise UserError(f"{where} is not UTF-8: {error}") from None
            if text.strip():
                yield number, where, parse_json(text, where)


class Results:
    """The file of results, which grows line by line and can be continued.

    Results of a broken line, and of requests that failed for a reason that may pass (a status of 500 and above, 408,
    429, a remote image that did not arrive), are taken out when the file is opened: these requests run again.

    Args:
      path: the file; made if it does not exist.

    Attributes:
      done: names of the requests that have a result.

    Raises:
      UserError: the file is not a file of results, cannot be written, or another process writes it.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            data = read_bytes(path)
        except FileNotFoundError:
            data = b""
        lines = recover_jsonl(data.decode("utf-8", "replace"))
        whole = [line for line in lines if line is not None]
        strange = next((line for line in whole if not isinstance(line, dict) or not isinstance(
            line.get("custom_id"), str) or not isinstance(line.get("response"), dict)), None)
        if strange is not None:
            raise UserError(f"{path} holds {short(strange)}, which is not a result of a batch; a file of results, or a "
                            "new file, was expected")
        kept = [line for line in whole if not _again(line["response"])]
        self.done = {line["custom_id"] for line in kept}
        try:
            if len(kept) < len(lines):
                warn(f"{path}: {len(lines) - len(kept)} of {len(lines)} lines are incomplete or failed on the server; "
                     "their requests run again")
                write_whole(path, lambda file: file.write(to_jsonl(kept).encode()))
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
        if not locks.is_free(self._descriptor, path):
            raise UserError(f"{path} is being written by another process")

    def check(self, names: set[str]) -> None:
        """Raises UserError if the file has results of requests that are not among `names`."""
        if foreign := sorted(self.done - names):
            raise UserError(f"{self.path} holds results of {some([short(name) for name in foreign], 3)}, which the "
                            "request file does not have; the file of an earlier run of the same requests, or a new "
                            "file, was expected")

    def add(self, custom_id: str, status: int, body: dict) -> None:
        """Appends one result. Raises UserError if it cannot be written."""
        line = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id,
                "response": {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}, "error": None}
        data = json.dumps(line).encode() + b"\n"
        try:
            while data:  # a disk that is almost full takes a part of a line, and refuses the next write
                data = data[os.write(self._descriptor, data):]
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}; it keeps what is complete: run "
                            "again to continue") from None
        self.done.add(custom_id)

    def close(self) -> None:
        """Puts the file on the disk and closes it."""
        os.fsync(self._descriptor)
        os.close(self._descriptor)


def _again(response: Mapping[str, Any]) -> bool:
    """Returns whether a request failed for a reason that may pass: of this server, or of an image's."""
    status, body = response.get("status_code"), response.get("body")
    error = body.get("error") if isinstance(body, dict) else None
    return (not isinstance(status, int) or status >= 500 or status in (408, 429)
            or isinstance(error, dict) and error.get("code") == UNAVAILABLE)
