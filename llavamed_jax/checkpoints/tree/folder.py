"""The directory `checkpoints/` of a run: whether its steps can be reached, and what interrupted saves left in it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from llavamed_jax.errors import UserError, warn_once

PARTIAL = ".orbax-checkpoint-tmp"  # follows a step's number while Orbax writes the step


def number(name: str) -> int | None:
    """Returns the step whose directory has a name; None for a name that no step has, such as `8.bak`, `08` or `²`."""
    return int(name) if name.isascii() and name.isdigit() and str(int(name)) == name else None


def check(workdir: str | Path) -> None:
    """Raises UserError if `checkpoints` exists and its steps cannot be listed.

    It may be a link to a disk that is not mounted, where a run that begins anew would lose its steps.
    """
    root = Path(workdir) / "checkpoints"
    try:
        os.listdir(root)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and not root.is_symlink():
            return
        what = f"cannot be read: {error.strerror}"
        if isinstance(error, FileNotFoundError):
            what = f"is a link to {os.readlink(root)}, which does not exist"
        elif isinstance(error, NotADirectoryError):
            what = "is not a directory"
        raise UserError(f"{root} {what}; the directory of the run's steps was expected: mount its disk, or remove "
                        f"{root} to start from the beginning") from None


def clear(workdir: str | Path) -> None:
    """Deletes what killed saves left, each as large as a step. What cannot be deleted gives a warning and stays."""
    for leftover in sorted((Path(workdir) / "checkpoints").glob(f"*{PARTIAL}*")):
        try:
            with contextlib.suppress(FileNotFoundError):
                shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
        except OSError as error:
            warn_once(f"{leftover}, which a killed save left, cannot be deleted: {error.strerror or error}")
