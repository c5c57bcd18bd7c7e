"""A workdir that somebody removes, moves or replaces under its run: nothing is called saved that is not, and nobody else's is touched."""

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import jax
import pytest

from llavamed_jax.checkpoints.tree import store
from llavamed_jax.checkpoints.tree.store import newest_intact_step, steps
from llavamed_jax.errors import UserError
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import place as places
from llavamed_jax.training import program, trainer
from llavamed_jax.training.place import Lost
from llavamed_jax.training.saver import Saver
from llavamed_jax.training.trainer import fit
from tests.support import training_runs as runs
from tests.support import xla
from tests.support.training_runs import ROOT, FakeStep

pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")


@pytest.fixture
def at_update(monkeypatch):
    """`at_update(number, act)`: something is done when an update is dispatched; saves are at 3 and 6, and at the last, 8.

    Args:
      after: the step whose save is waited for, until the run itself knows that it is done.
    """
    noted, note = [], places.Place.note
    monkeypatch.setattr(places.Place, "note", lambda self, step: (note(self, step), noted.append(step)))

    def use(number, *acts, after=None):
        step = FakeStep()
        update = step.update

        def acting(state, batch):
            found = update(state, batch)
            if step.step == number:
                deadline = time.monotonic() + 60
                while after is not None and after not in noted:
                    assert time.monotonic() < deadline, "the save does not come"
                    time.sleep(0.01)
                for act in acts:
                    act()
            return found
        step.update = acting
        monkeypatch.setattr(trainer, "make_train_step", step)
    return use


@pytest.fixture(scope="module")
def other(recipe, tmp_path_factory):
    """Another run's workdir, of the same recipe and the same model."""
    folder = tmp_path_factory.mktemp("other")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_mesh", lambda spec, *_: make_mesh(spec, jax.devices()[:1]))
        patch.setattr(trainer, "make_train_step", FakeStep())
        assert fit(recipe(total_steps=2), folder / "run")
    return folder / "run"


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


GONE = "was removed or moved during the run, together with the saved steps .{}.; restore it, or name another workdir"


def last_save(number):
    """The step of the last save before an update."""
    return (number - 1) // 3 * 3 or None


@pytest.mark.parametrize("number, log_every, saved", [
    (2, 1, "no step yet"), (2, 100, "no step yet"),  # before the first save; what is logged meets it first, or the save itself
    (5, 1, "the last step was 3"), (7, 100, "the last step was 6"),
])
def test_a_workdir_that_is_gone_ends_the_run(recipe, at_update, tmp_path, capsys, number, log_every, saved):
    work, how = tmp_path / "run", "moved" if number == 5 else "removed"
    at_update(number, lambda: shutil.rmtree(work) if how == "removed" else work.rename(tmp_path / "elsewhere"), after=last_save(number))
    with pytest.raises(Lost, match=f"^the workdir {work} {GONE.format(saved)}"):
        fit(recipe(log_every=log_every), work)
    assert not work.exists() and "stopped and saved" not in capsys.readouterr().out
    if how == "moved":
        assert str(newest_intact_step(tmp_path / "elsewhere")[0]) == {"no step yet": "None"}.get(saved, saved[-1])


@pytest.mark.parametrize("how", ["removed", "moved", "only its checkpoints"])
def test_a_workdir_that_goes_while_a_step_is_written(recipe, at_update, tmp_path, capfd, how):
    """As soon as the save is under way, in whatever it does: the sentence is one, and TensorStore says nothing of its own."""
    work = tmp_path / "run"
    acts = {"removed": lambda: shutil.rmtree(work, ignore_errors=True), "moved": lambda: work.rename(tmp_path / "elsewhere"),
            "only its checkpoints": lambda: shutil.rmtree(work / "checkpoints", ignore_errors=True)}
    at_update(4, acts[how])
    if how == "only its checkpoints":
        assert fit(recipe(total_steps=6), work) and newest_intact_step(work) == (6, [])
    else:
        with pytest.raises(Lost, match=f"^the workdir {work} was (removed or moved|replaced by another directory) during"):
            fit(recipe(), work)
    said = capfd.readouterr()
    assert "Traceback" not in said.err and "stopped and saved" not in said.out


