"""Files of results: whole under their final name, or absent."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation.answering.resume import num_answers
from llavamed_jax.evaluation.judging.judge import Verdict
from llavamed_jax.evaluation.report import tensorboard
from llavamed_jax.evaluation.scoring.predictions import read_predictions
from llavamed_jax.parallel import distributed
from llavamed_jax.utils import locks
from llavamed_jax.utils.files import is_at, read_json, utf8

# Files that only some evaluations leave. Beside the metrics of another evaluation they would be wrong.
_OF_RESULTS = ("predictions_control_*.jsonl", "judged.jsonl", "reviews.jsonl", "reviews_control_*.jsonl")
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
    return locks.lock(descriptor) is not False


@dataclass(frozen=True)
class Outcome:
    """What a scorer made of the answers of an evaluation.

    Attributes:
      metrics: the object of `metrics.json`.
      render: tables of what was run (title -> name -> value) -> the page `report.html`.
      files: further files of the results, name -> text.
      judged, verdicts: what a judge read, in the plural, and what it said of each.
      facts, hashes: further rows of the tables of what was run; `tables`: further ones.
    """

    metrics: dict
    render: Callable[[Mapping[str, Mapping]], str]
    files: Mapping[str, str] = field(default_factory=dict)
    judged: str = ""
    verdicts: Sequence[Verdict] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    hashes: Mapping[str, str] = field(default_factory=dict)
    tables: Mapping[str, Mapping] = field(default_factory=dict)


def check_writable(workdir: Path) -> None:
    """Creates the directory and a file in it, which is gone again; UserError where that cannot be done."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except FileExistsError as error:
        raise UserError(f"the workdir {workdir} is a file; a directory was expected") from error
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written to: {error.strerror or error}") from error


def check_unused(workdir: Path, path: Path, predictions: Sequence[Mapping]) -> None:
    """Refuses to lay the metrics of a file of predictions beside the answers of another evaluation.

    Raises:
      UsageError: the workdir holds other answers.
    """
    own = workdir / "predictions.jsonl"
    if any(map(num_answers, workdir.glob("predictions*.partial"))):
        raise UsageError(f"the workdir {workdir} holds answers of an evaluation that was stopped; the metrics of {path} do not "
                         "belong beside them, and another --workdir was expected")
    if own.exists() and not own.samefile(path) and _texts(read_predictions(own)) != _texts(predictions):
        raise UsageError(f"the workdir {workdir} holds other answers, {own.name} of another evaluation; the metrics of {path} do "
                         "not belong beside them, and another --workdir was expected")


def _texts(predictions: Sequence[Mapping]) -> dict[str, str]:
    return {str(each["question_id"]): each["text"] for each in predictions}


def write_results(workdir: Path, files: Mapping[str, str], metrics: Mapping, run: Mapping[str, str],
                  check: Callable[[], None] = lambda: None) -> None:
    """Writes all files of an evaluation at once, and removes files that an evaluation of something else left there.

    Args:
      workdir: where they go; its lock is held.
      files: name -> text, without `metrics.json`.
      run: who answered; a checkpoint's path says the step of TensorBoard's scalars.
      check: raises where the workdir is no longer at its place.
    Raises:
      UserError: the disk refuses a file; then nothing has changed but what a single rename could not undo. A file that
        is not there when all were written.
    """
    files = {**files, "metrics.json": json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"}
    step = tensorboard.step_of(run.get("checkpoint", ""))
    stale = [] if "predictions" in run else _stale(workdir, files, metrics)
    _write(workdir, files, lambda folder: tensorboard.write(folder, metrics, step), check)
    for path in stale:
        print(f"{path}: removed, it is of another evaluation", file=sys.stderr)
        path.unlink(missing_ok=True)


def _stale(workdir: Path, files: Mapping[str, str], metrics: Mapping) -> list[Path]:
    """Files that an earlier evaluation of something else left and this one does not write."""
    try:
        earlier = read_json(workdir / "metrics.json")
    except UserError:
        earlier = {}
    if _identity(earlier) == _identity(metrics):
        return []
    paths = (path for pattern in _OF_RESULTS for path in workdir.glob(pattern))
    return [path for path in sorted(paths) if path.name not in files]


def _identity(metrics: Mapping) -> tuple:
    """What an evaluation's answers depend on, as far as `metrics.json` says it."""
    said = metrics.get("asked")
    return (said, metrics.get("questions_sha256")) if isinstance(said, dict) else ()


def _write(workdir: Path, files: Mapping[str, str], more: Callable[[Path], None], check: Callable[[], None],
           last: str = "metrics.json") -> None:
    """Writes files under temporary names and renames them afterwards: a full disk leaves earlier results as they were.

    Args:
      more: writes further files into the folder that it is given, in folders of their own; such a file takes the place
        of those of an equal ending (`*.eval`).
      last: the file that is renamed after all others.
    """
    check()
    for leftover in workdir.glob(f"{_TEMPORARY}*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=workdir) as name:
            folder = Path(name)
            for file, text in files.items():
                with open(folder / file, "wb") as opened:
                    opened.write(utf8(text))
                    opened.flush()
                    os.fsync(opened.fileno())  # some file systems say only then that they are full
            more(folder)
            written = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
            for file in sorted(written, key=lambda file: file.name == last):
                target = workdir / file
                target.parent.mkdir(exist_ok=True)
                earlier = [] if file.parent == Path() else list(target.parent.glob(f"*{target.suffix}"))
                os.replace(folder / file, target)
                for other in set(earlier) - {target}:
                    other.unlink(missing_ok=True)
        check()
        if gone := [file for file in written if not (workdir / file).is_file()]:
            raise UserError(f"{workdir / gone[0]} was removed as soon as it was written")
    except OSError as error:
        check()
        raise UserError(f"the results in {workdir} cannot be written: {error.strerror or error}; what stood there before "
                        "is as it was") from error
