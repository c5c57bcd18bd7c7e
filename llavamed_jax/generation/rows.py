"""Decides which request gets which row, and which row's prefix it starts from. Runs on the host, without a device."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from llavamed_jax.generation.requests import Job

_NO_KEY = np.int64(-1)  # no position has this key
_LONG = 256  # positions from which a prompt's prefill is bound by computation and not by reading the weights


@dataclass
class Row:
    """The host's record of a row.

    Attributes:
      job: the job that has the row, or None.
      key: the keys (`Job.key`) of the positions whose keys and values the row holds, for requests with a common prefix.
      used: when the row was last given to a job or copied from.
      start: how many positions its job copied from another row.
    """

    job: Job | None = None
    key: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    used: int = 0
    start: int = 0


@dataclass
class Placed:
    """A job with its row, and the row whose first `start` positions it copies.

    Attributes:
      job: the job.
      source: the row to copy from.
      start: how many positions to copy.
      target: the job's row.
      length: the positions that are left to run.
    """

    job: Job
    source: int
    start: int
    target: int = -1
    length: int = field(init=False)

    def __post_init__(self):
        self.length = len(self.job.key) - self.start


class Rows:
    """R rows.

    Args:
      share: whether requests copy the prefix that they share with another row's request.
      shards: the number of prompts of one prefill must be a multiple of this.

    Attributes:
      rows: the record of each row.
    """

    def __init__(self, share: bool, shards: int = 1):
        self._share, self._shards, self._clock = share, shards, 0
        self.rows: list[Row] = []

    @property
    def running(self) -> dict[int, Job]:
        """The jobs that have a row, by row."""
        return {r: row.job for r, row in enumerate(self.rows) if row.job is not None}

    def resize(self, number: int, length: int) -> None:
        """Keeps the first `number` rows, of `length` positions; new rows are free.

        The last position of a row is never shared: a free row is fed its last token there if the row was cut below that
        token's own position.
        """
        self.rows = self.rows[:number] + [Row() for _ in range(number - len(self.rows))]
        for row in self.rows:
            row.key = row.key[: length - 1]

    def finish(self, r: int) -> None:
        """Frees a row.

        It keeps its keys for requests with the same prefix: those of all tokens that were fed, which the last was not.
        """
        row = self.rows[r]
        row.key = np.concatenate([row.job.key, np.asarray(row.job.tokens[:-1], np.int64)])
        row.job = None

    def forget(self, rows: Iterable[int]) -> None:
        """Marks the contents of these rows as unusable."""
        for r in rows:
            self.rows[r].key = self.rows[r].key[:0]

    def choose(self, waiting: Iterable[Job]) -> list[Placed]:
        """Returns the requests of one prefill, all of one bucket, each with a row.

        If a request shares a longer prefix with another waiting request than with any row, it waits for that request; a
        row is reserved for it.

        Args:
          waiting: the waiting jobs, in order.

        Returns:
          The placed jobs; empty if there is no free row.
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
        """Starts a job from the row with the longest common prefix, if that puts it into a smaller bucket."""
        alone, (row, shared) = Placed(job, 0, 0), self._best(job, held)
        return Placed(job, row, shared) if self._is_worth(job, shared, alone) else alone

    def _best(self, job: Job, keys: Keys) -> tuple[int, int]:
        """Returns the key with the longest usable prefix, and its length.

        A job runs its last position itself, for its logits.
        """
        if not self._share or job.is_alone or not len(keys):
            return 0, 0
        prefixes = keys.common_prefixes(job.key)
        best = int(prefixes.argmax())
        return best, int(job.boundaries[min(int(prefixes[best]), len(job.key) - 1)])

    @staticmethod
    def _is_worth(job: Job, shared: int, than: Placed) -> bool:
        return bucket(len(job.key) - shared) < bucket(than.length)

    def _give_rows(self, chosen: list[Placed], free: list[int], held: Keys, waiting: list[Job]) -> None:
        """Assigns free rows, the least recently used first.

        Rows with a long prefix of a waiting request are assigned last.
        """
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
    """The keys of several prompts in one array, compared at once. A Python loop took longer than a decode step.

    Args:
      keys: int64 [length] of each prompt.
    """

    def __init__(self, keys: Sequence[np.ndarray]):
        self._number = len(keys)
        self._table = np.full((len(keys), 1 + max(map(len, keys), default=0)), _NO_KEY)
        for row, key in zip(self._table, keys):
            row[: len(key)] = key

    @classmethod
    def empty(cls, room: int, length: int) -> Keys:
        """Returns an empty collection with room for `room` keys of at most `length` positions."""
        keys = cls([])
        keys._table = np.full((room, 1 + length), _NO_KEY)
        return keys

    def __len__(self) -> int:
        return self._number

    def add(self, key: np.ndarray) -> None:
        """Appends a key."""
        self._table[self._number, : len(key)] = key
        self._number += 1

    def common_prefixes(self, key: np.ndarray) -> np.ndarray:
        """Returns int [n]: how many leading positions each key has in common with `key`."""
        table = self._table[: self._number, : len(key)]
        differs = table != key[: table.shape[1]]
        return np.where(differs.any(axis=1), differs.argmax(axis=1), table.shape[1])


def bucket(length: int) -> int:
    """Rounds a length up to one that is compiled.

    These are 32 and 64 (a question behind a shared image), multiples of 64 up to 512, of 128 up to 1,024 (an image of
    576 positions and its question), and of 256 above.
    """
    step = 32 if length <= 64 else 64 if length <= 512 else 128 if length <= 1024 else 256
    return -(-length // step) * step


def batch_size(number: int, length: int = 1, shards: int = 1) -> int:
    """Returns how many of `number` prompts are run together: a power of four, so that few sizes are compiled.

    Two or three prompts are padded to four, unless each is long enough to keep a device busy by itself.

    Args:
      number: how many prompts wait.
      length: positions of the prompts.
      shards: the result is a multiple of this.

    Returns:
      The number of prompts.
    """
    size = 4 if number in (2, 3) and length < _LONG else 4 ** ((number.bit_length() - 1) // 2)
    return -(-size // shards) * shards


def power_of_two(n: int) -> int:
    """Rounds n up to a power of two, at least 1."""
    return 1 << max(0, n - 1).bit_length()
