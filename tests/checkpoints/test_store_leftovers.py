"""What interrupted saves and deletions leave beside the steps of a run: it goes, and nothing else does."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import optax
import pytest

from llavamed_jax.checkpoints.tree import bucket_copy, store
from llavamed_jax.errors import UserError
from llavamed_jax.training import bucket_files

TRAINED = {"decoder/norm/scale": jnp.arange(8.0)}


@pytest.fixture
def workdir(tmp_path):
    return tmp_path / "run"


def write(writer, step):
    writer.save(step, TRAINED, optax.adam(1e-3).init(TRAINED), {"position": step})


def save(workdir, steps):
    with store.StepWriter(workdir) as writer:
        for step in steps:
            write(writer, step)


def test_other_names_are_no_steps(workdir):
    """`int` takes more than a step's own name, and `str.isdigit` more than `int`."""
    names = ["8", "08", "²", "٣", "8.bak", "-8", "+8", "8 "]
    for name in names:
        (workdir / "checkpoints" / name / "params").mkdir(parents=True)
    manifests = {f"checkpoints/{name}/manifest.json": None for name in names}
    assert store.steps(workdir) == bucket_copy.sealed(manifests) == [8]
    assert [name for name in manifests if bucket_files.is_manifest(name)] == ["checkpoints/8/manifest.json"]


def test_a_step_that_cannot_be_looked_at_is_not_passed_over(workdir, monkeypatch):
    """Of another user, or on a disk that fails: it is listed, never deleted for want of a manifest, and no run begins anew over it."""
    save(workdir, [1, 2])
    (workdir / "checkpoints" / ".sealed").unlink()
    stat, hidden = os.stat, workdir / "checkpoints" / "1"

    def refuse(path, *args, **kwargs):
        if Path(path).is_relative_to(hidden):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *args, **kwargs)
    with store.StepWriter(workdir) as writer:
        monkeypatch.setattr(os, "stat", refuse)
        assert store.steps(workdir) == [1, 2] and store.has_sealed(workdir)
        writer.keep(1)
        (workdir / "checkpoints" / "2" / "manifest.json").unlink()
        assert store.has_sealed(workdir)
        monkeypatch.undo()
    assert store.steps(workdir) == [1, 2] and (hidden / "manifest.json").exists()


def test_names_beside_a_step_are_not_taken_for_its_save(workdir, monkeypatch):
    """`1.bak` of a user: in whatever order the file system lists the directory."""
    glob = Path.glob
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter(sorted(glob(self, pattern))))
    for name in ("1.bak", "1.a", "1.z"):
        (workdir / "checkpoints" / name).mkdir(parents=True)
    save(workdir, [1])
    assert store.newest_intact_step(workdir) == (1, [])


@pytest.mark.parametrize("make", [
    lambda path, other: path.write_text("x"),
    lambda path, other: path.symlink_to(other),
    lambda path, other: path.symlink_to(other / "nowhere"),
    lambda path, other: (path / "params").mkdir(parents=True),
], ids=["file", "link", "dangling link", "directory"])
def test_whatever_has_the_name_of_an_interrupted_save_is_no_hindrance(make, workdir, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("x")
    (workdir / "checkpoints").mkdir(parents=True)
    make(leftover := workdir / "checkpoints" / "1.orbax-checkpoint-tmp", other)
    save(workdir, [1])
    assert not os.path.lexists(leftover) and (other / "mine").exists() and store.newest_intact_step(workdir) == (1, [])


def test_a_leftover_that_cannot_be_deleted_is_said(workdir, monkeypatch, capsys):
    (workdir / "checkpoints" / "9.orbax-checkpoint-tmp").mkdir(parents=True)

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied", str(path))
    monkeypatch.setattr(store.shutil, "rmtree", refuse)
    save(workdir, [1])
    assert f"warning: {workdir}/checkpoints/9.orbax-checkpoint-tmp, which a killed save left, cannot be deleted: Permission denied\n" in capsys.readouterr().err
    assert store.newest_intact_step(workdir) == (1, [])


def test_what_fails_after_a_step_is_whole_leaves_the_step(workdir):
    def fail(step):
        raise OSError("the disk is full")
    writer = store.StepWriter(workdir, on_saved=fail)
    write(writer, 1)
    with pytest.raises(UserError, match="the disk is full"):
        writer.close()
    assert store.newest_intact_step(workdir) == (1, [])


def test_a_killed_save_makes_room_for_the_same_step(workdir, monkeypatch):
    """Without its manifest the step is worth nothing, and it may be what fills the disk."""
    save(workdir, [1, 2])
    (left := workdir / "checkpoints" / "2" / "manifest.json").unlink()
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: SimpleNamespace(free=0 if left.parent.exists() else 1 << 30))
    save(workdir, [2])
    assert store.newest_intact_step(workdir) == (2, [])


def test_what_a_killed_process_had_half_deleted_goes_with_the_next_step(workdir):
    """Of steps without a manifest only those before all that are kept: a later one may be under way, or is replaced when it is saved."""
    save(workdir, [1, 2, 4, 5, 6, 9])
    for step in (1, 2, 5, 9):
        (workdir / "checkpoints" / str(step) / "manifest.json").unlink()
    with store.StepWriter(workdir) as writer:
        writer.keep(2, also=[2], newest=6)
        assert store.steps(workdir) == [2, 4, 5, 6, 9]
        writer.keep(1, newest=6)
        assert store.steps(workdir) == [6, 9]


def test_a_step_that_is_being_written_stays_whatever_its_number(workdir, monkeypatch):
    save(workdir, [8])
    is_renamed, may_end = threading.Event(), threading.Event()
    seal = store._write_manifest
    monkeypatch.setattr(store, "_write_manifest", lambda directory: (is_renamed.set(), may_end.wait(20), seal(directory)))
    with store.StepWriter(workdir) as writer:
        write(writer, 3)
        assert is_renamed.wait(20)
        writer.keep(1)
        may_end.set()
    assert store.steps(workdir) == [3, 8] and (workdir / "checkpoints" / "3" / "manifest.json").exists()
