"""Where a run writes: the directory that it has locked, which others may remove, move or replace while it trains."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from llavamed_jax.checkpoints.tree import base
from llavamed_jax.errors import UserError
from llavamed_jax.parallel import distributed
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.utils.files import is_at


class Lost(UserError):
    """The directory of a run is no longer there, or no longer the run's."""


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Place]:
    """Holds the directory for one run; the kernel lets go of it however the process ends. Of several processes the first does.

    Raises:
      UserError: another run holds it.
    """
    place = Place(workdir)
    if distributed.process_index():
        yield place
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be made: {error.strerror}") from None
    place.lock()
    try:
        yield place
    finally:
        place.release()


class Place:
    """A run's directory, and what the run knows it by.

    Attributes:
      workdir: its path.
      saved: the newest step that the run has saved there; None before the first.
    """

    def __init__(self, workdir: Path):
        self.workdir, self.saved = workdir, None
        self._file: TextIO | None = None
        self._record: Mapping[str, Any] = {}

    def lock(self) -> None:
        """Takes the lock, or raises UserError where another run has it."""
        try:
            file = open(self.workdir / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"the workdir {self.workdir} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            with file:
                file.seek(0)
                holder = file.read().strip() or "unknown"
            raise UserError(f"the workdir {self.workdir} is in use by another run (process {holder})") from None
        self.release()
        self._file = file

    def release(self) -> None:
        if self._file is not None:
            self._file.close()

    def sign(self) -> None:
        """Signs the lock, for the message that others get: a run that has nothing to do leaves no trace."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()

    def belongs_to(self, record: Mapping[str, Any], saved: int | None) -> None:
        """Tells what stands in the directory from now on.

        Args:
          record: of the run (`resume.begin`), as its steps carry it.
          saved: the step that it goes on from.
        """
        self._record, self.saved = record, saved

    def note(self, step: int) -> None:
        """A step has been saved."""
        self.saved = step

    def check(self) -> None:
        """Makes sure, in the first process, that the directory is still the run's own. `.lock` and `recipe.json` are made anew where
        they alone were removed.

        Raises:
          Lost: it was removed, moved or replaced, or another model lies there.
        """
        if self._file is None or not self._record:
            return
        if not self.workdir.is_dir():
            raise Lost(f"the workdir {self.workdir} is gone, and with it what its run had saved ({self._saved_until()}): it was removed or "
                       "moved while the run was at work; the workdir back at its place, or another one to begin anew, was expected")
        is_own_lock = is_at(self._file.fileno(), self.workdir / ".lock")
        try:
            run = workdirs.read_record(self.workdir).get("run")
        except UserError as error:
            if not is_own_lock:
                raise Lost(f"the workdir {self.workdir} is another directory now: the run's own was removed or moved while the run was at "
                           f"work, and with it what it had saved ({self._saved_until()}); nothing more is saved ({error})") from None
            run = None
        if run not in (None, self._record["run"]):
            raise Lost(f"the workdir {self.workdir} is another run's now: this run's own was removed or moved while the run was at work, "
                       f"and with it what it had saved ({self._saved_until()}); nothing more is saved")
        try:
            base.check_fingerprints(self.workdir, self._record["model"])
            if not is_own_lock:
                self.lock()
                self.sign()
        except UserError as error:
            raise Lost(f"{error}; nothing more is saved ({self._saved_until()})") from None
        if run is None:
            workdirs.write_record(self.workdir, self._record)
            print(f"warning: {self.workdir / 'recipe.json'} was removed or damaged while the run was at work; it is written anew",
                  flush=True)

    def _saved_until(self) -> str:
        return "no step yet" if self.saved is None else f"the last was step {self.saved}"
