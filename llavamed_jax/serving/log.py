"""A structured log: one JSON object a line on stderr, without the words or pictures of a patient unless asked for."""

from __future__ import annotations

import json
import sys
import threading
import time
from typing import TextIO


class Log:
    """Writes events.

    Args:
      has_content: whether the texts of questions and answers are written too.
      file: where the lines go; None is stderr.
    """

    def __init__(self, has_content: bool = False, file: TextIO | None = None):
        self.has_content, self._file, self._lock = has_content, file, threading.Lock()
        self._said: set[str] = set()

    def once(self, event: str, **fields) -> None:
        """Writes an event unless it was written with these fields before, for the first thousand of them."""
        key = json.dumps([event, fields], default=str)
        if key not in self._said and len(self._said) < 1000:
            self._said.add(key)
            self.event(event, **fields)

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
