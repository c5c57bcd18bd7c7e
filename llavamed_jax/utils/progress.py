"""How far long work is: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Iterable[T] | None = None, *, is_long: bool = True, **options) -> tqdm:
    """tqdm's bar on stderr, on a terminal alone; in a pipe nothing is printed.

    Args:
      items: what it counts; without them call its `update`.
      is_long: whether the work takes long enough for a bar.
      options: tqdm's.
    """
    return tqdm(items, disable=None if is_long else True, **options)


def over(names: Iterable[T]) -> Iterable[T]:
    """The names of tensors or files, counted by a bar on a terminal."""
    return bar(names, unit="tensor")


def on_terminal() -> bool:
    """Whether stderr is a terminal, so that a bar may move there."""
    return sys.stderr is not None and sys.stderr.isatty()


def progress(total: int, kept: int, title: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A bar on a terminal; in a pipe a line for each tenth. Both on stderr, so that stdout holds results only; `kept`
    questions were answered before, which the rate does not count.
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
