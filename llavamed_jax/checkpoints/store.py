"""This project's own tree, which a run's workdir is.

    model/                config.json of ours, tokenizer and preprocessor files
    base/                 the tensors that are not trained, one array a tensor in its own dtype, as safetensors (`base.py`)
    checkpoints/STEP/     what a training step left, through Orbax:
      params/             the trained tensors under canonical names, layers unstacked
      optimizer/          the optimizer's state
      state/              position in the data, random state, … as JSON
      manifest.json       sha256 of every file of the step, written last

A step counts when its manifest is there and every file has the hash that stands in it; a save that was killed, or a disk that
lost a bit, is found and named.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import warnings
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src import asyncio_utils  # nothing public reaches its event loop

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.base import MANIFEST, check_fingerprints, read_base, write_base
from llavamed_jax.checkpoints.generation_file import copy_files
from llavamed_jax.checkpoints.layouts import match
from llavamed_jax.checkpoints.load import flatten, nest
from llavamed_jax.checkpoints.preprocessor_file import make_equal
from llavamed_jax.checkpoints.reader import Checkpoint, text_files, tree_config, tree_root
from llavamed_jax.checkpoints.torch_files import Tensor
from llavamed_jax.checkpoints.writer import Progress, total_bytes
from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UserError, at
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import read_json, write_json
from llavamed_jax.utils.hashes import sha256_of

SEALED = ".sealed"  # stands in checkpoints/ once a step was whole
_LEFT_S = 60.0  # that the writes of a save that has failed may take to end


def write_model(out: str | Path, checkpoint: Checkpoint, config: LlavaConfig | None = None, files: Mapping[str, Path] | None = None,
                without: Iterable[str] = (), progress: Progress = iter) -> None:
    """Writes `out/base` and then `out/model`, which marks the base as whole; each appears when it is complete.

    Args:
      config, files: in place of the checkpoint's own.
      without: canonical names that the base leaves out, because every step has them.
    Raises:
      UserError: `out` has a model already; weights that are no model's (`Checkpoint.sound`).
    """
    out, without, checkpoint, config = Path(out), set(without), checkpoint.sound(), config or checkpoint.config
    if (out / "base").exists() and not (out / "model").exists():
        shutil.rmtree(out / "base")  # of a run that was stopped while it wrote its base
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in without}
    with new_directory(out / "base", total_bytes(tensors)) as base:
        write_base(base, tensors, progress)
    checkpoint.tally.warn()
    with new_directory(out / "model") as model:
        write_json(model / "config.json", config.to_dict())
        copy_files(config, checkpoint.files if files is None else files, model)
        make_equal(config, model, config.source == "transformers", is_needed=False)


def open_tree(path: str | Path) -> Checkpoint:
    """Opens a workdir or `convert import`'s directory (base and the newest intact step), or one `DIR/checkpoints/STEP`.

    Raises:
      UserError: tensors that are missing, unexpected or misshapen; a step that was asked for by name and is not intact.
    """
    path = Path(path)
    root, config = tree_root(path), tree_config(path)
    if root == path:
        step, damaged = newest_intact_step(root, "params")
    else:
        step, damaged = int(path.name) if path.name.isdigit() and path.is_dir() else None, []
        damage = f"{path} does not exist; DIR/checkpoints/STEP was expected" if step is None else _damage(path, "params")
        if damage:
            raise at(path, damage)
    found = read_base(root)
    if step is not None:
        _refuse_other_base(root, step)
        found |= _step_tensors(root / "checkpoints" / str(step))
    shapes = {name: spec.shape for name, spec in names.specs(config).items()}
    try:
        tensors = match(root, found, {name: (name,) for name in shapes}, shapes)
    except UserError as error:
        raise UserError("; ".join([*damaged, str(error)])) from None
    for sentence in damaged:
        warnings.warn(sentence, stacklevel=2)
    return Checkpoint(config, "tree", root, tensors, text_files(root / "model"), "the tensors in the tree", step)


def _refuse_other_base(root: Path, step: int) -> None:
    """Raises UserError where the base is not the one that a run's step was trained over. Steps of no run do not say."""
    if _damage(root / "checkpoints" / str(step), "state") is None and (record := read_meta(root, step).get("run")):
        check_fingerprints(root, record["model"], "base/")


def _step_tensors(directory: Path) -> dict[str, Tensor]:
    """The trained tensors of a step, each read by itself when it is asked for."""
    params = (directory / "params").absolute()
    handler = ocp.PyTreeCheckpointHandler()
    metadata = flatten(handler.metadata(params).tree)

    def read(name):
        item = nest({name: 0})
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
        restored = handler.restore(params, args=ocp.args.PyTreeRestore(item=item, restore_args=arguments, partial_restore=True))
        return flatten(restored)[name]

    return {name: Tensor(tuple(m.shape), np.dtype(m.dtype), lambda name=name: read(name)) for name, m in metadata.items()}


