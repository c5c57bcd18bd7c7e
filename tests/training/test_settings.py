"""Which `remat` and how many micro-batches `auto` stands for."""

import functools
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from llavamed_jax.cli.common import load_config
from llavamed_jax.errors import UsageError
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import program, settings, trainer
from llavamed_jax.training import workdir as workdirs
from llavamed_jax.training.rows import Data
from llavamed_jax.training.settings import Settings, candidates, first_that_fits
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from tests.support import training_runs


def recipe(*overrides):
    return load_config(f"{training_runs.ROOT}/configs/finetune.py:v15,7b", list(overrides))


def test_the_settings_go_from_the_least_arithmetic_to_the_least_memory():
    found = [(each.remat, each.micro_batches) for each in candidates(recipe(), "gpu", 1, 2)]
    assert found == [(remat, number) for remat in ("minimal", "attention", "qkvo", "full") for number in (1, 2)]
    assert candidates(recipe(), "cpu", 1, 2) == [Settings("full", 1)]  # nothing is searched there
    assert candidates(recipe("micro_batches=4"), "tpu", 4, 8) == [Settings(remat, 4) for remat in ("minimal", "attention", "qkvo", "full")]
    assert candidates(recipe("remat=none"), "gpu", 1, 1) == [Settings("none", 1)]
    assert candidates(recipe("remat=qkvo"), "gpu", 1, 4) == [Settings("qkvo", 1), Settings("qkvo", 4)]


def test_the_first_that_fits_is_taken_and_no_further_one_is_compiled():
    tried, said, compiled = candidates(recipe(), "gpu", 1, 2), [], []
    peaks = dict(zip(tried, (60, 44, 40, 38, 28, 26, 24, 23), strict=True))
    peak_of = lambda each: compiled.append(each) or peaks[each] * 2**30
    assert first_that_fits(tried, peak_of, 37 * 2**30, said.append) == Settings("qkvo", 1) and compiled == tried[:5]
    assert said == ["remat=minimal micro_batches=1: 60.0 of 37.0 GiB, too much", "remat=minimal micro_batches=2: 44.0 of 37.0 GiB, too much",
                    "remat=attention micro_batches=1: 40.0 of 37.0 GiB, too much", "remat=attention micro_batches=2: 38.0 of 37.0 GiB, too much",
                    "remat=qkvo micro_batches=1: 28.0 of 37.0 GiB"]
    compiled.clear()
    assert first_that_fits(tried, peak_of, 2**30) == tried[-1] and compiled == tried[:-1]  # the last is not asked
    compiled.clear()
    assert first_that_fits(tried[-1:], peak_of, 2**30) == tried[-1] and not compiled


@pytest.fixture(scope="module")
def small(start, data):
    """A recipe that trains one array and saves at the end."""
    return lambda **changes: training_runs.shrunk(start, data, **{
        "trainable": '["projector/linear_0/kernel"]', "checkpoint.every_steps": 0, **changes})


def test_a_run_searches_once_and_keeps_what_it_found(small, tmp_path, monkeypatch):
    cfg = small(remat="auto", micro_batches="auto", total_steps=1, batch_size=8)
    monkeypatch.setattr(program, "make_mesh", lambda *_: make_mesh("data=1"))
    monkeypatch.setattr(trainer, "make_train_step", training_runs.FakeStep())
    monkeypatch.setattr(settings, "device_memory", lambda devices: 10)
    monkeypatch.setattr(settings, "peak_bytes", lambda memory: memory)
    asked = []

    def lowered(program, layout, number):
        asked.append((program.model.remat, number))
        analysed = SimpleNamespace(memory_analysis=lambda: {"minimal": 99, "attention": 50, "qkvo": 11 - number, "full": 1}[program.model.remat])
        return SimpleNamespace(compile=lambda: analysed)

    monkeypatch.setattr(settings, "lowered", lowered)
    real = settings.candidates
    monkeypatch.setattr(settings, "candidates", lambda cfg, platform, parts, rows: real(cfg, "gpu", parts, rows))
    assert fit(cfg, tmp_path / "run")
    assert asked == [("minimal", 1), ("minimal", 8), ("attention", 1), ("attention", 8), ("qkvo", 1)]
    found = json.loads((tmp_path / "run/recipe.json").read_text())
    assert (found["recipe"]["remat"], found["recipe"]["micro_batches"]) == ("auto", "auto")
    assert (found["resolved"]["remat"], found["resolved"]["micro_batches"]) == ("qkvo", 1)
    assert fit(small(remat="auto", micro_batches="auto", total_steps=2, batch_size=8), tmp_path / "run") and len(asked) == 5
    assert json.loads((tmp_path / "run/recipe.json").read_text())["resolved"]["remat"] == "qkvo"


class Asked(training_runs.FakeStep):
    """Notes for how many micro-batches the update was made, and what its layers keep."""

    def __call__(self, loss_fn, optimizer, schedule, mesh, shardings, micro_batches, *_):
        self.micro_batches = micro_batches
        return super().__call__()


@pytest.fixture
def run(small, monkeypatch, capsys):
    """`run(workdir, **changes)` -> (what the run settled, what it said of another way)."""
    monkeypatch.setattr(program, "make_mesh", lambda *_: make_mesh("data=1"))

    def run(workdir, **changes):
        monkeypatch.setattr(trainer, "make_train_step", step := Asked())
        assert fit(small(**{"batch_size": 8, "data.row_length": 64, "remat": "none", **changes}), workdir)
        found = json.loads((workdir / "recipe.json").read_text())["resolved"]
        assert found["micro_batches"] == step.micro_batches
        return found, [line for line in capsys.readouterr().out.splitlines() if " now: an update computes the same as before" in line]
    return run


