"""Files of results: whole under their final name, or absent."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

from llavamed_jax.errors import UserError
from llavamed_jax.parallel import distributed
from llavamed_jax.utils.files import is_at, utf8

_TEMPORARY = ".results."


class Lost(UserError):
    """The directory of an evaluation is no longer at its place."""


class Place:
    """The directory that an evaluation writes to, which others may remove, move or replace meanwhile."""

    def __init__(self, workdir: Path, descriptor: int | None = None):
        self._workdir, self._descriptor = workdir, descriptor
        if descriptor is None:
            self._descriptor = _open(workdir)
            weakref.finalize(self, os.close, self._descriptor)

    def check(self) -> None:
        """Raises Lost where another directory, or none, is at the path by now."""
        if not is_at(self._descriptor, self._workdir):
            raise Lost(f"the workdir {self._workdir} was removed, moved or replaced while the evaluation ran, and the answers that were "
                       "kept there are gone with it; no results are written")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Place]:
    """Holds a directory for one evaluation; the kernel lets go of it however the process ends, and nothing is left in it.

    Two at once would write their answers into one file, and the next start take those of the one for the other's. Of several
    processes of one evaluation the first holds it.
    Raises:
      UserError: another evaluation holds it. A file system that knows no locks is used without.
    """
    if distributed.process_index():
        yield Place(workdir)
        return
    descriptor = _open(workdir)
    try:
        while True:
            if not _lock(descriptor):
                raise UserError(f"the workdir {workdir} is in use by another evaluation; wait for its end, or name another")
            if is_at(descriptor, workdir):
                break
            os.close(descriptor)  # another evaluation that came to nothing has removed the directory meanwhile
            descriptor = _open(workdir)
        yield Place(workdir, descriptor)
    finally:
        os.close(descriptor)


def remove_empty(workdir: Path) -> None:
    """Removes a directory that nothing was written to, unless an evaluation holds it, whose it then is."""
    with contextlib.suppress(OSError):
        descriptor = os.open(workdir, os.O_RDONLY)
        try:
            if _lock(descriptor):
                os.rmdir(workdir)
        finally:
            os.close(descriptor)


def _open(workdir: Path) -> int:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        return os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be opened: {error.strerror or error}") from error


def _lock(descriptor: int) -> bool:
    """Whether a directory is ours now; True too on a file system that knows no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


class Results:
    """The files of a finished evaluation. All are written under temporary names, and only then renamed: a disk that is full leaves the
    results of an earlier evaluation as they were.

    Args:
      workdir: where they go; its lock is held.
      check: raises where it is no longer at its place.
    """

    def __init__(self, workdir: Path, check: Callable[[], None] = lambda: None):
        self._workdir, self._check, self._texts = workdir, check, {}

    def __contains__(self, name: str) -> bool:
        return name in self._texts

    def add(self, name: str, text: str) -> None:
        """A file of the results, to be written at the end."""
        self._texts[name] = text

    def write(self, more: Callable[[Path], None] = lambda folder: None, last: str = "metrics.json") -> None:
        """Writes what was added.

        Args:
          more: writes further files into the folder that it is given, in folders of their own; one takes the place of those of an
            equal ending (`*.eval`).
          last: the file that is renamed after all others.
        Raises:
          UserError: the disk refuses a file; then nothing has changed but what a single rename could not undo. A file that is not there
            when all were written.
        """
        self._check()
        for leftover in self._workdir.glob(f"{_TEMPORARY}*"):  # of a process that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=self._workdir) as name:
                folder = Path(name)
                for file, text in self._texts.items():
                    with open(folder / file, "wb") as opened:
                        opened.write(utf8(text))
                        opened.flush()
                        os.fsync(opened.fileno())  # some file systems say only then that they are full
                more(folder)
                files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
                for file in sorted(files, key=lambda file: file.name == last):
                    target = self._workdir / file
                    target.parent.mkdir(exist_ok=True)
                    earlier = [] if file.parent == Path() else list(target.parent.glob(f"*{target.suffix}"))
                    os.replace(folder / file, target)
                    for other in set(earlier) - {target}:
                        other.unlink(missing_ok=True)
            self._check()
            if gone := [file for file in files if not (self._workdir / file).is_file()]:
                raise UserError(f"{self._workdir / gone[0]} was removed as soon as it was written")
        except OSError as error:
            self._check()
            raise UserError(f"the results in {self._workdir} cannot be written: {error.strerror or error}; what stood there before is as "
                            "it was") from error