@pytest.mark.parametrize("number", [4, 6])
def test_a_workdir_that_is_gone_at_the_last_save_of_a_signal(recipe, at_update, tmp_path, capsys, number):
    """At 6 the step is saved by count, and then again nothing is left to save."""
    work = tmp_path / "run"
    at_update(number, lambda: shutil.rmtree(work), terminate, after=last_save(number))
    with pytest.raises(Lost, match="was removed or moved during the run, together with the saved steps"):
        fit(recipe(log_every=100), work)
    assert "stopped and saved" not in capsys.readouterr().out and not work.exists()


@pytest.mark.parametrize("moment", ["sealed", "written"])
def test_a_workdir_that_goes_after_its_last_save_is_not_called_saved(recipe, tmp_path, monkeypatch, capsys, moment):
    """The step was there and is not when the run says what it has done; and while it is written."""
    work = tmp_path / "run"
    if moment == "sealed":
        note = places.Place.note
        monkeypatch.setattr(places.Place, "note", lambda self, step: (note(self, step), step == 4 and shutil.rmtree(work)))
    else:
        write = store._write_manifest
        monkeypatch.setattr(store, "_write_manifest", lambda directory: (directory.name == "4" and shutil.rmtree(work), write(directory)))
    last = "4" if moment == "sealed" else "3"
    with pytest.raises(Lost, match=f"was removed or moved during the run, together with the saved steps .the last step was {last}"):
        fit(recipe(total_steps=4), work)
    assert "finished at" not in capsys.readouterr().out


def test_what_replaces_a_workdir_is_not_written_to(recipe, other, at_update, tmp_path, capsys):
    """Another run's workdir: of the same recipe, init, base and model, so that its name alone tells them apart."""
    work = tmp_path / "run"

    def replace():
        shutil.rmtree(work)
        shutil.copytree(other, work)
    at_update(4, replace, after=last_save(4))
    with pytest.raises(Lost, match=f"^the workdir {work} was replaced by the workdir of another run, .* .the last step was 3.; nothing more is saved$"):
        fit(recipe(), work)
    assert contents(work) == contents(other) and "saved at" not in capsys.readouterr().out


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_directory_of_nobody_is_not_written_to(recipe, at_update, tmp_path, is_empty):
    work = tmp_path / "run"

    def replace():
        shutil.rmtree(work)
        work.mkdir()
        if not is_empty:
            (work / "notes.txt").write_text("mine")
    at_update(4, replace, after=last_save(4))
    with pytest.raises(Lost, match=f"^the workdir {work} was replaced by another directory during the run, .*recipe.json is missing"):
        fit(recipe(), work)
    assert [path.name for path in work.iterdir()] == [[], ["notes.txt"]][not is_empty]


@pytest.mark.parametrize("part, how", [
    ("base/manifest.json", "changed"), ("model/config.json", "removed"), ("model/tokenizer.model", "changed")])
def test_another_model_in_the_workdir_ends_the_run(recipe, at_update, tmp_path, part, how):
    work = tmp_path / "run"
    file = work / part
    at_update(4, lambda: file.unlink() if how == "removed" else file.write_bytes(file.read_bytes() + b"\n"), after=last_save(4))
    with pytest.raises(Lost, match=f"^{file} (has been removed|has changed) since .*; nothing more is saved .the last step was 3.$"):
        fit(recipe(), work)
    assert steps(work) == [3]


@pytest.mark.parametrize("number, kept", [(2, [3, 6, 8]), (7, [8])])
def test_steps_that_are_removed_are_said_and_saving_goes_on(recipe, at_update, tmp_path, capsys, number, kept):
    work = tmp_path / "run"
    at_update(number, lambda: shutil.rmtree(work / "checkpoints"), after=last_save(number))
    assert fit(recipe(), work)
    assert steps(work) == kept and newest_intact_step(work) == (8, [])
    lost = {2: [], 7: [6]}[number]
    said = capsys.readouterr().out
    for step in lost:
        assert f"warning: {work}/checkpoints/{step} was removed after it was saved and is lost; the remaining steps: none" in said
    assert said.count("was removed") == len(lost)


@pytest.mark.parametrize("moment", ["sealed", "written"])
def test_a_last_step_that_is_removed_is_saved_again(recipe, tmp_path, monkeypatch, capsys, moment):
    """`checkpoints/` alone: what the run would call saved is still in its memory."""
    work, done = tmp_path / "run", []

    def remove(step):
        if step == 2 and not done:
            done.append(1)
            shutil.rmtree(work / "checkpoints")
    if moment == "sealed":
        note = places.Place.note
        monkeypatch.setattr(places.Place, "note", lambda self, step: (note(self, step), remove(step)))
    else:
        write = store._write_manifest
        monkeypatch.setattr(store, "_write_manifest", lambda directory: (remove(int(directory.name)), write(directory)))
    assert fit(recipe(total_steps=2), work)
    assert done and newest_intact_step(work) == (2, [])
    said = capsys.readouterr().out
    assert "2 was removed " + ("after" if moment == "sealed" else "while") in said and said.count("was removed") == 1


