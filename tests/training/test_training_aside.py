"""What fails beside the updates ends a run, but not before its state is saved, and the first reason is what the user reads."""

import errno
from types import SimpleNamespace

import jax
import pytest

from llavamed_jax.checkpoints.tree import store
from llavamed_jax.checkpoints.tree.store import newest_intact_step
from llavamed_jax.errors import UserError
from llavamed_jax.training import metrics_reader, trainer
from llavamed_jax.training.callbacks import Callbacks
from llavamed_jax.training.log import Board, MetricsWriter
from llavamed_jax.training.trainer import Run, fit
from tests.support.training_runs import FakeStep, log_lines

pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")
FULL = OSError(errno.ENOSPC, "No space left on device")


def failing(error, at, then=lambda *_: {}):
    """A callback that fails at one step."""
    def call(snapshot):
        if snapshot.step == at:
            raise error
        return then()
    return call


GONE = UserError("the questions are gone")


@pytest.mark.parametrize("what, step, error, sentence", [
    ("samples", 5, GONE, "^the questions are gone; step 5 is saved$"),
    ("validation", 3, GONE, "^the questions are gone; step 3 is saved$"),
    ("validation", 6, FileNotFoundError(errno.ENOENT, "No such file", "/data/q.json"),
     "^/data/q.json cannot be read or written: No such file; step 6 is saved$"),
])
def test_an_evaluation_that_fails_costs_no_update(recipe, tmp_path, what, step, error, sentence):
    work, cfg = tmp_path / "run", recipe(total_steps=6, samples_every=5 if step == 5 else 4)
    call = failing(error, step, list if what == "samples" else dict)
    callbacks = Callbacks(sampler=call) if what == "samples" else Callbacks([call])
    with pytest.raises(UserError, match=sentence):
        fit(cfg, work, callbacks)
    assert newest_intact_step(work) == (step, [])
    assert fit(cfg, work) is True
    assert [line["step"] for line in log_lines(work) if "loss" in line] == list(range(1, 7))


@pytest.mark.parametrize("owner, name, file", [(Board, "add", "tensorboard"), (MetricsWriter, "_find_again", "metrics.jsonl")])
def test_a_log_that_cannot_be_written_is_named_and_costs_no_update(recipe, tmp_path, monkeypatch, owner, name, file):
    """From step 4 on, whatever is tried again."""
    work, real = tmp_path / "run", getattr(owner, name)

    def full(self, step, *content):
        if step >= 4:
            raise FULL
        return real(self, step, *content)
    monkeypatch.setattr(owner, name, full)
    with pytest.raises(UserError, match=f"^{work}/{file} cannot be written: No space left on device; step [456] is saved$"):
        fit(recipe(**{"checkpoint.every_steps": 0}), work)
    monkeypatch.undo()
    assert newest_intact_step(work)[0] >= 4
    saved = store.read_meta(work, newest_intact_step(work)[0])
    assert saved["progress"]["samples"] == 4 * saved["step"], "each update is counted once"


def test_a_log_that_cannot_be_closed_is_named(recipe, tmp_path, monkeypatch):
    def close(self):
        raise FULL
    monkeypatch.setattr(Board, "close", close)
    with pytest.raises(UserError, match=f"^{tmp_path}/run/tensorboard cannot be written: No space left on device; step 1 is saved$"):
        fit(recipe(total_steps=1), tmp_path / "run")


@pytest.mark.parametrize("every_steps", [3, 100])
def test_the_first_reason_is_read_where_the_state_cannot_be_saved_either(recipe, tmp_path, monkeypatch, capsys, every_steps):
    """In a save that is due, and in that of the end. A log that cannot be closed hides the reason no more."""
    def save(self, step, *_):
        raise UserError("the disk is full")

    def close(self):
        raise FULL
    monkeypatch.setattr(store.StepWriter, "save", save)
    monkeypatch.setattr(Board, "close", close)
    call = failing(GONE, 3, list)
    with pytest.raises(UserError, match="^the questions are gone; no step had been saved$"):
        fit(recipe(samples_every=3, **{"checkpoint.every_steps": every_steps}), tmp_path / "run", Callbacks(sampler=call))
    assert "warning: step 3 is not saved: the disk is full\n" in capsys.readouterr().out


def test_updates_that_are_not_finite_are_said_where_their_samples_cannot_be_listed(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_train_step", FakeStep(lambda step: True))

    def full(*_):
        raise FULL
    monkeypatch.setattr(metrics_reader, "write_text", full)
    with pytest.raises(UserError, match="^4 updates in a row, up to step 4, .*; the ids of their samples could not be written to "
                                        f"{tmp_path}/run/not_finite.json: No space left on device; no step had been saved$"):
        fit(recipe(nan_limit=4, **{"checkpoint.every_steps": 0}), tmp_path / "run")


def test_of_several_processes_one_that_fails_alone_does_not_save(monkeypatch):
    """They save together, and the others may be in the midst of what has failed here."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    run = Run(*[None] * 10)
    with pytest.raises(UserError, match="^here$"), run._aside():
        raise UserError("here")
    assert run.failure is None


@pytest.mark.parametrize("error", [UserError("the bucket is gone"), PermissionError(errno.EACCES, "Permission denied")])
def test_the_reason_is_read_where_nobody_can_say_what_is_saved(error):
    def refuse():
        raise error
    place = SimpleNamespace(workdir="/run", check=lambda: None, what_is_saved=refuse)
    assert str(trainer._with_what_is_saved(FULL, place)) == "/run cannot be read or written: No space left on device"
