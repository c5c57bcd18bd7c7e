"""Answers on their way into `predictions.jsonl`: kept one by one, so that a run which was stopped goes on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answers import Answer
from llavamed_jax.evaluation.files import write_text


class Partial:
    """A file of answers. Its first line is the key of what was asked; a file with another key is begun anew.

    Each of several processes has a file of its own, and takes over what it finds in the others: they may be of an earlier start
    of more of them, or of fewer.

    Args:
      path: what the answers are on their way into, for example `predictions.jsonl`; its folder exists. The file is beside it.
      key: whatever the answers depend on, in JSON's types: the model, the settings, the questions.
      process: which of several this is.
    Attributes:
      answers: those that are kept, an earlier start's among them, by the question's place.
    Raises:
      UserError: a file that cannot be read or written.
    """

    def __init__(self, path: Path, key: Mapping, process: int = 0):
        self._final = path
        self.path = path.with_name(f"{path.name}.{process}.partial" if process else f"{path.name}.partial")
        self._head = {"answers of": hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()}
        own = _read(self.path)
        is_ours = own[:1] == [self._head]
        self.answers = self._found_by_others() | _answers(own[1:] if is_ours else [])
        if self.answers:
            print(f"{self.path}: {len(self.answers)} answers of an earlier start are taken over", file=sys.stderr)
        if own and not is_ours:
            print(f"{self.path}: its answers are of another checkpoint, configuration or data; all questions are asked anew",
                  file=sys.stderr)
        # Written again even where it fits: the last line of a process that was killed may be half a line.
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in [self._head, *(own[1:] if is_ours else [])]))

    def __len__(self) -> int:
        """Answers on the disk, those of other processes among them."""
        return len(self._found_by_others() | self.answers)

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
        """Deletes the file, and those of others: the answers stand under their final name."""
        for file in (self.path, *self._of_others()):
            file.unlink(missing_ok=True)

    def _found_by_others(self) -> dict[int, Answer]:
        files = map(_read, self._of_others())
        return {i: answer for lines in files if lines[:1] == [self._head] for i, answer in _answers(lines[1:]).items()}

    def _of_others(self) -> list[Path]:
        pattern = re.compile(re.escape(self._final.name) + r"(\.\d+)?\.partial")
        return sorted(file for file in self._final.parent.iterdir() if pattern.fullmatch(file.name) and file != self.path)


def _answers(lines: Sequence[Mapping]) -> dict[int, Answer]:
    return {line["question"]: Answer(**{key: value for key, value in line.items() if key != "question"}) for line in lines}


def _read(path: Path) -> list[dict]:
    """The lines of a file up to the first that is not whole; none where there is no file."""
    try:
        text = path.read_bytes().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    lines = []
    for line in text.split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            break
    return lines
