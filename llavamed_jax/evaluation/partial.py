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
from llavamed_jax.utils.files import read_bytes


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
        found = _read(self.path)
        own = found if found[:1] == [self._head] else []
        self._kept, damaged = _answers(own[1:])
        self.answers = self._found_by_others() | self._kept
        self._is_begun = False
        if self.answers:
            print(f"{self.path}: {len(self.answers)} answers of an earlier start are taken over", file=sys.stderr)
        if damaged:
            print(f"warning: {self.path}: {damaged} of {len(own) - 1} lines are no whole answers and are passed over", file=sys.stderr)
        if found and not own:
            print(f"{self.path}: its answers are of another checkpoint, configuration or data; all questions are asked anew",
                  file=sys.stderr)

    def __len__(self) -> int:
        """Answers on the disk, those of other processes among them."""
        return len(self._found_by_others() | self.answers)

    def add(self, question: int, answer: Answer) -> None:
        """Keeps the answer to the question at a place, on the disk too. The first one begins the file: until then the workdir is as
        it was."""
        self._begin()
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(question, answer))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.answers[question] = answer

    def remove(self) -> None:
        """Deletes the file, and those of others: the answers stand under their final name."""
        for file in (self.path, *self._of_others()):
            file.unlink(missing_ok=True)

    def _begin(self) -> None:
        """Writes the key and what was taken over. Also where the file fits: its last line may be half a line of a killed process."""
        if not self._is_begun:
            write_text(self.path, json.dumps(self._head) + "\n" + "".join(_line(*item) for item in self._kept.items()))
            self._is_begun = True

    def _found_by_others(self) -> dict[int, Answer]:
        files = map(_read, self._of_others())
        return {i: answer for lines in files if lines[:1] == [self._head] for i, answer in _answers(lines[1:])[0].items()}

    def _of_others(self) -> list[Path]:
        pattern = re.compile(re.escape(self._final.name) + r"(\.\d+)?\.partial")
        return sorted(file for file in self._final.parent.iterdir() if pattern.fullmatch(file.name) and file != self.path)


def _line(question: int, answer: Answer) -> str:
    return json.dumps({"question": question, **dataclasses.asdict(answer)}) + "\n"


_FIELDS = {"question": int, "text": str, "finish_reason": str, "tokens_cut": int}


def _answers(lines: Sequence[object]) -> tuple[dict[int, Answer], int]:
    """The answers of lines, by the question's place, and how many lines hold none: half a line, or JSON of another shape."""
    whole = [line for line in lines if isinstance(line, dict) and {name: type(value) for name, value in line.items()} == _FIELDS
             and line["question"] >= 0]
    return {line["question"]: Answer(line["text"], line["finish_reason"], line["tokens_cut"]) for line in whole}, len(lines) - len(whole)


def _read(path: Path) -> list[object]:
    """The values of a file's lines, None for one that is no JSON; no lines where there is no file."""
    try:
        text = read_bytes(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return [_value(line) for line in text.split("\n") if line.strip()]


def _value(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
