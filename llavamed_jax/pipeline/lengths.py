"""Measures the length and the number of images of each sample, in one pass over the text of all records.

Packing, the number of updates and the mean length are derived from the result, and the pass finds the records that
cannot be used. No image is opened. The result of large data is cached in a folder, under a name made from everything
that it depends on.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llavamed_jax.datasets.records import load_arrays, save_whole
from llavamed_jax.datasets.shards import ShardRecords
from llavamed_jax.datasets.training import TrainingData
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.pipeline import examples, stored, workers
from llavamed_jax.processor import Processor
from llavamed_jax.utils import signals
from llavamed_jax.utils.hashes import sha256
from llavamed_jax.utils.progress import bar

BLOCK = 512  # records that are measured together
FORMAT = 5  # of the cached file; raise it if samples become longer or shorter
_ARRAYS = ("tokens", "images", "lost")
_REST = ("damaged", "truncated", "surplus", "unsupervised", "first_lost", "first_unsupervised", "highest")
LARGE = 5000  # from so many records on, worker processes and the cache pay off


@dataclass(frozen=True)
class Lengths:
    """The result of the pass. N is the number of records of all sources, one source after another.

    Attributes:
      tokens: int32 [N], positions of each sample, images expanded, after cutting; 0 for a sample that cannot be used.
      images: int16 [N], images of each sample.
      damaged: the records that cannot be used, as {"id", "reason"}.
      truncated: number of samples that are cut at the maximal length.
      surplus: number of images without a marker, or lost by a cut.
      unsupervised: number of samples without a supervised token (see `conversation.supervise`).
      lost: int16 [N], the number of surplus images of each sample; None if unknown, which counts as no surplus.
      first_lost: a sentence about the first sample that loses an image.
      first_unsupervised: a sentence about the first sample without a supervised token.
      highest: the highest token id, and the id of the record that has it.
    """

    tokens: np.ndarray
    images: np.ndarray
    damaged: list[dict]
    truncated: int
    surplus: int
    unsupervised: int
    lost: np.ndarray | None = None
    first_lost: str = ""
    first_unsupervised: str = ""
    highest: tuple[int, object] = (0, None)

    @property
    def is_lossy(self) -> np.ndarray:
        """Whether each sample loses an image, bool [N]."""
        return np.zeros(len(self.tokens), bool) if self.lost is None else self.lost > 0

    @property
    def usable(self) -> int:
        """The number of samples that can be used."""
        return int(np.count_nonzero(self.tokens))

    @property
    def mean(self) -> float:
        """Mean number of tokens of a usable sample, images included; 0 without usable samples."""
        return float(self.tokens.sum() / max(self.usable, 1))

    @property
    def longest(self) -> int:
        """Tokens of the longest sample."""
        return int(self.tokens.max(initial=0))

    @property
    def max_images(self) -> int:
        """The most images of a sample."""
        return int(self.images.max(initial=0))


def measure(data: TrainingData, processor: Processor, max_length: int, num_workers: int = 0, cache: Path | None = None,
            rows: int | None = None) -> Lengths:
    """Measures all records.

    Args:
      data: the records.
      processor: the model's processor.
      max_length: tokens of a sample; longer samples are cut, never inside an image.
      num_workers: processes that measure large data.
      cache: a folder for the results of large data; None caches nothing.
      rows: rows of the model's embedding table; None if no model will read the tokens.

    Returns:
      The lengths.

    Raises:
      UsageError: the maximal length cannot hold an image, and the data has images.
      UserError: a token has no row in the model's embedding table.
    """
    if any(isinstance(source, ShardRecords) for source in data.sources):
        if len(data.sources) > 1:
            return joined([measure(TrainingData([source]), processor, max_length, num_workers, cache, rows)
                           for source in data.sources])
        known = stored.lengths_of(data.sources[0], processor, max_length, FORMAT)
        if known is not None:
            found = _from_arrays({**known, "rest": joined_rest(known["rest"])})
            _refuse_beyond(rows, found.highest, processor)
            return found
    is_large = data.num_records >= LARGE
    kept = cache / f"lengths-{_key(data, processor, max_length)}.npz" if is_large and cache is not None else None
    if kept is not None and (known := _load(kept)) is not None:
        _refuse_beyond(rows, known.highest, processor)
        return known
    count = -(-data.num_records // BLOCK)
    make = _Measure(data, processor, max_length)
    blocks = (workers.in_order(make, count, num_workers) if is_large and num_workers
              else map(make, signals.checked(range(count))))
    parts = []
    try:
        for part in bar(blocks, is_long=is_large, desc="measuring samples", total=count, unit_scale=BLOCK):
            _refuse_beyond(rows, part["highest"], processor)
            parts.append(part)
    finally:
        if is_large and num_workers:
            blocks.close()
    lengths = Lengths(
        *(np.concatenate([part[name] for part in parts]) if parts else np.zeros(0, int)
          for name in ("tokens", "images")),
        [entry for part in parts for entry in part["damaged"]],
        *(int(sum(part[name] for part in parts)) for name in ("truncated", "surplus", "unsupervised")),
        np.concatenate([part["lost"] for part in parts]) if parts else np.zeros(0, np.int16),
        *(next((part[name] for part in parts if part[name]), "") for name in ("first_lost", "first_unsupervised")),
        max((part["highest"] for part in parts), key=lambda found: found[0], default=(0, None)))
    if lengths.surplus and not lengths.max_images and processor.tokens_per_image >= max_length:
        raise UsageError(f"the config key 'max_length' is {max_length}, but one image takes "
                         f"{processor.tokens_per_image} tokens; a larger number was expected")
    if kept is not None:
        _save(kept, lengths)
    return lengths


@dataclass(frozen=True)
class _Measure:
    """Measures a block of records by its number. Worker processes call it."""

    data: TrainingData
    processor: Processor
    max_length: int

    def __call__(self, block: int) -> dict:
        numbers = range(block * BLOCK, min((block + 1) * BLOCK, self.data.num_records))
        found = dict(tokens=np.zeros(len(numbers), np.int32), images=np.zeros(len(numbers), np.int16), damaged=[],
                     truncated=0, surplus=0, unsupervised=0, lost=np.zeros(len(numbers), np.int16), first_lost="",
                     first_unsupervised="", highest=(0, None))
        for i, number in enumerate(numbers):
            record = {"id": number}
            try:
                record = self.data.record(number)
                example = examples.tokenize(record, self.processor, self.max_length)
            except UserError as error:
                found["damaged"].append({"id": record["id"], "reason": str(error)})
                continue
            found["tokens"][i], found["images"][i] = len(example.ids), len(example.images)
            found["truncated"] += example.is_truncated
            found["surplus"] += example.num_surplus
            found["lost"][i] = min(example.num_surplus, np.iinfo(np.int16).max)
            if example.num_surplus and not found["first_lost"]:
                found["first_lost"] = _why_lost(record, example, self.max_length)
            found["unsupervised"] += not example.is_supervised
            if not example.is_supervised and not found["first_unsupervised"]:
                found["first_unsupervised"] = _why_unsupervised(record, example, self.processor, self.max_length)
            found["highest"] = max(found["highest"], (max(example.ids, default=0), record["id"]),
                                   key=lambda pair: pair[0])
        return found


def _refuse_beyond(rows: int | None, highest: tuple[int, object], processor: Processor) -> None:
    """Raises UserError if a token has no row in the model's embedding table: its embedding would be NaN."""
    token, record = highest
    if rows is not None and token >= rows:
        raise UserError(f"record {record!r} has the token {token}, but the model's embedding table has {rows} rows; "
                        f"the tokenizer of {processor.tokenizer.vocab_size} tokens does not belong to the model, or "
                        "tokens were added without rows (`python -m convert build` adds rows)")


