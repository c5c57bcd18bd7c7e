"""The folder of a run that generates conversations: its settings, and every reply that was paid for.

`replies.jsonl` grows by one line a reply, written before the next request is sent. So a run that was killed repeats at
most the requests that were in flight, and no question with a reply is asked again. A figure whose caption or mentions
have changed is another question. `lost.jsonl` has the tokens of what was paid for and gave no reply: attempts that
failed, and replies without content that were asked for again.

A reply without content is final, unless a run with a higher `max_tokens` comes: it asks those again, and only those.
It writes them into `lost.jsonl`, and then writes `replies.jsonl` anew without them; so the run holds the folder alone.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from llavamed_jax.curation.instruct_cost import answer_tokens
from llavamed_jax.curation.instruct_ids import BATCH, written_ids
from llavamed_jax.curation.instruct_lines import lines_of
from llavamed_jax.curation.turns import read_turns
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.openai_client.cache import ReplyCache
from llavamed_jax.utils.files import read_json, write_text
from llavamed_jax.utils.locks import is_free

if TYPE_CHECKING:  # it imports openai, which takes a second
    from llavamed_jax.openai_client.replies import Reply

KEYS = 2  # the version of the keys; in version 1 a key was the `pair_id` alone
SETTINGS, REPLIES, LOST = "settings.json", "replies.jsonl", "lost.jsonl"


class Folder:
    """The kept replies, and what was lost.

    Args:
      folder: the folder.
      is_written: whether the run writes.
      max_tokens: those of the run.

    Attributes:
      replies: the replies, by the key of what was asked (`InstructPrompt.key`).
      over: the `custom_id`s of requests since which the question is asked again with more tokens.
      lost: key, tokens of the prompt and of the reply of each thing that was paid for and gave no reply.
    """

    def __init__(self, folder: Path, is_written: bool, max_tokens: int):
        self._folder, self._path, self._is_written = folder, folder / LOST, is_written
        self.replies = ReplyCache(folder / REPLIES, "the replies")
        self.lost: list[tuple[str, int, int]] = []
        self.over: set[str] = set()
        self._again: dict[str, set[int]] = {}  # key -> the `max_tokens` of its replies that were forgotten
        for line in lines_of(self._path):
            if not isinstance(line, dict):
                continue
            key, tokens = line.get("key"), [line.get(name) for name in ("prompt_tokens", "completion_tokens")]
            if isinstance(key, str) and all(type(count) is int for count in tokens):
                if type(limit := line.get("max_tokens")) is int:
                    if limit in self._again.setdefault(key, set()):
                        continue
                    self._again[key].add(limit)
                    if limit < max_tokens:
                        names = line.get("custom_ids")
                        self.over.update(each for each in (names if isinstance(names, list) else ())
                                         if isinstance(each, str))
                    elif key in self.replies:  # the run that asked it again was killed before it forgot the reply
                        continue
                self.lost.append((key, *tokens))

    def lose(self, key: str, prompt_tokens: int, completion_tokens: int, max_tokens: int | None = None,
             identities: Collection[str] = ()) -> None:
        """Writes down what was paid for without a reply. Raises UserError if the file cannot be written.

        A reply without content that a killed run wrote down, and did not forget, is not written down again.

        Args:
          key: of what was asked.
          prompt_tokens: tokens of the prompt.
          completion_tokens: tokens of the reply.
          max_tokens: those of a reply without content that will be asked for again; None for an attempt that failed.
          identities: each `custom_id` that was written for such a reply's question.
        """
        if max_tokens is not None:
            if max_tokens in self._again.setdefault(key, set()):
                return
            self._again[key].add(max_tokens)
            self.over.update(identities)
        self.lost.append((key, prompt_tokens, completion_tokens))
        if not self._is_written:
            return
        line = {"key": key, "prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
        line |= {} if max_tokens is None else {"max_tokens": max_tokens, "custom_ids": list(identities)}
        try:
            with open(self._path, "ab") as file:
                file.write(("" if self._is_whole() else "\n").encode() + json.dumps(line).encode() + b"\n")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written: {error.strerror or error}") from error

    def _is_whole(self) -> bool:
        """Returns whether the last line is whole; that of a killed run may not be."""
        with open(self._path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0, end - 1))
            return not end or file.read(1) == b"\n"

    def ask_again(self, max_tokens: int) -> int:
        """Forgets the replies without content, which had at most `max_tokens`; returns their number."""
        keys = [key for key in self.replies.keys()
                if has_no_content(reply := self.replies.get(key)) and reply.finish_reason != "content_filter"]
        written = written_ids(self._folder) if keys else {}
        for key in keys:
            reply = self.replies.get(key)
            self.lose(key, reply.prompt_tokens, answer_tokens(reply), max_tokens, written.get(key, ()))
        self.replies.forget(keys, self._is_written)
        return len(keys)


def has_no_content(reply: Reply) -> bool:
    """Returns whether a reply is empty, withheld, only reasoning, or cut before its first answer was complete."""
    return not reply.text.strip() or reply.finish_reason == "length" and not read_turns(reply.text, True).pairs


@contextlib.contextmanager
def opened(folder: Path, settings: Mapping[str, object], is_written: bool = True) -> Iterator[Folder]:
    """Opens the folder of a run for one process at a time.

    Args:
      folder: the folder; made if it does not exist.
      settings: what the replies depend on. A folder of other settings is refused, apart from a higher `max_tokens`, and
        so is one whose replies or requests have keys of another version: all of them would be asked for again.
      is_written: whether the run writes; otherwise nothing is made or locked.

    Yields:
      The replies.

    Raises:
      UsageError: the folder holds replies that were made with other settings, or have keys of another version.
      UserError: another run uses the folder, or it cannot be written.
    """
    settings = {"keys": KEYS, **settings}
    if not is_written:
        limit = _check_settings(folder, settings)
        yield _prepared(folder, settings, limit, False)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror or error}") from None
    try:
        if not is_free(descriptor, folder):
            raise UserError(f"another run is writing in {folder}; wait for it, or choose another folder")
        limit = _check_settings(folder, settings)
        found = _prepared(folder, settings, limit, True)
        if not (folder / SETTINGS).exists() or read_json(folder / SETTINGS) != settings:
            write_text(folder / SETTINGS, _text(settings))
        yield found
    finally:
        os.close(descriptor)


def _prepared(folder: Path, settings: Mapping[str, object], limit: int | None, is_written: bool) -> Folder:
    found = Folder(folder, is_written, settings.get("max_tokens", 0))
    if limit is not None:
        count = count_of(found.ask_again(limit), "reply without content is", "replies without content are")
        print(f"--max_tokens was {limit}: {count} asked for again", flush=True)
    return found


def _check_settings(folder: Path, settings: Mapping[str, object]) -> int | None:
    """Returns the `max_tokens` of the folder if those of the settings are more, else None."""
    found = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    if found.get("keys") != KEYS and any((folder / name).exists() for name in (REPLIES, LOST, BATCH)):
        raise UsageError(f"{folder} holds replies or requests of another version of this command, which would all be "
                         f"paid for again ({SETTINGS} does not say keys {KEYS}): finish it with the version that made "
                         "it, or give another --out; nothing in it was changed")
    if not found:
        return None
    found = {**found, "keys": KEYS}
    limit = found.get("max_tokens")
    is_more = type(limit) is int and limit < settings.get("max_tokens", 0)
    for name, value in settings.items():
        if found.get(name) != value and not (name == "max_tokens" and is_more):
            same = "the same value, more," if name == "max_tokens" else "the same value,"
            raise UsageError(f"{folder} holds replies that were made with {name} {found.get(name)!r}; now it is "
                             f"{value!r}: {same} or another folder, was expected")
    return limit if is_more else None


def _text(settings: Mapping[str, object]) -> str:
    return json.dumps(dict(settings), indent=2, ensure_ascii=False) + "\n"
