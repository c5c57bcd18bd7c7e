"""Reads a shard that an earlier run wrote, for its texts, and for the pixels of images that are gone."""

from __future__ import annotations

import functools
import json
import os
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llavamed_jax.curation import image_evidence
from llavamed_jax.datasets import shards, training
from llavamed_jax.errors import UserError
from llavamed_jax.utils import signals
from llavamed_jax.utils.hashes import sha256


class OldShard:
    """A shard of an earlier run with the same settings.

    Args:
      folder: the folder.
      shard: the shard's entry in its manifest.
      data: the records that it was made from.
      first: the first record of its span.
      last: the one after the last.
    """

    def __init__(self, folder: Path, shard: dict[str, Any], data: training.TrainingData, first: int, last: int):
        self._records = shards.ShardRecords(folder, [{"shards": [shard], "images": {}}])
        self._folder, self._file, self._data, self._span = folder, shard["file"], data, (first, last)

    def texts(self) -> list[dict]:
        """Returns all records, with names in place of images; one that is damaged has no turns."""
        found = []
        for place in signals.checked(range(len(self._records))):
            try:
                record = self._records[place]
                found.append({**record, "image": self._names(record, place)})
            except shards.DamagedRecordError:
                found.append({"id": place, "image": [], "conversations": []})
        return found

    def kept(self, number: int, read: Callable[[object], bytes]) -> tuple[bytes, dict] | None:
        """Returns a record that cannot be read now, with the shard's pixels for those images that are gone.

        Args:
          number: of the record, among all.
          read: encodes an image that is there.

        Returns:
          The record's bytes, and the record with names in place of images; None if no image is gone, if one of the
          others cannot be read, or if the shard lacks the record.
        """
        try:
            record = self._data.record(number)
            is_gone = [each == image_evidence.MISSING for each in image_evidence.evidence(record["image"])]
            if not any(is_gone) or number not in self._places:
                return None
            old = self._records[self._places[number]]["image"]
            images = [(os.path.basename(str(source)), stored.data if gone else read(source))
                      for source, stored, gone in zip(record["image"], old, is_gone, strict=True)]
        except UserError:
            return None
        return shards.encode(record, images), {**record, "image": [name for name, _ in images]}

    @functools.cached_property
    def _places(self) -> dict[int, int]:
        """The place in the shard of each record that it has, by number. Equal records are taken in order."""
        there: dict[str, list[int]] = defaultdict(list)
        for place, record in reversed(list(enumerate(self.texts()))):
            there[_key(record)].append(place)
        found = {}
        for number in signals.checked(range(*self._span)):
            try:
                record = self._data.record(number)
            except UserError:
                continue
            key = _key({**record, "image": [os.path.basename(str(source)) for source in record["image"]]})
            if there.get(key):
                found[number] = there[key].pop()
        return found

    def _names(self, record: dict, place: int) -> list[str]:
        before = f"record {place} of {self._folder / self._file}, "
        return [str(image).removeprefix(before) for image in record["image"]]


def _key(record: dict) -> str:
    return sha256(json.dumps([record["id"], record["conversations"], record["image"]], sort_keys=True).encode())
