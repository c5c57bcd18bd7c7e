"""Files of results: whole under their final name, or absent."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.parallel import distributed


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds a directory for one evaluation; the kernel lets go of it however the process ends, and nothing is left in it.

    Two at once would write their answers into one file, and the next start take those of the one for the other's. Of several
    processes of one evaluation the first holds it.
    Raises:
      UserError: another evaluation holds it. A file system that knows no locks is used without.
    """
    if distributed.process_index():
        yield
        return
    descriptor = os.open(workdir, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(f"the workdir {workdir} is in use by another evaluation; wait for its end, or name another") from None
        yield
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name and renames it: under the final name it is whole or absent.

    A lone surrogate, which UTF-8 has no bytes for, is written as JSON escapes it.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(utf8(text))
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where it could not even be begun
            temporary.unlink()
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def utf8(text: str) -> bytes:
    """The bytes that `write_text` writes."""
    return text.encode("utf-8", errors="backslashreplace")


def to_jsonl(objects: Sequence[Mapping]) -> str:
    """Objects as lines of JSON."""
    return "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in objects)
