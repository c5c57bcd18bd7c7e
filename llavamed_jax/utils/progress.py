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
