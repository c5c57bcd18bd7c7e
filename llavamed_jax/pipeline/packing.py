"""Which samples each row holds: the order of samples, rows packed by grain, and how many rows make an update.

The order is an endless sequence of epochs, each shuffled by (seed, epoch). The usable samples of an epoch are packed in this
order, by their lengths alone, into rows of `row_length` positions and `image_slots` images; an epoch ends its last rows. So
row r of epoch e is a function of (data, seed, e): any process can say what it holds, and where a run stands is two counts.
Rows that are not packed are the same thing with one sample each.
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
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.pipeline.lengths import LARGE, Lengths
from llavamed_jax.utils.hashes import sha256

ROW_LENGTHS = (8192, 4096, 2048)
# Rows that grain fills at a time. With 64 instead, rows of 2,048 hold a fiftieth less, with more nothing changes.
BINS = 256
_TRIAL = 2048  # samples on which numbers of image slots are compared
_TOLERANCE = 0.1  # of batch_size, that the samples an update really has may be off


@dataclass(frozen=True)
class Stream:
    """The order of samples.

    A source of weight 1.5 gives one and a half times its length an epoch: it is walked through again and again, newly
    shuffled each time, so that every sample of it has been seen before one is seen twice.
    """

    lengths: tuple[int, ...]  # records of each source
    sizes: tuple[int, ...]  # samples of each source an epoch
    seed: int
    is_shuffled: bool

    @classmethod
    def of(cls, data: TrainingData, seed: int, is_shuffled: bool = True) -> Stream:
        return cls(tuple(map(len, data.sources)), data.sizes, seed, is_shuffled)

    def __len__(self) -> int:
        """Samples an epoch."""
        return sum(self.sizes)

    def weights(self) -> np.ndarray:
        """Samples an epoch that each record stands for, float64 [records], numbered through all sources."""
        return np.repeat(np.divide(self.sizes, self.lengths), self.lengths)

    def order(self, epoch: int) -> np.ndarray:
        """The records of an epoch in order, int32 [samples], numbered through all sources."""
        return np.fromiter((self._record(epoch, slot) for slot in range(len(self))), np.int32, len(self))

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


def _shuffle(index: int, length: int, *key: int) -> int:
    """The place of `index` in a permutation of `length` that `key` names."""
    return index_shuffle(index, max_index=length - 1, seed=_seed(*key), rounds=4)


@functools.lru_cache(maxsize=64)
def _seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


# ---- one epoch -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The rows of an epoch: `records` int32 [samples], row by row, and where each row of them ends, int32 [rows]."""

    records: np.ndarray
    ends: np.ndarray

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int) -> np.ndarray:
        return self.records[self.ends[row - 1] if row else 0:self.ends[row]]


def pack(tokens: np.ndarray, images: np.ndarray, row_length: int, image_slots: int,
         seed: int | None = None) -> list[list[int]]:
    """Rows of samples by grain's best-fit packer: for each row, which of the samples stand in it, in order.

    grain is given empty arrays of the samples' sizes, which it places as it would place the tokens and images themselves.

    Args:
      tokens, images: int [samples], each at most `row_length` and `image_slots`.
      seed: rows are shuffled by it, for the last of those filled together are the emptiest; None leaves them in order.
    """
    positions, slots = np.zeros(row_length, np.bool_), np.zeros(image_slots, np.bool_)
    element = lambda i: dict(tokens=positions[:tokens[i]], images=slots[:images[i]], sample=i)
    in_turn = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = BestFitPackIterDataset(
        grain.MapDataset.range(len(tokens)).map(element).to_iter_dataset(in_turn),
        length_struct=dict(tokens=row_length, images=image_slots), num_packing_bins=min(BINS, max(1, len(tokens))),
        seed=seed or 0, shuffle_bins=seed is not None, meta_features=("sample",))
    return [row["sample"] for row in rows]


