"""Steps that are read while their run deletes old ones: what is held stays; where nothing can be held, one sentence says what to do."""

import errno
import fcntl
import os
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llavamed_jax.checkpoints import identity
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree import holding, model, step_manifest, store
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError

CFG = LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), DecoderConfig(64, 16, 24, 1, 2, 1, 8, 1e-5, 1e4, 128, architecture="mistral"))
SOURCE = random_checkpoint(CFG, seed=1)
TRAINED = [name for name in SOURCE.tensors if name.startswith("projector/linear_1/")]  # few arrays: saving them takes less time


def save_with(writer, step):
    """Saves a step, all that it waits for included."""
    writer.save(step, trained(step), optax.adam(1e-3).init(trained(step)), {"step": step})
    writer.wait()


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The workdir of a run that has saved step 1."""
    write_model(path := tmp_path_factory.mktemp("begun") / "run", SOURCE, without=TRAINED)
    with store.StepWriter(path) as writer:
        save_with(writer, 1)
    return path


@pytest.fixture
def workdir(begun, tmp_path):
    return shutil.copytree(begun, tmp_path / "run")


def trained(step):
    return {name: jnp.asarray(SOURCE.read(name)) + step for name in TRAINED}


@pytest.fixture
def save(workdir):
    """Saves a step after the first."""
    with store.StepWriter(workdir) as writer:
        def save(step, keep=1):
            save_with(writer, step)
            return writer.keep(keep)
        yield save


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)


def assert_is(checkpoint, step):
    for name in TRAINED:
        np.testing.assert_array_equal(checkpoint.read(name), np.asarray(trained(step)[name]), err_msg=name)


@pytest.mark.parametrize("path", ["", "checkpoints/1"])
def test_a_step_that_is_read_is_deleted_later(workdir, save, path):
    checkpoint = open_checkpoint(workdir / path)
    assert save(2) == [1] and store.steps(workdir) == [1, 2]
    assert_is(checkpoint, 1)
    del checkpoint
    assert save(3) == [] and store.steps(workdir) == [3]


def test_a_copy_of_the_checkpoint_holds_the_step_too(workdir, save):
    checkpoint = open_checkpoint(workdir).cast(np.float32).sound()
    assert save(2) == [1]
    load_params(checkpoint)
    del checkpoint
    assert save(3) == []


def test_two_readers_hold_a_step_until_the_last_is_done(workdir, save):
    one, other = open_checkpoint(workdir), open_checkpoint(workdir)
    del one
    assert save(2) == [1]
    assert_is(other, 1)


def test_reading_never_fails_beside_a_run_that_keeps_one_step(workdir, save):
    """The thread saves as fast as it can: of readers that hold nothing about every second one failed."""
    last, is_done, read = [1], threading.Event(), 0

    def train():
        while not is_done.is_set():
            last[0] += 1
            save(last[0])
    thread = threading.Thread(target=train)
    thread.start()
    try:
        while last[0] < 6 and thread.is_alive():
            checkpoint = open_checkpoint(workdir)
            assert_is(checkpoint, checkpoint.step)
            read += 1
    finally:
        is_done.set()
        thread.join()
    assert last[0] >= 6 and read > 1


def test_without_locks_a_step_that_goes_is_one_sentence(workdir, save, no_locks, capfd):
    checkpoint = open_checkpoint(workdir)
    assert save(2) == [] and store.steps(workdir) == [2]
    with pytest.raises(holding.StepGone, match=f"^{workdir}/checkpoints/1 was deleted while it was read, because a run that is still training "
                       r"deletes its older steps .checkpoint.keep.; read again to get the newest step$") as raised:
        load_params(checkpoint)
    assert raised.value.__cause__ is None and raised.value.__suppress_context__, "no traceback of TensorStore beneath it"
    assert "Traceback" not in "".join(capfd.readouterr())
    assert_is(open_checkpoint(workdir), 2)


@pytest.mark.parametrize("moment", ["before it is hashed", "while it is hashed", "before its tensors are listed"])
def test_without_locks_the_newest_step_is_opened_instead_of_one_that_goes(workdir, save, no_locks, monkeypatch, moment, recwarn):
    done = []

    def instead(what):
        """The step goes, and its successor comes, before a function is called for the first time."""
        def call(*args):
            if not done:
                done.append(1)
                save(2)
            return what(*args)
        return call

    if moment == "before its tensors are listed":
        monkeypatch.setattr(model, "_step_tensors", instead(model._step_tensors))
    elif moment == "while it is hashed":
        monkeypatch.setattr(step_manifest, "_hashes", instead(step_manifest._hashes))
    else:
        monkeypatch.setattr(store, "_damage", instead(store._damage))
    checkpoint = open_checkpoint(workdir)
    assert checkpoint.step == 2 and not [each for each in recwarn.list if "checkpoints/" in str(each.message)]
    assert_is(checkpoint, 2)


def test_a_step_that_is_being_deleted_is_not_opened(workdir, save):
    save(2, keep=2)
    directory = workdir / "checkpoints" / "1"
    with open(directory / "manifest.json", "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert holding.hold(directory) is None
    assert holding.hold(directory) is not None


@pytest.mark.parametrize("call, code, left", [("open", errno.EROFS, True), ("unlink", errno.EPERM, True),
                                              ("rmtree", errno.ENOTEMPTY, False)])
def test_an_old_step_that_cannot_be_deleted_is_said_once_and_saving_goes_on(workdir, save, monkeypatch, capsys, call, code, left):
    """Write-protected by the user, or busy on NFS. What is half deleted is deleted once that works."""
    directory = workdir / "checkpoints" / "1"
    place, path = {"open": (os, directory / "manifest.json"), "unlink": (Path, directory / "manifest.json"), "rmtree": (shutil, directory)}[call]
    original = getattr(place, call)

    def refuse(name, *args, **kwargs):
        if name == path and (call != "open" or args[0] & os.O_RDWR):
            raise OSError(code, os.strerror(code), str(name))
        return original(name, *args, **kwargs)
    monkeypatch.setattr(place, call, refuse)
    assert save(2) == [] and save(3) == [] and store.steps(workdir) == [1, 3]
    assert (directory / "manifest.json").exists() == left
    assert capsys.readouterr().err.count(f"warning: {directory} cannot be deleted and stays: {os.strerror(code)}\n") == 1
    monkeypatch.undo()
    assert save(4) == [] and store.steps(workdir) == [4]


@pytest.mark.parametrize("has_manifest", [True, False])
def test_of_a_step_that_is_a_link_the_link_is_deleted(workdir, save, tmp_path, capsys, has_manifest):
    """A user has moved it to another disk: that copy is not the run's."""
    directory = workdir / "checkpoints" / "1"
    directory.rename(away := tmp_path / "away")
    directory.symlink_to(away)
    if not has_manifest:
        (away / "manifest.json").unlink()
    before = sorted(away.rglob("*"))
    assert save(2) == [] and store.steps(workdir) == [2] and sorted(away.rglob("*")) == before
    assert f"warning: {directory} was a link, and only the link is deleted: {away} stays\n" in capsys.readouterr().err


