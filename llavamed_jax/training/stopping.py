"""SIGTERM and SIGINT: what is under way is finished and saved."""

from __future__ import annotations

import os
import signal
import time


class Stop:
    """As a context it remembers that a signal came; a second one, a second later or more, interrupts at once.

    What is sent to a whole job may reach a process twice in a moment: by itself, and passed on by its parent.
    """

    def __init__(self):
        self.is_asked = False
        self._asked_at = 0.0
        self._earlier: dict = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.is_asked:
            if time.monotonic() < self._asked_at + 1:
                return
            raise KeyboardInterrupt
        self.is_asked, self._asked_at = True, time.monotonic()
        # Not `print`, which a signal may have come in the middle of.
        os.write(2, f"{signal.Signals(number).name}: what is under way is finished and saved; a second one ends the run at once\n".encode())

    def __exit__(self, *_) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
