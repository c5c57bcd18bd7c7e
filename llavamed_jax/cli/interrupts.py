"""Ctrl-C, or a SIGTERM, before a run has begun. Nothing but the standard library is imported: the handler stands before slow imports."""

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