def test_a_resumed_run_may_compute_its_updates_in_another_way(small, run, tmp_path):
    run = functools.partial(run, **{"data.packing": True})
    first, said = run(tmp_path / "run", total_steps=1)
    assert (first["remat"], first["micro_batches"], said) == ("none", 1, [])
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    other = dict(remat="full", micro_batches=2)
    found, said = run(tmp_path / "run", total_steps=2, **other)
    assert found == {**first, "total_steps": 2, **other}
    assert [line.split(" now")[0] for line in said] == ["remat was none and is full", "micro_batches was 1 and is 2"]
    found, said = run(tmp_path / "run", total_steps=3, **other)
    assert (found["remat"], found["micro_batches"], said) == ("full", 2, [])
    assert run(tmp_path / "run", total_steps=4, remat="auto", micro_batches=2)[0] == {**first, "total_steps": 4, **other}
    for changes in (other, {}):  # a run that ended after it had written its recipe, and before it saved a step
        shutil.copy(tmp_path / "run/recipe.json", tmp_path / "killed/recipe.json")
        shutil.copytree(tmp_path / "killed", tmp_path / f"killed {len(changes)}")
        assert run(tmp_path / f"killed {len(changes)}", total_steps=2, **changes)[0] == {**first, "total_steps": 2, **changes}
    with pytest.raises(UsageError, match="at most 5 rows on a device; at most 5 was expected"):
        run(tmp_path / "run", total_steps=5, micro_batches=7)
    with pytest.raises(UsageError, match="'micro_batches' is 2, but .* was started with 1"):  # a scale of FP8 belongs to a micro-batch
        workdirs.write_recipe(tmp_path, small(compute="fp8"), {})
        workdirs.read_recipe(tmp_path, small(compute="fp8", micro_batches=2))


def test_a_resumed_run_of_rows_that_are_not_packed_may_too(run, tmp_path):
    run = functools.partial(run, tmp_path / "run", **{"data.packing": False})
    first, _ = run(total_steps=1)
    found, said = run(total_steps=2, micro_batches=2)
    assert found == {**first, "total_steps": 2, "micro_batches": 2} and len(said) == 1
    with pytest.raises(UsageError, match="a multiple of micro_batches .7. was expected"):
        run(total_steps=3, micro_batches=7)


def test_a_compiler_that_gives_up_is_a_setting_that_does_not_fit(small, monkeypatch):
    import jax
    cfg = small(remat="auto")
    checkpoint, mesh = open_start(cfg), make_mesh("data=1")
    built = program.Program.build(settings.open_remat(cfg), checkpoint, mesh, 1)
    layout = Data.open(cfg, checkpoint, mesh).plan.layout
    monkeypatch.setattr(settings, "candidates", lambda *_: [Settings("minimal", 1), Settings("full", 1)])

    def broken(words):
        def lowered(*_):
            raise jax.errors.JaxRuntimeError(words)
        monkeypatch.setattr(settings, "lowered", lowered)
        return settings.of_run(cfg, built, layout, {})
    assert broken("RESOURCE_EXHAUSTED: out of memory") == Settings("full", 1)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        broken("INTERNAL: something else")


def test_other_micro_batches_have_the_same_rows(small):
    cfg = small(micro_batches="auto", batch_size=8)
    cfg.data.validation = cfg.data.train
    data = Data.open(cfg, open_start(cfg))
    parts = data.with_micro_batches(4)
    assert parts.plan.layout == replace(data.plan.layout, micro_batches=4) and data.with_micro_batches(1) is data
    assert parts.plan.rows(0).records.tolist() == data.plan.rows(0).records.tolist()
    assert (data.validation_plan.layout.rows, parts.validation_plan.layout.rows) == (8, 2)
    assert sum(int(batch["segment_ids"].max(axis=1).sum()) for batch in parts.validation_batches()) == 12


@pytest.mark.parametrize("override, words", [
    ("micro_batches=much", "auto or a number was expected"), ("micro_batches=0", "more than 0"), ("micro_batches=-2", "more than 0"),
    ("micro_batches=2.5", "auto or a number"), ("micro_batches=", "auto or a number"), ("remat=best", "auto or none or full or qkvo or attention or minimal")])
def test_other_words_are_refused(override, words):
    from llavamed_jax.training import recipe as recipes
    with pytest.raises(UsageError, match=words):
        recipes.check(recipe(override))


@pytest.mark.parametrize("lacking, is_taken", [(("mean_text", "mean_images"), True), (("mean_images",), True), (("mean_length",), False)])
def test_a_recipe_that_writes_out_all_keys_need_not_have_the_newest(lacking, is_taken):
    from llavamed_jax.training import recipe as recipes
    cfg = recipe("data.mean_length=700")
    with cfg.unlocked():
        for key in lacking:
            del cfg.data[key]
    if not is_taken:
        with pytest.raises(UsageError, match="lacks the config keys data.mean_length$"):
            recipes.check(cfg)
        return
    recipes.check(cfg)
    assert [cfg.data[key] for key in lacking] == [recipes.SCHEMA[f"data.{key}"].default for key in lacking]
