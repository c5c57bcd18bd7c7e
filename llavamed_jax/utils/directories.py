"""Makes directories that appear when they are complete, and deletes what killed processes left of them."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from llavamed_jax.errors import UserError, amount
from llavamed_jax.utils import locks, signals
from llavamed_jax.utils.files import is_at


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
        delete_leftovers(target.parent, f".{target.name}.")
        free = shutil.disk_usage(target.parent).free
        if free < size:
            raise UserError(f"{out} needs {amount(size)}; its disk has {amount(free)} free")
        temporary, lock = make_partial(target.parent, f".{target.name}.")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}") from None
    except (ValueError, RuntimeError) as error:  # an invalid file name; a link to itself
        raise error if isinstance(error, UserError) else UserError(f"{str(out)!r} cannot be written: {error}") from None
    with contextlib.ExitStack() as stack, signals.undone_by(lambda: _remove(temporary)):
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
PARTIAL = ".partial"


def make_partial(parent: Path, prefix: str) -> tuple[Path, int]:
    """Makes a locked directory, which `delete_leftovers` of other processes leaves alone while it is locked.

    Args:
      parent: the directory that gets it.
      prefix: the beginning of its name; random characters and `.partial` follow.

    Returns:
      The directory, and a descriptor that holds the lock until it is closed or the process ends. A file system without
      locks gives no lock, and deletes no leftovers.
    """
    while True:
        directory = parent / f"{prefix}{secrets.token_hex(4)}{PARTIAL}"
        directory.mkdir()  # not `mkdtemp`, whose directories are private whatever the umask
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(directory, os.O_RDONLY)
            if locks.lock(descriptor) is not False and is_at(descriptor, directory):
                return directory, descriptor
            os.close(descriptor)  # another process took it for a leftover before it was locked


def delete_leftovers(parent: Path, prefix: str = "", delete: Callable[[Path], object] = shutil.rmtree) -> None:
    """Deletes the directories of `make_partial` whose processes were killed.

    Args:
      parent: the directory that contains them.
      prefix: the beginning of their names.
      delete: deletes one; an OSError leaves what is left of it to the next process.
    """
    for path in parent.iterdir():
        if path.name.startswith(prefix) and path.name.endswith(PARTIAL):
            with contextlib.suppress(OSError):  # such as one that its own process has just renamed or deleted
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    if locks.lock(descriptor) and is_at(descriptor, path):
                        delete(path)
                finally:
                    os.close(descriptor)


def _remove(directory: Path) -> None:
    """Deletes a directory in which another thread may still be writing."""
    for _ in range(3):
        shutil.rmtree(directory, ignore_errors=True)
