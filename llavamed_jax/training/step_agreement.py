"""Lets the processes of a run agree, after each update, on its counts and on whether to save by the clock or to stop.

Each process knows its own rows and receives its own signals, but all must make the same calls in the same order. So
after each update that is read, every process sends process 0 its counts and whether it was asked to stop; process 0
decides. A run of one process communicates with nobody. (`parallel.agreement` compares the processes' inputs once, at
the start.)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence

from llavamed_jax.parallel import distributed
from llavamed_jax.utils import signals

PATIENCE_S = 10.0  # seconds to wait for a batch after the run was asked to stop


class StepAgreement:
    """The decisions that all processes share, and this process's part in them.

    Args:
      is_asked: whether this process was asked to stop.
      every_minutes: minutes between saves by the clock of process 0; 0 for no such saves.
      rows: this process's rows of a batch. Processes with the same rows are counted once.
    """

    def __init__(self, is_asked: Callable[[], bool], every_minutes: float, rows: Sequence[int]):
        self._is_asked, self._seconds, self._rows = is_asked, 60 * every_minutes, list(rows)
        self._is_alone = distributed.process_count() == 1
        self._agreed = {"stop": False, "save": False}
        self.saved()

    @property
    def is_stopping(self) -> bool:
        """Whether the run stops before another update."""
        return self._is_asked() if self._is_alone else self._agreed["stop"]

    @property
    def is_save_due(self) -> bool:
        """Whether `every_minutes` have passed since the last save."""
        return self._is_late() if self._is_alone else self._agreed["save"]

    def on_wait(self, seconds: float) -> None:
        """Runs in the loader while it waits for a batch.

        Args:
          seconds: how long the loader has waited.

        Raises:
          Stopped: a run of one process was asked to stop.
          TimeoutError: one of several processes was asked to stop, and the batch does not come; the others wait for it.
        """
        if self._is_asked() and self._is_alone:
            raise signals.Stopped("stopped while waiting for a batch")
        if self._is_asked() and seconds > PATIENCE_S:
            raise TimeoutError

    def saved(self) -> None:
        """Notes that a step was saved just now."""
        self._saved_at = time.monotonic()
        self._agreed["save"] = False

    def add_up(self, counts: Mapping[str, int], skipped: Sequence[Mapping]) -> tuple[dict[str, int], list[Mapping]]:
        """Gathers the counts of an update on process 0 and broadcasts its decision: go on, save, or stop.

        All processes call it for each update in turn.

        Args:
          counts: the counts of this process's rows.
          skipped: the skipped samples of this process's rows.

        Returns:
          On process 0, the sums of all processes and the samples that the others skipped; elsewhere `counts` and [].
        """
        if self._is_alone:
            return dict(counts), []
        everyone = self._everyones(counts=dict(counts), skipped=list(skipped), stop=self._is_asked())
        self._agreed = distributed.from_first(
            lambda: dict(stop=any(each["stop"] for each in everyone), save=self._is_late()))
        if not everyone:
            return dict(counts), []
        others = self._others(everyone)
        return ({name: count + sum(each["counts"][name] for each in others) for name, count in counts.items()},
                [entry for each in others for entry in each["skipped"]])

    def agree_to_stop(self) -> bool:
        """Returns whether a process was asked to stop, and lets all of them stop then.

        All processes call it at the same points between updates, such as the batches of a validation.
        """
        if not self._is_alone:
            everyone = self._everyones(stop=self._is_asked())
            is_asked = distributed.from_first(lambda: any(each["stop"] for each in everyone))
            self._agreed["stop"] = self._agreed["stop"] or is_asked
        return self.is_stopping

    def listed(self, entries: Sequence[Mapping]) -> list[Mapping]:
        """Returns on process 0 the entries of all processes, of equal rows once; elsewhere an empty list."""
        if self._is_alone:
            return list(entries)
        everyone = self._everyones(entries=list(entries))
        return [*entries, *(entry for each in self._others(everyone) for entry in each["entries"])] if everyone else []

    def _everyones(self, **said) -> list[dict]:
        """Returns on process 0 what each process sends, with its rows; elsewhere an empty list."""
        return [json.loads(each) for each in distributed.gather(json.dumps(dict(rows=self._rows, **said)).encode())]

    def _others(self, everyone: Sequence[Mapping]) -> list[Mapping]:
        """Returns what the other processes sent; of processes with the same rows, only the lowest one's."""
        shares = {tuple(each["rows"]): each for each in reversed(everyone)}
        del shares[tuple(self._rows)]
        return list(shares.values())[::-1]

    def _is_late(self) -> bool:
        return 0 < self._seconds < time.monotonic() - self._saved_at
