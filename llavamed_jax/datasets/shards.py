"""Reads and writes training records in ArrayRecord shards, with their images, and the index that plans need.

    DIR/manifest-PPPPP-of-NNNNN.json     written last, by each of N writers: its shards with sha256, what made them
    DIR/part-PPPPP-of-NNNNN-SSSSS.array_record
    DIR/lengths-KEY-PPPPP-of-NNNNN.npz   tokens and images of each record, for one tokenizer, template and length

A record is four bytes with the length of a header, the header (JSON: `id`, `conversations`, `surplus`, `answer_type`,
`images` as [name, bytes]), and the encoded images one after another. Shards have `group_size:1`, so that a record is
read without its neighbours.
"""

from __future__ import annotations

import collections
import json
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llavamed_jax.datasets.records import load_arrays
from llavamed_jax.errors import UserError, short
from llavamed_jax.images.load import Stored
from llavamed_jax.utils import worker_notes
from llavamed_jax.utils.files import read_json
from llavamed_jax.utils.hashes import sha256_of_list

FORMAT = 1
OPTIONS = "group_size:1"
_MANIFEST = re.compile(r"manifest-(\d{5})-of-(\d{5})\.json")
_HEAD = struct.Struct("<I")
_OPEN = 32  # shards that a process keeps open
_KEPT = ("id", "conversations", "surplus", "answer_type")


class DamagedRecordError(UserError):
    """A record of a shard cannot be read; the others can."""


def part_name(part: int, parts: int) -> str:
    """Returns the part of a file's name that says whose it is: `00000-of-00004`."""
    return f"{part:05d}-of-{parts:05d}"


def encode(record: Mapping[str, Any], images: list[tuple[str, bytes]]) -> bytes:
    """Returns the bytes of a record.

    Args:
      record: `id`, `conversations`, and perhaps `surplus` and `answer_type`.
      images: name and encoded bytes of each image.
    """
    header = {key: record[key] for key in _KEPT if key in record}
    header["images"] = [[name, len(data)] for name, data in images]
    text = json.dumps(header, ensure_ascii=False).encode("utf-8")
    return b"".join([_HEAD.pack(len(text)), text, *(data for _, data in images)])


def decode(data: bytes, name: str) -> dict:
    """Returns a record as `records.normalize` does, with `Stored` images. Raises DamagedRecordError for other bytes."""
    try:
        (length,) = _HEAD.unpack_from(data)
        header = json.loads(data[_HEAD.size:_HEAD.size + length])
        place, images = _HEAD.size + length, []
        for image, size in header.pop("images"):
            images.append(Stored(f"{name}, {image}", data[place:place + size]))
            place += size
        if place != len(data):
            raise ValueError
        return {"id": header["id"], "image": images, **header}
    except (struct.error, ValueError, KeyError, TypeError, RecursionError):
        raise DamagedRecordError(f"{name} is not a record of this project's shards") from None


def is_shards(path: Path) -> bool:
    """Returns whether a folder holds shards."""
    return path.is_dir() and any(_MANIFEST.fullmatch(each.name) for each in path.glob("manifest-*.json"))


