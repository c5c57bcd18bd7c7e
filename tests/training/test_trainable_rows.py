"""Stage 1 of LLaVA-Med v1.0: the rows of `<im_start>` and `<im_end>` are trained, and no other row of the embedding moves by a bit."""

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from llavamed_jax.checkpoints.assemble.image_tokens import add_image_tokens
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli.common import load_config
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UsageError
from llavamed_jax.training import optimizer, recipe, trainer
from llavamed_jax.training.recipe import TABLE
from llavamed_jax.training.state import partition, tokens_of
from llavamed_jax.training.trainer import fit
from tests.support.training_runs import FakeStep, images

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
START, END = 1025, 1026
PAIR = (TABLE, ("<im_start>", "<im_end>"))


@pytest.fixture
def start(tmp_path):
    """A v1.0 model before stage 1, with and without the image tokens: `start(has_tokens)`."""
    def make(has_tokens):
        cfg = LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), DecoderConfig(1024, 16, 24, 1, 2, 2, 8, 1e-5, 1e4, 256), "linear",
                          image_aspect_ratio="square", max_length=160, source="llava")
        checkpoint = random_checkpoint(cfg).replace(files={"tokenizer.model": SAMPLE / "tokenizer.model"})
        if has_tokens:
            checkpoint, _ = add_image_tokens(checkpoint, tmp_path)
        write_model(tmp_path / "start", checkpoint)
        return tmp_path / "start"
    return make


def train(start, workdir, **changes):
    """Two records with an image and two of text alone, two updates of what `pretrain.py:v1` trains."""
    records = json.loads((SAMPLE / "alignment.json").read_text())[:4]
    for record in records[2:]:
        record.pop("image")
        record["conversations"][0]["value"] = "What is a hilum?"
    (workdir.parent / "train.json").write_text(json.dumps(records))
    keys = {"init": start, "data.train": workdir.parent / "train.json", "data.images": images(), "data.workers": 0,
            "data.packing": False, "batch_size": 8, "micro_batches": 1, "total_steps": 2, "max_length": 160, "remat": "none",
            "log_every": 1, "mesh.data": 1, "mesh.fsdp": 1, "optimizer.warmup_ratio": 0.0, **changes}
    cfg = load_config(f"{ROOT}/configs/pretrain.py:v1", [f"{key}={value}" for key, value in keys.items()])
    fit(cfg, workdir)
    return open_checkpoint(start), open_checkpoint(workdir)


def test_a_run_moves_two_rows_and_the_projector(start, tmp_path):
    """On two devices, over which the table lies."""
    before, after = train(start(True), tmp_path / "run", **{"optimizer.weight_decay": 0.1, "mesh.fsdp": 2})
    changed = {name for name in before.tensors if not np.array_equal(before.read(name), after.read(name))}
    assert changed == {"projector/linear_0/kernel", "projector/linear_0/bias", TABLE}
    rows = np.flatnonzero((before.read(TABLE) != after.read(TABLE)).any(axis=1))
    assert rows.tolist() == [START, END]


def test_a_model_without_the_tokens_trains_its_projector_and_says_so(start, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer, "make_train_step", step := FakeStep())
    train(start(False), tmp_path / "run")
    assert step.state.trainable.keys() == {"projector/linear_0/kernel", "projector/linear_0/bias"}
    assert "this model has no <im_start>, <im_end>, so no row of the embedding is trained" in capsys.readouterr().out


def test_a_recipe_that_trains_nothing_of_the_model_is_refused(start, tmp_path):
    with pytest.raises(UsageError, match="'trainable' names only the tokens <im_start>, <im_end>, and this model has none of them"):
        train(start(False), tmp_path / "run", trainable=(PAIR,))


def test_a_token_that_is_none_is_named(start, tmp_path):
    with pytest.raises(UsageError, match="'trainable' names the tokens <im_stat>, which the model's tokenizer lacks"):
        train(start(True), tmp_path / "run", trainable=("projector/.*", (TABLE, ("<im_start>", "<im_stat>"))))


def test_a_recipe_that_trains_the_whole_table_trains_it_whole():
    assert tokens_of(("projector/.*", PAIR)) == ["<im_start>", "<im_end>"]
    assert tokens_of(("projector/.*", "decoder/.*", PAIR)) == [] == tokens_of(("projector/.*",))
    trained, frozen = partition({TABLE: 0, "decoder/lm_head/kernel": 0}, (PAIR,))
    assert set(trained) == {TABLE} and set(frozen) == {"decoder/lm_head/kernel"}


@pytest.mark.parametrize("entry", [(TABLE,), (TABLE, "<im_start>"), (TABLE, ()), (TABLE, (3,)),
                                   ("decoder/lm_head/kernel", ("<im_start>",))])
def test_pairs_that_are_none(entry):
    with pytest.raises(UsageError, match="a regular expression, or a pair of 'decoder/embed_tokens/embedding' and tokens, was expected"):
        cfg = load_config(f"{ROOT}/configs/pretrain.py:v1", [])
        cfg.trainable = (entry,)
        recipe.check(cfg)


def test_weight_decay_leaves_a_table_of_few_rows_alone():
    settings = load_config(f"{ROOT}/configs/pretrain.py:v1", ["optimizer.weight_decay=0.5", "optimizer.warmup_ratio=0.0"]).optimizer
    params = {TABLE: np.ones((4, 2), np.float32), "projector/linear_0/kernel": np.ones((2, 2), np.float32)}
    transform, _ = optimizer.build(settings, 10, list(params), [TABLE])
    zero = {name: np.zeros_like(x) for name, x in params.items()}
    moved = jax.jit(lambda x: optax.apply_updates(x, transform.update(zero, transform.init(x), x)[0]))(params)
    assert np.array_equal(moved[TABLE], params[TABLE]) and (moved["projector/linear_0/kernel"] < 1).all()
