"""Batches for training: grain's pipeline with worker processes over a stream that depends on nothing but its arguments.

The stream is an endless sequence of samples, epoch after epoch, each epoch shuffled by (seed, epoch). Batch g of B rows is
samples gB to gB+B of the stream, so batches run over the end of an epoch and no sample is left out; process k of K builds
the k-th part of each. A batch is made whole in one worker, so what it holds cannot depend on how many workers there are,
and where the stream stands is one count of samples, which any later run can go on from.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import parent_process

import grain
import numpy as np
from absl import flags
from grain.experimental import index_shuffle

from llavamed_jax.config import IGNORE
from llavamed_jax.data import transforms
from llavamed_jax.data.datasets import TrainingData
from llavamed_jax.data.processor import Processor
from llavamed_jax.errors import UsageError, UserError

_ENDLESS = 2**62
_GRACE_S = 30  # a worker's, after a SIGTERM


class Records:
    """Records of one source as one block of JSON text, which reaches worker processes in one copy without pickling objects."""

    def __init__(self, records: list[dict]):
        lines = [json.dumps(record).encode() for record in records]
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._text = b"".join(lines)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> dict:
        return json.loads(self._text[self._ends[i - 1] if i else 0:self._ends[i]])


@dataclass(frozen=True)
class Stream:
    """The order of samples: position in the stream to (epoch, source, index in the source).

    A source of weight 1.5 gives one and a half times its length an epoch: it is walked through again and again, newly
    shuffled each time, so that every sample of it has been seen before one is seen twice.
    """

    lengths: tuple[int, ...]  # records of each source
    sizes: tuple[int, ...]  # samples of each source an epoch
    seed: int
    is_shuffled: bool

    def __len__(self) -> int:
        """Samples an epoch."""
        return sum(self.sizes)

    def locate(self, position: int) -> tuple[int, int, int]:
        epoch, slot = divmod(position, len(self))
        if self.is_shuffled:
            slot = _shuffle(slot, len(self), self.seed, epoch)
        source = 0
        while slot >= self.sizes[source]:
            slot -= self.sizes[source]
            source += 1
        walk, index = divmod(epoch * self.sizes[source] + slot, self.lengths[source])
        if self.is_shuffled and self.sizes[source] != self.lengths[source]:
            index = _shuffle(index, self.lengths[source], self.seed, walk, source + 1)
        return epoch, source, index


def _shuffle(index: int, length: int, *key: int) -> int:
    """The place of `index` in a permutation of `length` that `key` names."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    return index_shuffle(index, max_index=length - 1, seed=seed, rounds=4)


@dataclass(frozen=True)
class BatchMaker:
    """Batch number to (batch, report); what the worker processes run."""

    stream: Stream
    sources: list[Records]
    processor: Processor
    rows: int  # of this process
    batch_size: int  # of all processes
    offset: int  # first row of this process
    start: int  # position in the stream of batch 0
    stop: int  # position at which the stream ends
    length: int
    num_images: int

    def __call__(self, number: int) -> tuple[dict[str, np.ndarray], dict]:
        batch = transforms.empty_batch(self.rows, self.length, self.num_images, self.processor.image_size)
        report = {"skipped": [], "places": [], "truncated": 0, "unsupervised": 0}
        first = self.start + number * self.batch_size + self.offset
        for row, position in enumerate(range(first, min(first + self.rows, self.stop))):
            epoch, source, index = self.stream.locate(position)
            record = self.sources[source][index]
            example = transforms.tokenize(record, self.processor, self.length)
            pixels, broken = transforms.read_images(example, self.processor)
            if broken:
                report["skipped"].append({"id": record["id"], "epoch": epoch, **broken})
                report["places"].append((source, index))
                continue
            report["truncated"] += example.is_truncated
            report["unsupervised"] += not example.is_supervised
            transforms.fill_row(batch, row, example, pixels)
        return batch, report


