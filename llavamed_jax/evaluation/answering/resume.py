"""Keeps answers one by one while an evaluation runs, so that an interrupted evaluation can resume."""

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
    """A file of answers. Its first line is the key of the evaluation; answers under another key are never reused.

    Each process has its own file. It also reads the files of the others, because the interrupted run may have had
    another number of processes. If the file belongs to another evaluation, it is renamed to
    `predictions.jsonl.of-KEY.partial` when the first answer arrives; a run of that other evaluation reuses it.

    Args:
      path: the final file, for example `predictions.jsonl`; its folder exists. The partial file lies beside it.
      key: everything that the answers depend on (`asked.key`): name -> a value of a JSON type.
      process: index of this process.
      machine: what else the last digits may depend on. A change of it is printed.
      count: number of processes.
      check: raises if the folder was removed, moved or replaced.

    Attributes:
      path: the partial file.
      answers: all kept answers, including those of earlier starts, by index of the question.
      is_begun: whether this start has written the file.

    Raises:
      UserError: a file cannot be read or written.
    """

    def __init__(self, path: Path, key: Mapping, process: int = 0, machine: Mapping | None = None, count: int = 1,
                 check: Callable[[], None] = lambda: None):
        self._final, self._process, self._count, self._check = path, process, count, check
        self.path = path.with_name(f"{path.name}.{process}.partial" if process else f"{path.name}.partial")
        follows = json.loads(json.dumps(dict(key), default=str))
        digest = sha256(json.dumps(follows, sort_keys=True).encode())
        self._head = {"answers of": digest, "follow from": follows,
                      "machine": json.loads(json.dumps(dict(machine or {}), default=str))}
        found = _read(self.path)
        other = [] if self._is_ours(found) else found
        own = found if self._is_ours(found) else []
        self._kept, damaged = _answers(own[1:])
        self.answers = self._found_by_others() | self._kept
        self.is_begun = False
        if self.answers:
            print(f"{self.path}: {len(self.answers)} answers of an earlier start are reused", file=sys.stderr)
            self._say_machine([own, *map(_read, self._of_others())])
        if damaged:
            print(f"warning: {self.path}: {damaged} of {len(own) - 1} lines are not complete answers and are skipped",
                  file=sys.stderr)
        if other:
            print(f"warning: {self.path}: its {len(_answers(other[1:])[0])} answers belong to another evaluation "
                  f"({self._changes(other[0])}); the file is renamed to {_aside(self.path, other[0]).name}, and all "
                  "questions are asked again", file=sys.stderr)

    def _is_ours(self, lines: Sequence[object]) -> bool:
        return bool(lines) and isinstance(lines[0], dict) and lines[0].get("answers of") == self._head["answers of"]

    def _changes(self, head: object) -> str:
        """Describes the differences between the other evaluation's key and this one's."""
        earlier = head.get("follow from") if isinstance(head, dict) else None
        if not isinstance(earlier, dict):
            return "the file does not record its settings"
        return f"different: {changes(earlier, self._head['follow from'])}"

    def _say_machine(self, files: Sequence[Sequence[object]]) -> None:
        machines = [lines[0].get("machine") for lines in files if self._is_ours(lines) and len(lines) > 1]
        other = next((each for each in machines if isinstance(each, dict) and each != self._head["machine"]), None)
        if other is not None:
            print(f"warning: {self.path}: the reused answers came from another machine "
                  f"({changes(other, self._head['machine'])}); rounding may differ there, and in rare cases an answer",
                  file=sys.stderr)

    def __len__(self) -> int:
        """Number of answers on the disk, including those of other processes."""
        self._find_again()
        return len(self._found_by_others() | self.answers)

    def add(self, question: int, answer: Answer) -> None:
        """Keeps an answer, in memory and on the disk.

        The first answer creates the file; until then the workdir is unchanged.

        Args:
          question: index of the question.
          answer: the answer to it.
        """
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
        """Deletes the partial files of all processes once the final file exists. Files of other evaluations stay."""
        for file in (self.path, *self._of_others()):
            if self._number(file) is not None or file == self.path or self._is_ours(_read(file)):
                file.unlink(missing_ok=True)

    def _find_again(self) -> None:
        """Writes the file again, from memory, if it was removed while this run was writing it."""
        if self.is_begun and not self.path.exists():
            self.is_begun = False
            self._begin()
            print(f"warning: {self.path} was removed during the evaluation; it is written again with its "
                  f"{len(self._kept)} answers", file=sys.stderr)

    def _begin(self) -> None:
        """Writes the key and the reused answers.

        A file of this evaluation is rewritten too, because a killed process may have left half a line at its end.
        """
        if not self.is_begun:
            self._set_aside()
            write_text(self.path, json.dumps(self._head) + "\n" + "".join(_line(*item) for item in self._kept.items()))
            self.is_begun = True

    def _set_aside(self) -> None:
        """Renames this process's file if it is of another evaluation.

        The first process also renames the files of processes that this run does not have.
        """
        gone = [file for file in self._of_others() if (number := self._number(file)) is not None
                and number >= self._count]
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
        """Returns the index of the process that a file belongs to; None for the file of another evaluation."""
        match = re.fullmatch(re.escape(self._final.name) + r"(?:\.(\d+))?\.partial", file.name)
        return None if match is None else int(match[1] or 0)

    def _of_others(self) -> list[Path]:
        pattern = re.compile(re.escape(self._final.name) + r"(\.\d+)?(\.of-\w+(-\d+)?)?\.partial")
        return sorted(file for file in self._final.parent.iterdir() if pattern.fullmatch(file.name)
                      and file != self.path)


def num_answers(path: Path) -> int:
    """Returns the number of complete answers in a partial file of any evaluation."""
    return len(_answers(_read(path)[1:])[0])


def _aside(file: Path, head: object) -> Path:
    """Returns an unused name for the file of another evaluation."""
    digest = str(head.get("answers of"))[:8] if isinstance(head, dict) else ""
    name = digest if re.fullmatch("[0-9a-f]{8}", digest) else "unknown"
    stem = file.name.removesuffix(".partial")
    paths = (file.with_name(f"{stem}.of-{name}{f'-{n}' if n else ''}.partial") for n in itertools.count())
    return next(path for path in paths if not path.exists())


def _line(question: int, answer: Answer) -> str:
    said = dataclasses.asdict(answer)
    if answer.has_question:  # what a line does not say
        del said["has_question"]
    return json.dumps({"question": question, **said}) + "\n"


_FIELDS = {"question": int, "text": str, "finish_reason": str, "tokens_cut": int, "has_question": bool}
_DEFAULTS = {"has_question": True}


def _answers(lines: Sequence[object]) -> tuple[dict[int, Answer], int]:
    """Returns the answers by index of the question, and the number of invalid lines, such as half a line."""
    said = (_DEFAULTS | line for line in lines if isinstance(line, dict))
    whole = [line for line in said
             if {name: type(value) for name, value in line.items()} == _FIELDS and line["question"] >= 0]
    found = {line["question"]: Answer(**{name: line[name] for name in _FIELDS if name != "question"}) for line in whole}
    return found, len(lines) - len(whole)


def _read(path: Path) -> list[object]:
    """Reads the JSON value of each line, None for an invalid line; returns no lines if the file does not exist."""
    try:
        text = read_bytes(path).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return recover_jsonl(text)
