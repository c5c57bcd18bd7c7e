"""Plans which samples each row holds: the order of samples, rows packed by grain, and the number of rows of an update.

The order is an endless sequence of epochs, each shuffled by (seed, epoch). The usable samples of an epoch are packed in
this order, by their lengths only, into rows of `row_length` positions and `image_slots` images; no row crosses the end
of an epoch. So row r of epoch e is a function of (data, seed, e): any process can compute it, and the position of a run
is two counts. Without packing, each row holds one sample. An epoch of more than `WINDOW` samples is packed in windows
of so many, each when its rows are needed: the first update of a run on 15 million samples does not wait for the last.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grain
import numpy as np
from grain.experimental import BestFitPackIterDataset, index_shuffle

from llavamed_jax.datasets.records import load_arrays, save_whole
from llavamed_jax.datasets.training import TrainingData
from llavamed_jax.errors import UserError
from llavamed_jax.pipeline.lengths import LARGE, Lengths
from llavamed_jax.utils.hashes import sha256

# Rows that grain fills at a time. With 64, rows of 2,048 positions hold 2 % less; more than 256 changes nothing.
BINS = 256
_BLOCK = 1024  # samples among which a usable one is looked for
WINDOW = 2**19  # samples that are packed together: more than LLaVA-Med's sets have, and 20 s of packing


@dataclass(frozen=True)
class Stream:
    """The order of samples.

    A source of weight 1.5 gives one and a half times its length an epoch: it is traversed again and again, reshuffled
    each time, so that every sample of it is seen before one is seen twice.

    Attributes:
      lengths: records of each source.
      sizes: samples of each source an epoch.
      seed: of the shuffling.
      is_shuffled: whether samples are shuffled.
    """

    lengths: tuple[int, ...]
    sizes: tuple[int, ...]
    seed: int
    is_shuffled: bool

    @classmethod
    def of(cls, data: TrainingData, seed: int, is_shuffled: bool = True) -> Stream:
        """Makes the stream of a data set."""
        return cls(tuple(map(len, data.sources)), data.sizes, seed, is_shuffled)

    def __len__(self) -> int:
        """Returns the samples an epoch."""
        return sum(self.sizes)

    def weights(self) -> np.ndarray:
        """Returns the samples an epoch of each record, float64 [records], numbered through all sources."""
        return np.repeat(np.divide(self.sizes, self.lengths), self.lengths)

    def order(self, epoch: int, begin: int = 0, end: int | None = None) -> np.ndarray:
        """Returns the records of an epoch in order, int32 [end - begin], numbered through all sources.

        Args:
          epoch: the epoch.
          begin: the first place in the order.
          end: the place after the last; None is the number of samples.
        """
        end = len(self) if end is None else min(end, len(self))
        return np.fromiter((self._record(epoch, slot) for slot in range(begin, end)), np.int32, end - begin)

    def _record(self, epoch: int, slot: int) -> int:
        if self.is_shuffled:
            slot = _shuffle(slot, len(self), self.seed, epoch)
        source = 0
        while slot >= self.sizes[source]:
            slot -= self.sizes[source]
            source += 1
        walk, index = divmod(epoch * self.sizes[source] + slot, self.lengths[source])
        if self.is_shuffled and self.sizes[source] != self.lengths[source]:
            index = _shuffle(index, self.lengths[source], self.seed, walk, source + 1)
        return sum(self.lengths[:source]) + index


@functools.lru_cache(maxsize=4096)  # among few elements grain takes milliseconds for each
def _shuffle(index: int, length: int, *key: int) -> int:
    """Returns the place of `index` in the permutation of `length` elements that `key` selects."""
    return index_shuffle(index, max_index=length - 1, seed=_seed(*key), rounds=4)


@functools.lru_cache(maxsize=64)
def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# ---- one epoch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of an epoch.

    Attributes:
      records: int32 [samples], row by row.
      ends: int32 [rows], the end of each row in `records`.
    """

    records: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.records[self.ends[row - 1] if row else 0:self.ends[row]]


