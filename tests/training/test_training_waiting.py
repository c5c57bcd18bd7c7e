"""A run whose batches do not come: a signal saves without them, a worker that died or gives nothing ends it with what it has done saved."""

import contextlib
import os
import signal
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from llavamed_jax.checkpoints.tree.store import newest_intact_step
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.during_training import TrainedModel
from llavamed_jax.pipeline import loader, workers
from llavamed_jax.training import trainer, validation
from llavamed_jax.training.callbacks import Callbacks
from llavamed_jax.training.trainer import fit
from llavamed_jax.utils import signals
from tests.support import training_runs as runs

pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")


@pytest.fixture
def hanging(monkeypatch):
    """`hanging(step, when, act)`: the batches for which `when(maker, number)` do not come; `act` is done once the first is waited for,
    when the run has done `step` updates."""
    waits, obey = threading.Event(), workers.InOrder._obey
    monkeypatch.setattr(workers.InOrder, "_obey", lambda self, waited: (waits.set(), obey(self, waited)))
    monkeypatch.setattr(workers, "_POLL_S", 0.05)

    def use(step, when, act=lambda: None):
        make, done = loader.BatchMaker.__call__, []

        def call(self, number):
            if when(self, number):
                while trainer.make_train_step.step < step:
                    time.sleep(0.02)
                waits.clear()
                assert waits.wait(60), "the loop did not come to wait"
                if not done:
                    done.append(1)
                    act()
                time.sleep(60)
            return make(self, number)

        monkeypatch.setattr(loader.BatchMaker, "__call__", call)
    return use


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_signal_saves_without_the_batch_that_does_not_come(recipe, hanging, tmp_path, capsys):
    hanging(2, lambda maker, number: number == 2 and maker.start == (0, 0), terminate)
    begun = time.monotonic()
    assert fit(recipe(total_steps=4), tmp_path / "run") is False
    assert time.monotonic() - begun < 30
    assert newest_intact_step(tmp_path / "run") == (2, [])
    said = capsys.readouterr().out
    assert "\nstopped while waiting for a batch\n" in said and "\nstopped and saved at step 2 of 4" in said
    assert fit(recipe(total_steps=4), tmp_path / "run") is True, "it goes on with the batch that did not come"
    assert [line["step"] for line in runs.log_lines(tmp_path / "run") if "loss" in line] == list(range(1, 5))


def test_a_signal_saves_without_validation_data_that_do_not_come(recipe, hanging, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation, "PATIENCE_S", 0.1)
    hanging(3, lambda maker, number: maker.last_epoch is not None, terminate)
    data = runs.write_data(tmp_path)
    assert fit(recipe(**{"data.validation": data / "validation.json"}), tmp_path / "run") is False
    assert newest_intact_step(tmp_path / "run") == (3, [])
    assert "stopped while waiting for validation data\nstopped and saved at step 3 of 8" in capsys.readouterr().out


@pytest.mark.parametrize("at", ["batch", "evaluator", "answers"])
def test_a_signal_during_a_validation_saves_without_the_rest_of_it(recipe, tmp_path, monkeypatch, capsys, at):
    """What was stopped is not recorded; what was whole before is. The run goes on after the step."""
    data, calls = runs.write_data(tmp_path), []
    cfg = lambda: recipe(batch_size=2, total_steps=4, **{"data.validation": data / "validation.json"})  # three batches

    def evaluate(snapshot, what):
        calls.append(what)
        if at in ("evaluator", "answers"):
            terminate()
        if at == "answers":
            raise signals.Stopped  # as the engine does
        return {what: 1.0}

    def eval_step(*_):
        calls.append("batch")
        if at == "batch":
            terminate()
        return jax.numpy.float32(2), jax.numpy.float32(1)

    monkeypatch.setattr(trainer, "make_eval_step", lambda *_: eval_step)
    callbacks = Callbacks([lambda s: evaluate(s, "first"), lambda s: evaluate(s, "second")])
    assert fit(cfg(), tmp_path / "run", callbacks) is False
    assert newest_intact_step(tmp_path / "run") == (3, [])
    assert calls == (["batch"] if at == "batch" else ["batch", "batch", "batch", "first"])
    line, = [line for line in runs.log_lines(tmp_path / "run") if "validation_loss" in line or "first" in line] or [{}]
    assert line == {"batch": {}, "evaluator": {"step": 3, "validation_loss": 2.0, "first": 1.0},
                    "answers": {"step": 3, "validation_loss": 2.0}}[at]
    what = "the validation" if at == "batch" else "the evaluation of answers"
    said = capsys.readouterr().out
    assert f"\n{what} of step 3 was stopped and is not recorded\n" in said and "\nstopped and saved at step 3 of 4" in said
    at = ""
    assert fit(cfg(), tmp_path / "run", callbacks) is True


