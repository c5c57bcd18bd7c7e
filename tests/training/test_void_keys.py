"""A key that another key makes void is obeyed, refused, or said: for every pair in training and eval recipes."""

import json
import re
from pathlib import Path

import jax
import pytest

from llavamed_jax.cli import common
from llavamed_jax.cli import train as train_command
from llavamed_jax.cli.eval import main as evaluate
from llavamed_jax.cli.train import main as train
from llavamed_jax.datasets.registry import SETS
from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation import void as eval_void
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import optimizer as optimizers
from llavamed_jax.training import program, trainer, void_keys
from llavamed_jax.training import recipe as recipes
from llavamed_jax.training.trainer import fit
from tests.support import training_runs as runs
from tests.support.training_runs import SAMPLE, FakeStep

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TRAINING = sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "common")
EVAL = sorted(path.stem for path in (CONFIGS / "eval").glob("*.py") if path.stem != "common")


def training(name, *overrides):
    return common.load_config(f"{CONFIGS / name}.py", overrides)


def said(sentences, key):
    """What is said of a key; None where nothing is."""
    return next((line for line in sentences if line.startswith(f"the config key {key!r} is ")), None)


# ---- how long a run is

@pytest.mark.parametrize("overrides, wanted", [
    (["epochs=3"], (3, None)), (["total_steps=7"], (None, 7)), ([], (None, 36)), (["epochs=3", "total_steps=none"], (3, None)),
    (["total_steps=7", "epochs=none"], (None, 7)), (["epochs=none"], (None, 36))])
def test_the_length_that_is_typed_counts_in_a_recipe_of_steps(overrides, wanted, capsys):
    config = train_command._configured(f"{CONFIGS}/demo.py:vqa", overrides)
    assert (config.epochs, config.total_steps) == wanted
    assert ("has no effect" in capsys.readouterr().out) == (overrides == ["epochs=3"])


@pytest.mark.parametrize("overrides, wanted", [
    ([], (3, None)), (["total_steps=7"], (None, 7)), (["epochs=5"], (5, None)), (["total_steps=7", "epochs=none"], (None, 7))])
def test_the_length_that_is_typed_counts_in_a_recipe_of_epochs(overrides, wanted, capsys):
    config = train_command._configured(f"{CONFIGS}/finetune.py:small", overrides)
    assert (config.epochs, config.total_steps) == wanted
    out = capsys.readouterr().out
    assert ("total_steps is 7, so epochs (3 in the recipe) has no effect" in out) == (overrides == ["total_steps=7"])


def test_an_argument_that_a_key_overrules_is_said(capsys):
    assert train_command._configured(f"{CONFIGS}/vqa_rad.py:epochs=9,protocol=paper", ["epochs=5", "protocol=clean"]).epochs == 5
    out = capsys.readouterr().out
    assert "epochs is 5 because of --config.epochs; the recipe argument epochs=9 has no effect" in out
    assert "protocol is clean because of --config.protocol; the recipe argument protocol=paper has no effect" in out
    assert train_command._configured(f"{CONFIGS}/vqa_rad.py:epochs=9", ["total_steps=5"]).total_steps == 5
    assert "so epochs (9 in the recipe) has no effect" in capsys.readouterr().out
    train_command._configured(f"{CONFIGS}/vqa_rad.py:epochs=9", ["epochs=9"])
    assert not capsys.readouterr().out


@pytest.mark.parametrize("recipe", ["demo.py:warmup", "finetune.py:small", "vqa_rad.py:small,epochs=9"])
def test_two_lengths_are_a_wrong_command_line(recipe, tmp_path, capsys):
    words = ["--config", f"{CONFIGS}/{recipe}", "--workdir", str(tmp_path / "run"), "--config.epochs=3", "--config.total_steps=5"]
    assert train(words) == 2 and not (tmp_path / "run").exists()
    assert "'epochs' (3) and 'total_steps' (5) are both given" in capsys.readouterr().err