def test_a_last_step_that_is_removed_again_and_again_is_not_called_saved(recipe, tmp_path, monkeypatch, capsys):
    work, note = tmp_path / "run", places.Place.note
    monkeypatch.setattr(places.Place, "note", lambda self, step: (note(self, step), step == 2 and shutil.rmtree(work / "checkpoints")))
    with pytest.raises(ValueError, match="^step 2 was saved twice, and both times removed from .*; no step had been saved$"):
        fit(recipe(total_steps=2), work)
    assert "finished at" not in capsys.readouterr().out


def test_a_step_of_which_files_are_removed_while_it_is_written_is_not_sealed(recipe, tmp_path, monkeypatch, capsys):
    """TensorStore makes directories anew that are removed under it, and what comes after that is no whole step."""
    work, wait, done = tmp_path / "run", store.ocp.AsyncCheckpointer.wait_until_finished, []

    def waiting(self):
        wait(self)
        if (work / "checkpoints" / "3").exists() and not done:
            done.append(1)
            shutil.rmtree(work / "checkpoints" / "3" / "params")
    monkeypatch.setattr(store.ocp.AsyncCheckpointer, "wait_until_finished", waiting)
    assert fit(recipe(total_steps=4), work)
    assert done and f"warning: {work}/checkpoints/3 was removed while it was written" in capsys.readouterr().out
    assert newest_intact_step(work)[0] == 4 and not (work / "checkpoints" / "3" / "manifest.json").exists()


def test_one_step_that_is_removed_is_said(recipe, at_update, tmp_path, capsys):
    work = tmp_path / "run"
    at_update(7, lambda: shutil.rmtree(work / "checkpoints" / "6"), after=last_save(7))
    assert fit(recipe(total_steps=7), work)
    assert f"{work}/checkpoints/6 was removed after it was saved and is lost; the remaining steps: 3\n" in capsys.readouterr().out
    assert steps(work) == [3, 7]


@pytest.mark.parametrize("name", ["recipe.json", ".lock"])
def test_a_file_of_the_run_that_is_removed_is_made_anew(recipe, at_update, tmp_path, capsys, name):
    work = tmp_path / "run"
    at_update(2, lambda: (work / name).unlink())
    assert fit(recipe(total_steps=4), work)
    said = capsys.readouterr().out
    assert (f"warning: {work / 'recipe.json'} was removed or damaged" in said) == (name == "recipe.json")
    assert fit(recipe(total_steps=5), work), "it goes on as if nothing had been"
    assert (work / ".lock").read_text() == str(os.getpid())


def test_a_workdir_that_another_run_has_taken_is_left_to_it(recipe, at_update, tmp_path):
    """Somebody deletes the lock and starts the same run again: two would save into one directory."""
    work, opened = tmp_path / "run", []

    def take():
        (work / ".lock").unlink()
        opened.append(places.Place(work))
        opened[0].lock()
        opened[0].sign()
    at_update(4, take, after=last_save(4))
    with pytest.raises(Lost, match=f"^the workdir {work} is in use by another run .process {os.getpid()}.; nothing more is saved"):
        fit(recipe(), work)
    opened[0].release()
    assert steps(work) == [3]


