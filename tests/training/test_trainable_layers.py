"""Some layers of a stack: trained, at a rate of their own, clipped, decayed, saved and resumed as if the others were not there."""

import contextlib
import io
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli.common import load_config
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UsageError
from llavamed_jax.training import layers, optimizer, void_keys
from llavamed_jax.training.state import partition
from llavamed_jax.training.trainer import fit
from tests.support.training_runs import images, set_back

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
FC1 = "vision_tower/layers/mlp/fc1/kernel"
LAST_TWO = r"vision_tower/layers_-[12]/.*"
CFG = LlavaConfig(VisionConfig(16, 32, 4, 2, 16, 8), DecoderConfig(1024, 16, 24, 1, 2, 2, 8, 1e-5, 1e4, 256), "linear", max_length=160,
                  template="up:vicuna_v1")


# ---- names and masks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("regex, wanted", [
    ("vision_tower/.*", [1, 1, 1, 1]), (FC1, [1, 1, 1, 1]), (r"vision_tower/layers_3/.*", [0, 0, 0, 1]), (LAST_TWO, [0, 0, 1, 1]),
    (r"vision_tower/layers_-1/mlp/.*", [0, 0, 0, 1]), (r"vision_tower/layers_-4/.*", [1, 0, 0, 0]), (r"vision_tower/layers_[0-9]/.*", [1] * 4),
    (r"vision_tower/layers_-5/.*", [0] * 4), (r"vision_tower/layers_4/.*", [0] * 4), (r"layers_3", [0] * 4), (r"decoder/layers_3/.*", [0] * 4)])
def test_a_layer_has_its_number_from_either_end(regex, wanted):
    assert layers.matched(regex, FC1, 4).tolist() == list(map(bool, wanted))


def test_what_is_no_stack_has_one_name():
    assert layers.depths({FC1: np.zeros((4, 2, 3)), "projector/linear_0/kernel": np.zeros((2, 3))}) == {FC1: 4, "projector/linear_0/kernel": 0}
    assert layers.matched("projector/.*", "projector/linear_0/kernel", 0).tolist() is True
    assert layers.matched("projector/layers_0/.*", "projector/linear_0/kernel", 0).tolist() is False


def test_stacks_that_are_trained_in_part():
    params = {FC1: np.zeros((4, 2)), "vision_tower/layers/mlp/fc1/bias": np.zeros((4, 2)), "projector/linear_0/bias": np.zeros(2)}
    trained, frozen = partition(params, (LAST_TWO, "projector/.*"))
    assert set(trained) == set(params) and not frozen
    masks = layers.partly_trained((LAST_TWO, "projector/.*"), layers.depths(params))
    assert {name: mask.tolist() for name, mask in masks.items()} == {name: [False, False, True, True] for name in list(params)[:2]}
    assert layers.partly_trained((LAST_TWO, r"vision_tower/layers_[01]/.*"), layers.depths(params)) == {}
    assert set(partition(params, (r"vision_tower/layers_-1/.*/bias",))[0]) == {"vision_tower/layers/mlp/fc1/bias"}
    with pytest.raises(UsageError, match=r"'vision_tower/layers_9/.\*', which matches no parameter"):
        partition(params, (r"vision_tower/layers_9/.*",))


def test_gradient_norm_and_clipping_leave_the_others_out():
    """The same as a model of only the trained layers: updates, moments and the norm, at two rates and with decay."""
    rng = np.random.default_rng(0)
    params = {FC1: rng.standard_normal((4, 2, 3)).astype(np.float32), "projector/linear_0/kernel": np.ones((2, 3), np.float32)}
    alone = {**params, FC1: params[FC1][2:]}
    loss = lambda tree, x: 3 * jnp.sum(jnp.sin(x * tree["vision_tower"]["layers"]["mlp"]["fc1"]["kernel"])) + jnp.sum(
        tree["projector"]["linear_0"]["kernel"] ** 2)
    nested = lambda flat: {"vision_tower": {"layers": {"mlp": {"fc1": {"kernel": flat[FC1]}}}},
                           "projector": {"linear_0": {"kernel": flat["projector/linear_0/kernel"]}}}
    masks = {FC1: np.array([False, False, True, True])}
    masked = layers.only_layers(loss, masks)
    grads = jax.jit(jax.grad(lambda flat: masked(nested(flat), 0.7)))(params)
    grads_alone = jax.jit(jax.grad(lambda flat: loss(nested(flat), 0.7)))(alone)
    assert (grads[FC1][:2] == 0).all() and np.array_equal(grads[FC1][2:], grads_alone[FC1])
    np.testing.assert_allclose(optax.global_norm(grads), optax.global_norm(grads_alone), rtol=1e-6)

    settings = load_config(f"{ROOT}/configs/finetune.py:v1", [
        "optimizer.weight_decay=0.5", "optimizer.warmup_ratio=0.0", "optimizer.learning_rate=0.01", "optimizer.clip_norm=1.0"]).optimizer
    settings.overrides = ((r"vision_tower/layers_-1/.*", 1e-3), (r"vision_tower/.*", 4e-3))
    names = list(params)
    transform, _ = optimizer.build(settings, 10, names, (), {FC1: 4, names[1]: 0}, masks)
    other, _ = optimizer.build(settings, 10, names, (), {FC1: 2, names[1]: 0}, {})
    first = lambda transform: jax.jit(lambda grads, params: transform.update(grads, transform.init(params), params))
    (updates, state), (updates_alone, _) = first(transform)(grads, params), first(other)(grads_alone, alone)
    assert (updates[FC1][:2] == 0).all()
    np.testing.assert_allclose(updates[FC1][2:], updates_alone[FC1], rtol=1e-6)
    np.testing.assert_allclose(updates[names[1]], updates_alone[names[1]], rtol=1e-6)
    assert (optax.tree.get(state, "mu")[FC1][:2] == 0).all() and (optax.tree.get(state, "nu")[FC1][:2] == 0).all()
    moved = optax.apply_updates(params, updates)[FC1]
    assert moved[:2].tobytes() == params[FC1][:2].tobytes() and (moved[2:] != params[FC1][2:]).all()


