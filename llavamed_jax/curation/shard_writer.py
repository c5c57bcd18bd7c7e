"""Writes the shards of one part of training data, one after another, and continues where an earlier run stopped."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavamed_jax.datasets import shards, training
from llavamed_jax.datasets.records import MemoryRecords
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.pipeline import lengths, stored, workers
from llavamed_jax.processor import Processor
from llavamed_jax.utils import locks, progress, signals
from llavamed_jax.utils.files import read_json, write_json, write_whole
from llavamed_jax.utils.hashes import sha256_of

_BLOCK = 64  # records that a worker encodes at a time
_PNG_LEVEL = 3  # of zlib; 6 makes radiographs no smaller and takes twice as long


@dataclass(frozen=True)
class Encode:
    """Encodes a block of records by its number. Worker processes call it."""

    data: training.TrainingData
    processor: Processor
    begin: int
    end: int
    format: str
    quality: int | None

    def __call__(self, block: int) -> dict[str, Any]:
        """Returns `bytes` and `records` of the records that can be used, and `dropped`, the others with the reason."""
        first = self.begin + block * _BLOCK
        found: dict[str, Any] = {"bytes": [], "records": [], "dropped": []}
        for number in range(first, min(first + _BLOCK, self.end)):
            kind = "malformed record"
            try:
                record = self.data.record(number)
                kind = "image that cannot be read"
                images = [(os.path.basename(str(source)), self._image(source)) for source in record["image"]]
            except UserError as error:
                found["dropped"].append({"record": number, "kind": kind, "reason": str(error)})
                continue
            found["bytes"].append(shards.encode(record, images))
            found["records"].append({**record, "image": [name for name, _ in images]})
        return found

    def _image(self, source) -> bytes:
        (pixels,) = self.processor.images_uint8([source])
        file = io.BytesIO()
        options = {"compress_level": _PNG_LEVEL} if self.format == "png" else {"quality": self.quality,
                                                                              "subsampling": 0}
        Image.fromarray(pixels).save(file, self.format.upper(), **options)
        return file.getvalue()


class Writer:
    """Writes the shards of one part.

    A shard holds a fixed span of records. It gets its name when it is whole, and its summary after it, so that a
    stopped writer goes on with the shard that it had begun.

    Args:
      out: the folder.
      part: the number of this part, from 0.
      parts: the number of parts.
      data: all records.
      processor: makes the pixels and measures the tokens.
      max_length: tokens of a sample.
      span: records of a shard.
      image: format and quality of the images.
    """

    def __init__(self, out: Path, part: int, parts: int, data: training.TrainingData, processor: Processor,
                 max_length: int, span: int, image: dict[str, Any]):
        self._out, self._part, self._parts, self._data, self._processor = out, part, parts, data, processor
        self._max_length, self._span, self._image = max_length, span, image
        self._name = shards.part_name(part, parts)
        self._key = stored.key(processor, max_length, lengths.FORMAT)
        self._made_from = {"data": data.fingerprint(), "records": data.num_records, "records_a_shard": span,
                           "lengths": self._key}
        self._images = {**stored.preprocessing(processor), **image}

    def alone(self):
        """Returns a context in which no other process writes this part."""
        return _Lock(self._out / f".part-{self._name}.lock", self._out)

    def write(self, num_workers: int) -> None:
        """Writes what is missing, then the manifest, and prints the counts."""
        if self._is_complete():
            print(f"{self._out}: part {self._part} of {self._parts} is complete already")
            return
        total = self._data.num_records
        begin, end = self._part * total // self._parts, (self._part + 1) * total // self._parts
        spans = [(first, min(first + self._span, end)) for first in range(begin, end, self._span)]
        shown = progress.Amounts("records", end - begin, lambda: self._bytes)
        self._bytes = 0
        summaries = []
        for number, (first, last) in enumerate(spans):
            summary = self._finished(number)
            if summary is None:
                summary = self._shard(number, first, last, num_workers)
            self._bytes += summary["shard"]["bytes"]
            summaries.append(summary)
            shown.add(last - first)
        shown.close()
        self._finish(summaries)

    def _is_complete(self) -> bool:
        """Returns whether an earlier run finished this part with the same settings."""
        file = self._out / f"manifest-{self._name}.json"
        if not file.is_file():
            return False
        self._refuse_others(read_json(file), file)
        return True

    def _refuse_others(self, found: dict, file: Path) -> None:
        if (found.get("made_from"), found.get("images")) != (self._made_from, self._images):
            raise UsageError(f"{file} was written from other data or with other flags; the same flags, or another "
                             "--out was expected")

    def _file(self, number: int) -> Path:
        return self._out / f"part-{self._name}-{number:05d}.array_record"

    def _summary_file(self, number: int) -> Path:
        return self._out / f".part-{self._name}-{number:05d}.json"

    def _finished(self, number: int) -> dict | None:
        """Returns the summary of a shard that an earlier run finished with the same settings."""
        file, path = self._summary_file(number), self._file(number)
        if not file.is_file() or not path.is_file():
            return None
        summary = read_json(file)
        self._refuse_others(summary, path)
        return summary if path.stat().st_size == summary["shard"]["bytes"] else None

    def _shard(self, number: int, first: int, last: int, num_workers: int) -> dict:
        from array_record.python.array_record_module import ArrayRecordWriter  # a dependency of grain

        path = self._file(number)
        temporary = path.with_name(f".{path.name}.tmp")
        make = Encode(self._data, self._processor, first, last, self._image["format"], self._image["quality"])
        count = -(-(last - first) // _BLOCK)
        blocks = workers.in_order(make, count, num_workers) if num_workers else map(make, range(count))
        kept, dropped = [], []
        file = ArrayRecordWriter(str(temporary), shards.OPTIONS)
        try:
            for block in blocks:
                signals.check()
                for each in block["bytes"]:
                    file.write(each)
                kept += block["records"]
                dropped += block["dropped"]
            file.close()
        except RuntimeError as error:  # the library's error for a disk that refuses bytes
            raise UserError(f"{path} cannot be written: {str(error)[:200]}; finished shards are kept") from None
        finally:
            if num_workers:
                blocks.close()
        measured = lengths.measure(training.TrainingData([MemoryRecords(kept)]), self._processor, self._max_length)
        shard = {"file": path.name, "records": len(kept), "bytes": temporary.stat().st_size,
                 "sha256": sha256_of(temporary)}
        os.replace(temporary, path)
        summary = {"shard": shard, "dropped": dropped, "made_from": self._made_from, "images": self._images,
                   "lengths": {name: getattr(measured, name).tolist() for name in ("tokens", "images", "lost")},
                   "rest": lengths.rest_of(measured)}
        write_whole(self._summary_file(number), lambda out: out.write(json.dumps(summary).encode()))
        return summary

    def _finish(self, summaries: list[dict]) -> None:
        arrays = {name: np.concatenate([np.array(each["lengths"][name], kind) for each in summaries]
                                       or [np.zeros(0, kind)])
                  for name, kind in (("tokens", np.int32), ("images", np.int16), ("lost", np.int16))}
        rest = lengths.joined_rest([each["rest"] for each in summaries])
        write_whole(self._out / f"lengths-{self._key}-{self._name}.npz",
                    lambda file: stored.save_arrays(file, **arrays, rest=rest))
        dropped = [entry for each in summaries for entry in each["dropped"]]
        kinds = Counter(entry["kind"] for entry in dropped)
        write_json(self._out / f"dropped-{self._name}.json", {"dropped": dropped})
        manifest = {"format": shards.FORMAT, "part": self._part, "parts": self._parts,
                    "shards": [each["shard"] for each in summaries], "images": self._images,
                    "made_from": self._made_from}
        write_whole(self._out / f"manifest-{self._name}.json",
                    lambda file: file.write((json.dumps(manifest, indent=1) + "\n").encode()))
        for number in range(len(summaries)):
            self._summary_file(number).unlink(missing_ok=True)
        records = sum(each["shard"]["records"] for each in summaries)
        mean = arrays["tokens"].mean() if records else 0.0
        print(f"{self._out}: part {self._part} of {self._parts}, {count_of(records, 'record')} in "
              f"{count_of(len(summaries), 'shard')}, {self._bytes / 1e6:,.1f} MB, mean {mean:.1f} tokens")
        for kind, count in kinds.most_common():
            print(f"  dropped, {kind}: {count:,} (dropped-{self._name}.json)")


class _Lock:
    """A context that one process at a time enters."""

    def __init__(self, path: Path, folder: Path):
        self._path, self._folder = path, folder

    def __enter__(self) -> None:
        self._file = open(self._path, "ab")
        if not locks.is_free(self._file.fileno(), self._folder):
            self._file.close()
            raise UserError(f"another process writes this part of {self._folder}; each writer needs a --part of its "
                            "own")

    def __exit__(self, *_: object) -> None:
        self._file.close()
