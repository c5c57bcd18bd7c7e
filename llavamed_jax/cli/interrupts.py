"""Ctrl-C, or a SIGTERM, before a run has begun and during a preflight.

Nothing but the standard library is imported: the handler stands before slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def ending_on_interrupt() -> Iterator[None]:
    """Either ends the process at once with one sentence and status 1, for as long as there is nothing to save.

    As an exception it would surface in the middle of an import, or be swallowed by a library's callback.
    """
    def end(*_):
        os.write(2, b"error: interrupted before the run had begun\n")
        os._exit(1)

    with _heard_by(end):
        yield


@contextlib.contextmanager
def raising_on_interrupt() -> Iterator[None]:
    """The first of either is a KeyboardInterrupt, for whoever waits and has something to put in order; the next ones are not heard."""
    def interrupt(*_):
        for number in _NUMBERS:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _heard_by(interrupt):
        yield


@contextlib.contextmanager
def _heard_by(handler: Callable[..., None]) -> Iterator[None]:
    earlier = {number: signal.signal(number, handler) for number in _NUMBERS}
    try:
        yield
    finally:
        for number, before in earlier.items():
            signal.signal(number, before)
