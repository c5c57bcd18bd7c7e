"""Filters LLaVA files to the records whose images exist."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from llavamed_jax.curation.names import refuse_pointer
from llavamed_jax.datasets.records import find_records
from llavamed_jax.errors import UserError, at
from llavamed_jax.utils import signals
from llavamed_jax.utils.files import open_file, write_whole


@dataclass(frozen=True)
class Kept:
    """How many records of a file stay: all of them, those that stay, without image, and malformed."""

    records: int
    kept: int
    without_image: int
    malformed: int


def filter_records(source: Path, target: Path, images: Collection[str]) -> Kept:
    """Writes the records of a LLaVA file whose images exist, unchanged and in order.

    Records without an image stay. A JSON list becomes a JSON list, and JSON lines become JSON lines. The file is read
    record by record.

    Args:
      source: the file.
      target: the file to write, whole or not at all.
      images: names of the images that exist, as records name them.

    Returns:
      The counts.

    Raises:
      UserError: the source is missing or not JSON, or the target is the source or cannot be written.
    """
    if target.resolve() == source.resolve():
        raise UserError(f"{source} would be overwritten; another --out was expected")
    counts = dict(records=0, kept=0, without_image=0, malformed=0)

    def write(out) -> None:
        with open_file(source) as file:
            head = file.read(4096)
            refuse_pointer(source, head)
            is_list = head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
            places = find_records(file, str(source))
            out.write(b"[" if is_list else b"")
            for begin, end in places.tolist():
                signals.check()
                file.seek(begin)
                text = file.read(end - begin)
                counts["records"] += 1
                verdict = _verdict(text, images)
                counts[verdict] += 1
                if verdict == "kept":
                    separator = b"" if not is_list else b"\n" if counts["kept"] == 1 else b",\n"
                    out.write(separator + (text if is_list else text.strip() + b"\n"))
            out.write(b"\n]\n" if is_list else b"")

    try:
        write_whole(target, write)
    except FileNotFoundError:
        raise at(source, f"the training file {source} does not exist") from None
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror or error}") from None
    return Kept(**counts)


def _verdict(text: bytes, images: Collection[str]) -> str:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return "malformed"
    names = row.get("image") if isinstance(row, dict) else 0
    names = [] if names is None else [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return "malformed"
    return "kept" if all(name in images for name in names) else "without_image"
