"""What `train.py` says to a wrong command line, and how it ends: the exit statuses of the interface."""

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.common import base
from llavamed_jax.checkpoints.tree.store import newest_intact_step
from llavamed_jax.cli import common
from llavamed_jax.cli.train import main
from llavamed_jax.errors import UsageError
from llavamed_jax.models.stacking import REMAT_POLICIES
from llavamed_jax.recipes import recipe_arguments
from llavamed_jax.training import place, recipe
from llavamed_jax.utils.nested import flatten
from tests.support import xla
from tests.support.training_runs import images, write_start

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
CONFIGS = ROOT / "configs"


def complaint(capsys, *words):
    """(exit status, the one line on stderr)."""
    status = main([str(word) for word in words])
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return status, lines[0]


# ---- exit 2

@pytest.mark.parametrize("words, named", [
    (["--config.nonsense=1"], "'nonsense'"),
    (["--config.optimizer.learning_rat=1"], "optimizer.learning_rate"),
    (["--config.optimizer=1"], "optimizer.learning_rate"),
    (["--config.batch_size=many"], "'batch_size'"),
    (["--config.batch_size=0"], "'batch_size'"),
    (["--config.batch_size=2.5"], "'batch_size'"),
    (["--config.micro_batches=3"], "a multiple of micro_batches (3)"),
    (["--config.checkpoint.keep_best=perhaps"], "'checkpoint.keep_best'"),
    (["--config.checkpoint.keep_best=true"], "data.validation"),
    (["--config.trainable=projector"], "'trainable'"),
    (["--config.trainable=[]"], "'trainable'"),
    (["--config.remat=some"], "none or full"),
    (["--config.optimizer.learning_rate=nan"], "finite"),
    (["--config.optimizer.learning_rate=inf"], "finite"),
    (["--config.optimizer.learning_rate=1e30"], "at most 10"),
    (["--config.optimizer.overrides=[['a', 1e30]]"], "0 to 10"),
    (["--config.nan_limit=0"], "'nan_limit'"),
    (["--config.samples_every=-1"], "'samples_every'"),
    (["--config.data.workers=100000000"], "at most 1024"),
    (["--config.data.row_length=1000000000"], "at most 131072"),
    (["--config.batch_size=99999999999999999999"], "at most 1048576"),
    (["--config.epochs=1000000"], "at most 10000"),
    (["--config.total_steps=99999999999999999999"], "at most 1000000000"),
    (["--config.init="], "'init' is empty"),
    (["--config.data.train="], "'data.train' is empty"),
    (["--config.data.validation="], "'data.validation' is empty; text or none"),
    (["--profile", "5"], "--profile"),
    (["--profile", "5:4"], "--profile"),
    (["--profile", "0:4"], "--profile"),
    (["--profile", "a:b"], "--profile"),
    (["--config.optimizer.weight_decay=nan"], "finite"),
    (["--config.checkpoint.every_minutes=nan"], "finite"),
    (["--config.optimizer.b1=2"], "less than 1"),
    (["--config.optimizer.b2=-1"], "less than 1"),
    (["--config.optimizer.warmup_ratio=5"], "0 to 1"),
    (["--config.optimizer.overrides=[['a', -1.0]]"], "-1.0"),
    (["--config.optimizer.overrides=[['a', 'b']]"], "'b'"),
    (["--config.optimizer.overrides=['a']"], "pairs"),
    (["--config.optimizer.overrides=[['(', 1.0]]"], "not a valid regular expression"),
    (["--config.trainable=[1]"], "regular expression"),
    (["--config.data.packing=3"], "'data.packing'"),
    (["--config.data.skip_limit=1.5"], "0 to 1"),
    (["--config.total_steps=none"], "total_steps"),
    (["--config.seed"], "--config.seed"),
    (["--nonsense"], "--nonsense"),
    (["stray"], "'stray'"),
])
def test_a_wrong_flag_key_or_value_is_named(capsys, tmp_path, words, named):
    status, line = complaint(capsys, "--config", CONFIGS / "demo.py", "--workdir", tmp_path / "run", *words)
    assert status == 2 and named in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("spec, named", [
    ("absent.py", "absent.py"), ("demo.py:nonsense", "'nonsense'"), ("pretrain.py:v15,13b", "'13b'"),
    ("pretrain.py:epochs=x", "epochs=N"), ("pretrain.py:protocol=paper", "'protocol=paper'"), ("vqa_rad.py:protocol=x", "clean"),
    ("pretrain.py:v1,llava15", "'llava15'"), ("pretrain.py:small,7b", "'7b'"),
])
def test_a_wrong_config_file_or_argument_is_named(capsys, tmp_path, spec, named):
    status, line = complaint(capsys, "--config", CONFIGS / spec, "--workdir", tmp_path)
    assert status == 2 and named in line