def test_epochs_of_a_recipe_of_steps_are_trained(tmp_path, capsys, monkeypatch):
    """The demo's recipe has steps: once, `epochs` was ignored there."""
    monkeypatch.setattr(program, "make_mesh", lambda spec, *_: make_mesh(spec, jax.devices()[:1]))
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    start, data = runs.write_start(tmp_path / "start"), runs.write_data(tmp_path)
    words = ["--config", f"{CONFIGS}/demo.py:vqa", "--workdir", str(tmp_path / "run"), f"--config.init={start}", "--config.epochs=2",
             f"--config.data.train={data / 'train.json'}", f"--config.data.images={runs.images()}", "--config.batch_size=4", "--config.max_length=40",
             "--config.trainable=[\"projector/.*\"]"]
    assert train(words) == 0
    assert "12 samples, 6 updates of 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["resolved"]["total_steps"] == 6


# ---- the other keys of training recipes

@pytest.mark.parametrize("name", TRAINING)
def test_no_training_recipe_has_a_void_key_of_its_own(name):
    assert not void_keys.sentences(training(name))
    if name not in ("small", "demo", "smol"):  # these train one model only
        assert not void_keys.sentences(common.load_config(f"{CONFIGS / name}.py:small"))


VOID = {
    "epochs": (["total_steps=5"], "total_steps is 5"),
    "data.row_length": (["data.packing=false", "data.row_length=64"], "data.packing is false"),
    "data.samples": (["data.samples=x.json", "samples_every=0"], "samples_every is 0"),
    "checkpoint.keep_best": (["checkpoint.keep_best=true", "data.validation=x.json", "checkpoint.every_steps=0"], "only the last step"),
    "trainable": (['trainable=["decoder/.*", ("decoder/embed_tokens/embedding", ("<s>",))]'], "another entry trains all of"),
    "protocol": (["protocol=paper", f"data.train={SAMPLE / 'vqa_train.json'}"], "none of the data has VQA-RAD's own layout"),
    "data.images": ([f"data.train={SAMPLE}", f"data.images={SAMPLE / 'images'}"], "all data sets have their own folder of images"),
}


@pytest.mark.parametrize("key", VOID)
def test_a_void_key_of_training_is_said(key):
    overrides, why = VOID[key]
    config = training("finetune", *overrides)
    recipes.check(config)
    line = said(void_keys.sentences(config), key)
    assert line and why in line and "has no effect" in line


def test_what_is_used_is_not_called_void(tmp_path):
    mixed = f'[{{"path": "{SAMPLE}"}}, {{"path": "{SAMPLE / "vqa_train.json"}", "images": "{SAMPLE / "images"}"}}]'
    for overrides in ([f"data.train={SAMPLE}", "protocol=paper"], [f"data.train={mixed}", "protocol=paper"],
                      [f"data.train={SAMPLE / 'vqa_train.json'}", f"data.images={SAMPLE / 'images'}"],
                      [f"data.train={SAMPLE}", f"data.images={SAMPLE / 'images'}", f"data.validation={SAMPLE / 'vqa_train.json'}"],
                      ["data.samples=x.json", "samples_every=5"], ["data.row_length=64", "data.packing=true"],
                      ["checkpoint.keep_best=true", "data.validation=x.json", "checkpoint.every_steps=10"]):
        config = training("vqa_rad", *overrides)
        found = void_keys.sentences(config)
        assert not found, (overrides, found)
    config = training("finetune", f"data.train={mixed}", f"data.images={SAMPLE / 'images'}")
    assert "data.images" in void_keys.sentences(config)[0]
    config = training("vqa_rad", f'data.train=[{{"path": "{SAMPLE}", "images": "x"}}]')
    assert "'images': 'x'" in void_keys.sentences(config)[0] and "the images are in the folder" in void_keys.sentences(config)[0]