def test_overrides_that_reach_only_frozen_layers_are_refused():
    settings = load_config(f"{ROOT}/configs/finetune.py:v1", []).optimizer
    masks, names = {FC1: np.array([False, False, True, True])}, [FC1, "projector/linear_0/kernel"]
    build = lambda: optimizer.build(settings, 10, names, (), {FC1: 4, names[1]: 0}, masks)
    settings.overrides = ((r"vision_tower/layers_0/.*", 1e-3),)
    with pytest.raises(UsageError, match=r"overrides' has 'vision_tower/layers_0/.\*', which matches no trainable parameter"):
        build()
    settings.overrides = ((r"vision_tower/.*", 1e-3), (LAST_TWO, 1e-4))
    with pytest.raises(UsageError, match="but earlier entries match all its parameters"):
        build()
    settings.overrides = ((LAST_TWO, 1e-4),)
    build()


def test_a_base_rate_that_no_trained_layer_has_is_said():
    cfg = load_config(f"{ROOT}/configs/finetune.py:v1", [])
    cfg.optimizer.overrides = ((LAST_TWO, 1e-4),)
    sizes, masks = {FC1: 4}, {FC1: np.array([False, False, True, True])}
    assert any("optimizer.learning_rate" in said for said in void_keys.of_optimizer(cfg, [FC1], (), sizes, masks))
    assert not void_keys.of_optimizer(cfg, [FC1], (), sizes, {})


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    """Three updates of a model that is made here. Of the two layers six arrays each are trained: a save has few."""
    folder = tmp_path_factory.mktemp("layers")
    write_model(folder / "start", random_checkpoint(CFG).replace(files={"tokenizer.model": SAMPLE / "tokenizer.model"}))
    (folder / "train.json").write_text(json.dumps(json.loads((SAMPLE / "vqa_train.json").read_text())[:8]))
    keys = {"init": folder / "start", "data.train": folder / "train.json", "data.images": images(), "data.workers": 0, "data.packing": False,
            "batch_size": 4, "micro_batches": 1, "total_steps": 3, "max_length": 160, "remat": "none", "log_every": 1,
            "checkpoint.every_steps": 2, "checkpoint.keep": 9, "samples_every": 0, "mesh.data": 1, "mesh.fsdp": 2,
            "optimizer.warmup_ratio": 0.0, "optimizer.weight_decay": 0.1, "optimizer.learning_rate": 1e-3}
    cfg = load_config(f"{ROOT}/configs/finetune.py:llava15", [f"{key}={value}" for key, value in keys.items()])
    cfg.trainable = ("projector/.*", r"vision_tower/layers_-[12]/(layer_norm2|mlp)/.*")
    cfg.optimizer.overrides = ((r"vision_tower/.*", 1e-4),)
    return cfg


@pytest.fixture(scope="module")
def run(cfg, tmp_path_factory):
    """(workdir, what the run printed)."""
    workdir = tmp_path_factory.mktemp("runs") / "run"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert fit(cfg, workdir)
    return workdir, said.getvalue()


def changed(before, after):
    return {name for name in before.tensors if before.read(name).tobytes() != np.asarray(after.read(name), before.read(name).dtype).tobytes()}


def test_a_run_moves_the_last_layers_that_are_used_and_no_other(cfg, run):
    """Of four layers the features need three; the last two of those are trained, biases and norms too."""
    before, after = open_checkpoint(cfg.init), open_checkpoint(run[0])
    moved = changed(before, after)
    wanted = {name for name in before.tensors if re.match(r"projector/|vision_tower/layers_[12]/(layer_norm2|mlp)/", name)}
    assert moved == wanted and len(wanted) == 2 + 2 * 6
    move = lambda name: np.abs(after.read(name) - before.read(name)).max()
    # Adam moves a parameter by about its rate in an update: a tenth for the tower.
    assert move("vision_tower/layers_2/mlp/fc1/kernel") < 0.2 * move("projector/linear_0/kernel")
    assert f"{sum(before.read(name).size for name in wanted):,} of " in run[1], "it says how many values are trained"


def test_resuming_is_bit_exact(cfg, run, tmp_path):
    again = set_back(run[0], tmp_path / "run", last=3, to=2)
    assert fit(cfg, again)
    one, two = open_checkpoint(run[0]), open_checkpoint(again)
    assert one.step == two.step == 3
    for name in one.tensors:
        assert one.read(name).tobytes() == two.read(name).tobytes(), name