# ---- the run ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """The shape of a run's rows.

    Attributes:
      row_length: positions T of a row; image_slots: images I that a row has room for.
      rows: of an update, over all processes; `padding_rows` empty ones follow them, where a mesh asks for more.
      is_packed: whether rows hold several samples.
    """

    row_length: int
    image_slots: int
    rows: int
    is_packed: bool
    padding_rows: int = 0


class Plan:
    """What each row of a run holds. Rows of an epoch are planned when they are first asked for, or read from `cache`."""

    def __init__(self, stream: Stream, lengths: Lengths, layout: Layout, cache: Path | None = None):
        """Raises UserError where no sample can be used, for then there is no row."""
        if not lengths.usable:
            reason = f"; the first: {lengths.damaged[0]['reason']}" if lengths.damaged else ""
            raise UserError(f"none of the {len(lengths.tokens)} samples can be used{reason}")
        self.stream, self.lengths, self.layout = stream, lengths, layout
        self._cache = cache if len(stream) >= LARGE else None
        self._known: dict[int, Rows] = {}

    def fingerprint(self) -> str:
        """Names the plan: what it follows from, in short."""
        layout = (self.layout.row_length, self.layout.image_slots, self.layout.is_packed, BINS)
        arrays = self.lengths.tokens.tobytes() + self.lengths.images.tobytes()
        return sha256(repr((self.stream, layout)).encode() + arrays)[:24]

    def rows(self, epoch: int) -> Rows:
        if epoch not in self._known:
            if sum(len(rows.records) for rows in self._known.values()) > 2**22:  # a small run's epochs are all kept
                self._known.clear()
            self._known[epoch] = self._kept(epoch)
        return self._known[epoch]

    def num_updates(self, epochs: int) -> int:
        """Updates of so many epochs: the whole ones of each, at least one, as HF's Trainer counts them (spec 4.1)."""
        return sum(max(1, len(self.rows(epoch)) // self.layout.rows) for epoch in range(epochs))

    def walk(self, epoch: int, row: int, count: int, last_epoch: int | None = None) -> tuple[int, int]:
        """The place `count` rows after (epoch, row), at most the end of `last_epoch`."""
        row += count
        while row and (last_epoch is None or epoch <= last_epoch) and row >= len(self.rows(epoch)):
            row -= len(self.rows(epoch))
            epoch += 1
        return (epoch, row) if last_epoch is None or epoch <= last_epoch else (last_epoch + 1, 0)

    def take(self, epoch: int, row: int, count: int, last_epoch: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
        """Epoch and records of `count` rows from (epoch, row) on; fewer where `last_epoch` ends."""
        for _ in range(count):
            while (last_epoch is None or epoch <= last_epoch) and row >= len(self.rows(epoch)):
                epoch, row = epoch + 1, row - len(self.rows(epoch))
            if last_epoch is not None and epoch > last_epoch:
                return
            yield epoch, self.rows(epoch)[row]
            row += 1

    def _kept(self, epoch: int) -> Rows:
        if self._cache is None:
            return self._plan(epoch)
        path = self._cache / f"rows-{self.fingerprint()}-{epoch}.npz"
        if (known := load_arrays(path, "records", "ends")) is not None:
            return Rows(**known)
        rows = self._plan(epoch)
        save_whole(path, lambda file: np.savez(file, records=rows.records, ends=rows.ends))
        return rows

    def _plan(self, epoch: int) -> Rows:
        order = self.stream.order(epoch)
        order = order[self.lengths.tokens[order] > 0]
        if not self.layout.is_packed:
            return Rows(order, np.arange(1, len(order) + 1, dtype=np.int32))
        seed = _seed(self.stream.seed, epoch, 2**31) if self.stream.is_shuffled else None
        rows = pack(self.lengths.tokens[order], self.lengths.images[order], self.layout.row_length,
                    self.layout.image_slots, seed)
        return Rows(order[np.concatenate(rows)], np.cumsum([len(row) for row in rows], dtype=np.int32))


# ---- how many rows ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Update:
    """How many rows make an update of about `batch_size` samples.

    Attributes:
      samples: that rows without padding would hold.
      fitting: the batch size that the rows would be right for, where `batch_size` is more than a tenth off; else None.
    """

    row_length: int
    rows: int
    samples: float
    fitting: int | None


def rows_an_update(batch_size: int, mean_length: float, multiple: int, row_length: int = 0, longest: int = 0) -> Update:
    """Rows an update: the multiple nearest to what `batch_size` samples of the mean length fill, at least one.

    Args:
      multiple: data x fsdp x micro_batches, which share the rows evenly.
      row_length: positions a row; 0 picks the longest of `ROW_LENGTHS` whose rows hold `batch_size` samples to a tenth,
        and the shortest where none does.
      longest: tokens of the longest sample, which must fit a row.
    Raises:
      UsageError: a row length that the longest sample does not fit.
    """
    if row_length and row_length < longest:
        raise UsageError(f"the config key 'data.row_length' is {row_length}; the longest sample has {longest} tokens, "
                         "so at least that was expected")
    choices = [row_length] if row_length else [length for length in ROW_LENGTHS
                                               if length >= longest] or [-(-longest // 128) * 128]
    for length in choices:
        rows = max(1, int(batch_size * mean_length / length / multiple + 0.5)) * multiple
        samples = rows * length / mean_length
        if abs(samples - batch_size) <= _TOLERANCE * batch_size:
            return Update(length, rows, samples, None)
    return Update(length, rows, samples, round(samples))


def choose_image_slots(stream: Stream, lengths: Lengths, row_length: int, image_cost: float) -> int:
    """Images a row has room for: the number with the least work, tried on the first samples of the run.

    The tower encodes every slot, also an empty one, and a row may be full of images before it is full of tokens. So the work
    of a number of slots is rows x (row_length + slots x image_cost), where the rows are those that grain needs.

    Args:
      image_cost: the tower's work for one image, in tokens of the decoder.
    """
    least = lengths.max_images
    if not least:
        return 0
    order = stream.order(0)
    order = order[lengths.tokens[order] > 0][:_TRIAL]
    tokens, images = lengths.tokens[order], lengths.images[order]
    full = row_length * images.sum() / tokens.sum()  # images of a row without padding
    choices = sorted({max(least, round(full * share)) for share in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)})
    work = {slots: len(pack(tokens, images, row_length, slots)) * (row_length + slots * image_cost)
            for slots in choices}
    return min(work, key=work.get)