def test_a_run_prints_what_it_does_not_use(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(program, "make_mesh", lambda spec, *_: make_mesh(spec, jax.devices()[:1]))
    monkeypatch.setattr(trainer, "make_train_step", FakeStep())
    cfg = runs.shrunk(runs.write_start(tmp_path / "start"), runs.write_data(tmp_path), epochs=3, total_steps=1, **{"data.row_length": 64})
    cfg.optimizer.overrides = ((".*", 1e-4),)
    assert fit(cfg, tmp_path / "run")
    out = capsys.readouterr().out
    for key in ("epochs", "data.row_length", "optimizer.learning_rate"):
        assert re.search(f"^warning: the config key '{key}' is .* but has no effect: ", out, re.MULTILINE), key


def test_a_tower_beside_a_random_model_is_refused():
    with pytest.raises(UsageError, match="'vision_tower' is 'x', but init is 'preset:small', whose tower is random"):
        recipes.check(training("small", "vision_tower=x"))


NAMES = ("decoder/layers/mlp/up_proj/kernel", "decoder/norm/scale", "projector/linear_0/bias")


@pytest.mark.parametrize("overrides, is_void", [
    ([("decoder/.*", 1e-4), ("decoder/norm/.*", 1e-3)], True), ([(".*", 1e-4), ("projector/.*", 1e-3)], True),
    ([("decoder/norm/.*", 1e-3), ("decoder/.*", 1e-4)], False), ([("decoder/.*", 1e-4), ("projector/.*", 1e-3)], False),
    ([("decoder/layers/.*", 1e-4), ("decoder/norm/.*", 1e-4), ("decoder/.*", 1e-3)], True)])
def test_an_override_that_those_before_it_leave_nothing_is_refused(overrides, is_void):
    cfg = training("finetune").optimizer
    cfg.overrides = tuple(overrides)
    if not is_void:
        optimizers.build(cfg, 10, NAMES)
        return
    with pytest.raises(UsageError, match="but earlier entries match all its parameters"):
        optimizers.build(cfg, 10, NAMES)


def test_a_rate_or_a_decay_that_reaches_nothing_is_said():
    cfg = training("finetune", "optimizer.weight_decay=0.1")
    assert not void_keys.of_optimizer(cfg, NAMES)
    cfg.optimizer.overrides = (("decoder/.*", 1e-4),)
    assert not void_keys.of_optimizer(cfg, NAMES)
    cfg.optimizer.overrides = (("decoder/.*", 1e-4), ("projector/.*", 1e-3))
    assert said(void_keys.of_optimizer(cfg, NAMES), "optimizer.learning_rate")
    assert said(void_keys.of_optimizer(cfg, NAMES[1:]), "optimizer.weight_decay")
    table = ["decoder/embed_tokens/embedding"]
    assert said(void_keys.of_optimizer(cfg, table, table), "optimizer.weight_decay")


# ---- eval recipes

def test_no_eval_recipe_has_a_void_key_of_its_own():
    for name in EVAL:
        for source in ("checkpoint", "endpoint", "write_llava", "preflight"):
            assert not eval_void.sentences(common.load_config(f"{CONFIGS}/eval/{name}.py"), (), source), (name, source)


EVAL_VOID = [
    ("slake", ["data.trained_on_images=x"], "checkpoint", "data.trained_on_images", "data.trained_on is empty"),
    ("slake", ["protocol=paper"], "checkpoint", "protocol", "data.name is slake"),
    ("vqa_rad:demo", ["protocol=paper"], "checkpoint", "protocol", "data.held_out"),
    ("chat", ["protocol=paper"], "checkpoint", "protocol", "data.name is chat"),
    ("chat", ["data.split=train"], "checkpoint", "data.split", "one split"),
    ("slake", ["data.name=vqa_rad", "data.language=zh"], "checkpoint", "data.language", "vqa_rad has no such key"),
    ("pathvqa", ["data.name=slake", "data.images=x"], "checkpoint", "data.images", "slake has no such key"),
    ("captions", ["data.name=choices", "data.question=Describe"], "checkpoint", "data.question", "choices has no such key"),
    ("slake", ["judge.temperature=0.5"], "checkpoint", "judge.temperature", "judge.model is empty"),
    ("vqa_rad", ["judge.prompt=x"], "predictions", "judge.prompt", "judge.model is empty"),
    ("vqa_rad", ["judge.price_prompt=1"], "checkpoint", "judge.price_prompt", "judge.model is empty"),
    ("slake", ["generation.temperature=0.5"], "predictions", "generation.temperature", "no model is asked with --predictions"),
    ("vqa_rad:demo", [], "predictions", "organ_question", "no model is asked with --predictions"),
    ("slake", ["generation.max_new_tokens=5"], "write_llava", "generation.max_new_tokens", "no model is asked with --write_llava"),
    ("slake", ["published=from_llava"], "write_llava", "published", "nothing is scored"),
    ("slake", ["generation.batch_size=5"], "endpoint", "generation.batch_size", "--concurrency"),
    ("slake", ["seed=5"], "preflight", "seed", "no model is asked with --preflight"),
    ("slake", ["medevalkit.slake_case=true"], "checkpoint", "medevalkit.slake_case", "scoring is not medevalkit"),
    ("slake", ["scoring=medevalkit", "medevalkit.slake_twice=true"], "checkpoint", "medevalkit.slake_twice", "judge.model is empty"),
    ("vqa_rad", ["scoring=medevalkit", "judge.model=m", "judge.prompt=x"], "checkpoint", "judge.prompt", "a judge's prompt of its own"),
    ("slake", ["scoring=lmms_eval", "judge.model=m"], "checkpoint", "judge.model", "scoring=lmms_eval has no judge"),
    ("mmmu_med", ["scoring=medevalkit", "judge.model=m"], "checkpoint", "judge.model", "no judge for MMMU"),
    ("vqa_rad", ["scoring=medevalkit"], "write_llava", "scoring", "nothing is scored"),
]


@pytest.mark.parametrize("name, overrides, source, key, why", EVAL_VOID)
def test_a_void_key_of_an_evaluation_is_said(name, overrides, source, key, why):
    file, _, argument = name.partition(":")
    cfg = common.load_config(f"{CONFIGS}/eval/{file}.py:{argument}", overrides)
    line = said(eval_void.sentences(cfg, [override.partition("=")[0] for override in overrides], source), key)
    assert line and why in line and "has no effect" in line


@pytest.mark.parametrize("name, overrides, source", [
    ("vqa_rad", ["protocol=paper"], "checkpoint"), ("slake", ["data.language=zh", "generation.batch_size=5"], "checkpoint"),
    ("slake", ["protocol=paper", "data.trained_on=data/vqa_rad"], "checkpoint"), ("captions", ["data.question=x"], "endpoint"),
    ("slake", ["judge.model=m", "judge.temperature=0.5"], "checkpoint"), ("chat", ["judge.reading=original"], "checkpoint"),
    ("slake", ["data.trained_on=x", "data.trained_on_images=y"], "predictions"), ("pathvqa", ["data.images=x"], "checkpoint"),
    ("parquet", ["data.images=x", "data.language=zh"], "checkpoint"), ("slake", ["generation.batch_size=8"], "preflight")])
def test_what_an_evaluation_uses_is_not_called_void(name, overrides, source):
    cfg = common.load_config(f"{CONFIGS}/eval/{name}.py", overrides)
    assert not eval_void.sentences(cfg, [override.partition("=")[0] for override in overrides], source)


def test_every_set_says_which_keys_it_follows():
    names = {common.load_config(f"{CONFIGS}/eval/{name}.py").data.name for name in EVAL}
    assert names == {*SETS, "chat"} and not any(eval_void._followed(name) is None for name in names)


def test_an_evaluation_says_it_on_stderr(tmp_path, capsys):
    words = ["--config", f"{CONFIGS}/eval/vqa_rad.py:demo", "--config.protocol=paper", "--checkpoint", "preset:small",
             "--workdir", str(tmp_path / "w"), "--dry_run"]
    assert evaluate(words) == 0
    said = capsys.readouterr().err
    assert "warning: the config key 'protocol' is 'paper' but has no effect: with data.held_out each row is asked once" in said
