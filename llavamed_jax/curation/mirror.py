"""Fills gaps from a mirror: a folder or a web address, with single files or with the packages of before August 2026."""

from __future__ import annotations

import contextlib
import io
import tarfile
import urllib.parse
import zlib
from collections.abc import Sequence
from pathlib import Path

from llavamed_jax.curation import names
from llavamed_jax.curation.downloads import (
    AbsentError,
    Client,
    DamagedError,
    FailedError,
    TooLargeError,
    looks_like_html,
)
from llavamed_jax.curation.wanted import Wanted
from llavamed_jax.errors import UsageError, short
from llavamed_jax.utils.paths import is_address

_MOST_ARCHIVE = 2**31  # bytes of a package, packed and unpacked
_MOST_MEMBERS = 100_000
_WORDS = ("pmcid", "file", "name", "archive")


class Mirror:
    """A place with files of articles.

    Args:
      place: a folder, or an address with some of `{pmcid}`, `{file}`, `{name}` (`PAIR_ID.jpg`) and `{archive}`
        (`aa/bb/PMCn.tar.gz`, of LLaVA-Med's list). An address without them is followed by `{archive}`.
      client: sends the requests.

    Raises:
      UsageError: the folder does not exist, or the address has other words in braces.
    """

    def __init__(self, place: str, client: Client):
        self.place, self._client = place, client
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

    def find(self, rows: Sequence[Wanted], most: int) -> dict[Wanted, tuple[bytes, str]]:
        """Gets files of one article.

        Args:
          rows: what is wanted of the article.
          most: the most bytes of a file.

        Returns:
          The bytes of each row that was found, and where they lay.
        """
        found: dict[Wanted, tuple[bytes, str]] = {}
        for row in rows:
            places = self._addresses(row) if self._is_address else self._paths(row)
            for place, is_archive in places:
                if row in found:
                    break
                if is_archive:
                    data = self._read(place, _MOST_ARCHIVE)
                    inside = from_archive(data, [each.file for each in rows if each not in found], most) if data else {}
                    found |= {each: (inside[each.file], place) for each in rows
                              if each not in found and each.file in inside}
                elif (data := self._read(place, most)) is not None:
                    found[row] = data, place
        return found

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

    def _read(self, place: str, most: int) -> bytes | None:
        if not self._is_address:
            with contextlib.suppress(OSError):
                path = Path(place)
                return path.read_bytes() if path.stat().st_size <= most else None
            return None
        try:
            body = self._client.get(place, most)
        except (AbsentError, DamagedError, FailedError, TooLargeError):
            return None
        return None if looks_like_html(body) else body


def from_archive(data: bytes, wanted: Sequence[str], most: int) -> dict[str, bytes]:
    """Reads files out of a package without unpacking it to a disk.

    Only regular files count; links, devices and paths mean nothing here, because only the last part of a member's name
    is compared. What follows a damaged place is lost.

    Args:
      data: the bytes of a `.tar.gz` or `.tar`.
      wanted: names of files.
      most: the most bytes of a file.

    Returns:
      The bytes of the files that were found, by the wanted name.
    """
    there: dict[str, bytes] = {}
    unpacked = 0
    with contextlib.suppress(tarfile.TarError, EOFError, OSError, zlib.error, ValueError), \
            tarfile.open(fileobj=io.BytesIO(data), mode="r|*") as package:
        for number, member in enumerate(package):
            unpacked += max(member.size, 0)
            if number >= _MOST_MEMBERS or unpacked > _MOST_ARCHIVE:
                break
            name = member.name.rpartition("/")[2]
            if member.isreg() and member.size <= most and any(names.match(each, [name]) for each in wanted):
                there[name] = package.extractfile(member).read()
    matches = {each: names.match(each, there) for each in wanted}
    return {each: there[match[1]] for each, match in matches.items() if match is not None}
