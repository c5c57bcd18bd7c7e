"""Finds a file that an old list names among the files that an article has now."""

from __future__ import annotations

import re
import unicodedata
import urllib.parse
from collections.abc import Iterable

from llavamed_jax.errors import UserError

# The first is the best: the old packages held a `.gif` thumbnail beside the `.jpg` of each figure.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp", ".gif")
EXACT, NEAR = 0, 1
_LONGEST_NAME = 200  # bytes; file systems take 255, and a temporary name is longer than the name


def stem(name: str) -> str:
    """Returns a name without the suffix of an image: `a.g001.tif` -> `a.g001`, `a.g001` -> `a.g001`."""
    for suffix in IMAGE_SUFFIXES:
        if name.lower().endswith(suffix):
            return name[:-len(suffix)]
    return name


def is_image(name: str) -> bool:
    """Returns whether a file name has the suffix of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def match(wanted: str, names: Iterable[str]) -> tuple[int, str] | None:
    """Finds the image that a list means.

    The same name is best. Then comes the same name in another spelling: Unicode form, URL quotes, case, folder. Then
    comes the same name with another suffix of an image, `.jpg` first.

    Args:
      wanted: the name in the list, with a suffix or without.
      names: the names that exist.

    Returns:
      How well it fits, smaller is better, and the name; None if no name fits.
    """
    found = [(quality, name) for name in names if (quality := _quality(wanted, name)) is not None]
    return min(found, default=None)


def _quality(wanted: str, name: str) -> int | None:
    if wanted == name:
        return EXACT
    ours, theirs = _plain(wanted), _plain(name)
    if ours == theirs:
        return NEAR
    if ours.casefold() == theirs.casefold():
        return NEAR + 1
    if not is_image(theirs):
        return None
    suffix = next(number for number, each in enumerate(IMAGE_SUFFIXES) if theirs.lower().endswith(each))
    if stem(ours) == stem(theirs):
        return NEAR + 2 + suffix
    if stem(ours).casefold() == stem(theirs).casefold():
        return NEAR + 2 + len(IMAGE_SUFFIXES) + suffix
    return None


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", urllib.parse.unquote(name)).rpartition("/")[2]


def is_safe(name: str) -> bool:
    """Returns whether a name can be that of a file in a folder: no path, no control character, not too long."""
    try:
        length = len(name.encode())
    except UnicodeEncodeError:
        return False
    return 0 < length <= _LONGEST_NAME and name not in (".", "..") and not re.search(r"[/\\\x00-\x1f\x7f]", name)


def refuse_pointer(name: object, head: bytes) -> None:
    """Raises UserError if a file's first bytes are those of a Git LFS pointer: a clone without `git lfs` has these."""
    if head.startswith(b"version https://git-lfs."):
        raise UserError(f"{name} is a Git LFS pointer and not the file; `git lfs pull` in its repository fetches the "
                        "file")
