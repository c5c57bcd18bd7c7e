"""Holds a run's locked directory, and notices if somebody removes, moves or replaces it while the run trains."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from llavamed_jax.checkpoints.tree import base, store
from llavamed_jax.errors import UserError
from llavamed_jax.parallel import distributed
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.bucket_workdir import BucketWorkdir
from llavamed_jax.utils import locks
from llavamed_jax.utils.files import is_at


class Lost(UserError):
    """The directory of a run was removed, or no longer belongs to the run."""


@contextlib.contextmanager
def locked(workdir: Path, bucket: BucketWorkdir | None = None) -> Iterator[Place]:
    """Locks the directory for one run in process 0; the kernel releases the lock however the process ends.

    Args:
      workdir: the run's directory; made if it does not exist.
      bucket: copies the directory to its bucket; None outside of a bucket.

    Yields:
      The run's place.

    Raises:
      UserError: another run holds it. A file system without locks gives a warning.
    """
    place = Place(workdir, bucket)
    if distributed.process_index():
        yield place
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be created: {error.strerror}") from None
    place.lock()
    try:
        yield place
    finally:
        place.release()


class Place:
    """A run's directory, and the values by which the run recognises it.

    Args:
      workdir: the directory's path.
      bucket: copies the directory to its bucket; None outside of a bucket.

    Attributes:
      workdir: the directory's path.
      name: what the user calls it: the address in a bucket, or the path.
      saved: the newest step that the run has saved there; None before the first.
    """

    def __init__(self, workdir: Path, bucket: BucketWorkdir | None = None):
        self.workdir, self.saved, self._bucket = workdir, None, bucket
        self.name = str(workdir) if bucket is None else bucket.url
        self._file: TextIO | None = None
        self._record: Mapping[str, Any] = {}

    def lock(self) -> None:
        """Takes the lock, or raises UserError if another run has it."""
        try:
            file = open(self.workdir / ".lock", "a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"the workdir {self.workdir} cannot be written: {error.strerror}") from None
        if not locks.is_free(file.fileno(), self.workdir):
            with file:
                file.seek(0)
                holder = file.read().strip() or "unknown"
            raise UserError(f"the workdir {self.workdir} is in use by another run (process {holder})")
        self.release()
        self._file = file

    def release(self) -> None:
        """Releases the lock."""
        if self._file is not None:
            self._file.close()

    def sign(self) -> None:
        """Writes the process id into the lock file, for the message of other runs; a finished run writes nothing."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()

    def belongs_to(self, record: Mapping[str, Any], saved: int | None) -> None:
        """Records which run the directory belongs to from now on.

        Args:
          record: the run's record (`resume.begin`), as its steps carry it.
          saved: the step that the run resumes from; None to begin.
        """
        self._record, self.saved = record, saved

    def note(self, step: int) -> None:
        """Notes that a step has been saved; in a bucket it is then copied there."""
        if self._bucket is not None:
            self._bucket.follow(step)
        self.saved = step

    def settle(self) -> None:
        """Copies to the bucket what could not be copied there before; raises UserError if it still cannot."""
        if self._bucket is not None:
            self._bucket.settle()

    def what_is_saved(self) -> str:
        """Returns the newest step that a run resumes from, as the end of a sentence."""
        if self._bucket is not None:
            return self._bucket.saved_in_words()
        step, _ = store.newest_intact_step(self.workdir)
        return "no step had been saved" if step is None else f"step {step} is saved"

    def check(self) -> None:
        """Checks, in process 0, that the directory is still the run's own.

        If only `.lock` or `recipe.json` was removed, it is written again.

        Raises:
          Lost: the directory was removed, moved or replaced, or holds another model.
        """
        if self._file is None or not self._record:
            return
        if not self.workdir.is_dir():
            raise Lost(f"the workdir {self.workdir} was removed or moved during the run, together with the saved steps "
                       f"({self._saved_until()}); restore it, or name another workdir to start a new run")
        is_own_lock = is_at(self._file.fileno(), self.workdir / ".lock")
        try:
            run = workdirs.read_record(self.workdir).get("run")
        except UserError as error:
            if not is_own_lock:
                raise Lost(f"the workdir {self.workdir} was replaced by another directory during the run, and the "
                           f"saved steps are gone ({self._saved_until()}); nothing more is saved ({error})") from None
            run = None
        if run not in (None, self._record["run"]):
            raise Lost(f"the workdir {self.workdir} was replaced by the workdir of another run, and the saved steps of "
                       f"this run are gone ({self._saved_until()}); nothing more is saved")
        try:
            base.check_fingerprints(self.workdir, self._record["model"])
            if not is_own_lock:
                self.lock()
                self.sign()
        except UserError as error:
            raise Lost(f"{error}; nothing more is saved ({self._saved_until()})") from None
        if run is None:
            workdirs.write_record(self.workdir, self._record)
            print(f"warning: {self.workdir / 'recipe.json'} was removed or damaged during the run; it is written again",
                  flush=True)

    def _saved_until(self) -> str:
        return "no step yet" if self.saved is None else f"the last step was {self.saved}"
