"""Reads training records one by one, without keeping the file in memory.

A LLaVA file (JSON list or JSON lines) is scanned once for the offsets of its records. A worker process receives only
these offsets, 16 bytes a record, and opens the file itself. Records that are made in memory, from the layout of a VQA
set, are kept as one block of JSON text.

A record is a dict `{"id", "image": list of paths, "conversations": [{"from": "human"|"gpt", "value": str}, …]}`. It has
`"surplus"`, the number of images beyond its markers, if there are any, and `"answer_type"` if the file has it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from llavamed_jax.errors import UserError, short
from llavamed_jax.text.conversation import IMAGE_MARKER
from llavamed_jax.utils import worker_notes
from llavamed_jax.utils.files import open_file, parse_json, write_whole
from llavamed_jax.utils.hashes import sha256

_WINDOW = 4 * 2**20  # bytes of a JSON list that are parsed at a time
_LONGEST = 2**28  # bytes; a file with a longer record is assumed to be damaged
_BLANK = re.compile(r"[ \t\r\n]*")
_AFTER = re.compile(r"[ \t\r\n]*([,\]])")
_BOM = b"\xef\xbb\xbf"


class MemoryRecords:
    """Records in memory, as one block of text, so that a worker receives them without pickling many objects.

    Args:
      records: the records.
    """

    def __init__(self, records: Iterable[dict]):
        lines = [json.dumps(record).encode() for record in records]
        self._ends = np.cumsum([len(line) for line in lines], dtype=np.int64)
        self._text = b"".join(lines)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> dict:
        if not 0 <= i < len(self):
            raise IndexError(i)
        return json.loads(self._text[self._ends[i - 1] if i else 0:self._ends[i]])

    def fingerprint(self) -> str:
        """Returns a hash of the records."""
        return sha256(self._text + self._ends.tobytes())


class FileRecords:
    """The records of a LLaVA file, read on access. Use `open_records` to make one.

    Args:
      path: the file.
      images: the folder of the images.
      offsets: int64 [N,2], the first byte of each record and the byte after its last.
      sha256: the hash of the file.
    """

    def __init__(self, path: Path, images: Path, offsets: np.ndarray, sha256: str):
        self.path, self.images, self._offsets, self._sha256 = path, images, offsets, sha256
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> dict:
        """Reads record `i`. Raises UserError, which names the record, if it is damaged."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, end = self.place(i)
        name = f"record {i} of {self.path}"
        worker_notes.reading(name)
        try:
            if self._file is None:
                self._file = open(self.path, "rb", buffering=0)
            text = os.pread(self._file.fileno(), end - begin, begin).decode()
        except OSError as error:
            raise UserError(f"{self.path} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{name} is not UTF-8 text") from None
        return normalize(parse_json(text, name), self.images, name, i)

    def place(self, i: int) -> tuple[int, int]:
        """Returns the first byte of record `i` and the byte after its last."""
        begin, end = map(int, self._offsets[i])
        return begin, end

    def __getstate__(self) -> dict:
        return {**vars(self), "_file": None}  # each process opens the file itself

    def fingerprint(self) -> str:
        """Returns the hash of the file."""
        return self._sha256


def open_records(path: str | Path, images: str | Path | None = None, cache: Path | None = None) -> FileRecords:
    """Opens a LLaVA file, JSON (a list) or JSONL; the content decides which. Damaged records raise when they are read.

    Args:
      path: the file.
      images: the folder of the images; None means the folder of the file.
      cache: a folder where the offsets of a large file are kept under the file's hash; None keeps none.

    Raises:
      UserError: the file or the folder of images is missing, the file cannot be read, or a list is not valid JSON.
    """
    file = Path(path)
    folder = Path(images) if images is not None else file.parent
    try:
        with open_file(file, f"the data file {file}") as opened:
            if not folder.is_dir():
                raise UserError(f"the folder of images {folder} does not exist")
            sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
            return FileRecords(file, folder, _offsets(opened, file, sha256, cache), sha256)
    except FileNotFoundError:
        raise UserError(f"the data file {file} does not exist") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _offsets(opened: BinaryIO, file: Path, sha256: str, cache: Path | None) -> np.ndarray:
    """Returns the offsets, int64 [N,2], from `cache` if they are there."""
    if cache is None or file.stat().st_size < _WINDOW:  # scanning is as fast as reading the cache
        return find_records(opened, str(file))
    kept = cache / f"offsets-{sha256[:24]}.npz"
    if (found := load_arrays(kept, "offsets")) is None:
        found = dict(offsets=find_records(opened, str(file)))
        save_whole(kept, lambda out: np.savez(out, **found))
    return found["offsets"]


def load_arrays(path: Path, *names: str) -> dict[str, np.ndarray] | None:
    """Reads arrays that `np.savez` wrote. Returns None if the file is missing or damaged; the caller makes it again."""
    try:
        with np.load(path) as found:
            return {name: found[name] for name in names}
    except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def save_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file completely or not at all, even if several processes write it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)


def find_records(file: BinaryIO, name: str) -> np.ndarray:
    """Finds the first byte and the byte after the last of each record, int64 [N,2].

    The `json` library parses a list in windows, decoded as Latin-1. The syntax of JSON is ASCII, so one character is
    one byte, and only text inside strings is decoded wrongly, which is not used here. Lines are not parsed.

    Args:
      file: the opened file.
      name: what an error calls the file.

    Raises:
      UserError: a list is not valid JSON.
    """
    return np.fromiter((byte for pair in _places(file, name) for byte in pair), np.int64).reshape(-1, 2)


