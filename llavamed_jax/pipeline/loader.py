"""Batches for training, made ahead in worker processes from a deterministic plan of rows.

Batch g holds the rows gR to gR + R of the plan (see `pipeline.packing`), which continues across the end of an epoch.
With several processes, each builds the rows on its own devices. One worker makes a whole batch, so batches do not
depend on the number of workers, and the position in the stream is two counts, from which any later run can continue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from llavamed_jax.config import IGNORE
from llavamed_jax.datasets.shards import DamagedRecordError
from llavamed_jax.datasets.training import TrainingData
from llavamed_jax.errors import UserError, warn
from llavamed_jax.pipeline import examples, workers
from llavamed_jax.pipeline.packing import Layout, Plan
from llavamed_jax.pipeline.skips import SkipLimit
from llavamed_jax.processor import Processor

_ENDLESS = 2**40
SKIP_LIMIT = 0.5


@dataclass(frozen=True)
class BatchMaker:
    """Makes (batch, report) of a batch number. Worker processes call it.

    Attributes:
      data: the records.
      processor: the model's processor.
      plan: the plan of rows.
      max_length: the most tokens of a sample.
      start: epoch and row of batch 0.
      last_epoch: the last epoch; None for an endless stream.
      part: the rows of an update that this process builds, ascending.
    """

    data: TrainingData
    processor: Processor
    plan: Plan
    max_length: int
    start: tuple[int, int]
    last_epoch: int | None
    part: tuple[int, ...]

    def __call__(self, number: int) -> tuple[dict[str, np.ndarray], dict]:
        """Makes a batch, and a report of its samples."""
        layout = self.plan.layout
        batch = examples.empty_batch(len(self.part), layout.row_length, layout.image_slots, self.processor.image_size)
        report = {"skipped": [], "records": [], "seen": 0, "truncated": 0, "surplus": 0, "unsupervised": 0}
        place = self.plan.walk(*self.start, number * layout.rows, self.last_epoch)
        for row, epoch, records in self.rows(place):
            samples = [self._sample(int(record), epoch, report) for record in records]
            examples.fill_row(batch, row, [sample for sample in samples if sample is not None])
        return batch, report

    def rows(self, place: tuple[int, int]) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields number, epoch and records of this process's rows in the update that begins at (epoch, row) `place`."""
        here = {row: number for number, row in enumerate(self.part)}
        for row, (epoch, records) in enumerate(self.plan.take(*place, self.plan.layout.rows, self.last_epoch)):
            if row in here:
                yield here[row], epoch, records

    def _sample(self, number: int, epoch: int, report: dict) -> tuple[examples.Example, np.ndarray] | None:
        """Returns a sample and its pixels; None if an image is broken, which is reported."""
        try:
            record = self.data.record(number)
        except DamagedRecordError as error:  # of a shard; damaged records of a file are known from the measuring
            report["seen"] += 1
            report["skipped"].append({"id": number, "epoch": epoch, "image": f"record {number}", "reason": str(error)})
            report["records"].append(number)
            return None
        example = examples.tokenize(record, self.processor, self.max_length)
        measured = int(self.plan.lengths.tokens[number]), int(self.plan.lengths.images[number])
        if (len(example.ids), len(example.images)) != measured:
            raise UserError(f"record {record['id']!r} has {len(example.ids)} tokens and {len(example.images)} images, "
                            f"but had {measured[0]} and {measured[1]} when the data was measured: the record has "
                            "changed, or the run's folder cache/ or the shards' lengths are out of date")
        report["seen"] += 1
        pixels, broken = examples.read_images(example, self.processor)
        if broken:
            report["skipped"].append({"id": record["id"], "epoch": epoch, **broken})
            report["records"].append(number)
            return None
        report["truncated"] += example.is_truncated
        report["surplus"] += example.num_surplus
        report["unsupervised"] += not example.is_supervised
        return example, pixels


