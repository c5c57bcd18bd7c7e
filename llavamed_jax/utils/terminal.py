r"""Cleans all printed text, so that no text from outside moves a terminal's cursor, changes its title or hides.

    with terminal.cleaned():
        print(answer)          # an escape sequence in it shows as \x1b[…

The entry point of every command line opens `cleaned`, which replaces `sys.stdout` and `sys.stderr` by a `Screen`.
`print`, logging, warnings, tracebacks and tqdm write through it, so a new caller cannot forget to clean. Libraries in C
and C++ write to the file descriptors directly, which this module does not see.
"""

from __future__ import annotations

import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# Controls (C0 except tab and line feed, DEL, C1), marks and overrides of direction, line and paragraph separators,
# zero-width characters, annotations and tags, and lone surrogates, which no encoding has bytes for. The joiners of
# emoji and of Persian (U+200C, U+200D) stay.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    "\U000e0000-\U000e007f]"
)
_BAR = re.compile("\r|\n*(?:\x1b\\[A)+")  # tqdm moves the cursor to the start of the line, or up
_NUMBERS = {"stdout": 1, "stderr": 2}  # file descriptors
_hidden: list[Callable[[str], str]] = []


def clean(text: str) -> str:
    r"""Returns a text with its control characters written out (`\x1b`, `\u202e`); keeps line feeds and tabs."""
    return _UNPRINTABLE.sub(_escaped, text.replace("\r\n", "\n"))


def sentence(text: str) -> str:
    """Returns a text for one line: `clean`, with line feeds and tabs written out too."""
    return clean(text).replace("\n", "\\n").replace("\t", "\\t")


def clean_bytes(text: bytes) -> bytes:
    """Applies `clean` to the output of another program, in UTF-8 or not."""
    return clean(text.decode("utf-8", "surrogateescape")).encode("utf-8", "backslashreplace")


def _escaped(found: re.Match) -> str:
    return found[0].encode("unicode_escape").decode()


class Screen:
    """A text stream that cleans its input (`clean`, and the functions given to `hide`) and writes it to another stream.

    Only tqdm may move the cursor: to the start of the line, or up. Characters that the stream's encoding lacks are
    written out as escapes.

    Args:
      stream: the other stream.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Cleans and writes a text; returns its length before cleaning."""
        caller = sys._getframe().f_back  # None if Python itself prints a traceback
        # The bars of this package and of libraries.
        is_bar = caller is not None and caller.f_globals.get("__name__") == "tqdm.utils"
        found = _BAR.match(text) if is_bar else None
        begin = found[0] if found else ""
        rest = text[len(begin):]
        for hidden in _hidden:
            rest = hidden(rest)
        rest = sentence(rest) if begin else clean(rest)
        if getattr(self._stream, "errors", None) in ("strict", "surrogateescape"):  # surrogateescape in the locale C
            encoding = self._stream.encoding or "utf-8"
            rest = rest.encode(encoding, "backslashreplace").decode(encoding)
        self._stream.write(begin + rest)
        return len(text)

    def writelines(self, lines) -> None:
        """Cleans and writes each line."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def hide(cleaner: Callable[[str], str]) -> None:
    """Adds a function that removes secrets from all printed text while `cleaned` is open."""
    if isinstance(sys.stderr, Screen):
        _hidden.append(cleaner)


def install() -> Callable[[], None]:
    """Cleans the printed text of this process from now on. Returns a function that ends this."""
    earlier = {name: stream for name in ("stdout", "stderr") if (stream := getattr(sys, name)) is not None}
    screens = {name: stream if isinstance(stream, Screen) else Screen(stream) for name, stream in earlier.items()}
    for name, screen in screens.items():
        setattr(sys, name, screen)
    moved = []
    for handler in _stream_handlers():  # handlers made before this call hold the old streams
        name = next((name for name, stream in earlier.items()
                     if handler.stream is stream or _number(handler.stream) == _NUMBERS[name]), None)
        if name is not None:
            moved.append((handler, handler.setStream(screens[name])))

    def undo() -> None:
        for name, screen in screens.items():
            if getattr(sys, name) is screen:
                setattr(sys, name, earlier[name])
        for handler, stream in moved:
            if stream is not None:
                handler.setStream(stream)
        _hidden.clear()

    return undo


@contextlib.contextmanager
def cleaned() -> Iterator[None]:
    """Cleans printed text inside the block; after an uncaught exception it stays open for Python's traceback."""
    if isinstance(sys.stdout, Screen) and isinstance(sys.stderr, Screen):
        yield
        return
    undo = install()
    try:
        yield
    except Exception:
        raise
    except BaseException:  # SystemExit
        undo()
        raise
    undo()


def _number(stream: TextIO) -> int | None:
    """Returns the file descriptor of a stream; None if it has none."""
    try:
        return stream.fileno()
    except (AttributeError, OSError, ValueError):
        return None


def _stream_handlers() -> Iterator[logging.StreamHandler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    for handler in {id(each): each for logger in loggers for each in getattr(logger, "handlers", ())}.values():
        handler = getattr(handler, "python_handler", handler)  # absl's
        if isinstance(handler, logging.StreamHandler):
            yield handler
