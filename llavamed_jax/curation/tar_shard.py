"""Reads the files of a tar shard in their order, and says where and why a damaged shard ends.

`tarfile` takes a damaged header for the end of the archive. Here only the marker that tar writes is the end: two blocks
of zeros, after which only zeros come.
"""

from __future__ import annotations

import importlib
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from llavamed_jax.utils.files import open_file

_MOST_MEMBER = 2**28  # bytes of a file in a shard
_CHUNK = 2**20
_COMPRESSED = {b"\x1f\x8b\x08": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "lzma", b"]\0\0\x80": "lzma"}


class ShardError(Exception):
    """A shard is damaged.

    Args:
      reason: why, in few words.
      place: the byte at which reading ends; in the unpacked archive if the shard is compressed.
    """

    def __init__(self, reason: str, place: int):
        super().__init__(reason)
        self.place = place


class _Member(tarfile.TarInfo):
    """A member whose header, if damaged, is an error and not the end."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except (tarfile.EOFHeaderError, tarfile.EmptyHeaderError):  # zeros, or nothing: `_refusal_of_end` looks
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def files(shard: Path) -> Iterator[tuple[str, bytes | None]]:
    """Yields name and content of each member; None in place of the content of a folder, a link or a very large file.

    Raises:
      OSError: the shard cannot be opened.
      UserError: likewise, or it is no file.
      ShardError: it is damaged. What was yielded before is sound.
    """
    with open_file(shard) as file:
        members = None
        try:
            with tarfile.open(fileobj=_unpacked(file), mode="r|", tarinfo=_Member) as members:
                for member in members:
                    is_read = member.isreg() and member.size <= _MOST_MEMBER
                    yield member.name, members.extractfile(member).read() if is_read else None
                reason = _refusal_of_end(members)
        except Exception as error:  # tarfile and the decompressors raise many kinds for damaged bytes
            reason = type(error).__name__
        if reason:
            raise ShardError(reason, min(members.offset, members.fileobj.tell()) if members else 0)


def _unpacked(file: BinaryIO) -> BinaryIO:
    """Returns the archive; gzip's checksum is checked, which `tarfile` does not do."""
    head = file.read(6)
    file.seek(0)
    kind = next((kind for magic, kind in _COMPRESSED.items() if head.startswith(magic)), None)
    return importlib.import_module(kind).open(file) if kind else file


def _refusal_of_end(archive: tarfile.TarFile) -> str:
    """Reads what follows the last member and its first block of zeros; returns what is wrong with it, or ""."""
    zeros = 0
    while chunk := archive.fileobj.read(_CHUNK):
        if chunk.count(0) < len(chunk):
            return "data after its end"
        zeros += len(chunk)
    return "" if zeros >= tarfile.BLOCKSIZE else "no end marker"
