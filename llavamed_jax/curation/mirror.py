"""Fills gaps from a mirror: a folder or a web address, with single files or with the packages of before August 2026."""

from __future__ import annotations

import contextlib
import tarfile
import tempfile
import threading
import urllib.parse
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from llavamed_jax.curation import articles, names
from llavamed_jax.curation.articles import Missing
from llavamed_jax.curation.downloads import (
    AbsentError,
    Client,
    DamagedError,
    FailedError,
    TooLargeError,
    WebPageError,
    refuse_html,
)
from llavamed_jax.curation.wanted import Wanted
from llavamed_jax.errors import UsageError, short
from llavamed_jax.utils import signals
from llavamed_jax.utils.paths import is_address

_MOST_ARCHIVE = 2**31  # bytes of a package, packed and unpacked
_MOST_MEMBERS = 100_000
_PACKAGES_AT_A_TIME = 4  # of a mirror; each is a file of the disk while it is read
_WORDS = ("pmcid", "file", "name", "archive")


@dataclass
class Answer:
    """What a mirror has of an article.

    Attributes:
      found: the bytes of each row that was found, and where they lay.
      failed: why the mirror could not be asked about a row, or not be read.
    """

    found: dict[Wanted, tuple[bytes, str]] = field(default_factory=dict)
    failed: dict[Wanted, Missing] = field(default_factory=dict)


class Mirror:
    """A place with files of articles.

    Args:
      place: a folder, or an address with some of `{pmcid}`, `{file}`, `{name}` (`PAIR_ID.jpg`) and `{archive}`
        (`aa/bb/PMCn.tar.gz`, of LLaVA-Med's list). An address without them is followed by `{archive}`.
      client: sends the requests.
      folder: where packages of the web lie while they are read.

    Raises:
      UsageError: the folder does not exist, or the address has other words in braces.
    """

    def __init__(self, place: str, client: Client, folder: Path | None = None):
        self.place, self._client, self._folder = place, client, folder
        self._turn = threading.Semaphore(_PACKAGES_AT_A_TIME)
        self._is_address = is_address(place)
        if self._is_address:
            if "{" not in place:
                self.place = place.rstrip("/") + "/{archive}"
            try:
                self.place.format(**dict.fromkeys(_WORDS, ""))
            except (KeyError, IndexError, ValueError, AttributeError):
                raise UsageError(f"--mirror is {short(place)}; the words {{{'}, {'.join(_WORDS)}}} were "
                                 "expected in it") from None
        elif not Path(place).is_dir():
            raise UsageError(f"--mirror is {short(place)}; a folder or an address was expected")

    @property
    def is_address(self) -> bool:
        """Whether the mirror is a web address, and not a folder."""
        return self._is_address

    def find(self, rows: Sequence[Wanted], most: int) -> Answer:
        """Gets files of one article. A package is read once for all rows.

        Args:
          rows: what is wanted of the article.
          most: the most bytes of a file.

        Returns:
          What was found, and what failed.

        Raises:
          ServerError, signals.Stopped: as `Client.get`.
        """
        answer, packages = Answer(), set()
        for row in rows:
            for place, is_archive in self._addresses(row) if self._is_address else self._paths(row):
                if row in answer.found:
                    break
                if place in packages:
                    continue
                left = [each for each in rows if each not in answer.found] if is_archive else [row]
                try:
                    if is_archive:
                        packages.add(place)
                        self._from_package(place, left, most, answer)
                    else:
                        answer.found[row] = self._read(place, most), place
                except AbsentError:
                    continue
                except (FailedError, DamagedError, TooLargeError, OSError) as error:
                    why = Missing(_reason(error), f"{place}: {getattr(error, 'strerror', None) or error}")
                    answer.failed |= {
                        each: articles.joined(answer.failed[each], why) if each in answer.failed else why
                        for each in left if each not in answer.found}
        return answer

    def _from_package(self, place: str, rows: Sequence[Wanted], most: int, answer: Answer) -> None:
        """Adds the files of a package. It is never in memory, and a few are on the disk at a time."""
        with self._turn, contextlib.ExitStack() as stack:
            if self._is_address:
                file = stack.enter_context(tempfile.TemporaryFile(dir=self._folder))
                self._client.save(place, _MOST_ARCHIVE, file)
                file.seek(0)
            else:
                file = stack.enter_context(open(place, "rb"))
                _refuse_large(place, _MOST_ARCHIVE)
            inside, problem = from_archive(file, [each.file for each in rows], most)
        answer.found |= {each: (inside[each.file], place) for each in rows if each.file in inside}
        if problem:
            raise DamagedError(problem)

    def _addresses(self, row: Wanted) -> list[tuple[str, bool]]:
        if "{archive}" in self.place and not row.archive:
            return []
        values = {"pmcid": row.pmcid, "file": row.file, "name": row.name, "archive": row.archive}
        url = self.place.format(**{word: urllib.parse.quote(value) for word, value in values.items()})
        return [(url, url.lower().partition("?")[0].endswith((".tar.gz", ".tgz", ".tar")))]

    def _paths(self, row: Wanted) -> list[tuple[str, bool]]:
        root = Path(self.place)
        folders = [root / row.pmcid, *sorted(root.glob(f"{row.pmcid}.[0-9]*"))]
        if row.archive:
            folders.insert(1, root / row.archive.removesuffix(".tar.gz"))
        files = [root / row.name] if row.name else []
        for folder in folders:
            if folder.is_dir():
                there = {path.name: path for path in folder.iterdir() if path.is_file()}
                match = names.match(row.file, there)
                files += [there[match[1]]] if match else []
        packages = [root / row.archive] if row.archive else []
        packages.append(root / f"{row.pmcid}.tar.gz")
        return [(str(path), False) for path in files if path.is_file()] + [
            (str(path), True) for path in packages if path.is_file()]

    def _read(self, place: str, most: int) -> bytes:
        if self._is_address:
            return self._client.get(place, most, lambda body, _: refuse_html(body))
        _refuse_large(place, most)
        return Path(place).read_bytes()


