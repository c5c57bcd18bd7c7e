"""Answers on their way into `predictions.jsonl`: kept one by one, so that a run which was stopped goes on."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.utils.changes import changes
from llavamed_jax.utils.files import read_bytes, recover_jsonl, write_text
from llavamed_jax.utils.hashes import sha256


class Partial:
    """A file of answers. Its first line is the key of what was asked: the answers of another key stay, and are not taken over.

    Each of several processes has a file of its own, and takes over what it finds in the others: they may be of an earlier start
    of more of them, or of fewer. A file of another evaluation is set aside when the first answer comes
    (`predictions.jsonl.of-KEY.partial`), and taken over by a start of that evaluation.

    Args:
      path: what the answers are on their way into, for example `predictions.jsonl`; its folder exists. The file is beside it.
      key: whatever the answers depend on (`asked.key`): its name -> a value in JSON's types.
      process, count: which of several this is, and how many there are.
      check: raises where the folder is no longer the one that it was.
      machine: what else the last digits may follow from; where it has changed, that is said.
    Attributes:
      answers: those that are kept, an earlier start's among them, by the question's place.
      is_begun: whether this start has written the file.
    Raises:
      UserError: a file that cannot be read or written.
    """

    def __init__(self, path: Path, key: Mapping, process: int = 0, machine: Mapping | None = None, count: int = 1,
                 check: Callable[[], None] = lambda: None):
        self._final, self._process, self._count, self._check = path, process, count, check
        self.path = path.with_name(f"{path.name}.{process}.partial" if process else f"{path.name}.partial")
        follows = json.loads(json.dumps(dict(key), default=str))
        digest = sha256(json.dumps(follows, sort_keys=True).encode())
        self._head = {"answers of": digest, "follow from": follows, "machine": json.loads(json.dumps(dict(machine or {}), default=str))}
        found = _read(self.path)
        other = [] if self._is_ours(found) else found
        own = found if self._is_ours(found) else []
        self._kept, damaged = _answers(own[1:])
        self.answers = self._found_by_others() | self._kept
        self.is_begun = False
        if self.answers:
            print(f"{self.path}: {len(self.answers)} answers of an earlier start are taken over", file=sys.stderr)
            self._say_machine([own, *map(_read, self._of_others())])
        if damaged:
            print(f"warning: {self.path}: {damaged} of {len(own) - 1} lines are no whole answers and are passed over", file=sys.stderr)
        if other:
            print(f"warning: {self.path}: its {len(_answers(other[1:])[0])} answers are of another evaluation ({self._changes(other[0])}); "
                  f"they are set aside as {_aside(self.path, other[0]).name}, and all questions are asked anew", file=sys.stderr)

    def _is_ours(self, lines: Sequence[object]) -> bool:
        return bool(lines) and isinstance(lines[0], dict) and lines[0].get("answers of") == self._head["answers of"]

    def _changes(self, head: object) -> str:
        """What the other evaluation followed from and this one does not."""
        earlier = head.get("follow from") if isinstance(head, dict) else None
        if not isinstance(earlier, dict):
            return "it does not say what they follow from"
        return f"not the same: {changes(earlier, self._head['follow from'])}"

    def _say_machine(self, files: Sequence[Sequence[object]]) -> None:
        machines = [lines[0].get("machine") for lines in files if self._is_ours(lines) and len(lines) > 1]
        other = next((each for each in machines if isinstance(each, dict) and each != self._head["machine"]), None)
        if other is not None:
            print(f"warning: {self.path}: the answers that are taken over came from another machine "
                  f"({changes(other, self._head['machine'])}); last digits, and so a rare answer, may differ", file=sys.stderr)

    def __len__(self) -> int:
        """Answers on the disk, those of other processes among them."""
        self._find_again()
        return len(self._found_by_others() | self.answers)

    def add(self, question: int, answer: Answer) -> None:
        """Keeps the answer to the question at a place, on the disk too. The first one begins the file: until then the workdir is as
        it was."""
        self._check()
        self._find_again()
        self._begin()
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(question, answer))
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {error.strerror or error}") from error
        self.answers[question] = self._kept[question] = answer

    def remove(self) -> None:
        """Deletes the file, and those of others: the answers stand under their final name. What is set aside stays."""
        for file in (self.path, *self._of_others()):
            if self._number(file) is not None or file == self.path or self._is_ours(_read(file)):
                file.unlink(missing_ok=True)

    def _find_again(self) -> None:
        """Writes the file anew that was removed since it was begun: its answers are still here."""
        if self.is_begun and not self.path.exists():
            self.is_begun = False
            self._begin()
            print(f"warning: {self.path} was removed while the evaluation ran; it is written anew, with the {len(self._kept)} answers "
                  "that it held", file=sys.stderr)

    def _begin(self) -> None:
        """Writes the key and what was taken over. Also where the file fits: its last line may be half a line of a killed process."""
        if not self.is_begun:
            self._set_aside()
            write_text(self.path, json.dumps(self._head) + "\n" + "".join(_line(*item) for item in self._kept.items()))
            self.is_begun = True

    def _set_aside(self) -> None:
        """Renames the file of another evaluation; the first process also those of processes that are no longer there."""
        gone = [file for file in self._of_others() if (number := self._number(file)) is not None and number >= self._count]
        for file in [self.path, *([] if self._process else gone)]:
            lines = _read(file)
            if lines and not self._is_ours(lines):
                try:
                    os.rename(file, _aside(file, lines[0]))
                except OSError as error:
                    raise UserError(f"{file} cannot be renamed: {error.strerror or error}") from error

    def _found_by_others(self) -> dict[int, Answer]:
        files = map(_read, self._of_others())
        return {i: answer for lines in files if self._is_ours(lines) for i, answer in _answers(lines[1:])[0].items()}

    def _number(self, file: Path) -> int | None:
        """Which process a file is of; None for one that is set aside."""
        match = re.fullmatch(re.escape(self._final.name) + r"(?:\.(\d+))?\.partial", file.name)
        return None if match is None else int(match[1] or 0)

    def _of_others(self) -> list[Path]:
        pattern = re.compile(re.escape(self._final.name) + r"(\.\d+)?(\.of-\w+(-\d+)?)?\.partial")
        return sorted(file for file in self._final.parent.iterdir() if pattern.fullmatch(file.name) and file != self.path)


def num_answers(path: Path) -> int:
    """How many whole answers a file of kept answers has, whatever it is of."""
    return len(_answers(_read(path)[1:])[0])


def _aside(file: Path, head: object) -> Path:
    """Where the file of another evaluation goes: a name that is free."""
    digest = str(head.get("answers of"))[:8] if isinstance(head, dict) else ""
    name = digest if re.fullmatch("[0-9a-f]{8}", digest) else "unknown"
    stem = file.name.removesuffix(".partial")
    paths = (file.with_name(f"{stem}.of-{name}{f'-{n}' if n else ''}.partial") for n in itertools.count())
    return next(path for path in paths if not path.exists())


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
    return recover_jsonl(text)
