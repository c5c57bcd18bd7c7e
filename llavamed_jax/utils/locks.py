"""Locks on open files and directories, which the kernel releases however a process ends."""

from __future__ import annotations

import fcntl


def lock(descriptor: int, is_shared: bool = False) -> bool | None:
    """Locks what a descriptor has open, without waiting, until it is closed.

    Args:
      is_shared: others may hold a shared lock at the same time.

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