def _run_to_the_end(coro: Coroutine) -> Any:
    """In place of Orbax's function of its event loop, which closes the loop at the first failure. Then the writes that are still
    under way find it closed, and TensorStore prints a traceback for each; here they come to their end first."""
    loop = asyncio.new_event_loop()
    try:
        asyncio.set_event_loop(loop)
        return loop.run_until_complete(coro)
    except Exception:
        if left := asyncio.all_tasks(loop):
            for task in loop.run_until_complete(asyncio.wait(left, timeout=_LEFT_S))[0]:
                task.cancelled() or task.exception()  # looked at, or asyncio complains; the first one is raised here
        raise
    finally:
        asyncio.set_event_loop(None)
        loop.close()


asyncio_utils._run_sync_via_new_loop = _run_to_the_end


class StepWriter:
    """Saves steps under `workdir/checkpoints` while training goes on; one save is under way at a time.

    As a context it waits for the last save on leaving.
    """

    def __init__(self, workdir: str | Path):
        logging.getLogger("absl").addFilter(_is_not_orbaxs)
        self._root = Path(workdir).absolute() / "checkpoints"
        # Directories made in the background gain nothing here, and after a refused save their threads wait for minutes.
        options = ocp.AsyncOptions(create_directories_asynchronously=False)
        self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="seal-step")
        self._sealing: Future | None = None
        if jax.process_index() == 0:
            self._root.mkdir(parents=True, exist_ok=True)
            for leftover in self._root.glob("*.orbax-checkpoint-tmp*"):  # of a save that was killed; as large as a step
                shutil.rmtree(leftover)

    def __enter__(self) -> "StepWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def save(self, step: int, trained: Mapping[str, jax.Array], optimizer_state: Any, meta: dict) -> None:
        """Saves a step; a damaged one of the same number is replaced.

        Returns once the arrays are copied to the host, so that they may be donated; files and manifest follow.

        Args:
          trained: canonical name -> array, layers unstacked.
          optimizer_state: any pytree of arrays.
          meta: what JSON can hold: position in the data, random state.
        Raises:
          UserError: this save, or the one before it, does not fit the disk or could not be written.
        """
        self.wait()
        directory = self._root / str(step)
        size = sum(x.nbytes for x in jax.tree.leaves((dict(trained), optimizer_state)))
        with _writing(directory):
            free = shutil.disk_usage(self._root).free
            if free < size:
                raise UserError(f"{directory} needs {_amount(size)}; its disk has {_amount(free)} free")
            self._checkpointer.save(directory, force=True, args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(nest(trained)), optimizer=ocp.args.PyTreeSave(optimizer_state), state=ocp.args.JsonSave(meta)))
        self._sealing = self._thread.submit(self._seal, directory)

    def _seal(self, directory: Path) -> None:
        with _writing(directory):
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                _write_manifest(directory)
                (self._root / SEALED).touch()

    def wait(self) -> None:
        """Returns when the last save is on disk with its manifest; raises UserError where it could not be written."""
        if self._sealing is not None:
            sealing, self._sealing = self._sealing, None
            sealing.result()

    def keep(self, n: int, also: Iterable[int] = (), newest: int | None = None) -> None:
        """Deletes all steps but the newest `n` that are sealed and those in `also`. The one being saved is left alone.

        Args:
          newest: the last step that this run has saved. Later ones, which a run leaves that went back behind damaged steps,
            neither count nor go.
        """
        ours = (step for step in steps(self._root.parent) if newest is None or step <= newest)
        sealed = sorted(step for step in ours if (self._root / str(step) / MANIFEST).is_file())
        kept = {*sealed[max(len(sealed) - n, 0):], *also}
        if jax.process_index() == 0:
            for step in set(sealed) - kept:
                (self._root / str(step) / MANIFEST).unlink()  # first, so that a half-deleted step never looks intact
                shutil.rmtree(self._root / str(step))

    def close(self) -> None:
        try:
            self.wait()
        finally:
            self._thread.shutdown()
            self._checkpointer.close()


@contextlib.contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """What the disk refuses within is one sentence; TensorStore's own is of thousands of letters."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{directory} could not be written: {error.strerror or error}") from error
    except ValueError as error:
        if isinstance(error, UserError) or (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        raise UserError(f"{directory} could not be written: {os.strerror(int(code[1]))}") from error


def _is_not_orbaxs(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of a failure in each of its threads; it is raised once, and told once."""
    return "orbax" not in Path(record.pathname).parts


def _amount(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e3:.1f} kB"


