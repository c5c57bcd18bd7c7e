"""Writes the result files of an evaluation, each completely or not at all, and locks the workdir meanwhile."""

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

from llavamed_jax.errors import UsageError, UserError, some
from llavamed_jax.evaluation.answering.resume import num_answers
from llavamed_jax.evaluation.judging.judge import Verdict
from llavamed_jax.evaluation.report import tensorboard
from llavamed_jax.evaluation.scoring.predictions import read_predictions
from llavamed_jax.evaluation.scoring.programs import PROGRAMS
from llavamed_jax.parallel import distributed
from llavamed_jax.utils import locks
from llavamed_jax.utils.files import is_at, read_json, utf8

# Files that only some evaluations write. They would be wrong beside the metrics of another evaluation.
_OF_RESULTS = ("predictions_control_*.jsonl", "judged.jsonl", "reviews.jsonl", "reviews_control_*.jsonl",
               *(f"{name}.jsonl" for name in PROGRAMS))
_TEMPORARY = ".results."
_UNCHANGED = "the earlier results are unchanged"
_TRIES = 20  # to open a directory that other evaluations remove meanwhile


class Lost(UserError):
    """The directory of an evaluation was removed, moved or replaced."""


class Place:
    """The directory that an evaluation writes to. Other processes may remove, move or replace it meanwhile.

    Args:
      workdir: the path of the directory; it is created if it does not exist.
      descriptor: an open descriptor of the directory. None opens one, which is closed with this object.
    """

    def __init__(self, workdir: Path, descriptor: int | None = None):
        self._workdir, self._descriptor = workdir, descriptor
        if descriptor is None:
            self._descriptor = _open(workdir)
            weakref.finalize(self, os.close, self._descriptor)

    def check(self) -> None:
        """Raises Lost if the directory is no longer at its path."""
        if not is_at(self._descriptor, self._workdir):
            raise Lost(f"the workdir {self._workdir} was removed, moved or replaced during the evaluation, together "
                       "with the answers saved there; no results are written")


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[Place]:
    """Locks a directory for one evaluation.

    Two evaluations at once would write their answers into one file, and a resumed one would read the answers of the
    other. The kernel releases the lock however the process ends, and there is no lock file. If an evaluation has
    several processes, the first holds the lock. On a file system without locks there is a warning and no lock.

    Args:
      workdir: the directory; it is created if it does not exist.

    Yields:
      The locked directory.

    Raises:
      UserError: another evaluation holds the lock, or the directory cannot be opened.
    """
    if distributed.process_index():
        yield Place(workdir)
        return
    descriptor = _open(workdir)
    try:
        while True:
            if not locks.is_free(descriptor, workdir):
                raise UserError(f"the workdir {workdir} is in use by another evaluation; wait until it ends, or name "
                                "another workdir")
            if is_at(descriptor, workdir):
                break
            os.close(descriptor)  # another evaluation, which wrote nothing, has removed the directory meanwhile
            descriptor = _open(workdir)
        yield Place(workdir, descriptor)
    finally:
        os.close(descriptor)


def remove_empty(workdir: Path) -> None:
    """Removes the directory if it is empty and no evaluation holds its lock."""
    with contextlib.suppress(OSError):
        descriptor = os.open(workdir, os.O_RDONLY)
        try:
            if locks.lock(descriptor) is not False:
                os.rmdir(workdir)
        finally:
            os.close(descriptor)


def _open(workdir: Path) -> int:
    """Opens the directory, which is created if it does not exist."""
    tries = _TRIES
    while True:
        tries -= 1
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            return os.open(workdir, os.O_RDONLY)
        except OSError as error:
            # Another evaluation that wrote nothing may remove the directory between the two calls, or within the first.
            is_gone = isinstance(error, (FileExistsError, FileNotFoundError)) and not workdir.is_file()
            if not (is_gone and tries):
                raise UserError(f"the workdir {workdir} cannot be opened: {error.strerror or error}") from error


@dataclass(frozen=True)
class Outcome:
    """The result of scoring the answers of an evaluation.

    Attributes:
      metrics: the object of `metrics.json`.
      render: makes the page `report.html` from the tables of run details (title -> name -> value).
      files: further result files, name -> text.
      judged: a plural noun for what the judge read, for messages, such as "open answers".
      verdicts: the judge's verdict on each of them.
      facts: further rows for the table "Run".
      hashes: further rows for the table of hashes.
      tables: further tables of run details.
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
    """Creates the directory, and writes and deletes a file in it.

    Raises:
      UserError: the directory cannot be created or written to.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except FileExistsError as error:
        raise UserError(f"the workdir {workdir} is a file; a directory was expected") from error
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written to: {error.strerror or error}") from error


def check_unused(workdir: Path, path: Path, predictions: Sequence[Mapping]) -> None:
    """Checks that the metrics of a file of predictions will not be written beside answers of another evaluation.

    Args:
      workdir: the directory that the metrics will be written to.
      path: the file of predictions.
      predictions: its lines.

    Raises:
      UsageError: the workdir contains other answers.
    """
    own = workdir / "predictions.jsonl"
    if any(map(num_answers, workdir.glob("predictions*.partial"))):
        raise UsageError(f"the workdir {workdir} holds answers of a stopped evaluation, and {path} has other answers; "
                         "another --workdir was expected")
    if own.exists() and not own.samefile(path) and _texts(read_predictions(own)) != _texts(predictions):
        raise UsageError(f"the workdir {workdir} holds {own.name} of another evaluation, and {path} has other answers; "
                         "another --workdir was expected")


