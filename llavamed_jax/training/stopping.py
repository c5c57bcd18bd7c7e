"""SIGTERM and SIGINT: what is under way is finished and saved."""

from __future__ import annotations

import os
import signal


class Stop:
    """As a context it remembers that a signal came; a second one interrupts at once."""

    def __init__(self):
        self.is_asked = False
        self._earlier: dict = {}

    def __enter__(self) -> Stop:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._earlier[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, frame):
        if self.is_asked:
            raise KeyboardInterrupt
        self.is_asked = True
        # Not `print`, which a signal may have come in the middle of.
        os.write(2, f"{signal.Signals(number).name}: what is under way is finished and saved; a second one ends the run at once\n".encode())

    def __exit__(self, *_) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
