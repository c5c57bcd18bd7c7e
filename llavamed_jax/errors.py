"""The errors that a person is meant to read: one sentence that says what, where and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path


class UserError(ValueError):
    """Something outside the program is wrong (a file, a checkpoint, data). Command lines print it and exit 1."""


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


def some(items: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """A list for a sentence, cut with the count of what is left out."""
    return separator.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")
