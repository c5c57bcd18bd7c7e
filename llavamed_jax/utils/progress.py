"""How far long work is: a bar on a terminal, plain lines in a pipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm


def progress(total: int, kept: int, title: str) -> tuple[Callable[[int], None], Callable[[], None]]:
    """A bar on a terminal; in a pipe a line for each tenth. Both on stderr, so that stdout holds results only; `kept`
    questions were answered before, which the rate does not count."""
    if sys.stderr.isatty():
        bar = tqdm(total=total, initial=kept, desc=title, unit="question", file=sys.stderr)
        return bar.update, bar.close
    done, printed, begun = kept, kept, time.monotonic()

    def advance(count: int) -> None:
        nonlocal done, printed
        done += count
        if done == total or done - printed >= total / 10:
            printed = done
            rate = (done - kept) / max(time.monotonic() - begun, 1e-9)
            print(f"{title}: {done} of {total}, {rate:.1f} a second", file=sys.stderr, flush=True)

    return advance, lambda: None
