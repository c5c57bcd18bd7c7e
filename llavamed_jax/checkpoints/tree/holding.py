"""Steps that are read while their run goes on: a reader holds the step, and the run deletes it at a later save.

The lock is shared, on the step's manifest; the kernel releases it however a reader ends. A file system without locks is used without
them: there a step may go while it is read, and `reading` says so in a sentence.
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

from llavamed_jax.checkpoints.tree.base import MANIFEST
from llavamed_jax.errors import UserError, cut
from llavamed_jax.utils import locks


class StepGone(UserError):
    """A step was deleted while it was read."""


class Hold:
    """A step that its run does not delete, for as long as this object lives."""

    def __init__(self, descriptor: int):
        self.release = weakref.finalize(self, os.close, descriptor)


def hold(directory: Path) -> Hold | None:
    """Holds a step; None where it has no manifest, or is being deleted. Whoever reads it looks at its files afterwards."""
    try:
        descriptor = os.open(directory / MANIFEST, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    if locks.lock(descriptor, is_shared=True) is False:
        os.close(descriptor)
        return None
    return Hold(descriptor)


def delete(directory: Path) -> bool:
    """Deletes a sealed step; False where somebody holds it, so that it stays. Its manifest goes first: a half-deleted step never looks
    intact.
    """
    with contextlib.suppress(FileNotFoundError):  # somebody else was faster
        descriptor = os.open(directory / MANIFEST, os.O_RDWR)  # NFS gives an exclusive lock to nobody who only reads
        if locks.lock(descriptor) is False:
            os.close(descriptor)
            return False
        try:
            (directory / MANIFEST).unlink()
        finally:
            os.close(descriptor)  # before the rest: NFS keeps a file that is open under another name, in the directory
        shutil.rmtree(directory)
    return True


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """What Orbax and TensorStore raise within, while they read a step, is one sentence.

    Raises:
      StepGone: the step is no longer there. UserError: it cannot be read.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):  # the last: a device without room
        raise
    except Exception as error:
        if not (directory / MANIFEST).is_file():
            raise StepGone(f"{directory} was deleted while it was read, as a run that goes on deletes its older steps (checkpoint.keep); "
                           "read again to take the newest step") from None
        raise UserError(f"{directory} cannot be read: {reason(error)}") from None


def is_absence(error: Exception) -> bool:
    """Whether an exception says that a file or a directory is not there."""
    return isinstance(error, FileNotFoundError) or str(error).startswith("NOT_FOUND: ") or "os_error_code='2'" in str(error)


def is_refusal(error: Exception) -> bool:
    """Whether an exception says that the disk refused something: that it is full, failing, or not to be written to."""
    return isinstance(error, OSError) or "os_error_code=" in str(error)


def reason(error: Exception) -> str:
    """What an exception of Orbax or TensorStore says, without the thousands of letters about where in its source."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError):
        return error.strerror or str(error)
    lines = re.sub(r"\s*\[\w+(?: \w+)*='.*", "", str(error), flags=re.DOTALL).splitlines() or [""]
    return cut(f"{type(error).__name__}: {lines[0]}", 300)
