"""Stores the steps of a run in this project's own tree, which is the run's workdir.

    model/                config.json of this project, tokenizer and preprocessor files
    base/                 the frozen tensors, each in its own dtype, as safetensors (`base.py`)
    checkpoints/STEP/     a training step, written by Orbax:
      params/             the trained tensors under canonical names, layers unstacked
      optimizer/          the optimizer's state
      state/              position in the data, random state, … as JSON
      manifest.json       sha256 of every file of the step, written last

A step is valid if its manifest exists and every file has the hash in it; an interrupted save, or a bit that the disk
lost, is found and named.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.layout import match
from llavamed_jax.checkpoints.tree import folder, holding
from llavamed_jax.checkpoints.tree.holding import Hold, reading
from llavamed_jax.checkpoints.tree.step_manifest import MANIFEST
from llavamed_jax.checkpoints.tree.step_manifest import damage as _damage
from llavamed_jax.checkpoints.tree.step_manifest import write as _write_manifest
from llavamed_jax.errors import UserError, amount
from llavamed_jax.utils import private
from llavamed_jax.utils.files import is_at, read_json

SEALED = ".sealed"  # exists in checkpoints/ once a step was complete
TRIES = 5  # to open the newest step of a run that deletes older ones in the meantime
_REMOVALS = 20  # tries to delete what a failed save has written, a tenth of a second apart
_ABSENT = 4  # tries in a row that find nothing left, and end it
_REMOVED = "{} was removed while it was written, so this step is not saved"


class Unsaved(UserError):
    """A step was not saved though the disk refused nothing: its files were removed, and another save may succeed."""


private.let_orbax_finish_writes()


class StepWriter:
    """Saves steps under `workdir/checkpoints` while training continues; one save is in progress at a time.

    As a context manager it waits for the last save on leaving.

    Args:
      workdir: the run's directory.
      on_saved: called with the number of each step that is on disk, in a thread of process 0.
    """

    def __init__(self, workdir: str | Path, on_saved: Callable[[int], None] = lambda step: None):
        logging.getLogger("absl").addFilter(_is_not_orbaxs)
        self._root, self._on_saved = Path(workdir).absolute() / "checkpoints", on_saved
        # Creating directories in the background gains nothing here, and after a failed save its threads wait for
        # minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal-step")
        self._sealing: Future | None = None
        self._step: int | None = None  # that is being saved, or was saved last
        if jax.process_index() == 0:
            self._root.mkdir(parents=True, exist_ok=True)
            folder.clear(workdir)

    def __enter__(self) -> "StepWriter":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with contextlib.suppress(*[] if kind is None else [UserError]):  # another error came first
            self.close()

    def save(self, step: int, trained: Mapping[str, jax.Array], optimizer_state: Any, meta: dict) -> None:
        """Saves a step; replaces a damaged one of the same number, and makes `checkpoints/` again if it was removed.

        Returns once the arrays are copied to the host, so that they may be donated; files and manifest follow.

        Args:
          step: the step's number.
          trained: canonical name -> array, layers unstacked.
          optimizer_state: any pytree of arrays.
          meta: values that JSON can hold: position in the data, random state.

        Raises:
          UserError: this save, or the one before it, does not fit on the disk or could not be written.
          Unsaved: files were removed while they were written; the disk is not the reason.
        """
        self.wait()
        self._step = step
        directory, tree = self._root / str(step), unflatten_dict(trained, sep="/")
        size = sum(x.nbytes for x in jax.tree.leaves((dict(trained), optimizer_state)))
        with _writing(directory):
            if jax.process_index() == 0:
                self._root.mkdir(exist_ok=True)
                if not (directory / MANIFEST).exists():  # of a killed save: Orbax would delete it, if it had room
                    shutil.rmtree(directory, ignore_errors=True)
            free = shutil.disk_usage(self._root).free
            if free < size:
                raise UserError(f"{directory} needs {amount(size)}; its disk has {amount(free)} free")
            with _deleted_if_failed(directory):
                self._checkpointer.save(directory, force=True, args=ocp.args.Composite(
                    params=ocp.args.PyTreeSave(tree), optimizer=ocp.args.PyTreeSave(optimizer_state),
                    state=ocp.args.JsonSave(meta)))
            written = _open_written(directory)
        self._sealing = self._thread.submit(self._seal, written, directory, set(trained))

    def _seal(self, written: int, directory: Path, wanted: set[str]) -> None:
        with contextlib.ExitStack() as stack, _writing(directory):
            stack.callback(os.close, written)
            stack.enter_context(_deleted_if_failed(directory, written))
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                if not is_at(written, directory):
                    raise Unsaved(_REMOVED.format(directory))
                _check_written(directory, wanted)
                _write_manifest(directory)
                (self._root / SEALED).touch()
                self._on_saved(int(directory.name))

    def wait(self) -> None:
        """Waits until the last save is on disk with its manifest; raises UserError if it could not be written."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def is_there(self, step: int) -> bool:
        """Returns whether the files of a saved step are in their place; their content is not checked."""
        directory = self._root / str(step)
        try:
            return all((directory / file).is_file() for file in read_json(directory / MANIFEST))
        except UserError:
            return False

    def keep(self, n: int, also: Iterable[int] = (), newest: int | None = None) -> list[int]:
        """Deletes all sealed steps but the newest `n` and those in `also`; the step that is being saved stays.

        A step before them without a manifest, of which a killed process had deleted a part, goes too.

        Args:
          n: number of the newest steps to keep.
          also: numbers of other steps to keep.
          newest: the last step that this run has saved. Later steps, which exist after a run went back behind damaged
            ones, are neither counted nor deleted.

        Returns:
          The steps that stay only because readers hold them.
        """
        if jax.process_index():
            return []
        ours = [step for step in steps(self._root.parent) if newest is None or step <= newest]
        has_manifest = {step: _has_manifest(self._root / str(step)) for step in ours}
        sealed = [step for step in ours if has_manifest[step]]
        newest_ones = sealed[max(len(sealed) - n, 0):]
        kept = {*newest_ones, *also, self._step}
        halves = [step for step in ours if has_manifest[step] is False and step < min(newest_ones, default=0)]
        return [step for step in (*halves, *sealed) if step not in kept
                and not holding.delete(self._root / str(step))]

    def close(self) -> None:
        """Waits for the last save and ends the threads."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """Re-raises errors inside the block as one sentence.

    TensorStore's own messages have thousands of characters, and Orbax raises many exceptions for a missing file.
    """
    try:
        yield
    except (UserError, MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as error:
        if holding.is_absence(error):
            raise Unsaved(_REMOVED.format(directory)) from error
        kind = UserError if holding.is_refusal(error) else Unsaved
        raise kind(f"{directory} could not be written: {holding.reason(error)}") from error


@contextlib.contextmanager
def _deleted_if_failed(directory: Path, written: int | None = None) -> Iterator[None]:
    """Deletes what a save that fails inside the block has written, which may fill the disk.

    Args:
      directory: the step.
      written: a descriptor of the directory that the save writes to; if another one is at its path, that is left alone.
    """
    try:
        yield
    except Exception:
        if jax.process_index() == 0:
            for path in [*_partial(directory), directory]:
                with contextlib.suppress(OSError):
                    if not (path / MANIFEST).exists() and (written is None or is_at(written, path)):
                        _remove(path)
        raise


def _remove(path: Path) -> None:
    """Deletes a directory to which other writes of a failed save may still add files, or which they make anew.

    What appears at its path while this waits is taken for the failed save's and deleted too, unless it has a manifest.
    """
    absent = 0
    for _ in range(_REMOVALS):
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.1)
        absent = 0 if path.exists() else absent + 1
        if absent == _ABSENT or (path / MANIFEST).exists():
            return


def _partial(directory: Path) -> list[Path]:
    """Returns the directory that a step has as long as Orbax writes it; without one, an empty list."""
    return list(directory.parent.glob(f"{directory.name}{folder.PARTIAL}*"))


def _open_written(directory: Path) -> int:
    """Opens the directory that a save writes to, which gets the step's name when everything is written."""
    for path in [*_partial(directory), directory]:
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY)
    raise Unsaved(_REMOVED.format(directory))


