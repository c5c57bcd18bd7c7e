"""What the processes of a run agree on while it trains: what an update saw, when they save by the clock, and when they stop.

Each process knows its own rows and hears signals of its own, but all must make the same calls in the same order. So with each
update that is read, everyone tells the first what it saw and whether it was asked to stop, and the first says what all do.
A run of one process asks nobody.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence

from llavamed_jax.parallel import distributed
from llavamed_jax.utils import signals

PATIENCE_S = 10.0  # for a batch, once the run was asked to stop


class StepAgreement:
    """A process among those of a run.

    Args:
      is_asked: whether this one was asked to stop.
      every_minutes: by the clock of the first process, a save is due; 0: never.
      rows: of a batch, those of this process. Of processes that have the same rows one is counted.
    """

    def __init__(self, is_asked: Callable[[], bool], every_minutes: float, rows: Sequence[int]):
        self._is_asked, self._seconds, self._rows = is_asked, 60 * every_minutes, list(rows)
        self._is_alone = distributed.process_count() == 1
        self._agreed = {"stop": False, "save": False}
        self.saved()

    @property
    def is_stopping(self) -> bool:
        """Whether no further update is begun."""
        return self._is_asked() if self._is_alone else self._agreed["stop"]

    @property
    def is_save_due(self) -> bool:
        """Whether `every_minutes` are over."""
        return self._is_late() if self._is_alone else self._agreed["save"]

    def on_wait(self, seconds: float) -> None:
        """To be called while a batch is waited for.

        Raises:
          Stopped: this process was asked to stop, and is alone. TimeoutError: it is not, so that the others wait for it, and the batch
            does not come.
        """
        if self._is_asked() and self._is_alone:
            raise signals.Stopped("stopped while a batch was waited for")
        if self._is_asked() and seconds > PATIENCE_S:
            raise TimeoutError

    def saved(self) -> None:
        """A step was saved just now."""
        self._saved_at = time.monotonic()
        self._agreed["save"] = False

    def add_up(self, counts: Mapping[str, int], skipped: Sequence[Mapping]) -> tuple[dict[str, int], list[Mapping]]:
        """In the first process: what all have counted of an update, and what the others skipped. In all: they agree what to do next.

        To be called for each update in turn.
        """
        if self._is_alone:
            return dict(counts), []
        everyone = self._everyones(counts=dict(counts), skipped=list(skipped), stop=self._is_asked())
        self._agreed = distributed.from_first(lambda: dict(stop=any(each["stop"] for each in everyone), save=self._is_late()))
        if not everyone:
            return dict(counts), []
        others = self._others(everyone)
        return ({name: count + sum(each["counts"][name] for each in others) for name, count in counts.items()},
                [entry for each in others for entry in each["skipped"]])

    def listed(self, entries: Sequence[Mapping]) -> list[Mapping]:
        """In the first process: the entries of all, of equal rows once; elsewhere nothing. To be called by all."""
        if self._is_alone:
            return list(entries)
        everyone = self._everyones(entries=list(entries))
        return [*entries, *(entry for each in self._others(everyone) for entry in each["entries"])] if everyone else []

    def _everyones(self, **said) -> list[dict]:
        """In the first process what each says, with its rows; elsewhere nothing."""
        return [json.loads(each) for each in distributed.gather(json.dumps(dict(rows=self._rows, **said)).encode())]

    def _others(self, everyone: Sequence[Mapping]) -> list[Mapping]:
        """All but the first, of those with the same rows the lowest."""
        shares = {tuple(each["rows"]): each for each in reversed(everyone)}
        del shares[tuple(self._rows)]
        return list(shares.values())[::-1]

    def _is_late(self) -> bool:
        return 0 < self._seconds < time.monotonic() - self._saved_at


