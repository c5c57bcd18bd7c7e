"""Shows the progress of long work: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T] | None = None, *, is_long: bool = True, **options) -> tqdm:
    """Returns tqdm's bar on stderr; outside a terminal it prints nothing.

    Args:
      items: the items to count; None to call `update` of the bar instead.
      is_long: whether the work takes long enough for a bar.
      **options: tqdm's options.
    """
    return tqdm(items, disable=None if is_long else True, **options)


def over(names: Iterable[T]) -> Iterable[T]:
    """Returns the names of tensors or files, counted by a bar on a terminal."""
    return bar(names, unit="tensor")


def on_terminal() -> bool:
    """Returns whether stderr is a terminal, where a bar can move."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(total: int, kept: int, title: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    """Shows the progress of questions on stderr: a bar on a terminal, a line for each tenth in a pipe.

    Args:
      total: number of questions.
      kept: questions that were answered in an earlier run; the rate leaves them out.
      title: the title of the bar or of each line.

    Returns:
      A function that adds a number of answered questions, and one that ends the bar.
    """
    if on_terminal():
        shown = bar(total=total, initial=kept, desc=title, unit="question")
        return shown.update, shown.close
    done, printed, begun = kept, kept, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if done == total or done - printed >= total / 10:
            printed = done
            rate = (done - kept) / max(time.monotonic() - begun, 1e-9)
            print(f"{title}: {done} of {total}, {rate:.1f} a second", file=sys.stderr, flush=True)

    return advance, lambda: None


class Amounts:
    """Shows items, bytes, their rates and the time left on stderr: a bar on a terminal, else a line now and then.

    Args:
      noun: what is counted, in the plural.
      total: number of items.
      received: returns the number of bytes so far.
      every_s: seconds between lines outside a terminal.
    """

    def __init__(self, noun: str, total: int, received: Callable[[], int], every_s: float = 30.0):
        self._noun, self._total, self._received, self._every_s = noun, total, received, every_s
        self._done, self._begun = 0, time.monotonic()
        self._printed_at = self._begun
        self._bar = tqdm(total=total, desc=noun, unit=f" {noun}") if on_terminal() and total else None

    def add(self, count: int = 1) -> None:
        """Counts finished items."""
        self._done += count
        now = time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._amount(now), refresh=False)
            self._bar.update(count)
        elif now - self._printed_at >= self._every_s or self._done == self._total:
            self._printed_at = now
            print(self.line(now), file=sys.stderr, flush=True)

    def line(self, now: float) -> str:
        """Returns the line at a time of `time.monotonic`."""
        seconds = max(now - self._begun, 1e-9)
        left = seconds / max(self._done, 1) * (self._total - self._done)
        return (f"{self._done:,} of {self._total:,} {self._noun}, {self._done / seconds:.1f} a second, "
                f"{self._amount(now)}, {_duration(left)} left")

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def _amount(self, now: float) -> str:
        received = self._received()
        return f"{received / 1e6:,.1f} MB, {received / 1e6 / max(now - self._begun, 1e-9):.2f} MB a second"


def _duration(seconds: float) -> str:
    """Returns a number of seconds as hours, minutes and seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
