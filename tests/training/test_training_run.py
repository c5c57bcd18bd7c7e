"""Whole runs of a tiny model on the sample: interrupted and resumed, finished, chained, judged by validation data."""

import json
import os
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree.store import steps
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.models.stacking import unstack
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.training import place, program, trainer
from llavamed_jax.training.callbacks import Callbacks
from llavamed_jax.training.program import Program, from_disk
from llavamed_jax.training.rows import Data
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from tests.support.training_runs import SAMPLE, FakeStep
from tests.support.training_runs import log_lines as lines

pytestmark = pytest.mark.usefixtures("one_device")


def tensors(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in folder.rglob("*")}


@pytest.fixture(scope="module")
def recipe(recipe):
    """These runs train a part of the decoder's layers too."""
    return lambda **changes: recipe(**{"trainable": '["projector/.*","decoder/layers/mlp/.*"]', **changes})


@pytest.fixture(scope="module")
def runs(recipe, tmp_path_factory):
    """`run`: of eight updates that nothing disturbed, checkpoints at 3, 6 and 8; `cut`: what it had written when it was about to save
    step 6, which is what a power cut leaves."""
    folder = tmp_path_factory.mktemp("runs")

    def copy(snapshot):
        if snapshot.step == 6:
            deadline = time.monotonic() + 60
            while not (folder / "run" / "checkpoints" / ".sealed").exists():
                assert time.monotonic() < deadline, "step 3, which is written in the background, does not come"
                time.sleep(0.01)
            shutil.copytree(folder / "run", folder / "cut")
        return {}

    assert fit(recipe(), folder / "run", Callbacks([copy]))
    return folder


@pytest.fixture(scope="module")
def finished(runs):
    return runs / "run"


def test_a_run_leaves_what_the_interface_promises(finished, start):
    assert steps(finished) == [3, 6, 8]
    found = lines(finished)
    assert [line["step"] for line in found] == list(range(1, 9))
    promised = {"step", "loss", "learning_rate", "grad_norm", "samples", "tokens", "tokens_per_second", "padding_fraction",
                "image_padding_fraction", "mfu", "samples_skipped"}
    assert promised <= set(found[-1]) and found[-1]["samples"] == 32 and found[-1]["mfu"] is None
    assert any((finished / "tensorboard").iterdir())
    recipe = json.loads((finished / "recipe.json").read_text())
    assert recipe["recipe"]["init"] == str(start) and recipe["resolved"]["total_steps"] == 8
    before, after = tensors(start), tensors(finished)
    assert set(before) == set(after)
    for name in before:
        is_trained = name.startswith("projector/") or name.startswith("decoder/") and "/mlp/" in name
        assert np.array_equal(before[name], after[name]) != is_trained, name


def test_a_finished_run_changes_nothing(finished, recipe):
    before = snapshot(finished)
    assert fit(recipe(), finished)
    assert snapshot(finished) == before


def test_resumed_is_uninterrupted_to_the_bit(runs, finished, recipe, tmp_path):
    """A power cut after step 5 throws back to step 3; SIGTERM in step 6 is saved at 6; the end is the undisturbed run's."""
    workdir = tmp_path / "run"
    shutil.copytree(runs / "cut", workdir)
    assert steps(workdir) == [3] and lines(workdir)[-1]["step"] >= 5

    def terminate(snapshot):
        if snapshot.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return {}

    assert fit(recipe(), workdir, Callbacks([terminate])) is False
    assert steps(workdir) == [3, 6]
    assert fit(recipe(), workdir) is True
    measured = {"tokens_per_second"}
    strip = lambda found: [{k: v for k, v in line.items() if k not in measured} for line in found]
    assert strip(lines(workdir)) == strip(lines(finished))
    for step in (6, 8):
        ours, theirs = tensors(workdir / "checkpoints" / str(step)), tensors(finished / "checkpoints" / str(step))
        assert all(np.array_equal(ours[name], theirs[name]) for name in theirs), step