@pytest.mark.parametrize("text, said", [
    ("def get_config(arg=''):\n    return 1 / 0", "ZeroDivisionError at line 2"),
    ("def get_config(arg=''\n", "SyntaxError"),
    ("x = 1", "no get_config"),
    ("def get_config(arg=''):\n    return {}", "ConfigDict"),
    ("from ml_collections import ConfigDict\ndef get_config(arg=''):\n    return ConfigDict({'seed': 1})", "lacks the config keys"),
])
def test_a_config_file_that_is_wrong_says_where(capsys, tmp_path, text, said):
    (tmp_path / "c.py").write_text(text)
    status, line = complaint(capsys, "--config", tmp_path / "c.py", "--workdir", tmp_path / "run")
    assert status == 2 and said in line


def test_a_directory_and_a_config_that_exits_are_refused(capsys, tmp_path):
    status, line = complaint(capsys, "--config", CONFIGS, "--workdir", tmp_path / "run")
    assert status == 2 and "is a directory" in line and "demo.py" in line
    (tmp_path / "c.py").write_text("import sys\ndef get_config(arg=''):\n    sys.exit(0)")
    status, line = complaint(capsys, "--config", tmp_path / "c.py", "--workdir", tmp_path / "run")
    assert status == 2 and "SystemExit at line 3" in line
    status, line = complaint(capsys, "--config", CONFIGS / "demo.py", "--workdir", "")
    assert status == 2 and "--workdir is empty" in line


