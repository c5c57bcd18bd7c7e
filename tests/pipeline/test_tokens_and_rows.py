"""Tokens for which a model has no row are refused before the first update, wherever they come from; and long values are not echoed."""

import json
from dataclasses import replace

import pytest

from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli.train import main as train
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import LONGEST, UsageError, UserError, without_middle
from llavamed_jax.pipeline import lengths
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.training import recipe as recipes
from llavamed_jax.training.rows import Data
from llavamed_jax.training.start import open_start
from llavamed_jax.training.trainer import fit
from tests.support import training_runs as runs
from tests.support.training_runs import ROOT, SAMPLE

TOKENIZER = Tokenizer.load(SAMPLE / "tokenizer.model")


def model(rows, **changes):
    return LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), DecoderConfig(rows, 16, 24, 1, 2, 1, 8, 1e-5, 1e4, 128, architecture="mistral"),
                       max_length=64, **{"template": "v1.5:mistral_instruct", **changes})


@pytest.fixture
def started(tmp_path):
    """`started(rows, …)`: the recipe of a tiny model whose table has so many rows, with the sample's tokenizer."""
    def started(rows, added=(), cfg=None, **changes):
        files = {"tokenizer.model": SAMPLE / "tokenizer.model"}
        if added:
            (tmp_path / "added_tokens.json").write_text(json.dumps({token: TOKENIZER.vocab_size + i for i, token in enumerate(added)}))
            files["added_tokens.json"] = tmp_path / "added_tokens.json"
        start = tmp_path / f"start {len(list(tmp_path.glob('start *')))}"
        write_model(start, random_checkpoint(cfg or model(rows)), files=files)
        return runs.shrunk(start, runs.write_data(tmp_path), **changes)
    return started


@pytest.mark.parametrize("packing", [True, False])
def test_a_tokenizer_larger_than_the_table_is_refused_before_the_first_update(started, tmp_path, packing):
    cfg = started(600, **{"data.packing": packing, "data.row_length": 64 if packing else 0})
    with pytest.raises(UserError, match=r"record \d+ has the token \d+, but the model's embedding table has 600 rows; "
                                        rf"the tokenizer of {TOKENIZER.vocab_size} tokens does not belong to the model") as error:
        fit(cfg, tmp_path / "run")
    assert "no step had been saved" in str(error.value) and not (tmp_path / "run" / "recipe.json").exists()


def test_tokens_that_no_text_uses_are_no_trouble(started):
    """A tokenizer may have a few more than the table, as released ones do."""
    highest = Data.open(cfg := started(TOKENIZER.vocab_size), open_start(cfg)).plan.lengths.highest[0]
    assert 3 < highest < TOKENIZER.vocab_size - 1
    processor = Processor(model(TOKENIZER.vocab_size), TOKENIZER)
    data = read_training(cfg.data.train, cfg.data.images)
    assert lengths.measure(data, processor, 40, rows=highest + 1).highest[0] == highest
    with pytest.raises(UserError, match=f"has the token {highest}, but .* has {highest} rows"):
        lengths.measure(data, processor, 40, rows=highest)


@pytest.mark.parametrize("key", ["data.validation", "data.samples"])
def test_validation_and_sample_data_too(started, tmp_path, key):
    added = "<odd>"
    records = [{"id": "odd one", "conversations": [{"from": "human", "value": f"what is {added}?"}, {"from": "gpt", "value": "yes"}]}]
    (tmp_path / "odd.json").write_text(json.dumps(records))
    cfg = started(TOKENIZER.vocab_size, [added], samples_every=2, **{key: tmp_path / "odd.json"})
    with pytest.raises(UserError, match=f"record 'odd one' has the token {TOKENIZER.vocab_size}, but"):
        Data.open(cfg, open_start(cfg))


def test_what_was_measured_for_a_larger_table_is_checked_again(started, tmp_path, monkeypatch):
    monkeypatch.setattr(lengths, "LARGE", 1)
    cfg = started(TOKENIZER.vocab_size)
    data, processor = read_training(cfg.data.train, cfg.data.images), Processor(model(TOKENIZER.vocab_size), TOKENIZER)
    found = lengths.measure(data, processor, 40, cache=tmp_path / "cache")
    assert lengths.measure(data, processor, 40, cache=tmp_path / "cache").highest == found.highest and any((tmp_path / "cache").iterdir())
    with pytest.raises(UserError, match="has 600 rows"):
        lengths.measure(data, processor, 40, cache=tmp_path / "cache", rows=600)


