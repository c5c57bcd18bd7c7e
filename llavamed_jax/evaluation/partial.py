"""Answers on their way into `predictions.jsonl`: kept batch by batch, so that a run which was stopped goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.vqa import Answer, write_text


class Partial:
    """A file of batches. Its first line is the key of what was asked; a file with another key is begun anew.

    Args:
      path: the file, for example `predictions.jsonl.partial`; its folder exists.
      key: whatever the answers depend on, in JSON's types: the model, the settings, the questions.
    Raises:
      UserError: a file that cannot be read or written.
    """

    def __init__(self, path: Path, key: Mapping):
        self.path = path
        self._batches: dict[int, list[Answer]] = {}
        head = {"key": hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()}
        lines = self._read()
        if lines and lines[0] == head:
            self._batches = {line["start"]: [Answer(**answer) for answer in line["answers"]] for line in lines[1:]}
            if self._batches:
                print(f"{path}: {len(self)} answers of an earlier start are taken over", file=sys.stderr)
        elif lines:
            print(f"{path}: its answers are of another checkpoint, configuration or data; all questions are asked anew", file=sys.stderr)
        # Written again even where it fits: the last line of a process that was killed may be half a line.
        kept = [head, *({"start": start, "answers": _plain(batch)} for start, batch in self._batches.items())]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def __len__(self) -> int:
        return sum(map(len, self._batches.values()))

    def get(self, start: int) -> list[Answer] | None:
        """The batch that begins at question `start`, where it has been answered."""
        return self._batches.get(start)

    def add(self, start: int, batch: Sequence[Answer]) -> None:
        """Keeps a batch, on the disk too."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"start": start, "answers": _plain(batch)}) + "\n")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self._batches[start] = list(batch)

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


def _plain(batch: Sequence[Answer]) -> list[dict]:
    return [dataclasses.asdict(answer) for answer in batch]