def test_none_leaves_open_what_may_be_open():
    cfg = common.load_config(str(CONFIGS / "demo.py"), ["template=none", "tokenizer=None", "remat=none"])
    assert cfg.template is None and cfg.tokenizer is None and cfg.remat == "none"
    recipe.check(cfg)


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_config_lists_every_key_in_the_order_of_the_recipes(capsys, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    with pytest.raises(SystemExit) as ended:
        main(["--help-config"])  # without --config, which is required elsewhere
    assert not ended.value.code
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= width
    source, at = inspect.getsource(base), 0
    for name in (line.partition(":")[0] for line in lines if not line.startswith(" ")):
        at += re.search(rf"\b{name.rpartition('.')[2]}\s*=", source[at:]).end()
    text = " ".join(line.strip() for line in lines)
    for wanted in ("remat: auto or none or full or qkvo or attention or minimal; default auto what a layer keeps", "init: text; required the checkpoint",
                   "optimizer.b1: number, 0 or more and less than 1; required", "data.skip_limit: number, 0 to 1; default 0.5",
                   "data.row_length: integer, 0 or more, at most 131,072; default 0", "protocol: clean or paper; default none",
                   "epochs: integer, more than 0, at most 10,000; default none", "name: text, at most 200 characters; required",
                   "data.packing: true or false; default true", "data.train: text or list; required"):
        assert wanted in text, wanted


def test_the_schema_says_the_defaults_of_the_common_recipe_and_the_choices_of_the_code():
    found = flatten(base("x", "y", "z", "w"))
    arguments = {"name", "init", "template", "data.train"}  # of `base`
    for name, key in recipe.SCHEMA.items():
        if name not in arguments:
            wanted = None if key.default is recipe.REQUIRED else key.default
            assert found[name] == wanted and type(found[name]) in (*key.types, type(None)), name
        assert key.meaning and (key.is_open or key.default is not None), name
    assert recipe.SCHEMA["remat"].choices == ("auto", "none", *REMAT_POLICIES)


def test_the_schema_needs_no_jax():
    code = "import sys; from llavamed_jax.training import recipe; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_missing_flag_is_named(capsys):
    status, line = complaint(capsys, "--config", CONFIGS / "demo.py")
    assert status == 2 and "--workdir" in line


def test_help_ends_with_0(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert not ended.value.code and "--workdir" in capsys.readouterr().out


@pytest.mark.parametrize("key, value, named", [
    ("tokenizer", "absent.model", "absent.model"), ("init", "nowhere", "the directory does not exist"), ("init", "preset:foo", "small, "),
    ("template", "nonsense", "v1.5:mistral_instruct"), ("tokenizer", "x" * 300, "File name too long"),
])
def test_a_value_that_names_nothing_is_named_with_its_key(capsys, tmp_path, key, value, named):
    status, line = complaint(capsys, "--config", CONFIGS / "demo.py", "--workdir", tmp_path, f"--config.{key}={value}")
    assert status == 2 and f"{key!r} is {value!r}" in line and named in line
    assert not (tmp_path / "recipe.json").exists()


# ---- exit 1

@pytest.mark.parametrize("key, value, named", [
    ("data.train", "absent.json", "absent.json"), ("data.images", "nowhere", "nowhere"),
])
def test_what_is_missing_is_named(capsys, tmp_path, key, value, named):
    status, line = complaint(capsys, "--config", CONFIGS / "demo.py", "--workdir", tmp_path, f"--config.{key}={value}")
    assert status == 1 and named in line
    assert not (tmp_path / "recipe.json").exists()


def test_a_workdir_in_use_ends_with_1(capsys, tmp_path):
    with place.locked(tmp_path):
        status, line = complaint(capsys, "--config", CONFIGS / "demo.py", "--workdir", tmp_path)
    assert status == 1 and "in use" in line


# ---- overrides and arguments

def test_overrides_have_the_type_of_their_key():
    cfg = common.load_config(str(CONFIGS / "demo.py"), [
        "optimizer.learning_rate=1", "batch_size=4", "checkpoint.keep_best=True", 'trainable=["a", "b"]', "total_steps=3",
        "data.validation=v.json", 'data.train=[{"path": "p", "weight": 2}]', 'optimizer.overrides=[["projector/.*", 1e-5]]'])
    assert type(cfg.optimizer.learning_rate) is float and cfg.batch_size == 4 and cfg.checkpoint.keep_best is True
    assert list(cfg.trainable) == ["a", "b"] and cfg.total_steps == 3 and cfg.data.validation == "v.json"
    assert cfg.data.train[0]["weight"] == 2 and cfg.optimizer.overrides[0][1] == 1e-5
    assert common.load_config(str(CONFIGS / "demo.py"), ["epochs=none"]).epochs is None
    recipe.check(cfg)


def test_recipe_arguments():
    args = recipe_arguments("v1,13b,epochs=9,protocol=paper", epochs=3, protocol="clean")
    assert (args.preset, args.epochs, args.protocol) == ("v1-13b", 9, "paper")
    assert recipe_arguments("").preset == "v15-7b" and recipe_arguments("small").preset == "small"
    assert recipe_arguments("b", words=("a", "b")).word == "b" and recipe_arguments("", words=("a", "b")).word == "a"
    with pytest.raises(UsageError):
        recipe_arguments("epochs=3")


@pytest.mark.parametrize("variable", ["XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION", None])
def test_memory_fraction_is_set_unless_the_user_did(monkeypatch, variable):
    for name in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "0.5")
    seen = {}
    common.run(lambda argv: seen.update({k: v for k, v in os.environ.items() if k.endswith("MEM_FRACTION")}), [])
    assert seen == ({variable: "0.5"} if variable else {"XLA_CLIENT_MEM_FRACTION": "0.95"})


# ---- the program itself

@pytest.mark.parametrize("moment, number", [("llavamed_jax.cli.compilation_cache", signal.SIGINT), ("config", signal.SIGTERM)])
def test_interrupted_before_it_begins_it_says_so_and_ends_with_1(tmp_path, moment, number):
    """While modules are imported, which Python names as it goes, and while the config is read."""
    (tmp_path / "c.py").write_text("import sys, time\ndef get_config(arg=''):\n    print('config', file=sys.stderr)\n    time.sleep(60)")
    command = [sys.executable, "-u", "-X", "importtime", "train.py", "--config", str(tmp_path / "c.py"), "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if line.split()[-1].startswith(moment):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert err.splitlines()[-1] == "error: interrupted before the run had begun" and not out


def test_interrupted_at_the_keyboard_saves_and_ends_with_75(tmp_path):
    """Ctrl-C reaches the whole process group, the loader's worker processes too; the run saves, and goes on from there."""
    write_start(tmp_path / "start")
    command = [sys.executable, "train.py", "--config", "configs/demo.py:vqa", "--workdir", str(tmp_path / "run"),
               f"--config.init={tmp_path / 'start'}", "--config.total_steps=100000", "--config.data.workers=1", "--config.log_every=1",
               f"--config.data.images={images()}", "--config.batch_size=4", "--config.max_length=64",
               "--config.trainable=['projector/.*']"]
    environment = {**os.environ, "XLA_FLAGS": xla.flags()}  # one device
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, start_new_session=True)
    log = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().count("\n")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out + err
    step, damaged = newest_intact_step(tmp_path / "run")
    assert step and not damaged and f"stopped and saved at step {step}" in out
    assert "SIGINT: finishing the current update and saving" in err and "Traceback" not in err
    assert "\r" not in out + err, "there is no terminal, so there is no progress bar"
    assert json.loads(log.read_text().splitlines()[-1])["step"] == step
