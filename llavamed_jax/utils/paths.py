"""Checks paths that a user types: they must be of this machine, or in a bucket where that is supported, and in UTF-8.

Only this module refuses addresses (`gs://`, `s3://`, `https://` …).
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamed_jax.errors import UsageError, short


def is_address(path: object) -> bool:
    """Returns whether a path is an address, SCHEME://…, from which `pathlib` would make a folder `SCHEME:`."""
    return isinstance(path, str) and re.match(r"\s*[A-Za-z][\w.+-]*://", path) is not None


def is_bucket(path: object) -> bool:
    """Returns whether a path is in a bucket, `gs://…` or `s3://…`."""
    return isinstance(path, str) and path.startswith(("gs://", "s3://"))


def split_bucket(url: str) -> tuple[str, str, str]:
    """Returns scheme, bucket and key of `gs://BUCKET/KEY` or `s3://BUCKET/KEY`; UsageError for another address."""
    found = re.fullmatch(r"(gs|s3)://([a-z0-9][a-z0-9._-]+)/((?:[^/]+/)*[^/]+)/?", url)
    if found is None or {".", ".."} & set(found[3].split("/")):
        raise UsageError(f"{short(url)} is not an address in a bucket; gs://BUCKET/KEY or s3://BUCKET/KEY was expected")
    return found[1], found[2], found[3]


def check(name: str, value: Any, may_be_bucket: bool = False) -> None:
    """Raises UsageError if a path, or one inside lists and mappings, is an address, or not valid UTF-8.

    A name is not valid UTF-8 if its bytes are in another encoding, or if the locale makes Python encode it otherwise.
    Libraries in C++ (SentencePiece, TensorStore) would not find the file, or would write to another place.

    Args:
      name: the value's name in errors: `--workdir`, or `the config key 'init'`.
      value: the value; numbers and None are not paths.
      may_be_bucket: whether the value may be `gs://BUCKET/KEY` or `s3://BUCKET/KEY`.
    """
    if may_be_bucket and is_bucket(value):
        split_bucket(value)
    elif is_address(value):
        allowed = (" or gs://BUCKET/KEY or s3://BUCKET/KEY was expected" if may_be_bucket else
                   " was expected (only --workdir of train.py, `init`, --checkpoint, and what `convert inspect` and "
                   "`convert verify` read may be in a bucket)")
        raise UsageError(f"{name} is the address {short(value)}; a path on this machine{allowed}")
    if isinstance(value, (str, Path)) and not _is_utf8(str(value)):
        encoding = sys.getfilesystemencoding()
        hint = "" if encoding == "utf-8" else f" (the locale's encoding is {encoding}: set PYTHONUTF8=1)"
        raise UsageError(f"{name} is {short(str(value))}; a name in UTF-8 was expected{hint}")
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        check(name, each)


def _is_utf8(path: str) -> bool:
    try:
        return os.fsencode(path) == path.encode()
    except UnicodeEncodeError:  # bytes that are not characters, or characters that the locale's encoding lacks
        return False


def local(text: str) -> Path:
    """Returns a path; serves as the `type` of a path in a script's `argparse`, and refuses addresses."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{text!r} is an address; a path on this machine was expected")
    return Path(text)


def user_cache() -> Path:
    """Returns this project's folder in the user's cache directory: $XDG_CACHE_HOME if that is absolute, else ~/.cache.

    Raises:
      OSError: the user has no home directory.
    """
    named, home = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~")
    if not os.path.isabs(named) and not os.path.isabs(home):
        raise OSError("this user has no home directory")
    return (Path(named) if os.path.isabs(named) else Path(home) / ".cache") / "llavamed_jax"
