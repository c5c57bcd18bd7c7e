"""A run whose batches do not come: a signal saves without them, a worker that died or gives nothing ends it with what it has done saved."""

import os
import signal
import time

import pytest

from llavamed_jax.checkpoints.tree.store import newest_intact_step
from llavamed_jax.errors import UserError
from llavamed_jax.pipeline import loader, workers
from llavamed_jax.training import validation
from llavamed_jax.training.trainer import fit
from tests.support import training_runs as runs

pytestmark = pytest.mark.usefixtures("one_device", "without_compiling")


@pytest.fixture
def hanging(monkeypatch):
    """`hanging(when, act)`: the batches for which `when(maker, number)` do not come; `act` is done once the first is waited for."""
    def use(when, act=lambda: None):
        make, done = loader.BatchMaker.__call__, []

        def call(self, number):
            if when(self, number):
                time.sleep(2)  # until those before it are used
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
    hanging(lambda maker, number: number == 2 and maker.start == (0, 0), terminate)
    begun = time.monotonic()
    assert fit(recipe(total_steps=6), tmp_path / "run") is False
    assert time.monotonic() - begun < 30
    assert newest_intact_step(tmp_path / "run") == (2, [])
    said = capsys.readouterr().out
    assert "\nstopped while waiting for a batch\n" in said and "\nstopped and saved at step 2 of 6" in said
    assert fit(recipe(total_steps=6), tmp_path / "run") is True, "it goes on with the batch that did not come"
    assert [line["step"] for line in runs.log_lines(tmp_path / "run") if "loss" in line] == list(range(1, 7))


def test_a_signal_saves_without_validation_data_that_do_not_come(recipe, hanging, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation, "PATIENCE_S", 0.5)
    hanging(lambda maker, number: maker.last_epoch is not None, terminate)
    data = runs.write_data(tmp_path)
    assert fit(recipe(**{"data.validation": data / "validation.json"}), tmp_path / "run") is False
    assert newest_intact_step(tmp_path / "run") == (3, [])
    assert "stopped while waiting for validation data\nstopped and saved at step 3 of 8" in capsys.readouterr().out


def test_batches_that_never_come_end_the_run_with_its_step_saved(recipe, hanging, tmp_path, monkeypatch):
    hanging(lambda maker, number: number == 5, lambda: monkeypatch.setattr(workers, "GIVE_UP_S", 1.0))
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
            assert fit(recipe(), tmp_path / name) is False
        assert "stopped before the first update: run again to continue" in capsys.readouterr().err
        assert not [path for path in (tmp_path / name).iterdir() if path.name.endswith(".partial")]
    assert fit(recipe(), tmp_path / "write") is True