class Loader:
    """An iterator over batches in row form (see `data.transforms`). Make one with `batches`.

    Attributes:
      skipped: samples whose image could not be read, as {"id", "epoch", "image", "reason"}; their rows are padding.
      truncated, unsupervised: samples so far that were cut, and that teach nothing (see `conversation.supervise`).
    """

    def __init__(self, make: BatchMaker, workers: int, on_skip: Callable[[dict], None] | None, skip_limit: int):
        self._make, self._workers, self._on_skip, self._skip_limit = make, workers, on_skip, skip_limit
        self._position = make.start
        self._running: list[grain.DatasetIterator] = []  # the one iterator, once started
        # Closes it with this object or, before modules are torn down (grain's destructors need them), with the program.
        weakref.finalize(self, _close, self._running)
        self.skipped: list[dict] = []
        self._broken: set[tuple[int, int]] = set()  # (source, index) of what was skipped: ids may be equal
        self._barren = 0  # samples since the last one with a supervised token
        self.truncated = self.unsupervised = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """The next batch.

        Raises:
          UserError: more samples were skipped than the limit allows, or a whole epoch of an endless stream had no supervised token.
        """
        if not self._running:
            self._running.append(self._start())
        batch, report = next(self._running[0])
        before, self._position = self._position, min(self._position + self._make.batch_size, self._make.stop)
        self.truncated += int(report["truncated"])
        self.unsupervised += int(report["unsupervised"])
        for entry in report["skipped"]:
            self.skipped.append(entry)
            if self._on_skip is not None:
                self._on_skip(entry)
        self._broken.update((int(source), int(index)) for source, index in report["places"])
        if len(self._broken) > self._skip_limit:
            self.close()
            raise UserError(f"{len(self._broken)} samples have an image that cannot be read, more than the {self._skip_limit} that are "
                            f"skipped; the last: {self.skipped[-1]['reason']}")
        self._barren = 0 if (batch["labels"] != IGNORE).any() else self._barren + self._position - before
        if self._make.stop == _ENDLESS and self._barren >= len(self._make.stream):
            self.close()
            raise UserError(f"none of the {len(self._make.stream)} samples of an epoch has a supervised token: their images cannot be "
                            "read, they have no turn of gpt, or max_length cuts it off")
        # Out of the worker's shared memory, which would otherwise live as long as the last array made from it.
        return {name: np.array(array) for name, array in batch.items()} if self._workers else batch

    def state(self) -> dict[str, int]:
        """Where the stream stands after the batches that were handed out; JSON, and good for any number of workers."""
        epoch, position = divmod(self._position, len(self._make.stream))
        return {"epoch": epoch, "position": position, "samples": len(self._make.stream), "seed": self._make.stream.seed}

    def ids(self, state: dict[str, int]) -> list:
        """Ids of the samples of this process's rows in the batch that follows `state`."""
        make = self._make
        first = state["epoch"] * len(make.stream) + state["position"] + make.offset
        places = [make.stream.locate(position) for position in range(first, min(first + make.rows, make.stop))]
        return [make.sources[source][index]["id"] for _, source, index in places]

    def restore(self, state: dict[str, int]) -> None:
        """Goes on from `state`. Raises UserError when it belongs to other data or another seed."""
        stream = self._make.stream
        for key, here in (("samples", len(stream)), ("seed", stream.seed)):
            if state[key] != here:
                raise UserError(f"the position in the data was saved with {key} {state[key]}; it is {here} now")
        self.close()
        self._position = state["epoch"] * len(stream) + state["position"]
        self._make = BatchMaker(**{**vars(self._make), "start": self._position})

    def close(self) -> None:
        """Ends the worker processes. They also end with this object, with the program, and when the program dies."""
        _close(self._running)

    def _start(self) -> grain.DatasetIterator:
        remaining = max(0, self._make.stop - self._make.start)
        numbers = grain.MapDataset.range(-(-remaining // self._make.batch_size))
        # One thread each: tokenising holds the interpreter's lock, and a second batch in the making costs its memory.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2 if self._workers == 0 else 1)
        dataset = numbers.map(self._make).to_iter_dataset(options)
        if self._workers:
            if not flags.FLAGS.is_parsed():  # grain asks absl for its options, and our command lines are argparse's
                flags.FLAGS.mark_as_parsed()
            dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=self._workers, per_worker_buffer_size=1),
                                          worker_init_fn=_tie_to_parent)
        return iter(dataset)


def _close(running: list[grain.DatasetIterator]) -> None:
    while running:
        running.pop().close()


def batches(data: TrainingData, processor: Processor, batch_size: int, max_length: int, *, seed: int = 0, workers: int = 0,
            epochs: int | None = None, shuffle: bool = True, process_index: int = 0, process_count: int = 1,
            on_skip: Callable[[dict], None] | None = None, skip_limit: int | None = None) -> Loader:
    """Batches of training rows.

    Args:
      data: from `datasets.read_training`.
      batch_size: rows of all processes together; each gets its part, rows `process_index * batch_size / process_count` on.
      max_length: positions T of a row; longer samples are cut and counted.
      workers: processes that make batches; 0 makes them in a thread of this one. The batches are the same.
      epochs: None goes on for ever; otherwise the last batch is filled up with rows of padding.
      on_skip: called with each skipped sample as it is met.
      skip_limit: how many different samples of this process may be skipped; None is one in a hundred, at least one.
    Raises:
      UserError: a batch size that the processes cannot share; UsageError: images that no row could hold.
    """
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"a batch of {batch_size} rows cannot be shared by {process_count} processes")
    if not len(data):
        raise UserError("the training data is empty; at least one record was expected")
    num_images = data.max_images
    if num_images and processor.tokens_per_image >= max_length:
        raise UsageError(f"the config key 'max_length' is {max_length}; an image alone takes {processor.tokens_per_image} positions")
    stream = Stream(tuple(map(len, data.sources)), tuple(data.sizes), seed, shuffle)
    rows = batch_size // process_count
    make = BatchMaker(
        stream, [Records(source) for source in data.sources], processor, rows, batch_size, rows * process_index, start=0,
        stop=_ENDLESS if epochs is None else epochs * len(stream), length=max_length, num_images=num_images)
    return Loader(make, workers, on_skip, skip_limit if skip_limit is not None else max(1, len(stream) // 100))


def _tie_to_parent(worker: int, num_workers: int) -> None:
    """Run first in each worker process: it ends when its parent does, not before, and not after.

    A Ctrl-C and a scheduler's SIGTERM reach the whole process group; the parent still wants batches until it has saved.
    When the parent is gone, however it went, grain's own worker would wait for ever.
    """
    def later(*_):
        timer = threading.Timer(_GRACE_S, os._exit, (1,))
        timer.daemon = True
        timer.start()

    def watch(parent):
        parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, later)
    if (parent := parent_process()) is not None:
        threading.Thread(target=watch, args=(parent,), daemon=True).start()
