"""Reads files that a user named, and writes files atomically.

Reading refuses a pipe, a device, a socket or a directory at once instead of waiting for it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import stat
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from llavamed_jax.errors import UserError, at, short
from llavamed_jax.utils import signals

MOST = 2**32  # bytes of a file that is read whole
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket",
          stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}


def open_file(path: str | Path, name: str = "") -> BinaryIO:
    """Opens a regular file for reading bytes. It never waits for a writer at the other end of a pipe.

    Args:
      path: the file.
      name: the file's name in errors; the path if empty.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: a directory, a pipe, a device or a socket; a file that cannot be opened; an invalid file name.
    """
    name = name or str(path)
    try:
        file = open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    except FileNotFoundError:
        raise
    except IsADirectoryError:
        raise UserError(f"{name} is a directory; a file was expected") from None
    except OSError as error:
        raise at(path, f"{name} cannot be read: {error.strerror or error}") from None
    except ValueError:  # a NUL character, or half a surrogate pair
        raise at(path, f"{short(name)} is not a valid file name") from None
    kind = _KINDS.get(stat.S_IFMT(os.fstat(file.fileno()).st_mode))
    if kind is not None:
        file.close()
        raise UserError(f"{name} is {kind}; a file was expected")
    return file


def is_at(descriptor: int, path: str | Path) -> bool:
    """Returns whether an open file or directory is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (FileNotFoundError, NotADirectoryError):
        return False


def read_bytes(path: str | Path, name: str = "", most: int = MOST) -> bytes:
    """Reads the content of a regular file.

    Args:
      path: the file.
      name: the file's name in errors; the path if empty.
      most: the most bytes that it may have.

    Raises:
      FileNotFoundError: there is no such file.
      UserError: as `open_file`; the file is larger than `most`, or cannot be read.
    """
    with open_file(path, name) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = file.read(most + 1) if size <= most else b""
        except OSError as error:
            raise UserError(f"{name or path} cannot be read: {error.strerror or error}") from None
        except MemoryError:
            raise UserError(f"{name or path} has {size / 1e9:.2f} GB, more than the free memory") from None
    if max(size, len(data)) > most:
        raise UserError(f"{name or path} has {max(size, len(data)) / 1e9:.2f} GB; at most {most / 1e9:.2f} GB were "
                        "expected")
    return data


def read_json(path: Path) -> dict:
    """Reads the object in a JSON file. Raises UserError if the file is missing, or holds something else."""
    try:
        text = read_bytes(path).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    value = parse_json(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; an object was expected")
    return value


def parse_json(text: str, name: str) -> Any:
    """Parses a JSON text. Raises UserError, in which `name` stands for the text, if it is invalid."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{name} is nested too deeply to be read as JSON") from None


def parse_jsonl(text: str, name: Callable[[int], str]) -> list[tuple[str, Any]]:
    """Returns each line's name and JSON value; skips blank lines. Only line feeds separate lines.

    Args:
      text: the lines.
      name: returns a line's name in errors from its number, counted from 1.

    Raises:
      UserError: a line is not JSON.
    """
    lines = [(name(number), line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [(where, parse_json(line, where)) for where, line in lines]


def recover_jsonl(text: str) -> list[Any]:
    """Returns the values of JSON lines, with None for each invalid line, such as the last one of a killed process."""
    def value(line: str) -> Any:
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            return None

    return [value(line) for line in text.split("\n") if line.strip()]


def write_json(file: Path, value: dict) -> None:
    """Writes an object as indented JSON with sorted keys."""
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it, so that it is never seen incomplete.

    A lone surrogate, which UTF-8 has no bytes for, is written as a JSON escape. Raises UserError if the file cannot be
    written.
    """
    try:
        write_whole(path, lambda file: file.write(utf8(text)))
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file under a temporary name beside it and renames it, so that several processes may write the same file.

    Args:
      path: the file.
      write: writes the content into the open file. If it raises, the temporary file is removed and `path` is unchanged.

    Raises:
      OSError: the disk refuses the file.
    """
    # Random, not the process id, which may repeat on a disk that several machines share.
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    remove = functools.partial(temporary.unlink, missing_ok=True)
    with signals.undone_by(remove):
        try:
            with open(temporary, "wb") as file:
                write(file)
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                remove()
            raise


def utf8(text: str) -> bytes:
    """Returns the bytes that `write_text` writes."""
    return text.encode("utf-8", errors="backslashreplace")


def to_jsonl(objects: Sequence[Mapping]) -> str:
    """Returns objects as lines of JSON."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