def test_a_damaged_step_is_passed_over(finished, recipe, tmp_path, capsys, without_compiling):
    """The updates that follow change nothing: the end is step 6."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    victim = next(p for p in sorted((workdir / "checkpoints" / "8" / "params").rglob("*")) if p.is_file() and p.stat().st_size > 20)
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    assert fit(recipe(), workdir)
    said = capsys.readouterr().out
    assert "damaged" in said and "resuming from step 6" in said
    assert steps(workdir) == [3, 6, 8]
    ours, theirs, last = tensors(workdir), tensors(finished / "checkpoints" / "6"), tensors(finished)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    assert not all(np.array_equal(ours[name], last[name]) for name in last)


@pytest.mark.parametrize("content", [None, "{}"], ids=["deleted", "empty"])
def test_steps_of_which_none_is_intact_are_named_and_left_alone(finished, recipe, tmp_path, content):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    for manifest in workdir.glob("checkpoints/*/manifest.json"):
        manifest.unlink() if content is None else manifest.write_text(content)
    before = snapshot(workdir)
    with pytest.raises(UserError, match="has no intact step to resume from: .*checkpoints/8 .*checkpoints/3 "):
        fit(recipe(), workdir)
    assert snapshot(workdir) == before


def test_a_recipe_that_failed_before_its_first_step_may_be_corrected(recipe, tmp_path, without_compiling):
    with pytest.raises(UserError, match="max_length"):
        fit(recipe(init="preset:small", tokenizer=SAMPLE / "tokenizer.model", max_length=5), tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} <= {".lock", "checkpoints"}

    def crash(snapshot):
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        fit(recipe(total_steps=1, trainable='["projector/.*"]'), tmp_path / "run", Callbacks([crash]))
    assert fit(recipe(total_steps=1), tmp_path / "run") and len(tensors(tmp_path / "run")) > 5


@pytest.mark.parametrize("text", ["[]", '{"recipe": [], "resolved": []}', None], ids=["list", "lists", "directory"])
def test_a_damaged_recipe_is_named(finished, recipe, tmp_path, text):
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run" / "recipe.json"
    file.unlink()
    file.mkdir() if text is None else file.write_text(text)
    with pytest.raises(UserError, match="recipe.json is damaged"):
        fit(recipe(), tmp_path / "run")


def test_a_run_that_learns_nothing_does_not_finish(recipe, data, tmp_path, monkeypatch):
    """The updates are of our own: that a batch without a supervised token moves nothing is tested with the step."""
    class Empty(FakeStep):
        def metrics(self, is_skipped):
            return {**super().metrics(is_skipped), **{name: jax.device_put(np.float32(0)) for name in ("tokens", "grad_norm", "moved")}}

    records = [{**r, "conversations": r["conversations"][:1]} for r in json.loads((data / "train.json").read_text())]
    (tmp_path / "train.json").write_text(json.dumps(records))
    for updates, sentence in ((1, "has a supervised token, so nothing was trained"), (8, "none of the 12 samples of an epoch")):
        monkeypatch.setattr(trainer, "make_train_step", Empty())
        with pytest.raises(UserError, match=sentence):
            fit(recipe(**{"data.train": tmp_path / "train.json", "total_steps": updates}), tmp_path / f"run{updates}")
        assert not steps(tmp_path / f"run{updates}")


def test_a_run_goes_on_on_another_mesh(finished, recipe, tmp_path, monkeypatch, capsys):
    """Saved on one device, restored onto the first two of eight: the same run up to the order of sums."""
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    shutil.rmtree(workdir / "checkpoints" / "8")
    monkeypatch.setattr(program, "make_mesh", make_mesh)
    assert fit(recipe(**{"mesh.data": 1, "mesh.fsdp": 2}), workdir)
    assert "mesh {'data': 1, 'fsdp': 2, 'tp': 1} on the first 2 of 8 devices\n" in capsys.readouterr().out
    np.testing.assert_allclose([line["loss"] for line in lines(workdir)], [line["loss"] for line in lines(finished)], rtol=2e-6)
    ours, theirs = tensors(workdir), tensors(finished)
    for name in theirs:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("key, value", [("seed", 7), ("optimizer.learning_rate", 1.0), ("max_length", 41)])
def test_another_recipe_is_refused_by_its_key(finished, recipe, key, value):
    before = snapshot(finished)
    with pytest.raises(UsageError, match=key):
        fit(recipe(**{key: value}), finished)
    assert snapshot(finished) == before


def test_what_may_differ_does(finished, recipe):
    assert fit(recipe(**{"log_every": 3, "checkpoint.keep": 1, "data.workers": 2, "mesh.fsdp": 1, "total_steps": 7}), finished)


def test_a_workdir_in_use_is_refused(recipe, tmp_path):
    with place.locked(tmp_path) as held:
        held.sign()
        with pytest.raises(UserError, match=f"in use by another run .process {os.getpid()}"):
            fit(recipe(), tmp_path)


def test_the_best_step_is_kept(recipe, data, tmp_path, monkeypatch):
    """Updates ruin the model: the first step judged is the best, and survives `keep=1`."""
    class Ruinous(FakeStep):
        def update(self, state, batch):
            state, metrics = super().update(state, batch)
            return state.replace(trainable={name: x + x for name, x in state.trainable.items()}), metrics

    monkeypatch.setattr(trainer, "make_train_step", Ruinous())
    cfg = recipe(**{"data.validation": data / "validation.json", "checkpoint.keep": 1, "checkpoint.keep_best": True,
                    "checkpoint.every_steps": 2, "trainable": '["decoder/lm_head/.*"]'})
    seen = []
    assert fit(cfg, tmp_path / "run", Callbacks([lambda snapshot: seen.append(snapshot.step) or {"answers": float(snapshot.step)}]))
    judged = [line for line in lines(tmp_path / "run") if "validation_loss" in line]
    assert seen == [line["step"] for line in judged] == [2, 4, 6, 8] and judged[0]["answers"] == 2.0
    best = min(judged, key=lambda line: line["validation_loss"])["step"]
    assert best != 8, "this test is about a best step that is not the newest"
    assert steps(tmp_path / "run") == sorted({best, 8})


def test_a_stage_starts_from_the_stage_before(finished, recipe, tmp_path, without_compiling):
    """`init` is a workdir: its newest step is trained on, and what the stage before has trained is frozen now as it left it."""
    assert fit(recipe(**{"init": finished, "total_steps": 1, "trainable": '["projector/.*"]'}), tmp_path / "run")
    before, after = tensors(finished), tensors(tmp_path / "run")
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_samples_whose_image_is_broken_are_skipped_and_listed(recipe, data, tmp_path, without_compiling):
    records = json.loads((data / "train.json").read_text())
    records[3]["image"] = "missing.jpg"
    (tmp_path / "train.json").write_text(json.dumps(records))
    assert fit(recipe(**{"data.train": tmp_path / "train.json", "total_steps": 3}), tmp_path / "run")
    listed = [json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines()]
    assert [entry["id"] for entry in listed] == [records[3]["id"]]
    last = lines(tmp_path / "run")[-1]
    assert (last["samples"], last["samples_skipped"]) == (11, 1)


def test_a_preset_takes_its_vocabulary_from_the_tokenizer(recipe):
    cfg = recipe(init="preset:small", tokenizer=SAMPLE / "tokenizer.model")
    checkpoint = open_start(cfg)
    tokenizer = Tokenizer.load(SAMPLE / "tokenizer.model")
    decoder = checkpoint.config.decoder
    assert decoder.vocab_size == tokenizer.vocab_size == checkpoint.tensors["decoder/lm_head/kernel"].shape[1]
    assert (decoder.bos_token_id, decoder.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    with pytest.raises(UsageError, match="tokenizer"):
        open_start(recipe(init="preset:small", tokenizer="none"))


def test_remat_and_attention_of_the_recipe_reach_the_model(recipe):
    checkpoint, mesh = open_start(recipe()), make_mesh("data=1", jax.devices()[:1])
    for remat, attention, backend in (("qkvo", "splash", "splash_interpreted"), ("none", "auto", "xla")):
        model = Program.build(recipe(remat=remat, attention=attention), checkpoint, mesh, 8).model
        assert (model.remat, model.attention) == (remat, backend)


def test_epochs_are_counted_as_the_original_counts_them(recipe, data):
    cfg = recipe(batch_size=5, epochs=3, total_steps="none")
    opened = Data.open(cfg, open_start(cfg))
    assert opened.total_steps() == 12 // 5 * 3


def test_disk_form_is_one_array_a_layer_and_back():
    flat = {"decoder/layers/mlp/up_proj/kernel": np.arange(24.0).reshape(3, 2, 4), "projector/linear_0/bias": np.ones(2)}
    disk = unstack(flat)
    assert set(disk) == {f"decoder/layers_{i}/mlp/up_proj/kernel" for i in range(3)} | {"projector/linear_0/bias"}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    back = from_disk(disk, dict.fromkeys(flat, sharding))
    assert all(np.array_equal(back[name], flat[name]) for name in flat)