def steps(workdir: str | Path) -> list[int]:
    """The numbers of the steps that lie in a workdir, intact or not, ascending."""
    root = Path(workdir) / "checkpoints"
    return sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit()) if root.is_dir() else []


def has_sealed(workdir: str | Path) -> bool:
    """Whether any step was ever whole. A lone one without a manifest may be a first save that was killed."""
    root = Path(workdir) / "checkpoints"
    return (root / SEALED).exists() or any((root / str(step) / MANIFEST).exists() for step in steps(workdir))


def newest_intact_step(workdir: str | Path, part: str = "") -> tuple[int | None, list[str]]:
    """The newest step whose files are those of its manifest, and a sentence about each newer one that is damaged.

    Args:
      part: only this part of the steps is read and checked (`params`); "" for everything.
    """
    damaged = []
    for step in reversed(steps(workdir)):
        damage = _damage(Path(workdir) / "checkpoints" / str(step), part)
        if damage is None:
            return step, damaged
        damaged.append(damage)
    return None, damaged


def read_meta(workdir: str | Path, step: int) -> dict:
    """The `meta` of a step, as `StepWriter.save` was given it."""
    return ocp.JsonCheckpointHandler().restore(Path(workdir).absolute() / "checkpoints" / str(step) / "state", ocp.args.JsonRestore())


def restore_step(workdir: str | Path, step: int, trained_like: Mapping[str, Any], optimizer_like: Any) -> tuple[dict, Any, dict]:
    """Reads a step back.

    Args:
      trained_like: canonical name -> `jax.ShapeDtypeStruct` with the sharding that the array shall have, or such an array.
      optimizer_like: the optimizer's state, likewise.
    Returns:
      The trained tensors, the optimizer's state and `meta`, as `StepWriter.save` was given them.
    Raises:
      UserError: the step has other tensors, or other shapes.
    """
    directory = Path(workdir).absolute() / "checkpoints" / str(step)
    found = {name: Tensor(tuple(m.shape), m.dtype, None)
             for name, m in flatten(ocp.PyTreeCheckpointHandler().metadata(directory / "params").tree).items()}
    match(directory, found, {name: (name,) for name in trained_like}, {name: x.shape for name, x in trained_like.items()})
    _check_optimizer(directory, optimizer_like)
    trees = {"params": nest(trained_like), "optimizer": optimizer_like}
    arguments = {key: ocp.args.PyTreeRestore(item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree))
                 for key, tree in trees.items()}
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        restored = checkpointer.restore(directory, args=ocp.args.Composite(**arguments, state=ocp.args.JsonRestore()))
    return flatten(restored["params"]), restored["optimizer"], restored["state"]


def _check_optimizer(directory: Path, like: Any) -> None:
    """Raises UserError where the saved optimizer is not of the shapes, types and names of `like`."""
    saved = ocp.PyTreeCheckpointHandler().metadata(directory / "optimizer").tree
    found, wanted = ({jax.tree_util.keystr(path, simple=True, separator="/"): f"{np.dtype(x.dtype).name} {list(x.shape)}"
                      for path, x in jax.tree_util.tree_leaves_with_path(tree)} for tree in (saved, like))
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise UserError(f"{directory}/optimizer has {name} as {found.get(name, 'nothing')}; {wanted.get(name, 'nothing')} was expected")


def _files(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)


def _hashes(directory: Path, files: list[str]) -> dict[str, str]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:  # hashing lets go of the interpreter lock
        return dict(zip(files, threads.map(lambda file: sha256_of(directory / file), files)))


def _write_manifest(directory: Path) -> None:
    temporary = directory / f".{MANIFEST}"
    write_json(temporary, _hashes(directory, _files(directory)))
    temporary.replace(directory / MANIFEST)


def _damage(directory: Path, part: str = "") -> str | None:
    """What is wrong with a step, in a sentence; None when it is intact."""
    if not (directory / MANIFEST).is_file():
        return f"{directory} has no {MANIFEST}: its saving was interrupted"
    try:
        manifest = read_json(directory / MANIFEST)
    except UserError as error:
        return str(error)
    for needed in (part,) if part else ("params", "optimizer", "state"):
        if not any(file.startswith(f"{needed}/") for file in manifest):
            return f"{directory} is damaged: its {MANIFEST} names no file of {needed}/"
    wanted = {file: sha for file, sha in manifest.items() if file.startswith(f"{part}/" if part else "")}
    absent = [file for file in wanted if not (directory / file).is_file()]
    if absent:
        return f"{directory} lacks {absent[0]}, which its {MANIFEST} names"
    found = _hashes(directory, list(wanted))
    changed = [file for file in wanted if found[file] != wanted[file]]
    return f"{directory} is damaged: {changed[0]} has another sha256 than its {MANIFEST} says" if changed else None
