"""Reads the training data of a recipe: LLaVA files, and every data set for evaluation, in its own layout.

Every training record is a dict `{"id", "image": list of paths, "conversations": [{"from": "human"|"gpt", "value": str},
…]}`; `sample.to_llava` makes one from a question.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.records import FileRecords, MemoryRecords, open_records
from llavamed_jax.datasets.registry import SETS, Selection
from llavamed_jax.datasets.sample import to_llava
from llavamed_jax.datasets.shards import ShardRecords, is_shards, open_shards
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.utils.hashes import sha256

LARGEST_WEIGHT = 1000  # of a source; the plan of an epoch is in memory, and a larger weight is probably a typing error


@dataclass(frozen=True)
class TrainingData:
    """Records of one or several sources. An epoch takes `round(weight * len(source))` of each (see `pipeline.packing`).

    Attributes:
      sources: the records of each source.
      weights: how often an epoch uses the records of each source.
      found: one line for each source that is a data set with published counts (`counts.describe`).
    """

    sources: Sequence[MemoryRecords | FileRecords | ShardRecords]
    weights: Sequence[float] = (1.0,)
    found: Sequence[str] = ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of samples that an epoch takes from each source."""
        return tuple(round(weight * len(source)) for source, weight in zip(self.sources, self.weights, strict=True))

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def num_records(self) -> int:
        """Number of records of all sources, without weights."""
        return sum(map(len, self.sources))

    def record(self, number: int) -> dict:
        """Reads a record; `number` counts through all sources. Raises UserError, which names a damaged record."""
        for source in self.sources:
            if number < len(source):
                return source[number]
            number -= len(source)
        raise IndexError(number)

    def fingerprint(self) -> str:
        """Returns a hash of the records' text; the pixels of the images do not count."""
        return sha256(repr([source.fingerprint() for source in self.sources]).encode())[:24]

    def readable(self) -> Iterator[dict]:
        """Yields the records in order, without the damaged ones."""
        for number in range(self.num_records):
            with contextlib.suppress(UserError):
                yield self.record(number)


def read_training(data, images: str | Path | None = None, protocol: str = "clean", split: str = "train",
                  cache: Path | None = None) -> TrainingData:
    """Reads the training data that `data.train` of a recipe names.

    Args:
      data: a LLaVA JSON or JSONL file; a folder of shards (`shards.open_shards`); a data set in its own layout
        (`registry.SETS`), as a folder or a file; or a list of `{"path", "images", "weight"}`. A weight of 2 uses a
        source twice in an epoch, 0.5 uses half of it.
      images: the folder of the images; None means the folder of the layout.
      protocol: which rows of VQA-RAD, `clean` or `paper`.
      split: which rows of a data set.
      cache: see `records.open_records`.

    Raises:
      UserError: a file is missing or is not JSON, a row of a data set is malformed, or there are no records. Records of
        a LLaVA file are read later; `lengths.measure` finds malformed ones.
    """
    if isinstance(data, (list, tuple)):
        return _read_mixture(data, images, protocol, split, cache)
    path = Path(data)
    if is_shards(path):
        source = open_shards(path)
        if not len(source):
            raise UserError(f"{path} holds no training records")
        return TrainingData([source])
    layout = detect.layout_of(path)
    if layout is None and path.is_dir():
        titles = ", ".join(each.title for each in SETS.values())
        raise UserError(f"the folder {path} holds none of the known data sets: {titles}{detect.hint(path, '')}")
    if layout is None or SETS[layout].is_conversations:
        file = detect.split_file(path, split, layout) if path.is_dir() else path
        source, found = open_records(file, images, cache), ()
    else:
        selected = Selection(path, split, protocol, images)
        samples = SETS[layout].questions(selected)
        source = MemoryRecords(map(to_llava, samples))
        found = (describe(samples, layout, split, SETS[layout].variant(selected)),)
    if not len(source):
        raise UserError(f"{path} holds no training records")
    return TrainingData([source], found=found)


def _read_mixture(entries, images, protocol, split, cache) -> TrainingData:
    sources, weights, found = [], [], []
    for entry in entries:
        if not hasattr(entry, "keys"):  # a ConfigDict is not a Mapping
            raise UsageError(f"an entry of the training data is {entry!r}; {{path, images, weight}} was expected")
        entry = dict(entry)
        unknown = set(entry) - {"path", "images", "weight"}
        if "path" not in entry or unknown:
            raise UsageError(f"an entry of the training data is {entry}; "
                             "the keys path, images and weight were expected")
        for key in ("path", "images"):
            if not (isinstance(entry.get(key, ""), (str, Path)) or key == "images" and entry[key] is None):
                raise UsageError(f"an entry of the training data has the {key} {entry[key]!r}; text was expected")
        weight = entry.get("weight", 1.0)
        if type(weight) not in (int, float) or not 0 < weight <= LARGEST_WEIGHT:
            raise UsageError(f"the weight of {entry['path']} is {weight!r}; more than 0 and at most {LARGEST_WEIGHT} "
                             "was expected")
        part = read_training(entry["path"], entry.get("images", images), protocol, split, cache)
        if not round(weight * len(part)):
            raise UserError(f"the weight {weight} of {entry['path']} is too small: an epoch would use none of its "
                            f"{len(part)} records")
        sources += part.sources
        found += part.found
        weights.append(float(weight))
    if not sources:
        raise UserError("the list of training data is empty; at least one {path, images, weight} was expected")
    return TrainingData(sources, weights, found)
