"""Answers on their way into `predictions.jsonl`: kept one by one, so that a run which was stopped goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.asking import Answer
from llavamed_jax.evaluation.files import write_text


class Partial:
    """A file of answers. Its first line is the key of what was asked; a file with another key is begun anew.

    Args:
      path: the file, for example `predictions.jsonl.partial`; its folder exists.
      key: whatever the answers depend on, in JSON's types: the model, the settings, the questions.
    Attributes:
      answers: those that are kept, an earlier start's among them, by the question's place.
    Raises:
      UserError: a file that cannot be read or written.
    """

    def __init__(self, path: Path, key: Mapping):
        self.path = path
        head = {"answers of": hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()}
        lines, kept = self._read(), []
        if lines and lines[0] == head:
            kept = lines[1:]
            if kept:
                print(f"{path}: {len(kept)} answers of an earlier start are taken over", file=sys.stderr)
        elif lines:
            print(f"{path}: its answers are of another model, configuration or data; all questions are asked anew", file=sys.stderr)
        self.answers = {line.pop("question"): Answer(**line) for line in map(dict, kept)}
        # Written again even where it fits: the last line of a process that was killed may be half a line.
        write_text(path, "".join(json.dumps(line) + "\n" for line in [head, *kept]))

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, question: int, answer: Answer) -> None:
        """Keeps the answer to the question at a place, on the disk too."""
        line = json.dumps({"question": question, **dataclasses.asdict(answer)}) + "\n"
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.answers[question] = answer

    def remove(self) -> None:
        """Deletes the file: the answers stand under their final name."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> list[dict]:
        """The lines up to the first that is not whole; none where there is no file."""
        if not self.path.exists():
            return []
        try:
            text = self.path.read_bytes().decode("utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror or error}") from error
        lines = []
        for line in text.split("\n"):
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
        return lines
