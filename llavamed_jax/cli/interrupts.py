"""Ctrl-C before a run has begun. Nothing but the standard library is imported: the handler stands before slow imports."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def ending_on_interrupt() -> Iterator[None]:
    """A Ctrl-C ends the process at once with one sentence and status 1, for as long as there is nothing to save.

    As an exception it would surface in the middle of an import, or be swallowed by a library's callback.
    """
    def end(*_):
        os.write(2, b"error: interrupted before the run had begun\n")
        os._exit(1)

    earlier = signal.signal(signal.SIGINT, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, earlier)