def _why_lost(record: dict, example: examples.Example, max_length: int) -> str:
    unmarked, marked = record.get("surplus", 0), len(record["image"])
    images = lambda count: count_of(count, "image")
    if unmarked:
        return (f"record {record['id']!r} names {images(unmarked + marked)} but has "
                f"{count_of(marked, '<image> marker')}")
    return f"record {record['id']!r} is cut at {max_length} tokens, which removes {images(example.num_surplus)}"


def _why_unsupervised(record: dict, example: examples.Example, processor: Processor, max_length: int) -> str:
    if not any(turn["from"] != "human" and str(turn["value"]) for turn in record["conversations"]):
        return f"record {record['id']!r} has no answer or an empty answer"
    if example.is_truncated:
        return f"record {record['id']!r} is cut at {max_length} tokens, before or within its answer"
    return (f"the template {processor.template_name} does not find the answers of record {record['id']!r}: the text "
            "contains a special token, or the tokenizer does not fit the template")


def _key(data: TrainingData, processor: Processor, max_length: int) -> str:
    """Returns a name for everything that lengths depend on.

    The name may change with the version of Python, which costs one more pass.
    """
    config = processor.config
    parts = [FORMAT, max_length, processor.template_name, processor.tokens_per_image, processor.max_length,
             config and config.use_start_end, [source.fingerprint() for source in data.sources]]
    return sha256(json.dumps(parts).encode() + pickle.dumps(processor.tokenizer))[:24]


def rest_of(lengths: Lengths) -> dict:
    """Returns what is not an array, as values of JSON."""
    return {name: getattr(lengths, name) for name in _REST}


def joined_rest(parts: Sequence[dict]) -> dict:
    """Joins what `rest_of` returns for one part of the records after another."""
    return {"damaged": [entry for part in parts for entry in part["damaged"]],
            **{name: sum(part[name] for part in parts) for name in ("truncated", "surplus", "unsupervised")},
            **{name: next((part[name] for part in parts if part[name]), "")
               for name in ("first_lost", "first_unsupervised")},
            "highest": max((tuple(part["highest"]) for part in parts), key=lambda found: found[0], default=(0, None))}


def joined(parts: Sequence[Lengths]) -> Lengths:
    """Joins the lengths of one source after another."""
    none = lambda part: np.zeros(len(part.tokens), np.int16)
    return _from_arrays({"tokens": np.concatenate([part.tokens for part in parts]),
                         "images": np.concatenate([part.images for part in parts]),
                         "lost": np.concatenate([none(part) if part.lost is None else part.lost for part in parts]),
                         "rest": joined_rest([rest_of(part) for part in parts])})


def _from_arrays(found: dict) -> Lengths:
    rest = {**found["rest"], "highest": tuple(found["rest"]["highest"])}
    return Lengths(**{name: found[name] for name in _ARRAYS}, **rest)


def _save(path: Path, lengths: Lengths) -> None:
    arrays = {name: getattr(lengths, name) for name in _ARRAYS}
    save_whole(path, lambda file: stored.save_arrays(file, **arrays, rest=rest_of(lengths)))


def _load(path: Path) -> Lengths | None:
    found = load_arrays(path, *_ARRAYS, "rest")
    return None if found is None else _from_arrays({**found, "rest": json.loads(str(found["rest"]))})
