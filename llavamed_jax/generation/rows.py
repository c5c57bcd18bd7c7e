"""Which request gets which row, and from whose beginning it starts: the host's bookkeeping, without a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llavamed_jax.generation.requests import Job

_NO_KEY = np.int64(-1)  # what no position has
_LONG = 256  # positions of a prompt with which computing, and not reading the weights, takes the time


@dataclass
class Row:
    """What the host knows of a row.

    Attributes:
      job: the one that has it, or None.
      key: of the positions whose keys and values it holds (`Job.key`), for requests that begin alike.
      used: when it was last given out or taken from.
      start: how many positions its job took over.
    """

    job: Job | None = None
    key: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = 0
    start: int = 0


@dataclass
class Placed:
    """A job with its row, and the row whose first `start` positions it takes over."""

    job: Job
    source: int
    start: int
    target: int = -1

    @property
    def length(self) -> int:
        """Positions that are left to run."""
        return len(self.job.key) - self.start


class Rows:
    """R rows.

    Args:
      share: whether requests take over what another row's request has in common with them.
      shards: over which the prompts of one prefill must divide.
    """

    def __init__(self, share: bool, shards: int = 1):
        self._share, self._shards, self._clock = share, shards, 0
        self.rows: list[Row] = []

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def running(self) -> dict[int, Job]:
        return {r: row.job for r, row in enumerate(self.rows) if row.job is not None}

    def resize(self, number: int, length: int) -> None:
        """The first `number` rows, of `length` positions; new ones are free.

        The last position is kept for nobody: a free row is fed its last token, which stands there if its own place is cut off.
        """
        self.rows = self.rows[:number] + [Row() for _ in range(number - len(self.rows))]
        for row in self.rows:
            row.key = row.key[: length - 1]

    def finish(self, r: int) -> None:
        """A row is free again. What it holds stays, for whoever begins alike: all tokens that were fed, not the last one."""
        row = self.rows[r]
        row.key = np.concatenate([row.job.key, np.asarray(row.job.tokens[:-1], np.int64)])
        row.job = None

    def forget(self, rows: Iterable[int]) -> None:
        """What these rows hold is good for nobody."""
        for r in rows:
            self.rows[r].key = self.rows[r].key[:0]

    def choose(self, waiting: Iterable[Job]) -> list[Placed]:
        """The requests that one prefill takes, all of one bucket, each with a row.

        One that has more in common with another of these than with any row waits for that to be run, and a row is kept
        for it.
        """
        free = [r for r, row in enumerate(self.rows) if row.job is None]
        if not free:
            return []
        waiting = list(itertools.islice(waiting, 2 * len(self.rows)))
        held = Keys([row.key for row in self.rows])
        taken = Keys.empty(len(free), max((len(job.key) for job in waiting), default=0))
        chosen: list[Placed] = []
        kept = 0
        for job in waiting:
            if len(chosen) + kept == len(free):
                break
            placed = self._place(job, held)
            if self._is_worth(job, self._best(job, taken)[1], placed):
                kept += 1
            elif not chosen or bucket(placed.length) == bucket(chosen[0].length):
                taken.add(job.key)
                chosen.append(placed)
        chosen = chosen[: batch_size(len(chosen), chosen[0].length, self._shards)] if chosen else []
        self._give_rows(chosen, free, held, waiting)
        return chosen

    def _place(self, job: Job, held: Keys) -> Placed:
        """Starts a job from the row that has most in common with it, if that makes it shorter to run."""
        alone, (row, shared) = Placed(job, 0, 0), self._best(job, held)
        return Placed(job, row, shared) if self._is_worth(job, shared, alone) else alone

    def _best(self, job: Job, keys: Keys) -> tuple[int, int]:
        """Which key a job can take most over from, and how many positions. The last one it runs itself, for its logits."""
        if not self._share or job.is_alone or not len(keys):
            return 0, 0
        prefixes = keys.common_prefixes(job.key)
        best = int(prefixes.argmax())
        return best, job.boundary(min(int(prefixes[best]), len(job.key) - 1))

    @staticmethod
    def _is_worth(job: Job, shared: int, than: Placed) -> bool:
        return bucket(len(job.key) - shared) < bucket(than.length)

    def _give_rows(self, chosen: list[Placed], free: list[int], held: Keys, waiting: list[Job]) -> None:
        """Rows that no waiting request begins like are given first, then those that were not used for longest."""
        self._clock += 1
        is_wanted = np.zeros(len(self.rows), bool)
        if self._share and len(chosen) < len(free):
            for job in waiting:
                is_wanted |= held.common_prefixes(job.key) > len(job.key) // 2
        for placed in chosen:
            if placed.start:
                self.rows[placed.source].used = self._clock
        order = sorted(free, key=lambda r: (is_wanted[r], self.rows[r].used))
        for placed, r in zip(chosen, order):
            placed.target = r
        for placed in chosen:
            self.rows[placed.target] = Row(placed.job, placed.job.key, self._clock, placed.start)


class Keys:
    """Several prompts' keys, to be compared with one at once: a row of Python comparisons took longer than a decode step."""

    def __init__(self, keys: Sequence[np.ndarray]):
        self._number = len(keys)
        self._table = np.full((len(keys), 1 + max(map(len, keys), default=0)), _NO_KEY)
        for row, key in zip(self._table, keys):
            row[: len(key)] = key

    @classmethod
    def empty(cls, room: int, length: int) -> Keys:
        """None yet, with room for as many of at most this length."""
        keys = cls([])
        keys._table = np.full((room, 1 + length), _NO_KEY)
        return keys

    def __len__(self) -> int:
        return self._number

    def add(self, key: np.ndarray) -> None:
        """One more."""
        self._table[self._number, : len(key)] = key
        self._number += 1

    def common_prefixes(self, key: np.ndarray) -> np.ndarray:
        """int [n]: how many positions each has in common with `key` from the beginning."""
        table = self._table[: self._number, : len(key)]
        differs = table != key[: table.shape[1]]
        return np.where(differs.any(axis=1), differs.argmax(axis=1), table.shape[1])


def bucket(length: int) -> int:
    """Lengths that are compiled: 32 and 64 (a question behind a shared image), multiples of 64 up to 512, of 128 up to 1,024
    (an image of 576 and its question), then of 256."""
    step = 32 if length <= 64 else 64 if length <= 512 else 128 if length <= 1024 else 256
    return -(-length // step) * step


def batch_size(number: int, length: int = 1, shards: int = 1) -> int:
    """How many of `number` prompts of a length are run together: a power of four, so that few sizes are compiled; two or three
    are filled up to four, unless each is long enough to keep a device busy by itself. A multiple of `shards`."""
    size = 4 if number in (2, 3) and length < _LONG else 4 ** ((number.bit_length() - 1) // 2)
    return -(-size // shards) * shards


def power_of_two(n: int) -> int:
    """The next one, at least 1."""
    return 1 << max(0, n - 1).bit_length()
