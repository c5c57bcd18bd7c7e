"""The folder of a run that generates conversations: its settings, and every reply that was paid for.

`replies.jsonl` grows by one line a reply, written before the next request is sent, and is never rewritten. So a run
that was killed repeats at most the requests that were in flight, and no question with a reply is asked again. A figure
whose caption or mentions have changed is another question.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.openai_client.cache import ReplyCache
from llavamed_jax.utils.files import read_json, write_text
from llavamed_jax.utils.locks import is_free

SETTINGS, REPLIES = "settings.json", "replies.jsonl"


@contextlib.contextmanager
def opened(folder: Path, settings: Mapping[str, object], is_written: bool = True) -> Iterator[ReplyCache]:
    """Opens the folder of a run for one process at a time.

    Args:
      folder: the folder; made if it does not exist.
      settings: what the replies depend on. A folder of other settings is refused.
      is_written: whether the run writes; otherwise nothing is made or locked.

    Yields:
      The replies, by the key of what was asked (`InstructPrompt.key`).

    Raises:
      UsageError: the folder holds replies that were made with other settings.
      UserError: another run uses the folder, or it cannot be written.
    """
    if not is_written:
        _check_settings(folder, settings)
        yield ReplyCache(folder / REPLIES, "the replies")
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror or error}") from None
    try:
        if not is_free(descriptor, folder):
            raise UserError(f"another run is writing in {folder}; wait for it, or choose another folder")
        _check_settings(folder, settings)
        if not (folder / SETTINGS).exists():
            write_text(folder / SETTINGS, _text(settings))
        yield ReplyCache(folder / REPLIES, "the replies")
    finally:
        os.close(descriptor)


def _check_settings(folder: Path, settings: Mapping[str, object]) -> None:
    if not (folder / SETTINGS).exists():
        return
    found = read_json(folder / SETTINGS)
    for name, value in settings.items():
        if found.get(name) != value:
            raise UsageError(f"{folder} holds replies that were made with {name} {found.get(name)!r}; now it is "
                             f"{value!r}: the same value, or another folder, was expected")


def _text(settings: Mapping[str, object]) -> str:
    return json.dumps(dict(settings), indent=2, ensure_ascii=False) + "\n"
