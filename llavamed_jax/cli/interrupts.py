"""Ctrl-C, or a SIGTERM, before a run has begun and during a preflight.

Nothing but the standard library is imported: the handler stands before slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ending_on_interrupt() -> Iterator[None]:
    """Either ends the process at once with one sentence and status 1, for as long as there is nothing to save.

    As an exception it would surface in the middle of an import, or be swallowed by a library's callback.
    """
    def end(*_):
        os.write(2, b"error: interrupted before the run had begun\n")
        os._exit(1)

    earlier = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def raising_on_interrupt() -> Iterator[None]:
    """The first of either is a KeyboardInterrupt, for whoever waits and has something to put in order; the next ones are not heard."""
    def interrupt(*_):
        for number in earlier:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    earlier = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
