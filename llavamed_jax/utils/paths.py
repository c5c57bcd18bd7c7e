"""Paths that somebody types: of this machine, and in UTF-8. Addresses (`gs://`, `s3://`, `https://` …) are refused here alone."""

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
    """Whether a path is an address of the form SCHEME://…, which `pathlib` would make a folder `SCHEME:` of."""
    return isinstance(path, str) and re.match(r"\s*[A-Za-z][\w.+-]*://", path) is not None


def check(name: str, value: Any) -> None:
    """Raises UsageError where a path, or one inside lists and mappings, is an address, or a name that is not UTF-8.

    A name is not, where its bytes are of another encoding, and where Python takes them for another by the locale. Libraries in
    C++ (SentencePiece, TensorStore) would not find it, or would write to another place.

    Args:
      name: what the error calls it: `--workdir`, or `the config key 'init'`.
      value: numbers and None are no paths.
    """
    if is_address(value):
        raise UsageError(f"{name} is {short(value)}, an address; buckets and the web are neither read nor written yet, and a path "
                         "on this machine was expected")
    if isinstance(value, (str, Path)) and not _is_utf8(str(value)):
        encoding = sys.getfilesystemencoding()
        hint = "" if encoding == "utf-8" else f" (the locale's encoding is {encoding}: set PYTHONUTF8=1)"
        raise UsageError(f"{name} is {short(str(value))}; a name in UTF-8 was expected{hint}")
    for each in value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ():
        check(name, each)


def _is_utf8(path: str) -> bool:
    try:
        return os.fsencode(path) == path.encode()
    except UnicodeEncodeError:  # bytes that are no characters, or characters that the locale's encoding lacks
        return False


def local(text: str) -> Path:
    """The `type` of a path in a script's `argparse`."""
    if is_address(text):
        raise argparse.ArgumentTypeError(f"{text!r} is an address; a path on this machine was expected")
    return Path(text)
