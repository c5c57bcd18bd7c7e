"""Reads lists of what to fetch.

A row is one of these:

- LLaVA-Med's own: `{"pair_id": "123_F1", "pmc_tar_url": "…/aa/bb/PMC7.tar.gz", "image_file_path": "PMC7/a.jpg"}`, in
  JSON lines or a JSON list; a figure record with `graphic_ref` in place of `image_file_path`, as in LLaVA-Med's
  `llava_med_instruct_fig_captions.json` (lists by domain), serves too;
- a line of text `PMC7/a.jpg`, or `PMC7.2/a.jpg` for one version;
- a line of text `PMC7` or `PMC7.2`: the article's XML and all of its images.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamed_jax.curation.articles import WHOLE
from llavamed_jax.curation.names import is_safe, refuse_pointer
from llavamed_jax.datasets.records import find_records
from llavamed_jax.errors import UserError, at, short
from llavamed_jax.utils.files import open_file, read_bytes

_ARTICLE = re.compile(r"(?:PMC)?([0-9]{1,12})(?:\.([0-9]{1,6}))?", re.IGNORECASE)
_ARCHIVE = re.compile(r"(?:[0-9a-f]{2}/){2}PMC[0-9]+\.tar\.gz")
_SHOWN = 60  # characters of a row in an error


@dataclass(frozen=True, slots=True)
class Wanted:
    """A file to fetch, or an article.

    Attributes:
      pmcid: the article, such as `PMC10009416`.
      version: the version, or None for whichever holds the file.
      file: the file's name in the article; `WHOLE` for its XML and every image.
      name: where it goes below the folder of images; "" for a whole article.
      archive: the old package, `aa/bb/PMCn.tar.gz`, for mirrors; "" if unknown.
    """

    pmcid: str
    version: int | None
    file: str
    name: str
    archive: str = ""


@dataclass(frozen=True)
class Rejected:
    """A row that names nothing: its number from 1 and its text."""

    number: int
    text: str


def read_list(path: Path) -> Iterator[Wanted | Rejected]:
    """Yields the rows of a list.

    Args:
      path: the file.

    Raises:
      UserError: the file is missing, or its first row is no row of a list.
    """
    is_first = True
    for number, row in enumerate(_rows(path), start=1):
        wanted = _from_object(row) if isinstance(row, dict) else _from_line(row) if isinstance(row, str) else None
        if wanted is None and is_first:
            raise UserError(f"{path} is not a list of figures: row 1 is {short(row, _SHOWN)}; PMCn/FILE, PMCn, or "
                            "{pair_id, image_file_path} was expected")
        is_first = False
        yield Rejected(number, short(row, 200)) if wanted is None else wanted
    if is_first:
        raise UserError(f"{path} is empty; a list of PMCn/FILE, PMCn, or {{pair_id, image_file_path}} was expected")


def _rows(path: Path) -> Iterator[Any]:
    """Yields lines of text, or the objects of JSON lines, of a list, or of lists by domain."""
    try:
        with open_file(path) as file:
            head = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
            refuse_pointer(path, head)
            file.seek(0)
            if not head.startswith((b"{", b"[")):
                for line in file:
                    if text := line.decode("utf-8", "replace").strip("\ufeff \t\r\n"):
                        yield text
                return
            places = find_records(file, str(path))
            if head.startswith(b"{") and len(places) and not _is_object(file, *places[0]):
                yield from _by_domain(path)
                return
            for begin, end in places.tolist():
                file.seek(begin)
                yield _parsed(file.read(end - begin))
    except FileNotFoundError:
        raise at(path, f"the list {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text.decode("utf-8", "replace")


def _is_object(file, begin: int, end: int) -> bool:
    file.seek(int(begin))
    found = _parsed(file.read(int(end) - int(begin)))
    return isinstance(found, dict) and not any(isinstance(each, list) for each in found.values())


def _by_domain(path: Path) -> Iterator[Any]:
    found = _parsed(read_bytes(path))
    if not isinstance(found, dict):
        raise UserError(f"{path} is not valid JSON; a list of figures was expected")
    for each in found.values():
        yield from each if isinstance(each, list) else [each]


def _from_object(row: dict) -> Wanted | None:
    source = row.get("image_file_path") or row.get("graphic_ref")
    if not isinstance(source, str):
        return None
    parts = source.strip().split("/")
    place = next((i for i, part in enumerate(parts[:-1]) if _ARTICLE.fullmatch(part) and part[:3].upper() == "PMC"),
                 None)
    if place is None:
        return None
    pair, url = row.get("pair_id"), row.get("pmc_tar_url")
    archive = _ARCHIVE.search(url) if isinstance(url, str) else None
    wanted = _wanted(parts[place], "/".join(parts[place + 1:]), archive[0] if archive else "")
    if wanted is None or pair is None:
        return wanted
    name = f"{pair}.jpg"  # as LLaVA-Med's records name it, whatever the bytes are
    return Wanted(wanted.pmcid, wanted.version, wanted.file, name, wanted.archive) if is_safe(name) else None


def _from_line(line: str) -> Wanted | None:
    article, slash, file = line.partition("/")
    return _wanted(article, file if slash else WHOLE)


def _wanted(article: str, file: str, archive: str = "") -> Wanted | None:
    match = _ARTICLE.fullmatch(article)
    if match is None or file != WHOLE and not all(map(is_safe, file.split("/"))):
        return None
    pmcid, version = f"PMC{int(match[1])}", int(match[2]) if match[2] else None
    name = "" if file == WHOLE else f"{article}/{file.rpartition('/')[2]}"
    return Wanted(pmcid, version, file, name, archive)

