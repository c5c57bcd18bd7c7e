"""Shows on stderr what is being compiled: a bar with a clock on a terminal, else a line for each begin and end."""

from __future__ import annotations

import sys
import threading

from llavamed_jax.utils.progress import bar, on_terminal


class Progress:
    """The progress of compilations, several of which may run at the same time.

    Args:
      total: number of topologies.
    """

    def __init__(self, total: int):
        self._total, self._done, self._now = total, 0, []
        self._lock = threading.Lock()
        self._bar = None
        if on_terminal():
            form = "preflight: {n_fmt} of {total_fmt} [{elapsed}]{postfix}"
            self._bar = bar(total=total, bar_format=form, leave=False, dynamic_ncols=True)

    def begin(self, what: str) -> None:
        """Shows that a compilation begins.

        Args:
          what: the topology, and the changed config keys.
        """
        with self._lock:
            self._now.append(what)
        if self._bar is None:
            self._say(f"{what}: compiling")
        self.tick()

    def end(self, what: str) -> None:
        """Removes a compilation from the display."""
        with self._lock:
            self._now.remove(what)

    def settled(self, what: str) -> None:
        """Shows that a topology is finished; `what` is its name and its verdict."""
        self._done += 1
        self._say(f"{what} ({self._done} of {self._total})")
        if self._bar is not None:
            self._bar.update()

    def note(self, text: str) -> None:
        """Prints a line that stays above the bar."""
        self._say(text)

    def tick(self) -> None:
        """Updates the clock."""
        if self._bar is not None:
            with self._lock:
                self._bar.set_postfix_str("compiling " + ", ".join(self._now) if self._now else "")

    def close(self) -> None:
        """Removes the bar."""
        if self._bar is not None:
            self._bar.close()

    def _say(self, text: str) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.write(text, file=sys.stderr)
            elif sys.stderr is not None:
                print(text, file=sys.stderr, flush=True)
