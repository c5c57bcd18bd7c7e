"""The errors that a person is meant to read: one sentence that says what, where and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

LONGEST = 2000  # characters of a sentence


class UserError(ValueError):
    """Something outside the program is wrong (a file, a checkpoint, data). Command lines print it and exit 1.

    A sentence that quotes a long value is cut in its middle: what is wrong stands before the value, what was expected behind it.
    """

    def __init__(self, sentence: object = ""):
        super().__init__(without_middle(str(sentence)))


class UsageError(UserError):
    """The command line, the config file, a config key or its value is wrong. Command lines print it and exit 2."""


def warn(sentence: str) -> None:
    """Says on stderr what is not as whoever runs this may think, and goes on."""
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


_said: set[str] = set()


def warn_once(sentence: str) -> None:
    """`warn`, where this process has not said the same before: a checkpoint's files are read more than once."""
    if sentence not in _said:
        _said.add(sentence)
        warn(sentence)


def at(path: str | Path, sentence: str) -> UserError:
    """The error about what lies at a path that somebody named: where nothing lies there, the name is wrong (`UsageError`)."""
    return (UserError if exists(path) else UsageError)(sentence)


def exists(path: str | Path) -> bool:
    """Whether something lies at a path; False for a name that no file can have, and for one that may not be looked at."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def short(value: object, most: int = 80) -> str:
    """A value for a sentence, cut where it is long."""
    return cut(repr(value), most)


def cut(text: str, most: int = 80) -> str:
    """A text for a sentence, cut where it is long."""
    return text if len(text) <= most else text[:most] + "…"


def without_middle(text: str, most: int = LONGEST) -> str:
    """A text of at most about `most` characters: of a longer one the beginning, the end, and how much is left out between them."""
    if len(text) <= most:
        return text
    head, tail = text[:most * 3 // 5], text[-(most * 2 // 5):]
    return f"{head}… ({len(text) - len(head) - len(tail):,} characters left out) …{tail}"


def some(items: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """A list for a sentence, cut with the count of what is left out."""
    return separator.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
