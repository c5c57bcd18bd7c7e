"""Temporary directories that other processes take for leftovers, or delete at the same moment."""

import os
import shutil

import pytest

from llavamed_jax.utils import directories
from llavamed_jax.utils.directories import delete_leftovers, make_partial, new_directory


@pytest.mark.parametrize("answer", [True, False])
def test_a_directory_that_another_process_deletes_before_it_is_locked(answer, tmp_path, monkeypatch):
    """Then this process makes another one; `answer` is whether the other process had ended by the time of the lock."""
    lock, deleted = directories.locks.lock, []

    def late(descriptor, *_):
        if deleted:
            return lock(descriptor)
        deleted.extend(tmp_path.glob(".out.*"))
        shutil.rmtree(deleted[0])
        return answer

    monkeypatch.setattr(directories.locks, "lock", late)
    with new_directory(tmp_path / "out") as made:
        assert deleted and made != deleted[0] and made.is_dir()
    assert os.listdir(tmp_path) == ["out"]


def test_a_directory_that_another_process_deletes_before_it_is_opened(tmp_path, monkeypatch):
    opened, found = os.open, []

    def late(path, *more, **named):
        if not found and str(path).endswith(".partial"):
            found.append(path)
            shutil.rmtree(path)
        return opened(path, *more, **named)

    with monkeypatch.context() as patch:
        patch.setattr(directories.os, "open", late)
        made, descriptor = make_partial(tmp_path, "x.")
        assert found and made != found[0] and made.is_dir()
    os.close(descriptor)
    found.clear()
    with monkeypatch.context() as patch:
        patch.setattr(directories.os, "open", late)
        delete_leftovers(tmp_path)
    assert found == [made] and os.listdir(tmp_path) == []


def test_leftovers(tmp_path):
    """Only directories that nobody has locked go, and one that cannot be deleted is left to the next process."""
    held, descriptor = make_partial(tmp_path, "a.")
    for name in ("a.left.partial", "b.left.partial", "a.other"):
        (tmp_path / name).mkdir()
    (tmp_path / "a.file.partial").write_text("x")
    (tmp_path / "a.link.partial").symlink_to("nowhere")
    delete_leftovers(tmp_path, "a.", lambda path: (_ for _ in ()).throw(PermissionError(13, "no")))
    assert (tmp_path / "a.left.partial").is_dir()
    delete_leftovers(tmp_path, "a.")
    assert sorted(os.listdir(tmp_path)) == sorted([held.name, "b.left.partial", "a.other", "a.file.partial", "a.link.partial"])
    os.close(descriptor)
    delete_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["a.file.partial", "a.link.partial", "a.other"]
