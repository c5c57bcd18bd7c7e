"""The errors that users read: one sentence that says what is wrong, where, and what was expected."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

LONGEST = 2000  # characters of a sentence


class UserError(ValueError):
    """Something outside the program is wrong: a file, a checkpoint or data.

    Command lines print the error and exit with 1.

    A sentence that quotes a long value is cut in its middle, so that the cause before the value and the expectation
    after it remain.

    Args:
      sentence: what is wrong, where, and what was expected.
    """

    def __init__(self, sentence: object = ""):
        super().__init__(without_middle(str(sentence)))


class UsageError(UserError):
    """The command line, the config file, a config key or its value is wrong.

    Command lines print the error and exit with 2.
    """


def warn(sentence: str) -> None:
    """Prints a warning to stderr; the program continues."""
    print(f"warning: {sentence}", file=sys.stderr, flush=True)


_said: set[str] = set()


def warn_once(sentence: str) -> None:
    """Prints a warning if this process has not printed it before: a checkpoint's files are read more than once."""
    if sentence not in _said:
        _said.add(sentence)
        warn(sentence)


def at(path: str | Path, sentence: str) -> UserError:
    """Returns the error about a path that the user gave: `UsageError` if the path does not exist, else `UserError`."""
    return (UserError if exists(path) else UsageError)(sentence)


def exists(path: str | Path) -> bool:
    """Returns whether a path exists; False for an invalid name and for a path that may not be read."""
    try:
        return Path(path).exists()
    except (OSError, ValueError):
        return False


def short(value: object, most: int = 80) -> str:
    """Returns the `repr` of a value for a sentence, cut to `most` characters."""
    return cut(repr(value), most)


def cut(text: str, most: int = 80) -> str:
    """Returns a text for a sentence, cut to `most` characters."""
    return text if len(text) <= most else text[:most] + "…"


def without_middle(text: str, most: int = LONGEST) -> str:
    """Shortens a text to about `most` characters: its beginning, the number of characters left out, and its end."""
    if len(text) <= most:
        return text
    head, tail = text[:most * 3 // 5], text[-(most * 2 // 5):]
    return f"{head}… ({len(text) - len(head) - len(tail):,} characters left out) …{tail}"


def some(items: Sequence[str], most: int = 8, separator: str = ", ") -> str:
    """Joins a list for a sentence: the first `most` items and the number of the others."""
    return separator.join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def amount(size: int) -> str:
    """Returns a number of bytes in words: `1.25 GB`, `3.10 MB`, `3.0 kB`."""
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"


def count_of(number: int, one: str, many: str = "") -> str:
    """Returns a number with its noun: `1 image`, `2 images`.

    Args:
      number: the number.
      one: the words after the number 1.
      many: the words after every other number; "" appends an s to `one`.
    """
    return f"{number} {one if number == 1 else many or one + 's'}"