@pytest.mark.parametrize("at", ["samples", "batch"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_a_signal_at_the_last_step_leaves_out_neither_the_checks_nor_the_validation(recipe, tmp_path, monkeypatch, at, is_trained):
    """No run resumes there."""
    data, calls = runs.write_data(tmp_path), []
    monkeypatch.setattr(trainer, "make_train_step", runs.FakeStep(lambda step: not is_trained))

    def sampler(snapshot):
        if at == "samples" and snapshot.step == 3:
            terminate()
            raise signals.Stopped("stopped while the model answered")
        return []

    def eval_step(*_):
        calls.append("batch")
        if at == "batch":
            terminate() if len(calls) == 1 else None
        return jax.numpy.float32(2), jax.numpy.float32(1)

    monkeypatch.setattr(trainer, "make_eval_step", lambda *_: eval_step)
    cfg = recipe(batch_size=2, total_steps=3, samples_every=1, **{"data.validation": data / "validation.json"})  # three batches
    if not is_trained:
        with pytest.raises(UserError, match="3 of 3 updates were skipped"):
            fit(cfg, tmp_path / "run", Callbacks(sampler=sampler))
        return
    assert fit(cfg, tmp_path / "run", Callbacks(sampler=sampler)) is True
    line, = [line for line in runs.log_lines(tmp_path / "run") if "validation_loss" in line]
    assert line == {"step": 3, "validation_loss": 2.0} and calls == ["batch"] * 3


def test_a_signal_cuts_the_answers_short(monkeypatch):
    """In process 0, which answers for all; elsewhere its word counts."""
    monkeypatch.setattr(TrainedModel, "_loaded", lambda *_: contextlib.nullcontext(
        SimpleNamespace(generate_tokens=lambda *_: signals.check() or [[5]])))
    monkeypatch.setattr(TrainedModel, "_row", lambda *_: ([1], []))
    monkeypatch.setattr(TrainedModel, "_text", lambda *_: "Yes")
    with signals.listening(signals.Phase("")):
        assert TrainedModel().ask(None, ["Is it?"], 4) == ["Yes"]
        signals.ask("SIGTERM")
        with pytest.raises(signals.Stopped, match="stopped while the model answered"):
            TrainedModel().ask(None, ["Is it?"], 4)
        signals.check()  # the loop's phase does not raise


def test_batches_that_never_come_end_the_run_with_its_step_saved(recipe, hanging, tmp_path, monkeypatch):
    hanging(5, lambda maker, number: number == 5, lambda: monkeypatch.setattr(workers, "GIVE_UP_S", 0.2))
    with pytest.raises(UserError, match=r"^timeout: the loader, reading .*, has returned nothing for \d+ s; step 5 is saved$"):
        fit(recipe(**{"checkpoint.every_steps": 3}), tmp_path / "run")
    assert newest_intact_step(tmp_path / "run") == (5, [])


def test_a_signal_before_the_first_update_saves_nothing_and_says_so(recipe, tmp_path, monkeypatch, capsys):
    """While data are measured, weights are read, and what no step will have is written: a start that is given up leaves nothing in part."""
    for name, at in (("measure", "llavamed_jax.pipeline.lengths.measure"), ("load", "llavamed_jax.training.program.load_params"),
                     ("write", "llavamed_jax.checkpoints.tree.model.write_base")):
        module, _, function = at.rpartition(".")
        with monkeypatch.context() as patch:
            real = getattr(__import__(module, fromlist=[function]), function)
            patch.setattr(at, lambda *args, real=real, **kwargs: (terminate(), real(*args, **kwargs))[1])
            assert fit(recipe(total_steps=1), tmp_path / name) is False
        assert "stopped before the first update: run again to continue" in capsys.readouterr().err
        assert not [path for path in (tmp_path / name).iterdir() if path.name.endswith(".partial")]
    assert fit(recipe(total_steps=1), tmp_path / "write") is True
