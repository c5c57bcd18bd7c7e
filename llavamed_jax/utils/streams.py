"""The three standard streams, which a process may have been started without (`<&-`, some schedulers and services)."""

from __future__ import annotations

import os
import sys

_STREAMS = (("stdin", "r"), ("stdout", "w"), ("stderr", "w"))


def keep_open() -> None:
    """Opens the null device for each of stdin, stdout and stderr that is closed; to be called before other files are opened.

    The next file that is opened would get the number of a closed stream. A child process, or a library that prints, would then
    read from that file or write into it.
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
