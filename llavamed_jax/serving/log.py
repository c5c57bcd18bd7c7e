"""A structured log: one JSON object a line on stderr, without the words or pictures of a patient unless asked for."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterable
from typing import TextIO

from llavamed_jax.utils.hashes import short_hash

_NAME, _MOST_NAMES = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}"), 20
_REMEMBERED = 1000  # events


class Log:
    """Writes events.

    Args:
      has_content: whether the texts of questions and answers are written too.
      file: where the lines go; None is stderr.
    """

    def __init__(self, has_content: bool = False, file: TextIO | None = None):
        self.has_content, self._file, self._lock = has_content, file, threading.Lock()
        self._said: dict[str, None] = {}  # hashes, the oldest first

    def once(self, event: str, **fields) -> None:
        """Writes an event unless it is among the last thousand that were written so."""
        key = short_hash(event, fields)
        with self._lock:
            is_new = key not in self._said
            self._said[key] = None
            if len(self._said) > _REMEMBERED:
                del self._said[next(iter(self._said))]
        if is_new:
            self.event(event, **fields)

    def ignored(self, route: str, keys: Iterable[str]) -> None:
        """Names, once, the keys of a request that have no effect; counts those that are no names but may be texts."""
        keys = list(keys)
        names = [key for key in keys if _NAME.fullmatch(key)][:_MOST_NAMES]
        self.once("ignored", route=route, keys=names, others=len(keys) - len(names))

    def event(self, event: str, content: dict | None = None, **fields) -> None:
        """Writes one line.

        Args:
          event: what happened.
          content: texts, written only if the log has content.
          **fields: numbers, names and codes that say nothing about a patient.
        """
        line = {"time": round(time.time(), 3), "event": event, **fields}
        if content and self.has_content:
            line["content"] = content
        text = json.dumps(line, ensure_ascii=True, default=str)
        with self._lock:
            try:
                print(text, file=self._file or sys.stderr, flush=True)
            except (OSError, ValueError):  # a log that is gone stops no answers
                pass
