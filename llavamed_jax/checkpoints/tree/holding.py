"""Holds steps while they are read: a running job deletes a held step only at a later save.

The lock is a shared one on the step's manifest; the kernel releases it however a reader ends. On a file system without
locks no lock is taken: a step may then be deleted while it is read, and `reading` reports that in one sentence.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

import jax

from llavamed_jax.checkpoints.tree.step_manifest import MANIFEST
from llavamed_jax.errors import UserError, cut, warn_once
from llavamed_jax.utils import locks


class StepGone(UserError):
    """A step was deleted while it was read."""


class Hold:
    """A lock on a step, which its run does not delete as long as this object lives.

    Args:
      descriptor: the open and locked manifest of the step.
    """

    def __init__(self, descriptor: int):
        self.release = weakref.finalize(self, os.close, descriptor)


def hold(directory: Path) -> Hold | None:
    """Holds a step; returns None if it has no manifest or is being deleted. Check the step's files afterwards."""
    try:
        descriptor = os.open(directory / MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    if locks.lock(descriptor, is_shared=True) is False:
        os.close(descriptor)
        return None
    return Hold(descriptor)


def delete(directory: Path) -> bool:
    """Deletes a step; returns False if a reader holds it, so that it stays.

    The manifest is deleted first, so that a half-deleted step never looks intact. Of a link the link is deleted, and
    what it leads to stays. A step that cannot be deleted gives a warning: a run does not end for an old step.
    """
    target = os.readlink(directory) if directory.is_symlink() else None
    try:
        with contextlib.suppress(FileNotFoundError):  # another process deleted it, or was killed before it had
            descriptor = os.open(directory / MANIFEST, os.O_RDWR)  # for an exclusive lock NFS needs write access
            try:
                if locks.lock(descriptor) is False:
                    return False
                if target is None:
                    (directory / MANIFEST).unlink()
            finally:
                os.close(descriptor)  # before rmtree: NFS keeps an open file under another name in the directory
        with contextlib.suppress(FileNotFoundError):
            if target is None:
                shutil.rmtree(directory)
            else:
                directory.unlink()
                warn_once(f"{directory} was a link, and only the link is deleted: {target} stays")
    except OSError as error:
        warn_once(f"{directory} cannot be deleted and stays: {error.strerror or error}")
    return True


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """Re-raises errors of Orbax and TensorStore inside the block, while a step is read, as one sentence.

    Raises:
      StepGone: the step was deleted.
      UserError: the step cannot be read.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # JaxRuntimeError: a device is out of memory
        raise
    except Exception as error:
        if not (directory / MANIFEST).is_file():
            raise StepGone(f"{directory} was deleted while it was read, because a run that is still training deletes "
                           "its older steps (checkpoint.keep); read again to get the newest step") from None
        raise UserError(f"{directory} cannot be read: {reason(error)}") from None


def is_absence(error: Exception) -> bool:
    """Returns whether an exception says that a file or a directory does not exist."""
    return (isinstance(error, FileNotFoundError) or str(error).startswith("NOT_FOUND: ")
            or "os_error_code='2'" in str(error))


def is_refusal(error: Exception) -> bool:
    """Returns whether an exception says that the disk is full, failing or write-protected."""
    return isinstance(error, OSError) or "os_error_code=" in str(error)


def reason(error: Exception) -> str:
    """Returns the reason of an exception of Orbax or TensorStore, without the long text on source locations."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError):
        return error.strerror or str(error)
    lines = re.sub(r"\s*\[\w+(?: \w+)*='.*", "", str(error), flags=re.DOTALL).splitlines() or [""]
    return cut(f"{type(error).__name__}: {lines[0]}", 300)