def _texts(predictions: Sequence[Mapping]) -> dict[str, str]:
    return {str(each["question_id"]): each["text"] for each in predictions}


def write_results(workdir: Path, files: Mapping[str, str], metrics: Mapping, run: Mapping[str, str],
                  check: Callable[[], None] = lambda: None) -> None:
    """Writes all result files of an evaluation together, and removes files that a different evaluation left there.

    Args:
      workdir: the directory to write to; the caller holds its lock.
      files: name -> text, without `metrics.json`.
      metrics: the object of `metrics.json`.
      run: who answered. The path of a checkpoint determines the step of TensorBoard's scalars.
      check: raises if the workdir is no longer at its path.

    Raises:
      UserError: a file cannot be written, or its place is taken by a directory; then the earlier results are
        unchanged, unless the error came while the new files were being renamed, which the error says. Or a file
        disappeared after it was written.
    """
    files = {**files, "metrics.json": json.dumps(metrics, indent=2, ensure_ascii=False) + "\n"}
    step = tensorboard.step_of(run.get("checkpoint", ""))
    stale = [] if "predictions" in run else _stale(workdir, files, metrics)
    _write(workdir, files, lambda folder: tensorboard.write(folder, metrics, step), check)
    for path in stale:
        print(f"{path}: removed, because it belongs to another evaluation", file=sys.stderr)
        path.unlink(missing_ok=True)


def _stale(workdir: Path, files: Mapping[str, str], metrics: Mapping) -> list[Path]:
    """Returns the files that a different, earlier evaluation left and that this one does not write."""
    try:
        earlier = read_json(workdir / "metrics.json")
    except UserError:
        earlier = {}
    if _identity(earlier) == _identity(metrics):
        return []
    paths = (path for pattern in _OF_RESULTS for path in workdir.glob(pattern))
    return [path for path in sorted(paths) if path.name not in files and not _is_own_directory(path)]


def _identity(metrics: Mapping) -> tuple:
    """Returns what the answers of an evaluation depend on, as far as `metrics.json` states it."""
    said = metrics.get("asked")
    return (said, metrics.get("questions_sha256")) if isinstance(said, dict) else ()


def _write(workdir: Path, files: Mapping[str, str], more: Callable[[Path], None], check: Callable[[], None],
           last: str = "metrics.json") -> None:
    """Writes files under temporary names and renames them afterwards, so a full disk leaves earlier results unchanged.

    Args:
      workdir: the directory to write to.
      files: name -> text.
      more: writes further files into subfolders of the folder that it is given. Such a file replaces all files with the
        same suffix (`*.eval`) in its subfolder.
      check: raises if the workdir is no longer at its path.
      last: the file that is renamed after all others.
    """
    renamed: list[str] = []
    check()
    for leftover in workdir.glob(f"{_TEMPORARY}*"):  # left by a killed process
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        with tempfile.TemporaryDirectory(prefix=_TEMPORARY, dir=workdir) as name:
            folder = Path(name)
            for file, text in files.items():
                with open(folder / file, "wb") as opened:
                    opened.write(utf8(text))
                    opened.flush()
                    os.fsync(opened.fileno())  # some file systems report a full disk only here
            more(folder)
            written = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file()]
            for file in written:
                _check_place(workdir, file)
            for file in sorted(written, key=lambda file: file.name == last):
                target = workdir / file
                target.parent.mkdir(exist_ok=True)
                earlier = [] if file.parent == Path() else list(target.parent.glob(f"*{target.suffix}"))
                os.replace(folder / file, target)
                renamed.append(str(file))
                for other in set(earlier) - {target}:
                    other.unlink(missing_ok=True)
        check()
        if gone := [file for file in written if not (workdir / file).is_file()]:
            raise UserError(f"{workdir / gone[0]} was removed right after it was written")
    except OSError as error:
        check()
        kept = f"{some(renamed, 3)} {'is' if len(renamed) == 1 else 'are'} new already" if renamed else _UNCHANGED
        raise UserError(f"the results in {workdir} cannot be written: {error.strerror or error}; {kept}") from error


def _check_place(workdir: Path, file: Path) -> None:
    """Raises UserError if a result cannot get its name in the workdir, because of what has this name already."""
    target, parent = workdir / file, (workdir / file).parent
    wrong = ""
    if os.path.lexists(parent) and not parent.is_dir():
        wrong = f"{parent} is not a directory"
    elif _is_own_directory(target):
        wrong = f"{target} is a directory and no file"
    if wrong:
        raise UserError(f"the results in {workdir} cannot be written: {wrong}; {_UNCHANGED}")


def _is_own_directory(path: Path) -> bool:
    """Returns whether a path is a directory, and not a link to one, which a new file replaces."""
    return path.is_dir() and not path.is_symlink()
