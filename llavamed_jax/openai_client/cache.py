"""Stores paid replies as they come, one line each, so that a resumed run does not pay for them again."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import read_bytes, recover_jsonl, write_text
from llavamed_jax.utils.hashes import sha256

if TYPE_CHECKING:  # at run time it would import the client
    from llavamed_jax.openai_client.replies import Reply


class ReplyCache:
    """A file of replies.

    A line is an object with `key`, `text`, `finish_reason`, `prompt_tokens` and `completion_tokens`.

    An incomplete line, such as the last one of a killed process, is skipped: its question is asked again. Several runs
    may share a file as long as they only `add`, by which it grows. `forget` writes the file anew, without what other
    runs have added since it was read: who calls it must hold the file alone.

    Args:
      path: the file; made by the first `add` if it does not exist.
      what: what errors call the replies.

    Raises:
      UserError: the file cannot be read or written.
    """

    def __init__(self, path: Path, what: str = "the judge's replies"):
        self.path, self._what, self._lines = path, what, {}
        try:
            data = read_bytes(path, f"the file of {what} {path}")
        except FileNotFoundError:
            data = b""
        self._is_whole = not data or data.endswith(b"\n")
        lines, damaged = recover_jsonl(data.decode("utf-8", "replace")), 0
        for line in lines:
            try:
                self._lines.update([_kept(line)])
            except ValueError:
                damaged += 1
        if damaged:
            print(f"warning: {path}: {damaged} of {len(lines)} lines are not complete replies and are skipped",
                  file=sys.stderr)

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def __len__(self) -> int:
        return len(self._lines)

    def keys(self) -> list[str]:
        """Returns the keys of all replies."""
        return list(self._lines)

    def get(self, key: str) -> Reply | None:
        """Returns the reply under a key; None if there is none."""
        from llavamed_jax.openai_client.replies import Reply

        return Reply(**self._lines[key]) if key in self._lines else None

    def forget(self, keys: Sequence[str], is_written: bool) -> None:
        """Removes replies from the memory and, if `is_written`, from the file, which no other run may use meanwhile.

        Args:
          keys: the keys of the replies.
          is_written: whether the file is written anew.

        Raises:
          UserError: the file cannot be written.
        """
        for key in keys:
            del self._lines[key]
        if keys and is_written:
            text = "".join(json.dumps({"key": each} | kept) + "\n" for each, kept in self._lines.items())
            write_text(self.path, text)
            self._is_whole = True

    def add(self, key: str, reply: Reply) -> None:
        """Stores a reply under a key, in memory and in the file. Raises UserError if the file cannot be written."""
        fields = {name: getattr(reply, name) for name in _FIELDS}
        line = json.dumps({"key": key} | fields) + "\n"  # ASCII: a lone surrogate is escaped
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._lines and not self.path.exists():
                print(f"warning: {self.path} was removed; it is written again with its {len(self._lines)} replies",
                      file=sys.stderr)
                line = "".join(json.dumps({"key": each} | kept) + "\n" for each, kept in self._lines.items()) + line
            descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            data = ("" if self._is_whole else "\n").encode() + line.encode()
            self._is_whole = False
            with open(descriptor, "wb", buffering=0) as file:
                while data:  # a disk that is almost full takes a part of a line, and refuses the next write
                    data = data[file.write(data):]
        except OSError as error:
            raise UserError(f"{self._what} {self.path} cannot be written: {error.strerror or error}") from error
        self._is_whole = True
        self._lines[key] = fields


_FIELDS = {"text": str, "finish_reason": str, "prompt_tokens": int, "completion_tokens": int}


def _kept(line: object) -> tuple[str, dict]:
    """Returns key and fields of a line. Raises ValueError for a line that is not a reply."""
    if not isinstance(line, dict) or any(
            type(line.get(name)) is not kind for name, kind in {"key": str, **_FIELDS}.items()):
        raise ValueError
    return line["key"], {name: line[name] for name in _FIELDS}


def request_key(model: str, messages: Sequence[Mapping], settings: Mapping) -> str:
    """Returns the SHA-256 of a request. A judge is identified by its name: the address is not part of the key.

    Args:
      model: the judge's name.
      messages: OpenAI chat messages.
      settings: the request's other settings.
    """
    content = json.dumps([model, list(messages), dict(settings)], sort_keys=True)
    return sha256(content.encode())
