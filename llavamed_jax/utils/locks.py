"""Locks open files and directories; the kernel releases the locks however a process ends.

Some file systems have no locks: Lustre without the mount option `flock`, NFS without its lock daemon.
"""

from __future__ import annotations

import contextlib
import fcntl

from llavamed_jax.errors import warn_once


def lock(descriptor: int, is_shared: bool = False) -> bool | None:
    """Locks the file or directory of a descriptor, without waiting, until the descriptor is closed.

    Args:
      descriptor: an open file or directory.
      is_shared: whether others may hold a shared lock at the same time.

    Returns:
      True if this process holds the lock now, False if another one does, None on a file system without locks.
    """
    try:
        _flock(descriptor, fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def wait(descriptor: int) -> None:
    """Locks the file or directory of a descriptor once no other process holds it; does nothing without locks."""
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def is_free(descriptor: int, directory: object) -> bool:
    """Locks a directory that one run at a time may write to; returns False if another run holds the lock.

    On a file system without locks it prints a warning and returns True: the run goes on without a lock.

    Args:
      descriptor: the open directory, or an open file in it.
      directory: the directory, for the warning.
    """
    try:
        _flock(descriptor, fcntl.LOCK_EX)
    except BlockingIOError:
        return False
    except OSError as error:
        warn_once(f"{directory} cannot be locked ({error.strerror or error}), so a second run there would not be "
                  "noticed, and both would write the same files; start one run at a time")
    return True


def _flock(descriptor: int, operation: int) -> None:
    fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
