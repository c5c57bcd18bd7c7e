"""Keeps the three standard streams usable.

A process may have been started without them (`<&-`, some schedulers and services), and their readers may end before it.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TextIO

from llavamed_jax.errors import UserError
from llavamed_jax.utils import signals

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def keep_open() -> None:
    """Opens the null device for each of stdin, stdout and stderr that is closed; call it before other files are opened.

    Otherwise the next file would get the number of a closed stream, and a child process, or a library that prints,
    would read from that file or write into it.
    """
    for number, (name, mode) in enumerate(_STREAMS):
        try:
            os.fstat(number)
        except OSError:  # all lower numbers are taken, so this one is the next
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, f"__{name}__") is None:
            stream = open(number, mode, encoding="utf-8", closefd=False)
            setattr(sys, f"__{name}__", stream)
            if getattr(sys, name) is None:
                setattr(sys, name, stream)


def outlast() -> None:
    """Replaces stdout and stderr by streams that outlast their readers.

    If stderr cannot be written to any more, the command continues without it; likewise if stdout was a terminal, whose
    loss SIGHUP reports. If stdout fails because its reader has ended or the disk is full, a command that saves its work
    is asked to stop (`signals.ask`), and another command raises BrokenPipeError or UserError.
    """
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = opened(number, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def opened(number: int, like: TextIO, closefd: bool = False) -> io.TextIOWrapper:
    """Returns such a stream over a file descriptor, with the encoding of another stream.

    Args:
      number: the file descriptor; 2 stands for stderr.
      like: the stream whose encoding and buffering are copied.
      closefd: whether closing the stream closes the descriptor.
    """
    raw = (_Errors if number == 2 else _Output)(number, "w", closefd=closefd)
    is_unbuffered = getattr(like, "write_through", False)  # python -u
    return io.TextIOWrapper(raw if is_unbuffered else io.BufferedWriter(raw), like.encoding, like.errors,
                            write_through=is_unbuffered,
                            line_buffering=like.line_buffering)


class _Errors(io.FileIO):
    """A raw stderr that ignores failed writes."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise
            return len(data)


class _Output(io.FileIO):
    """A raw stdout, or a copy of it, that asks the command to stop after a failed write."""

    def write(self, data) -> int | None:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno == errno.EAGAIN:
                raise
            was_terminal = error.errno == errno.EIO and os.fstat(self.fileno()).st_rdev
            if not was_terminal:
                sentence = f"stdout cannot be written to: {error.strerror}"
                if not signals.can_be_asked():
                    raise error if error.errno == errno.EPIPE else UserError(sentence) from error
                signals.ask(sentence, is_failure=True)
            return len(data)