def pack(tokens: np.ndarray, images: np.ndarray, row_length: int, image_slots: int,
         seed: int | None = None) -> list[list[int]]:
    """Packs samples into rows with grain's best-fit packer.

    grain gets empty arrays of the samples' sizes and places them as it would place the tokens and images themselves.

    Args:
      tokens: int [samples], at most `row_length` each.
      images: int [samples], at most `image_slots` each.
      row_length: positions of a row.
      image_slots: images of a row.
      seed: shuffles the rows, since the packer leaves the emptiest rows last; None does not shuffle them.

    Returns:
      For each row the indices of its samples, in order.
    """
    positions, slots = np.zeros(row_length, np.bool_), np.zeros(image_slots, np.bool_)
    element = lambda i: dict(tokens=positions[:tokens[i]], images=slots[:images[i]], sample=i)
    in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = BestFitPackIterDataset(
        grain.MapDataset.range(len(tokens)).map(element).to_iter_dataset(in_turn),
        length_struct=dict(tokens=row_length, images=image_slots), num_packing_bins=min(BINS, max(1, len(tokens))),
        seed=seed or 0, shuffle_bins=seed is not None, meta_features=("sample",))
    return [row["sample"] for row in rows]


def nothing_usable(lengths: Lengths, epoch: int = 0) -> UserError:
    """Returns the error about an epoch without a usable sample."""
    reason = f"; the first: {lengths.damaged[0]['reason']}" if lengths.damaged else ""
    if not lengths.usable:
        return UserError(f"none of the {len(lengths.tokens)} samples can be used{reason}")
    return UserError(f"none of the samples that epoch {epoch + 1} takes can be used ({lengths.usable} of the "
                     f"{len(lengths.tokens)} samples can, but the weights of their sources leave them out){reason}")


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The shape of a run's rows.

    Attributes:
      row_length: T, positions of a row.
      image_slots: I, images that a row has room for.
      rows: rows of an update, over all processes.
      is_packed: whether rows hold several samples.
      padding_rows: empty rows behind the rows of an update, if the mesh needs them.
      micro_batches: parts in which the rows are computed.
    """

    row_length: int
    image_slots: int
    rows: int
    is_packed: bool
    padding_rows: int = 0
    micro_batches: int = 1


class Plan:
    """The contents of each row of a run. The rows of an epoch are planned on first use, or read from `cache`.

    Args:
      stream: the order of samples.
      lengths: the lengths of all records.
      layout: the shape of the rows.
      cache: a folder for the rows of large data; None caches nothing.
    """

    def __init__(self, stream: Stream, lengths: Lengths, layout: Layout, cache: Path | None = None):
        """Raises UserError if no sample of the first epoch can be used."""
        blocks = (stream.order(0, begin, begin + _BLOCK) for begin in range(0, len(stream), _BLOCK))
        if not lengths.usable or not any(lengths.tokens[records].any() for records in blocks):
            raise nothing_usable(lengths)
        self.stream, self.lengths, self.layout = stream, lengths, layout
        self.cache = cache if len(stream) >= LARGE else None
        self._known: dict[tuple[int, int], Rows] = {}  # (epoch, window)
        self._sizes: dict[tuple[int, int], int] = {}  # rows of each window that was planned
        self.windows = -(-len(stream) // WINDOW)

    @functools.cached_property
    def _fingerprint(self) -> str:
        layout = (self.layout.row_length, self.layout.image_slots, self.layout.is_packed, BINS)
        layout += (WINDOW,) if self.windows > 1 else ()
        arrays = self.lengths.tokens.tobytes() + self.lengths.images.tobytes()
        return sha256(repr((self.stream, layout)).encode() + arrays)[:24]

    def fingerprint(self) -> str:
        """Returns a hash of everything that the plan depends on."""
        return self._fingerprint

    def window(self, epoch: int, window: int) -> Rows:
        """Returns the rows of one window of an epoch."""
        place = epoch, window
        if place not in self._known:
            if sum(len(rows.records) for rows in self._known.values()) > 2**22:  # all epochs of a small run stay
                self._known.clear()
            self._known[place] = self._kept(epoch, window)
            self._sizes[place] = len(self._known[place])
        return self._known[place]

    def rows(self, epoch: int) -> Rows:
        """Returns the rows of an epoch, of all windows."""
        if self.windows == 1:
            return self.window(epoch, 0)
        parts = [self.window(epoch, window) for window in range(self.windows)]
        begins = np.cumsum([0, *(len(part.records) for part in parts[:-1])])
        ends = [part.ends + begin for part, begin in zip(parts, begins, strict=True)]
        return Rows(np.concatenate([part.records for part in parts]), np.concatenate(ends).astype(np.int32))

    def first(self, epoch: int) -> Rows:
        """Returns the rows of the first window of an epoch with a usable sample; raises UserError if there is none."""
        for window in range(self.windows):
            if len(rows := self.window(epoch, window)):
                return rows
        raise nothing_usable(self.lengths, epoch)

    def expected_rows(self, epoch: int) -> int:
        """Returns the number of rows of an epoch; with several windows, as many as the first one lets expect."""
        first = self.first(epoch)
        if self.windows == 1:
            return len(first)
        usable = float((self.stream.weights() * (self.lengths.tokens > 0)).sum())
        return round(len(first) * usable / len(first.records))

    def _find(self, epoch: int, row: int) -> tuple[int, int] | None:
        """Returns the window of a row and its place there; None if the epoch has fewer rows. Plans no later window."""
        for window in range(self.windows):
            size = self._sizes.get((epoch, window))
            size = len(self.window(epoch, window)) if size is None else size
            if row < size:
                return window, row
            row -= size
        return None

    def _size(self, epoch: int) -> int:
        """Returns the number of rows of an epoch."""
        return sum(self._sizes[epoch, window] if (epoch, window) in self._sizes else len(self.window(epoch, window))
                   for window in range(self.windows))

    def num_updates(self, epochs: int) -> int:
        """Returns the number of updates of `epochs` epochs.

        These are the whole updates of each epoch, at least one, as transformers' Trainer counts them. With several
        windows the rows are those that each epoch's first window lets expect, and the stream goes on accordingly.
        """
        return sum(max(1, self.expected_rows(epoch) // self.layout.rows) for epoch in range(epochs))

    def walk(self, epoch: int, row: int, count: int, last_epoch: int | None = None) -> tuple[int, int]:
        """Returns the place `count` rows after (epoch, row), at most the end of `last_epoch`."""
        row += count
        while row and (last_epoch is None or epoch <= last_epoch) and self._find(epoch, row) is None:
            row -= self._size(epoch)
            epoch += 1
        return (epoch, row) if last_epoch is None or epoch <= last_epoch else (last_epoch + 1, 0)

    def take(self, epoch: int, row: int, count: int, last_epoch: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Yields epoch and records of `count` rows from (epoch, row) on; fewer if `last_epoch` ends before."""
        for _ in range(count):
            while (last_epoch is None or epoch <= last_epoch) and self._find(epoch, row) is None:
                epoch, row = epoch + 1, row - self._size(epoch)
            if last_epoch is not None and epoch > last_epoch:
                return
            window, place = self._find(epoch, row)
            yield epoch, self.window(epoch, window)[place]
            row += 1

    def _kept(self, epoch: int, window: int) -> Rows:
        if self.cache is None:
            return self._plan(epoch, window)
        name = f"{epoch}" if self.windows == 1 else f"{epoch}-{window}"
        path = self.cache / f"rows-{self.fingerprint()}-{name}.npz"
        if (known := load_arrays(path, "records", "ends")) is not None:
            return Rows(**known)
        rows = self._plan(epoch, window)
        save_whole(path, lambda file: np.savez(file, records=rows.records, ends=rows.ends))
        return rows

    def _plan(self, epoch: int, window: int) -> Rows:
        order = self.stream.order(epoch, window * WINDOW, (window + 1) * WINDOW)
        order = order[self.lengths.tokens[order] > 0]
        if not self.layout.is_packed:
            return Rows(order, np.arange(1, len(order) + 1, dtype=np.int32))
        key = (self.stream.seed, epoch, 2**31, *([window] if window else []))
        seed = _seed(*key) if self.stream.is_shuffled else None
        rows = pack(self.lengths.tokens[order], self.lengths.images[order], self.layout.row_length,
                    self.layout.image_slots, seed)
        if not rows:
            return Rows(order, np.zeros(0, np.int32))
        return Rows(order[np.concatenate(rows)], np.cumsum([len(row) for row in rows], dtype=np.int32))
