"""Files of results: whole under their final name, or absent."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from llavamed_jax.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it: under the final name it is whole or absent.

    A lone surrogate, which UTF-8 has no bytes for, is written as JSON escapes it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(utf8(text))
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def utf8(text: str) -> bytes:
    """The bytes that `write_text` writes."""
    return text.encode("utf-8", errors="backslashreplace")


def to_jsonl(objects: Sequence[Mapping]) -> str:
    """Objects as lines of JSON."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