def test_a_linked_step_that_is_read_stays(workdir, save, tmp_path):
    directory = workdir / "checkpoints" / "1"
    directory.rename(tmp_path / "away")
    directory.symlink_to(tmp_path / "away")
    checkpoint = open_checkpoint(workdir)
    assert save(2) == [1] and directory.is_symlink()
    assert_is(checkpoint, 1)


@pytest.mark.parametrize("part, read", [
    ("params", lambda workdir: load_params(open_checkpoint(workdir))),
    ("state", lambda workdir: store.read_meta(workdir, 1)),
    ("optimizer", lambda workdir: store.restore_step(workdir, 1, trained(1), optax.adam(1e-3).init(trained(1)))),
])
def test_what_cannot_be_read_after_it_was_checked_is_one_sentence(workdir, monkeypatch, part, read, capfd):
    """Every file of a part in turn is cut after its hash was looked at: a disk that fails."""
    monkeypatch.setattr(store, "_damage", lambda *_: None)
    files = [path for path in (workdir / "checkpoints" / "1" / part).rglob("*") if path.is_file() and path.stat().st_size]
    refused = 0
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content[:len(content) // 2])
        try:
            read(workdir)
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"{workdir}/checkpoints/1") and len(str(error)) < 500 and "\n" not in str(error), str(error)
            assert error.__cause__ is None and error.__suppress_context__
        file.write_bytes(content)
    assert refused
    assert "Traceback" not in "".join(capfd.readouterr())


def test_the_hash_of_a_step_is_known_when_it_is_gone(workdir, save):
    """An evaluation writes the hashes of its checkpoint at its end, when a run may have deleted the step long since."""
    checkpoint = open_checkpoint(workdir)
    origin = identity.origin(workdir, checkpoint)
    wanted = origin.hashes()
    del checkpoint
    save(2)
    assert store.steps(workdir) == [2] and origin.hashes() == wanted and "checkpoints/1/manifest.json" in wanted