@pytest.mark.parametrize("template", ["v1.5:mistral_instruct", "up:vicuna_v1", "v1.0:v0"])
@pytest.mark.parametrize("added, sentence", [
    ((), "<im_start>"), (("<im_start>", "<im_end>"), "has the token|has no free rows"),
    (("<im_start>",), "lacks <im_end>|has no free rows")])
def test_image_tokens_without_rows_are_refused(started, tmp_path, template, added, sentence):
    """Without the tokens v1.5's text would spell `<im_start>` in letters; beyond the table its embedding would be NaN."""
    cfg = started(None, added, model(TOKENIZER.vocab_size, use_start_end=True, template=template), template=template, max_length=120)
    with pytest.raises(UserError, match=sentence):
        fit(cfg, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


def test_image_tokens_with_rows_are_used(started):
    cfg = model(TOKENIZER.vocab_size + 2, use_start_end=True)
    recipe = started(None, ("<im_start>", "<im_end>"), cfg)
    data = Data.open(recipe, open_start(recipe))
    assert data.plan.lengths.highest[0] == TOKENIZER.vocab_size + 1
    ids, _ = data.processor.training_example([{"from": "human", "value": "<image> is it?"}, {"from": "gpt", "value": "yes"}], 1)
    at = ids.index(-200)
    assert ids[at - 1:at + 2] == [TOKENIZER.vocab_size, -200, TOKENIZER.vocab_size + 1]
    fewer = cfg.replace(decoder=replace(cfg.decoder, vocab_size=cfg.decoder.vocab_size - 1))
    recipe = started(None, ("<im_start>", "<im_end>"), fewer)
    with pytest.raises(UserError, match=f"has the token {TOKENIZER.vocab_size + 1}, but the .* has {TOKENIZER.vocab_size + 1} rows"):
        Data.open(recipe, open_start(recipe))


# ---- long values

LONG = "x" * 100_000


@pytest.mark.parametrize("override", [
    f"template={LONG}", f"tokenizer={LONG}", f"init={LONG}", f"init=preset:{LONG}", f"data.train={LONG}", f"data.images={LONG}",
    f"remat={LONG}", f"batch_size={LONG}", f"trainable=['{LONG}(']", f"trainable=['{LONG}']", f"trainable={LONG}", f"{LONG}=1",
    f"optimizer.overrides=[['{LONG}', 1.0]]", f"optimizer.overrides=[['{LONG}', 100.0]]", f"data.train=[{{'{LONG}': 1}}]",
    f"data.train=[{{'path': '{LONG}'}}]", f"protocol={LONG}", f"name={LONG}", f"loss_weighting={LONG}"])
def test_an_error_does_not_echo_a_long_value(override, tmp_path, capsys):
    status = train(["--config", f"{ROOT}/configs/demo.py:warmup", "--workdir", str(tmp_path / "run"), f"--config.{override}"])
    said = capsys.readouterr().err
    assert status in (1, 2) and said.startswith("error: ") and len(said) < LONGEST + 200
    key = override.partition("=")[0]
    assert key in said or key == LONG or key.startswith("data.")


def test_a_cut_sentence_keeps_its_beginning_and_its_end():
    error = UsageError(f"the config key 'x' is {LONG!r}; a number was expected")
    assert str(error).startswith("the config key 'x' is 'xxx") and str(error).endswith("xxx'; a number was expected")
    assert "98," in str(error) and "characters left out" in str(error) and len(str(error)) < LONGEST + 60
    assert without_middle("a" * LONGEST) == "a" * LONGEST
    assert str(UserError(f"{error}; step 3 is saved")).endswith("; step 3 is saved")
    with pytest.raises(UsageError, match="'name' has 100,000 characters; .*at most 200"):
        recipes.check(runs.shrunk("x", tmp := SAMPLE, name=LONG, **{"data.train": tmp / "instruct.json"}))