def _has_manifest(directory: Path) -> bool | None:
    """Returns whether a step has its manifest; None if that cannot be seen."""
    try:
        return (directory / MANIFEST).is_file()
    except OSError:
        return None


def _check_written(directory: Path, wanted: set[str]) -> None:
    """Raises Unsaved if parts of a step that was just written are missing.

    TensorStore recreates directories that are removed while it writes, and with the files written afterwards the step
    would look complete.
    """
    try:
        handler = ocp.PyTreeCheckpointHandler()
        found = flatten_dict(handler.metadata(directory / "params").tree, sep="/")
        handler.metadata(directory / "optimizer")
        ocp.JsonCheckpointHandler().restore(directory / "state", ocp.args.JsonRestore())
    except Exception as error:
        raise Unsaved(_REMOVED.format(directory)) from error
    if found.keys() != wanted:
        raise Unsaved(_REMOVED.format(directory))


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    """Hides Orbax's log lines: each of its threads logs the traceback of a failure, which is raised once anyway."""
    return "orbax" not in Path(record.pathname).parts


def steps(workdir: str | Path) -> list[int]:
    """Returns the numbers of the steps in a workdir, intact or not, ascending."""
    try:
        names = os.listdir(Path(workdir) / "checkpoints")
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = (step for step in map(folder.number, names) if step is not None)
    return sorted(step for step in found if _is_directory(Path(workdir) / "checkpoints" / str(step)))