class ShardRecords:
    """The records of a folder of shards, read on access. Use `open_shards` to make one.

    Args:
      folder: the folder.
      manifests: the manifests of all parts, in order.
    """

    def __init__(self, folder: Path, manifests: list[dict]):
        self.folder, self._parts = folder, len(manifests)
        self._shards = [shard for each in manifests for shard in each["shards"]]
        self._ends = np.cumsum([shard["records"] for shard in self._shards], dtype=np.int64)
        self.images = manifests[0]["images"]
        self._readers: collections.OrderedDict[int, Any] = collections.OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> dict:
        """Reads record `i`. Raises DamagedRecordError, which names the record, if it is damaged."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        shard = int(np.searchsorted(self._ends, i, side="right"))
        place = i - (int(self._ends[shard - 1]) if shard else 0)
        name = f"record {place} of {self.folder / self._shards[shard]['file']}"
        worker_notes.reading(name)
        try:
            (data,) = self._reader(shard).read([place])
        except (RuntimeError, IndexError, ValueError, OSError) as error:
            why = str(error)[:200] or type(error).__name__
            raise DamagedRecordError(f"{name} cannot be read: {why}") from None
        return decode(data, name)

    def _reader(self, shard: int):
        from array_record.python.array_record_module import ArrayRecordReader  # a dependency of grain

        if shard not in self._readers:
            if len(self._readers) >= _OPEN:
                self._readers.popitem(last=False)[1].close()
            path = self.folder / self._shards[shard]["file"]
            reader = ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
            if reader.num_records() != self._shards[shard]["records"]:
                raise OSError(f"the shard has {reader.num_records()} records; {self._shards[shard]['records']} were "
                              "expected")
            self._readers[shard] = reader
        self._readers.move_to_end(shard)
        return self._readers[shard]

    def __getstate__(self) -> dict:
        return {**vars(self), "_readers": collections.OrderedDict()}  # each process opens the shards itself

    def fingerprint(self) -> str:
        """Returns a hash of the shards' hashes."""
        return sha256_of_list({shard["file"]: shard["sha256"] for shard in self._shards})

    def lengths(self, key: str) -> dict[str, np.ndarray] | None:
        """Returns the arrays `tokens`, `images` and `lost`, and `rest` as JSON text, of every part; None without them.

        Args:
          key: of tokenizer, template and length, as the writer names them.
        """
        parts = [load_arrays(self.folder / f"lengths-{key}-{part_name(part, self._parts)}.npz",
                             "tokens", "images", "lost", "rest") for part in range(self._parts)]
        if any(part is None for part in parts) or sum(len(part["tokens"]) for part in parts) != len(self):
            return None
        return ({name: np.concatenate([part[name] for part in parts]) for name in ("tokens", "images", "lost")}
                | {"rest": [json.loads(str(part["rest"])) for part in parts]})


def open_shards(folder: Path) -> ShardRecords:
    """Opens a folder of shards.

    Raises:
      UserError: a part or a shard is missing, parts do not belong together, or a manifest is damaged.
    """
    found = {int(match[1]): (int(match[2]), path) for path in folder.glob("manifest-*.json")
             if (match := _MANIFEST.fullmatch(path.name))}
    numbers = {parts for parts, _ in found.values()}
    if len(numbers) != 1:
        raise UserError(f"{folder} holds shards of writers that do not belong together: of "
                        f"{' and of '.join(map(str, sorted(numbers)))} parts; one number was expected")
    (parts,) = numbers
    missing = sorted(set(range(parts)) - set(found))
    if missing:
        raise UserError(f"part {missing[0]} of {parts} of the shards in {folder} is missing; its writer has not "
                        "finished")
    manifests = [read_json(found[part][1]) for part in range(parts)]
    for number, each in enumerate(manifests):
        _check(each, found[number][1])
        if (each["images"], each["made_from"]) != (manifests[0]["images"], manifests[0]["made_from"]):
            raise UserError(f"{found[number][1]} was written with other data or for other images than part 0; the same "
                            "flags were expected for every part")
    records = ShardRecords(folder, manifests)
    gone = next((shard["file"] for each in manifests for shard in each["shards"]
                 if not _has_size(folder / shard["file"], shard["bytes"])), None)
    if gone is not None:
        raise UserError(f"{folder / gone} is missing or has another size than its manifest says")
    return records


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _check(manifest: dict, path: Path) -> None:
    shards = manifest.get("shards")
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("images"), dict) or "made_from" not in manifest:
        raise UserError(f"{path} is not a manifest of format {FORMAT}; shards of `curation records` were expected")
    for shard in shards if isinstance(shards, list) else [None]:
        keys = {"file": str, "records": int, "bytes": int, "sha256": str}
        if not isinstance(shard, dict) or not all(isinstance(shard.get(key), kind) for key, kind in keys.items()):
            raise UserError(f"{path} has the shard {short(shard)}; file, records, bytes and sha256 were expected")