def first_record(path: Path) -> Any:
    """Returns the first record of a file, unchanged; None if it cannot be read. Reading the file gives the error."""
    try:
        with open_file(path) as file:
            begin, end = next(_places(file, str(path)))
            file.seek(begin)
            return json.loads(file.read(end - begin))
    except (OSError, UserError, ValueError, RecursionError, StopIteration):
        return None


def _places(file: BinaryIO, name: str) -> Iterator[tuple[int, int]]:
    file.seek(0)
    start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
    file.seek(start)
    head = file.read(4096)  # assumed to contain more than white space
    first = head.lstrip()
    if first.startswith(b"["):
        return _list_items(file, start + len(head) - len(first) + 1, name)
    return _lines(file, start)


def _lines(file: BinaryIO, begin: int) -> Iterator[tuple[int, int]]:
    file.seek(begin)
    for line in file:
        if line.strip():
            yield begin, begin + len(line)
        begin += len(line)


def _list_items(file: BinaryIO, begin: int, name: str) -> Iterator[tuple[int, int]]:
    """Yields begin and end of each item of the list that opens just before the byte `begin`."""
    # Numbers are not parsed here, so one with too many digits for Python is an error of its record, not of the file.
    decode, count, window = json.JSONDecoder(parse_int=str, parse_float=str).raw_decode, 0, _WINDOW

    def items(text: str) -> Iterator[tuple[int, int, int, str]]:
        at = 0
        while True:
            at = _BLANK.match(text, at).end()
            try:
                _, end = decode(text, at)
            except ValueError:
                return
            follows = _AFTER.match(text, end)
            if follows is None:  # the window ends here, perhaps inside a number
                return
            yield at, end, follows.end(), follows[1]
            at = follows.end()

    while True:
        file.seek(begin)
        text = file.read(window).decode("latin-1")
        if not count and text[_BLANK.match(text).end():][:1] == "]":
            return
        used = 0
        try:
            for item_begin, end, used, follows in items(text):
                yield begin + item_begin, begin + end
                count += 1
                if follows == "]":
                    if (text[used:] + file.read(_WINDOW).decode("latin-1")).strip():
                        raise UserError(f"{name} is not valid JSON: text follows the list of {count} records")
                    return
        except RecursionError:
            raise UserError(f"record {count} of {name} is nested too deeply to be read as JSON") from None
        if not used and (len(text) < window or window > _LONGEST):
            raise UserError(f"{name} is not valid JSON: record {count}, which begins at byte {begin}, does not end or "
                            "is not followed by a comma")
        window = _WINDOW if used else 8 * window
        begin += used


def normalize(row: Any, images: Path, name: str, index: int) -> dict:
    """Checks a record that was read from a file, and returns it in the form that is described at the top of this file.

    `conversations` may be spelled `conversatons` (quirk Q13), values may be numbers, and `image` may be a name, a list
    or absent. Images beyond the markers are surplus and left out. So a record that names an image and has no marker is
    text, as in the originals, which do not report it. Images under the key `images`, which the originals do not read,
    are surplus too.

    Args:
      row: the parsed JSON value.
      images: the folder of the images.
      name: what an error calls the record.
      index: the id of the record if it has none.

    Raises:
      UserError: the record has another form, or fewer images than markers.
    """
    def fail(what):
        return UserError(f"{name} {what}")

    if not isinstance(row, dict):
        raise fail("is not an object; {id, image, conversations} was expected")
    turns = row.get("conversations", row.get("conversatons"))
    if not isinstance(turns, list) or not turns:
        raise fail("has no conversations; a list of {from, value} was expected")
    for i, turn in enumerate(turns):
        value = turn.get("value") if isinstance(turn, dict) else None
        # NaN is the empty cell of a table.
        is_text = isinstance(value, (str, int)) or isinstance(value, float) and math.isfinite(value)
        if not is_text or turn.get("from") not in ("human", "gpt"):
            raise fail(f"has {short(turn)} as turn {i}; {{from: human or gpt, value: text}} was expected")
    speakers = [turn["from"] for turn in turns]
    first = 1 if speakers[0] == "gpt" else 0
    if any(s != ("human", "gpt")[i % 2] for i, s in enumerate(speakers[first:])):
        raise fail("does not alternate between human and gpt")
    names = row.get("image") or []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(image, str) for image in names):
        raise fail(f"has the image {short(names)}; a name or a list of names was expected")
    conversations = [{"from": turn["from"], "value": str(turn["value"])} for turn in turns]
    try:
        "".join([*names, *(turn["value"] for turn in conversations)]).encode()
    except UnicodeEncodeError:  # JSON can express it; files and tokenizers cannot
        raise fail("has half a surrogate pair in its text") from None
    markers = [turn["value"].count(IMAGE_MARKER) for turn in conversations[first:]]
    # The original reads several markers in one turn as one image, unless the record lists an image for each marker.
    if len(names) < sum(markers) and len(names) != sum(map(bool, markers)):
        raise fail(f"has {len(names)} images for {sum(markers)} {IMAGE_MARKER} markers")
    used = min(len(names), sum(markers))
    name = row.get("id")
    name = index if name is None else name if isinstance(name, (str, int)) else str(name)  # JSON allows other types
    record = {"id": name, "image": [str(images / image) for image in names[:used]], "conversations": conversations}
    record |= {"answer_type": str(row["answer_type"])} if "answer_type" in row else {}
    others = row.get("images") if "image" not in row else None
    surplus = len(names) - used + (len(others) if isinstance(others, list)
                                   else isinstance(others, str) and others != "")
    return {**record, "surplus": surplus} if surplus else record
