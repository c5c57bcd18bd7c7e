"""Likes and dislikes of the page as lines of a JSONL file; the words of a conversation only if the log has them too."""

from __future__ import annotations

import json
import os
import threading
import time

from llavamed_jax.errors import UserError


class Feedback:
    """Appends ratings to a file.

    Args:
      path: the file; created if it does not exist, readable for its owner only.
      has_content: whether questions and answers are written too.

    Raises:
      UserError: the file cannot be written.
    """

    def __init__(self, path: str, has_content: bool = False):
        self._path, self._has_content, self._lock = path, has_content, threading.Lock()
        try:
            self._append(b"")
        except OSError as error:
            raise UserError(f"--feedback {path} cannot be written: {error.strerror}") from None

    def write(self, rating: str, turn: int, request: str, model: str, messages: list[dict], answer: str) -> None:
        """Writes one line.

        Args:
          rating: `like`, `dislike`, or empty if the rating was taken back.
          turn: index of the question in its conversation.
          request: the answer's name, as in the server's log.
          model: the served name.
          messages: the conversation up to the question, without images.
          answer: the answer.

        Raises:
          OSError: the line was not written.
        """
        line = {"time": round(time.time(), 3), "rating": rating or None, "request": request, "turn": turn,
                "model": model}
        if self._has_content:
            line["content"] = {"messages": messages, "answer": answer}
        self._append((json.dumps(line) + "\n").encode())

    def _append(self, data: bytes) -> None:
        with self._lock:
            descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                while data:
                    data = data[os.write(descriptor, data):]
            finally:
                os.close(descriptor)
