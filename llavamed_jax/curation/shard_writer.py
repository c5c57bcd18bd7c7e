"""Writes the shards of one part of training data, one after another, and continues where an earlier run stopped.

A shard whose images have changed since is written again, and so is one whose unreadable images can be read now. An
image that is gone has not changed: its pixels stay, also if another one of its shard has changed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llavamed_jax.curation import image_evidence
from llavamed_jax.curation.old_shard import OldShard
from llavamed_jax.datasets import shards, training
from llavamed_jax.datasets.records import MemoryRecords, load_arrays
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.pipeline import lengths, stored, workers
from llavamed_jax.processor import Processor
from llavamed_jax.utils import locks, progress, signals
from llavamed_jax.utils.files import read_json, write_json, write_whole
from llavamed_jax.utils.hashes import sha256_of

_BLOCK = 64  # records that a worker encodes at a time
_LENGTHS = ("tokens", "images", "lost")
_MALFORMED, _NO_IMAGE = "malformed record", "image that cannot be read"
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
        """Returns `bytes`, `records` and `numbers` of those that can be used, `dropped` with reasons, and `seen`."""
        first = self.begin + block * _BLOCK
        found: dict[str, Any] = {"bytes": [], "records": [], "numbers": [], "dropped": [], "seen": []}
        for number in range(first, min(first + _BLOCK, self.end)):
            kind = _MALFORMED
            try:
                record = self.data.record(number)
                kind = _NO_IMAGE
                found["seen"] += image_evidence.evidence(record["image"])  # before reading: a change is seen later
                images = self._images(record)
            except UserError as error:
                found["dropped"].append({"record": number, "kind": kind, "reason": str(error)})
                continue
            found["numbers"].append(number)
            found["bytes"].append(shards.encode(record, images))
            found["records"].append({**record, "image": [name for name, _ in images]})
        return found

    def seen(self) -> list[int]:
        """Returns the evidence of all images of the records, as it is now."""
        found: list[int] = []
        for number in signals.checked(range(self.begin, self.end)):
            with contextlib.suppress(UserError):
                found += image_evidence.evidence(self.data.record(number)["image"])
        return found

    def is_readable(self, number: int) -> bool:
        """Returns whether a record and its images can be read."""
        try:
            self._images(self.data.record(number))
        except UserError:
            return False
        return True

    def _images(self, record: dict) -> list[tuple[str, bytes]]:
        return [(os.path.basename(str(source)), self.image(source)) for source in record["image"]]

    def image(self, source) -> bytes:
        """Returns the encoded pixels of an image. Raises UserError if it cannot be read."""
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
        spans = self._spans()
        shown = progress.Amounts("records", sum(last - first for first, last in spans), lambda: self._bytes)
        self._bytes = 0
        summaries = []
        for number, (first, last) in enumerate(spans):
            before = self._before(number)
            if before is not None and self._is_current(before, first, last):
                summary = self._measured(before, self._old(before, first, last))
            else:
                summary = self._shard(number, first, last, num_workers, before)
            self._bytes += summary["shard"]["bytes"]
            summaries.append(summary)
            shown.add(last - first)
        shown.close()
        self._finish(summaries)

    def _spans(self) -> list[tuple[int, int]]:
        """Returns the first record of each shard, and the one after its last."""
        total = self._data.num_records
        begin, end = self._part * total // self._parts, (self._part + 1) * total // self._parts
        return [(first, min(first + self._span, end)) for first in range(begin, end, self._span)]

    def _is_complete(self) -> bool:
        """Returns whether an earlier run finished this part with the same settings and images.

        If images have changed, the part becomes an unfinished one that lacks the shards of these images.
        """
        file = self._out / f"manifest-{self._name}.json"
        if not file.is_file():
            return False
        manifest = read_json(file)
        self._refuse_others(manifest, file)
        summaries, spans = self._summaries(manifest), self._spans()
        is_known = all(each["seen"] is not None for each in summaries)
        changed = sum(not self._is_current(each, *span) for each, span in zip(summaries, spans, strict=True))
        if not changed and all(each["lengths"] is not None for each in summaries):
            if not is_known:
                self._keep_seen(summaries)
            return True
        if changed:
            what = count_of(changed, "shard is missing or has", "shards are missing or have")
            print(f"{self._out}: part {self._part} of {self._parts}: {what} other images now; "
                  f"{'it is' if changed == 1 else 'they are'} written again", flush=True)
        for summary in summaries:
            self._keep(summary)
        file.unlink()
        return False

    def _summaries(self, manifest: dict) -> list[dict]:
        """Returns the summaries of a finished part's shards, in order.

        What the files beside the shards do not say, since an earlier version wrote them or they are lost, is None:
        `lengths`, `rest`, `seen`. That is no reason to write a shard again.

        Raises:
          UserError: the manifest lists other shards than this part has.
        """
        listed, spans = manifest.get("shards"), self._spans()
        wanted = [self._file(number).name for number in range(len(spans))]
        if not isinstance(listed, list) or [_file_of(each) for each in listed] != wanted:
            raise UserError(f"{self._out / f'manifest-{self._name}.json'} lists other shards than those of this part; "
                            f"{count_of(len(spans), 'shard')} with records and bytes of each were expected")
        arrays = load_arrays(self._out / f"lengths-{self._key}-{self._name}.npz", *_LENGTHS)
        places = np.cumsum([0, *(shard["records"] for shard in listed)])
        if arrays is not None and any(len(arrays[name]) != places[-1] for name in _LENGTHS):
            arrays = None
        images = load_arrays(self._images_file(), "seen", "counts")
        ends = [] if images is None else np.cumsum([0, *images["counts"]])
        if images is not None and (len(ends) != len(listed) + 1 or ends[-1] != len(images["seen"])):
            images = None
        try:
            dropped = [{**each} for each in read_json(self._out / f"dropped-{self._name}.json")["dropped"]
                       if isinstance(each["record"], int) and each["kind"]]
        except (UserError, KeyError, TypeError):
            dropped = []
        return [{"number": number, "shard": shard, "rest": shard.get("rest"),
                 "lengths": arrays and {name: arrays[name][places[number]:places[number + 1]].tolist()
                                        for name in _LENGTHS},
                 "seen": None if images is None else images["seen"][ends[number]:ends[number + 1]].tolist(),
                 "dropped": [each for each in dropped if first <= each["record"] < last],
                 "made_from": self._made_from, "images": self._images}
                for number, (shard, (first, last)) in enumerate(zip(listed, spans, strict=True))]

    def _is_current(self, summary: dict, first: int, last: int) -> bool:
        """Returns whether the shard is there, its images are the same, and those that failed still fail.

        If it is unknown which images the shard was made from, they count as those of now, which the summary gets.
        """
        path = self._file(summary["number"])
        make = self._encode(first, last)
        now = make.seen()
        if summary.get("seen") is None:
            summary["seen"] = now
        before = summary["seen"]
        if not path.is_file() or path.stat().st_size != summary["shard"]["bytes"]:
            return False
        gone = image_evidence.num_gone(before, now)
        if image_evidence.is_changed(before, now) or any(
                make.is_readable(each["record"]) for each in summary["dropped"] if each["kind"] == _NO_IMAGE):
            return False
        if gone:
            print(f"{path}: {count_of(gone, 'image is', 'images are')} gone since; the shard keeps their pixels",
                  flush=True)
        return True

    def _refuse_others(self, found: dict, file: Path) -> None:
        if (found.get("made_from"), found.get("images")) != (self._made_from, self._images):
            raise UsageError(f"{file} was written from other data or with other flags; the same flags, or another "
                             "--out was expected")

    def _file(self, number: int) -> Path:
        return self._out / f"part-{self._name}-{number:05d}.array_record"

    def _summary_file(self, number: int) -> Path:
        return self._out / f".part-{self._name}-{number:05d}.json"

    def _images_file(self) -> Path:
        return self._out / f"images-{self._name}.npz"

    def _encode(self, first: int, last: int) -> Encode:
        return Encode(self._data, self._processor, first, last, self._image["format"], self._image["quality"])

    def _before(self, number: int) -> dict | None:
        """Returns the summary of a shard that an earlier run wrote with the same settings; it may be out of date."""
        file = self._summary_file(number)
        if not file.is_file():
            return None
        summary = read_json(file) | {"number": number}
        self._refuse_others(summary, self._file(number))
        return summary

    def _measured(self, summary: dict, old: OldShard) -> dict:
        """Returns a summary with what its shard's texts tell, if it lacks that."""
        rest = summary.get("rest") or summary["shard"].get("rest")
        if rest is None or summary.get("lengths") is None:
            measured = self._measure(old.texts())
            rest, summary["lengths"] = lengths.rest_of(measured), _lists(measured)
        return {**summary, "rest": rest, "shard": {**summary["shard"], "rest": rest}}

    def _measure(self, records: list[dict]) -> lengths.Lengths:
        return lengths.measure(training.TrainingData([MemoryRecords(records)]), self._processor, self._max_length)

    def _shard(self, number: int, first: int, last: int, num_workers: int, before: dict | None) -> dict:
        """Writes a shard. Of images that are gone since an earlier run wrote it, the old shard's pixels are taken."""
        from array_record.python.array_record_module import ArrayRecordWriter  # a dependency of grain

        path = self._file(number)
        temporary = path.with_name(f".{path.name}.tmp")
        make = self._encode(first, last)
        old = self._old(before, first, last) if before is not None and path.is_file() else None
        count = -(-(last - first) // _BLOCK)
        blocks = workers.in_order(make, count, num_workers) if num_workers else map(make, range(count))
        kept, dropped, seen, saved = [], [], [], 0
        file = ArrayRecordWriter(str(temporary), shards.OPTIONS)
        try:
            for block in blocks:
                signals.check()
                found = dict(zip(block["numbers"], zip(block["bytes"], block["records"], strict=True), strict=True))
                for entry in block["dropped"]:
                    is_lost = old is not None and entry["kind"] == _NO_IMAGE
                    again = old.kept(entry["record"], make.image) if is_lost else None
                    if again is None:
                        dropped.append(entry)
                    else:
                        found[entry["record"]], saved = again, saved + 1
                for _, (data, record) in sorted(found.items(), key=lambda item: item[0]):
                    file.write(data)
                    kept.append(record)
                seen += block["seen"]
            file.close()
        except RuntimeError as error:  # the library's error for a disk that refuses bytes
            raise UserError(f"{path} cannot be written: {str(error)[:200]}; finished shards are kept") from None
        finally:
            if num_workers:
                blocks.close()
        if saved:
            print(f"{path}: {count_of(saved, 'record keeps', 'records keep')} pixels of images that are gone since",
                  flush=True)
        measured = self._measure(kept)
        shard = {"file": path.name, "records": len(kept), "bytes": temporary.stat().st_size,
                 "sha256": sha256_of(temporary), "rest": lengths.rest_of(measured)}
        os.replace(temporary, path)
        summary = {"number": number, "shard": shard, "dropped": dropped,
                   "seen": image_evidence.joined((before or {}).get("seen") or [], seen), "made_from": self._made_from,
                   "images": self._images, "rest": shard["rest"], "lengths": _lists(measured)}
        self._keep(summary)
        return summary

    def _old(self, summary: dict, first: int, last: int) -> OldShard:
        return OldShard(self._out, summary["shard"], self._data, first, last)

    def _keep(self, summary: dict) -> None:
        write_whole(self._summary_file(summary["number"]), lambda out: out.write(json.dumps(summary).encode()))

    def _keep_seen(self, summaries: list[dict]) -> None:
        seen = np.array([one for each in summaries for one in each["seen"]], np.uint64)
        counts = np.array([len(each["seen"]) for each in summaries], np.int64)
        write_whole(self._images_file(), lambda file: np.savez(file, seen=seen, counts=counts))

    def _finish(self, summaries: list[dict]) -> None:
        arrays = {name: np.concatenate([np.array(each["lengths"][name], kind) for each in summaries]
                                       or [np.zeros(0, kind)])
                  for name, kind in zip(_LENGTHS, (np.int32, np.int16, np.int16), strict=True)}
        rest = lengths.joined_rest([each["rest"] for each in summaries])
        write_whole(self._out / f"lengths-{self._key}-{self._name}.npz",
                    lambda file: stored.save_arrays(file, **arrays, rest=rest))
        self._keep_seen(summaries)
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
        empty = sum(not each["shard"]["records"] for each in summaries)
        if empty:
            print(f"  {count_of(empty, 'shard holds', 'shards hold')} no record")
        for kind, count in kinds.most_common():
            print(f"  dropped, {kind}: {count:,} (dropped-{self._name}.json)")


def _lists(measured: lengths.Lengths) -> dict[str, list[int]]:
    return {name: getattr(measured, name).tolist() for name in _LENGTHS}


def _file_of(shard: object) -> str | None:
    is_whole = isinstance(shard, dict) and all(isinstance(shard.get(key), int) for key in ("records", "bytes"))
    return shard.get("file") if is_whole else None


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
