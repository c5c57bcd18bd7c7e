"""A run that learns nothing ends with a sentence: no gradient, or updates that move no parameter. One that learns little goes on."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.tree.store import read_meta, steps
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.training import recipe as recipes
from llavamed_jax.training import trainer
from llavamed_jax.training.progress import Progress
from llavamed_jax.training.trainer import fit
from tests.support.training_runs import FakeStep

PROJECTOR = '["projector/.*"]'


@pytest.fixture(scope="module")
def text(data, tmp_path_factory):
    """The questions of train.json, of which no image is left."""
    records = json.loads((data / "train.json").read_text())
    for record in records:
        del record["image"]
        record["conversations"][0]["value"] = record["conversations"][0]["value"].replace("<image>", "").strip()
    file = tmp_path_factory.mktemp("text") / "text.json"
    file.write_text(json.dumps(records))
    return file


pytestmark = pytest.mark.usefixtures("one_device")


def tensors(path):
    checkpoint = open_checkpoint(path)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


# ---- real updates

@pytest.mark.parametrize("changes, sentence", [
    ({"optimizer.weight_decay": 0.1}, "3 updates in a row, up to step 3"),
    ({"data.packing": True, "data.row_length": 64, "loss_weighting": "sample"},
     r"3 updates in a row, up to step 3, had a gradient of exactly 0 \(nan_limit is 3\): the loss does not depend on the "
     "parameters that trainable names, .* have no image; no step had been saved"),
], ids=["decay", "packed"])
def test_a_projector_without_images_has_no_gradient(recipe, text, tmp_path, changes, sentence):
    """Rows that are not packed are in the next test."""
    cfg = recipe(**{"data.train": text, "trainable": PROJECTOR, "nan_limit": 3, "total_steps": 20, "checkpoint.every_steps": 0, **changes})
    with pytest.raises(UserError, match=sentence):
        fit(cfg, tmp_path / "run")
    assert not steps(tmp_path / "run")


def test_images_without_markers_have_no_gradient_where_the_limit_lets_them_pass(recipe, data, tmp_path):
    """The case that once finished with a gradient of 0.000."""
    records = json.loads((data / "train.json").read_text())
    for record in records:
        record["conversations"][0]["value"] = "is it?"
    (tmp_path / "unmarked.json").write_text(json.dumps(records))
    cfg = recipe(**{"data.train": tmp_path / "unmarked.json", "trainable": PROJECTOR, "data.skip_limit": 1.0, "nan_limit": 3})
    with pytest.raises(UserError, match="had a gradient of exactly 0"):
        fit(cfg, tmp_path / "run")
    cfg.data.skip_limit = 0.99
    with pytest.raises(UserError, match="12 of the 12 samples of .* lose images"):
        fit(cfg, tmp_path / "other")


@pytest.mark.parametrize("key, value, total_steps", [
    ("optimizer.eps", 1e300, 4), ("optimizer.clip_norm", 1e-30, 4), ("optimizer.eps", 1e20, 20), ("optimizer.learning_rate", 1e-30, 20)])
def test_updates_that_move_nothing_end_the_run(recipe, tmp_path, key, value, total_steps):
    """Biases and zeros may take on 1e-25: that is nothing, too. What such an update reports is tested with the step, and below what
    follows from it."""
    cfg = recipe(**{key: value, "total_steps": total_steps, "nan_limit": 5, "checkpoint.every_steps": 0})
    sentence = {20: r"none of the first 5 updates, up to step 6, changed the parameters \(nan_limit is 5\); the last had a gradient norm of "
                    r"[0-9.e-]+ and a learning rate of [0-9.e-]+; optimizer.learning_rate, eps and clip_norm",
                4: "none of 3 updates changed the parameters, so nothing was trained; optimizer"}[total_steps]
    with pytest.raises(UserError, match=sentence):
        fit(cfg, tmp_path / "run")
    assert not steps(tmp_path / "run")


@pytest.mark.parametrize("changes", [{"optimizer.learning_rate": 1e-9}, {"optimizer.warmup_ratio": 1.0}, {"optimizer.clip_norm": 1e-6},
                                     {"optimizer.weight_decay": 0.1, "optimizer.learning_rate": 1e-8}])
def test_a_run_that_moves_a_little_goes_on(recipe, start, tmp_path, capsys, changes):
    """Its first update, of the warm-up, moves nothing, and does not count."""
    assert fit(recipe(**changes, total_steps=4, nan_limit=1, **{"checkpoint.every_steps": 1}), tmp_path / "run")
    assert "learning rate was 0" not in capsys.readouterr().out
    before, first, after = tensors(start), tensors(tmp_path / "run" / "checkpoints" / "1"), tensors(tmp_path / "run")
    assert all(np.array_equal(before[name], first[name]) for name in before)
    assert any(not np.array_equal(before[name], after[name]) for name in before)
    counts = [read_meta(tmp_path / "run", step)["progress"] for step in (1, 4)]
    assert [(each["updates_moved"], each["updates_unmoved"]) for each in counts] == [(0, 0), (3, 0)]


# ---- what counts, by updates of our own

class Scripted(FakeStep):
    """Updates with these values, the last again and again."""

    def __init__(self, *script):
        super().__init__()
        self.script = script

    def metrics(self, is_skipped):
        values = self.script[min(self.step, len(self.script)) - 1]
        return {**super().metrics(values.get("skipped", 0)), **{name: jax.device_put(np.float32(x)) for name, x in values.items()}}


ZERO, STILL, MOVED, EMPTY, SKIPPED = dict(grad_norm=0, moved=0), dict(moved=0), {}, dict(tokens=0, grad_norm=0, moved=0), dict(skipped=1)


@pytest.mark.parametrize("script, total_steps, sentence", [
    ([ZERO, ZERO, MOVED, ZERO, ZERO, ZERO], 12, "3 updates in a row, up to step 6"),
    ([ZERO, SKIPPED, SKIPPED, EMPTY, ZERO, SKIPPED, ZERO], 12, "3 updates in a row, up to step 7, had a gradient"),
    ([dict(learning_rate=0, moved=0), STILL, STILL, STILL], 12,
     r"none of the first 3 updates, up to step 4, changed the parameters \(nan_limit is 3\); the last had a gradient norm of 1 "
     "and a learning rate of 0.001; optimizer.learning_rate, eps and clip_norm"),
    ([ZERO, ZERO], 2, "2 of 2 updates had a gradient of exactly 0, so nothing was trained: the loss does not depend"),
    ([STILL, STILL], 2, "none of 2 updates changed the parameters, so nothing was trained; optimizer"),
    ([ZERO, ZERO, EMPTY, EMPTY, EMPTY, EMPTY, MOVED, ZERO, ZERO], 9, None), ([STILL, STILL, MOVED, STILL], 12, None),
])
def test_which_updates_count(recipe, tmp_path, monkeypatch, script, total_steps, sentence):
    monkeypatch.setattr(trainer, "make_train_step", Scripted(*script))
    cfg = recipe(total_steps=total_steps, nan_limit=3, **{"checkpoint.every_steps": 0})
    if sentence is None:
        assert fit(cfg, tmp_path / "run")
        return
    with pytest.raises(UserError, match=sentence):
        fit(cfg, tmp_path / "run")
    assert not steps(tmp_path / "run")


def test_a_run_of_nothing_but_its_first_warm_up_update_says_so(recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "make_train_step", Scripted(dict(learning_rate=0, moved=0)))
    assert fit(recipe(total_steps=1), tmp_path / "run")
    assert "warning: the learning rate was 0 in every update" in capsys.readouterr().out


def test_the_count_goes_on_where_the_run_goes_on(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "make_train_step", Scripted(MOVED, ZERO, ZERO))
    assert fit(recipe(total_steps=3, nan_limit=4), tmp_path / "run")
    monkeypatch.setattr(trainer, "make_train_step", Scripted(ZERO))
    with pytest.raises(UserError, match="4 updates in a row, up to step 5"):
        fit(recipe(total_steps=9, nan_limit=4), tmp_path / "run")


def test_a_run_of_before_these_counts_goes_on(recipe, tmp_path, monkeypatch):
    """Its step does not say whether anything has moved: it is taken to have."""
    new = {"zero_gradients", "zero_gradients_in_a_row", "updates_moved", "updates_unmoved"}
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "vars", lambda x: {k: v for k, v in x.__dict__.items() if k not in new}, raising=False)
        assert fit(recipe(total_steps=3), tmp_path / "run")
    assert new <= vars(Progress()).keys()
    monkeypatch.setattr(trainer, "make_train_step", Scripted(STILL))
    assert fit(recipe(total_steps=9, nan_limit=2), tmp_path / "run")


def test_a_rate_that_float32_takes_for_0_is_a_wrong_value(recipe):
    for key in ("optimizer.learning_rate", "optimizer.eps"):
        with pytest.raises(UsageError, match=f"{key}' is 1e-40, which is 0 in float32; at least 1.2e-38 was expected"):
            recipes.check(recipe(**{key: 1e-40}))
        recipes.check(recipe(**{key: 2.0**-126}))
    assert float(jnp.float32(2.0**-126) * jnp.float32(1)) > 0
