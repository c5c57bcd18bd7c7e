"""Training records wherever they lie, without holding them: each is read when it is asked for, in the process that asks.

A LLaVA file (JSON list or JSON lines) of half a million records is gone through once for where each begins and ends. What
travels to a worker process is these offsets, 16 bytes a record; it opens the file itself. Records that are made in memory
(from a VQA set's own layout) are kept as one block of JSON text.

A record is a dict `{"id", "image": list of paths, "conversations": [{"from": "human"|"gpt", "value": str}, …]}`, with
`"surplus"`, how many images it names beyond its markers, where there are any, and `"answer_type"`, where the file has it.
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

_WINDOW = 4 * 2**20  # bytes of a JSON list that are looked at together
_LONGEST = 2**28  # bytes of one record, beyond which the file is taken to be broken
_BLANK = re.compile(r"[ \t\r\n]*")
_AFTER = re.compile(r"[ \t\r\n]*([,\]])")
_BOM = b"\xef\xbb\xbf"


class MemoryRecords:
    """Records that were made here, as one block of text: it reaches a worker without pickling half a million objects."""

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
        return sha256(self._text + self._ends.tobytes())


class FileRecords:
    """The records of a LLaVA file. Make one with `open_records`."""

    def __init__(self, path: Path, images: Path, offsets: np.ndarray, sha256: str):
        """`offsets` int64 [N,2] are the first byte of each record and the one after its last."""
        self.path, self.images, self._offsets, self._sha256 = path, images, offsets, sha256
        self._file: BinaryIO | None = None

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, i: int) -> dict:
        """Record `i`. Raises UserError, which names it, where it is none."""
        if not 0 <= i < len(self):
            raise IndexError(i)
        begin, end = map(int, self._offsets[i])
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

    def __getstate__(self) -> dict:
        return {**vars(self), "_file": None}  # each process opens its own

    def fingerprint(self) -> str:
        return self._sha256


def open_records(path: str | Path, images: str | Path | None = None, cache: Path | None = None) -> FileRecords:
    """The records of a LLaVA file, JSON (a list) or JSONL, told apart by content; damaged ones are found when they are read.

    Args:
      images: the folder of its images; None is the file's own.
      cache: a folder that keeps where the records of a large file lie, beside the hash of its bytes.
    Raises:
      UserError: a file or a folder that is missing, a file that cannot be read, a list that is no JSON.
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
    """int64 [N,2], from `cache` where they were written down before."""
    if cache is None or file.stat().st_size < _WINDOW:  # found as fast as they would be read
        return find_records(opened, str(file))
    kept = cache / f"offsets-{sha256[:24]}.npz"
    if (found := load_arrays(kept, "offsets")) is None:
        found = dict(offsets=find_records(opened, str(file)))
        save_whole(kept, lambda out: np.savez(out, **found))
    return found["offsets"]


def load_arrays(path: Path, *names: str) -> dict[str, np.ndarray] | None:
    """What `np.savez` has kept in a file; None where there is none, or none that can be read: it is made again then."""
    try:
        with np.load(path) as found:
            return {name: found[name] for name in names}
    except (OSError, ValueError, KeyError, AttributeError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def save_whole(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all, also where several processes write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, write)


def find_records(file: BinaryIO, name: str) -> np.ndarray:
    """First byte and the byte after the last of each record, int64 [N,2].

    A list is parsed by the `json` library through a window, as Latin-1: what JSON is made of is ASCII, so one character is
    one byte, and only the text inside strings comes out wrong, which nobody looks at. Lines are not parsed.
    """
    return np.fromiter((byte for pair in _places(file, name) for byte in pair), np.int64).reshape(-1, 2)


def first_record(path: Path) -> Any:
    """What the first record of a file says, as it stands there; None where there is none: whoever reads the file says why."""
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
    head = file.read(4096)  # in which there is more than white space
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
    """Where the items of a list lie whose "[" is right before `begin`."""
    # Numbers are not looked at: one of too many digits for Python is the trouble of its record, not of the file.
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
            if follows is None:  # the window ends here, perhaps within a number
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
                        raise UserError(f"{name} is no JSON: more follows the list of {count} records")
                    return
        except RecursionError:
            raise UserError(f"record {count} of {name} is nested too deeply to be read as JSON") from None
        if not used and (len(text) < window or window > _LONGEST):
            raise UserError(f"{name} is no JSON: record {count}, from byte {begin} on, has no end or no comma after it")
        window = _WINDOW if used else 8 * window
        begin += used


def normalize(row: Any, images: Path, name: str, index: int) -> dict:
    """A record from what stood in a file.

    `conversations` may be spelled `conversatons` (quirk Q13), values may be numbers, `image` a name, a list or absent.
    Images beyond the markers are surplus and left out: a record that names an image and marks none is text, as in the
    originals, which say nothing of it. Images under the key `images`, which the originals do not read, are surplus too.

    Args:
      name: what an error calls the record.
      index: its id where it has none.
    Raises:
      UserError: something else than that, or fewer images than markers.
    """
    def fail(what):
        return UserError(f"{name} {what}")

    if not isinstance(row, dict):
        raise fail("is no object; {id, image, conversations} was expected")
    turns = row.get("conversations", row.get("conversatons"))
    if not isinstance(turns, list) or not turns:
        raise fail("has no conversations; a list of {from, value} was expected")
    for i, turn in enumerate(turns):
        value = turn.get("value") if isinstance(turn, dict) else None
        is_text = isinstance(value, (str, int)) or isinstance(value, float) and math.isfinite(value)  # NaN: an empty cell of a table
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
    except UnicodeEncodeError:  # JSON can say it, and no file and no tokenizer knows what it is
        raise fail("has half a surrogate pair in its text") from None
    markers = [turn["value"].count(IMAGE_MARKER) for turn in conversations[first:]]
    # Upstream reads several markers in one turn as one image; a record that lists them all means each.
    if len(names) < sum(markers) and len(names) != sum(map(bool, markers)):
        raise fail(f"has {len(names)} images for {sum(markers)} {IMAGE_MARKER} markers")
    used = min(len(names), sum(markers))
    name = row.get("id")
    name = index if name is None else name if isinstance(name, (str, int)) else str(name)  # what a line of JSON can say
    record = {"id": name, "image": [str(images / image) for image in names[:used]], "conversations": conversations}
    record |= {"answer_type": str(row["answer_type"])} if "answer_type" in row else {}
    others = row.get("images") if "image" not in row else None
    surplus = len(names) - used + (len(others) if isinstance(others, list) else isinstance(others, str) and others != "")
    return {**record, "surplus": surplus} if surplus else record