def test_a_file_system_without_locks_is_said_and_the_run_goes_on(recipe, tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert fit(recipe(total_steps=1), tmp_path / "run")
    said = capsys.readouterr().err
    assert said.count(f"warning: {tmp_path / 'run'} cannot be locked (No locks available), so a second run") == 1


def test_logs_that_are_removed_begin_anew(recipe, at_update, tmp_path, capsys):
    work = tmp_path / "run"
    at_update(5, (work / "metrics.jsonl").unlink, lambda: shutil.rmtree(work / "tensorboard"))
    assert fit(recipe(total_steps=6), work)
    first = json.loads((work / "metrics.jsonl").read_text().splitlines()[0])["step"]
    assert [line["step"] for line in runs.log_lines(work)] == list(range(first, 7)) and first > 2
    said = capsys.readouterr().out
    assert f"warning: {work}/metrics.jsonl was removed; a new file begins at step {first}, and the earlier lines are lost" in said
    assert f"was removed; a new file begins at step {first}, and the earlier values are lost" in said
    (events,) = (work / "tensorboard").iterdir()
    assert events.stat().st_size > 500


def test_steps_that_are_read_at_the_end_are_named(recipe, at_update, tmp_path, capsys):
    from llavamed_jax.checkpoints.open import open_checkpoint
    work, readers = tmp_path / "run", []
    at_update(5, lambda: readers.append(open_checkpoint(work)), after=last_save(5))
    assert fit(recipe(total_steps=6, **{"checkpoint.keep": 1}), work)
    assert readers[0].step == 3 and steps(work) == [3, 6]
    assert "other programs are reading the steps 3, so these steps are kept; delete them later\n" in capsys.readouterr().out
    assert len([readers[0].read(name) for name in readers[0].tensors]) > 10


def test_a_command_whose_workdir_is_gone_exits_1(recipe, tmp_path):
    """SIGTERM after `rm -rf`: one sentence, and not 75."""
    work, cfg = tmp_path / "run", recipe()
    words = [sys.executable, "train.py", "--config", "configs/demo.py:vqa", "--workdir", str(work), f"--config.init={cfg.init}",
             f"--config.data.train={cfg.data.train}", f"--config.data.images={cfg.data.images}", "--config.total_steps=100000",
             "--config.batch_size=4", "--config.max_length=40", "--config.log_every=100000", "--config.checkpoint.every_steps=0"]
    run = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla.flags()})
    while not all((work / name).exists() for name in ("tensorboard", "checkpoints", "metrics.jsonl")):
        assert run.poll() is None
    shutil.rmtree(work)
    run.terminate()
    said, wrong = run.communicate(timeout=120)
    assert run.returncode == 1 and "saved at step" not in said and not work.exists()
    assert wrong.splitlines()[-1].startswith(f"error: the workdir {work} was removed or moved during the run, together with the saved steps"), wrong


@pytest.mark.parametrize("error, reason", [(TypeError("a fault of ours"), "TypeError: a fault of ours"),
                                           (OSError(errno.ENOSPC, "No space left on device"), "No space left on device")])
def test_saves_that_come_to_nothing_twice_in_a_row_end_the_run(recipe, tmp_path, monkeypatch, capsys, error, reason):
    """One is a warning and the next save makes up for it; a fault that stays must not cost the whole run."""
    work, tries = tmp_path / "run", []

    def fail(directory):
        tries.append(directory.name)
        raise error
    monkeypatch.setattr(store, "_write_manifest", fail)
    with pytest.raises(ValueError, match=f"^{work}/checkpoints/6 could not be written: {reason}; no step had been saved$"):
        fit(recipe(total_steps=20), work)
    said = capsys.readouterr().out
    assert said.count("warning: ") == 2 and f"warning: {work}/checkpoints/3 could not be written: {reason}; the rem" in said
    assert tries == ["3", "6"]


@pytest.mark.parametrize("step", [3, 4])
def test_a_disk_that_is_full_for_a_while_costs_one_save(recipe, tmp_path, monkeypatch, capsys, step):
    """The next save makes up for it, and after the last step the same one."""
    work, write, tries = tmp_path / "run", store._write_manifest, []

    def full_once(directory):
        tries.append(int(directory.name))
        if tries.count(step) == 1 == len([number for number in tries if number >= step]):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(directory)
    monkeypatch.setattr(store, "_write_manifest", full_once)
    assert fit(recipe(total_steps=4), work) and newest_intact_step(work)[0] == 4
    assert tries == ([3, 4] if step == 3 else [3, 4, 4])
    said = capsys.readouterr().out
    assert said.count("could not be written") == 1 and f"warning: {work}/checkpoints/{step} could not be written: No space" in said


def test_a_save_that_fails_while_the_run_ends_does_not_hide_why(recipe, tmp_path, monkeypatch):
    def full(directory):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(store, "_write_manifest", full)
    monkeypatch.setattr(trainer, "make_train_step", FakeStep(lambda step: step > 3))
    with pytest.raises(UserError, match="^2 updates in a row, up to step 5, .* not finite"):
        fit(recipe(nan_limit=2), tmp_path / "run")


def test_of_several_processes_a_failed_save_ends_all(recipe, monkeypatch):
    """They save together, and the others may not know of it."""
    class Full:
        def wait(self):
            raise UserError("the disk is full")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(UserError, match="^the disk is full$"):
        Saver(Full(), None, None, None, None, 3).save(None, {"step": 6})