class Loader:
    """An iterator over batches in row form (see `pipeline.examples`). `batches` makes one.

    Args:
      make: makes batches by their number.
      num_workers: processes that make batches; 0 uses a thread.
      on_skip: called with each skipped sample.
      skip_limit: the share of samples that may be skipped.

    Attributes:
      skipped: samples that could not be used, as {"id", "epoch", "image", "reason"}: the damaged records first, once
        (epoch and image None), then each sample with an image that cannot be read, when it occurs. The other samples of
        a row move up.
      on_wait: called with the seconds for which a batch has been waited for (`workers.InOrder`).
      truncated: samples so far that were cut.
      surplus: images so far that were left out.
      unsupervised: samples so far without a supervised token (see `conversation.supervise`).
      limit: the limit of samples that may turn out unusable.
      seen: samples so far that were read.
      unreadable: samples so far with an image that could not be read.
      unreadable_anew: those of them that were not known to lose an image when they were measured.
    """

    def __init__(self, make: BatchMaker, num_workers: int, on_skip: Callable[[dict], None] | None, skip_limit: float):
        self._make, self._workers, self._on_skip = make, num_workers, on_skip
        self.limit = SkipLimit(make.plan, skip_limit)
        self._place = make.start
        self._records = make.data.fingerprint()
        self.on_wait: Callable[[float], object] = lambda waited: None
        self._running: list[workers.InOrder] = []  # at most one iterator
        self.skipped: list[dict] = []
        self._broken: set[int] = set()  # numbers of records with a broken image; ids may not be unique
        self._barren = 0  # rows since the last one with a supervised token
        self.truncated = self.surplus = self.unsupervised = self.seen = self.unreadable = self.unreadable_anew = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        """Returns the next batch.

        Raises:
          UserError: too many samples had to be skipped, or a whole epoch of an endless stream had no supervised token;
            or a worker died or does not respond (`workers.WorkerError`).
          Stopped: `on_wait` raised it.
        """
        if not self._running:
            self._running.append(self._start())
        # A resumed run has listed them before; of several processes the one with row 0 lists them.
        if self._place == (0, 0) and 0 in self._make.part:
            self._skip([{**entry, "epoch": None, "image": None} for entry in self._make.plan.lengths.damaged])
        self._running[0].on_wait = self.on_wait
        batch, report = next(self._running[0])
        self._place = self._make.plan.walk(*self._place, self._make.plan.layout.rows, self._make.last_epoch)
        self.truncated += int(report["truncated"])
        self.surplus += int(report["surplus"])
        self.unsupervised += int(report["unsupervised"])
        self._skip(report["skipped"])
        self._count([int(record) for record in report["records"]], int(report["seen"]))
        self._refuse_barren(batch)
        # Copies out of the worker's shared memory, which would otherwise live as long as the last array made from it.
        return {name: np.array(array) for name, array in batch.items()} if self._workers else batch

    def _skip(self, entries: list[dict]) -> None:
        for entry in entries:
            self.skipped.append(entry)
            if self._on_skip is not None:
                self._on_skip(entry)

    def _count(self, unreadable: list[int], seen: int) -> None:
        """Counts the records of a batch with an unreadable image; raises UserError if there are too many by now."""
        self.seen += seen
        self.unreadable += len(unreadable)
        self.unreadable_anew += sum(not self.limit.is_known(record) for record in unreadable)
        self._broken.update(unreadable)
        try:
            self.limit.refuse(self._broken, self.seen, self.skipped[-1]["reason"] if self.skipped else "")
        except UserError:
            self.close()
            raise

    def _refuse_barren(self, batch: dict[str, np.ndarray]) -> None:
        if len(batch["labels"]) < self._make.plan.layout.rows:
            return  # the other processes' parts of the batch are unknown here
        is_barren = not (batch["labels"] != IGNORE).any()
        self._barren = self._barren + self._make.plan.layout.rows if is_barren else 0
        if self._make.last_epoch is None and self._barren and self._barren >= len(self._make.plan.rows(self._place[0])):
            self.close()
            why = self._make.plan.lengths.first_unsupervised or "their images cannot be read"
            raise UserError(f"none of the {len(self._make.plan.stream)} samples of an epoch has a supervised token: "
                            f"{why}")

    def state(self) -> dict:
        """Returns the position of the stream behind the returned batches, for any number of workers; JSON values."""
        epoch, row = self._place
        plan = self._make.plan
        return {"epoch": epoch, "row": row, "samples": len(plan.stream), "seed": plan.stream.seed,
                "row_length": plan.layout.row_length, "image_slots": plan.layout.image_slots,
                "rows_an_update": plan.layout.rows, "rows": plan.fingerprint(), "records": self._records}

    def ids(self, state: dict) -> list:
        """Returns the ids of the samples in this process's part of the batch that follows `state`."""
        rows = self._make.rows((state["epoch"], state["row"]))
        return [self._id(int(record)) for _, _, records in rows for record in records]

    def _id(self, number: int) -> object:
        try:
            return self._make.data.record(number)["id"]
        except DamagedRecordError:
            return number

    def restore(self, state: dict) -> None:
        """Resumes from `state`.

        Raises UserError if it belongs to other data, another seed, or rows of another shape.
        """
        for key, here in self.state().items():
            if key not in ("epoch", "row") and state.get(key) != here:
                change = {"rows": "the lengths of the samples differ",
                          "records": "the text or the images of the samples differ"}.get(
                    key, f"{key} was {state.get(key)} and is {here} now")
                raise UserError(f"the run was started with other data: {change}; the same data was expected")
        self.close()
        self._place = state["epoch"], state["row"]
        self._make = replace(self._make, start=self._place)

    def close(self) -> None:
        """Ends the worker processes. They also end with this object, with the program, and if the program crashes."""
        while self._running:
            self._running.pop().close()

    def _start(self) -> workers.InOrder:
        make, count = self._make, _ENDLESS
        if make.last_epoch is not None:
            epoch, row = make.start
            rows = sum(len(make.plan.rows(e)) for e in range(epoch, make.last_epoch + 1)) - row
            count = max(0, -(-rows // make.plan.layout.rows))
        return workers.in_order(make, count, self._workers)


def row_bytes(layout: Layout, image_size: int | None) -> int:
    """Returns the bytes of a row of a batch (`examples.empty_batch`)."""
    return 4 * 4 * layout.row_length + 3 * (image_size or 0) ** 2 * layout.image_slots


def _fitting(num_workers: int, size: int) -> int:
    """Returns how many workers have room for their batches in shared memory; warns if not all of them have."""
    found = workers.fitting(num_workers, size)
    if found < num_workers:
        who = (f"only {found} of {num_workers} data.workers are started" if found
               else "no data.workers are started (a thread makes the batches)")
        warn(f"{who}, because {workers.SHARED} has {workers.free_bytes() / 1e6:.0f} MB free and a worker needs "
             f"{workers.HELD * size / 1e6:.0f} MB for batches of {size / 1e6:.1f} MB; docker run --shm-size=8g gives "
             "more")
    return found


def batches(data: TrainingData, processor: Processor, plan: Plan, max_length: int, *, num_workers: int = 0,
            epochs: int | None = None, part: Sequence[int] | None = None,
            on_skip: Callable[[dict], None] | None = None, skip_limit: float = SKIP_LIMIT) -> Loader:
    """Makes batches of training rows.

    Args:
      data: from `datasets.training.read_training`.
      processor: the model's processor.
      plan: of rows; its layout has the number of rows of an update over all processes.
      max_length: tokens of a sample; longer samples are cut and counted. Equal to the `max_length` of the plan's
        lengths.
      num_workers: processes that make batches; 0 makes the same batches in a thread of this process.
      epochs: None continues forever; otherwise the last batch is filled up with rows of padding.
      part: the rows of an update, padding included, that are made here, ascending; None makes all.
      on_skip: called with each skipped sample when it occurs.
      skip_limit: the share of samples that may be skipped for their images.

    Returns:
      The loader.
    """
    part = range(plan.layout.rows + plan.layout.padding_rows) if part is None else part
    num_workers = _fitting(num_workers, len(part) * row_bytes(plan.layout, processor.image_size))
    make = BatchMaker(data, processor, plan, max_length, (0, 0), None if epochs is None else epochs - 1, tuple(part))
    return Loader(make, num_workers, on_skip, skip_limit)
