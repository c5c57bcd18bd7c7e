"""Locks open files and directories; the kernel releases the locks however a process ends."""

from __future__ import annotations

import fcntl


def lock(descriptor: int, is_shared: bool = False) -> bool | None:
    """Locks the file or directory of a descriptor, without waiting, until the descriptor is closed.

    Args:
      descriptor: an open file or directory.
      is_shared: whether others may hold a shared lock at the same time.

    Returns:
      True if this process holds the lock now, False if another one does, None on a file system without locks.
    """
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if is_shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True