def _is_directory(path: Path) -> bool:
    """Returns whether a path is a directory; True if that cannot be seen: no step is passed over in silence."""
    try:
        return path.is_dir()
    except OSError:
        return True


def has_sealed(workdir: str | Path) -> bool:
    """Returns whether any step was ever complete; a single step without a manifest may be a killed first save.

    A step that cannot be looked at counts: its run does not begin anew.
    """
    root = Path(workdir) / "checkpoints"
    return (root / SEALED).exists() or any(_has_manifest(root / str(step)) is not False for step in steps(workdir))


def newest_intact_step(workdir: str | Path) -> tuple[int | None, list[str]]:
    """Returns the newest step with the files of its manifest, and a sentence about each newer, damaged one."""
    step, _, damaged = hold_newest(Path(workdir), "")
    return step, damaged


def hold_newest(root: Path, part: str) -> tuple[int | None, Hold | None, list[str]]:
    """Returns `newest_intact_step` with a hold, taken before the check; a step deleted meanwhile is not damaged.

    Args:
      root: the run's directory.
      part: reads and checks only this part of the steps (`params`); "" for everything.
    """
    for _ in range(TRIES):
        listed, damaged = steps(root), {}
        for step in reversed(listed):
            directory = root / "checkpoints" / str(step)
            held = holding.hold(directory)
            if (damage := _damage(directory, part)) is None:
                return step, held, list(damaged.values())
            damaged[directory] = damage
        damaged = {directory: damage for directory, damage in damaged.items() if _is_directory(directory)}
        if steps(root) == listed:
            break
    return None, None, list(damaged.values())


def read_meta(workdir: str | Path, step: int) -> dict:
    """Returns the `meta` of a step, as it was given to `StepWriter.save`."""
    directory = Path(workdir).absolute() / "checkpoints" / str(step)
    with reading(directory):
        return ocp.JsonCheckpointHandler().restore(directory / "state", ocp.args.JsonRestore())


def restore_step(workdir: str | Path, step: int, trained_like: Mapping[str, Any],
                 optimizer_like: Any) -> tuple[dict, Any, dict]:
    """Restores a step.

    Args:
      workdir: the run's directory.
      step: the step's number.
      trained_like: canonical name -> array, or `jax.ShapeDtypeStruct` with the sharding of the array to restore.
      optimizer_like: the optimizer's state as such arrays.

    Returns:
      The trained tensors, the optimizer's state and `meta`, as they were given to `StepWriter.save`.

    Raises:
      UserError: the step has other tensors, or other shapes.
    """
    directory = Path(workdir).absolute() / "checkpoints" / str(step)
    with reading(directory):
        metadata = flatten_dict(ocp.PyTreeCheckpointHandler().metadata(directory / "params").tree, sep="/")
    found = {name: Tensor(tuple(m.shape), m.dtype, None) for name, m in metadata.items()}
    match(directory, found, {name: (name,) for name in trained_like},
          {name: x.shape for name, x in trained_like.items()})
    _check_optimizer(directory, optimizer_like)
    trees = {"params": unflatten_dict(trained_like, sep="/"), "optimizer": optimizer_like}
    arguments = {key: ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
                 for key, tree in trees.items()}
    with reading(directory), ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(directory, args=ocp.args.Composite(**arguments, state=ocp.args.JsonRestore()))
    return flatten_dict(restored["params"], sep="/"), restored["optimizer"], restored["state"]


def _check_optimizer(directory: Path, like: Any) -> None:
    """Raises UserError if the saved optimizer has other names, shapes or dtypes than `like`."""
    with reading(directory):
        saved = ocp.PyTreeCheckpointHandler().metadata(directory / "optimizer").tree
    found, wanted = ({
        jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name} {list(x.shape)}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)} for tree in (saved, like))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(f"{directory}/optimizer: {name} is {found.get(name, 'missing')}; "
                            f"{wanted.get(name, 'no such array')} was expected")
