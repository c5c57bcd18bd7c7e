"""Tells whether the images of records are still those that were read, without reading them again.

The evidence of an image is eight bytes made from its file's name, size and time of change; 0 is a file that is not
there. The folder does not count, so a copy that keeps the times is the same image.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence

from llavamed_jax.errors import UserError
from llavamed_jax.images.load import split_frame

MISSING = 0


def evidence(sources: Iterable[object]) -> list[int]:
    """Returns the evidence of each image of a record.

    Args:
      sources: paths of images, with `#frame=N` or without. For bytes that the record itself holds, it is 0.
    """
    return [_of(str(source)) for source in sources]


def _of(source: str) -> int:
    try:
        path = split_frame(source)[0]
        found = os.stat(path)
    except (OSError, ValueError, UserError):
        return MISSING
    text = os.fsencode(f"{os.path.basename(path)}\0{found.st_size}\0{found.st_mtime_ns}")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") | 1


def is_changed(before: Sequence[int], now: Sequence[int]) -> bool:
    """Returns whether an image is another one, or has come; one that is gone has not changed what was made of it."""
    return len(before) != len(now) or any(new not in (MISSING, old) for old, new in zip(before, now, strict=True))


def num_gone(before: Sequence[int], now: Sequence[int]) -> int:
    """Returns the number of images that were there and are not there now."""
    return sum(old != MISSING and new == MISSING for old, new in zip(before, now, strict=False))


def joined(before: Sequence[int], now: Sequence[int]) -> list[int]:
    """Returns the evidence of what a shard holds that is written again: an image that is gone keeps its evidence."""
    if len(before) != len(now):
        return list(now)
    return [old if new == MISSING else new for old, new in zip(before, now, strict=True)]