def _refuse_large(place: str, most: int) -> None:
    if Path(place).stat().st_size > most:
        raise TooLargeError(f"more than {most:,} bytes")


def _reason(error: Exception) -> str:
    if isinstance(error, DamagedError):
        return articles.WEB_PAGE if isinstance(error, WebPageError) else articles.DAMAGED
    return articles.TOO_LARGE if isinstance(error, TooLargeError) else articles.MIRROR_FAILED


def from_archive(file: BinaryIO, wanted: Sequence[str], most: int) -> tuple[dict[str, bytes], str]:
    """Reads files out of a package without unpacking it to a disk.

    Only regular files count; links, devices and paths mean nothing here, because only the last part of a member's name
    is compared. What follows a damaged place is lost.

    Args:
      file: a `.tar.gz` or `.tar`.
      wanted: names of files.
      most: the most bytes of a file.

    Returns:
      The bytes of the files that were found, by the wanted name; and why the rest may be lost, "" for a whole package.
    """
    there: dict[str, bytes] = {}
    unpacked, problem = 0, ""
    try:
        with tarfile.open(fileobj=file, mode="r|*") as package:
            for number, member in enumerate(package):
                signals.check()
                unpacked += max(member.size, 0)
                if number >= _MOST_MEMBERS or unpacked > _MOST_ARCHIVE:
                    problem = f"the package has more than {_MOST_MEMBERS:,} files or {_MOST_ARCHIVE:,} bytes"
                    break
                name = member.name.rpartition("/")[2]
                if member.isreg() and any(names.match(each, [name]) for each in wanted):
                    if member.size > most:
                        problem = f"{name} in the package has more than {most:,} bytes"
                    else:
                        there[name] = package.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        problem = f"the package is damaged: {type(error).__name__}"
    matches = {each: names.match(each, there) for each in wanted}
    return {each: there[match[1]] for each, match in matches.items() if match is not None}, problem
