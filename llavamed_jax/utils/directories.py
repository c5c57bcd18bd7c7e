"""Makes directories that appear when they are complete."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.utils import locks, signals


@contextlib.contextmanager
def new_directory(out: str | Path, size: int = 0, apart_from: Iterable[Path | None] = ()) -> Iterator[Path]:
    """Yields a temporary directory beside `out` that becomes `out` at the end; it is deleted if the block fails.

    It is locked while it is written, so that the next process that writes `out` can tell the leftovers of a killed
    process (`.NAME.*.partial`) and delete them.

    Args:
      out: a directory that does not exist or is empty.
      size: bytes that will be written; the disk must have them free.
      apart_from: directories that are read and must not contain `out`.

    Raises:
      UserError: `out` is a file or a directory with content, lies in a directory that is read, cannot be written, or
        does not fit on the disk.
    """
    out = Path(out)
    try:
        target = out.resolve()  # a symbolic link keeps its target
        if target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise UserError(f"{out} exists and is not empty; a new directory was expected")
        for source in apart_from:
            if source is not None and target.is_relative_to(source.resolve()):
                raise UserError(f"{out} lies inside {source}, which is an input; a directory outside it was expected")
        target.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(target)
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise UserError(f"{out} needs {size / 1e9:.2f} GB; its disk has {free / 1e9:.2f} GB free")
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}{_PARTIAL}")
        temporary.mkdir()  # not `mkdtemp`, whose directories are private whatever the umask
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # an invalid file name; a link to itself
        raise error if isinstance(error, UserError) else UserError(f"{str(out)!r} cannot be written: {error}") from None
    with contextlib.ExitStack() as stack, signals.undone_by(lambda: _remove(temporary)):
        lock = _lock(temporary)
        if lock is not None:
            stack.callback(os.close, lock)
        try:
            yield temporary
            temporary.replace(target)
        except BaseException as error:
            _remove(temporary)
            if isinstance(error, OSError) and error.errno in _DISK:
                raise UserError(f"{out} cannot be written: {error.strerror}") from None
            # An error about a directory inside names the temporary path; the user knows `out`.
            if type(error) is UserError and str(temporary) in str(error):
                raise UserError(str(error).replace(str(temporary), str(out))) from None
            raise


# Errors of a disk during a write: full, over a quota, file too large, read-only by now, failing.
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_PARTIAL = ".partial"


def _lock(directory: Path) -> int | None:
    """Locks a directory and returns a descriptor that holds the lock until it is closed, or until the process ends.

    Returns None if another process holds the lock, or on a file system without locks.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    if not locks.lock(descriptor):
        os.close(descriptor)
        return None
    return descriptor


def _remove(directory: Path) -> None:
    """Deletes a directory in which another thread may still be writing."""
    for _ in range(3):
        shutil.rmtree(directory, ignore_errors=True)


def _remove_leftovers(out: Path) -> None:
    for path in out.parent.iterdir():
        if path.name.startswith(f".{out.name}.") and path.name.endswith(_PARTIAL) and path.is_dir():
            lock = _lock(path)
            if lock is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)
