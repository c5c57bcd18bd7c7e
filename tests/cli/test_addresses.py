"""Addresses are refused by every flag that names a path, of every command, and by every config key, in one sentence.

Only a run's workdir, `init` and checkpoints may be in a bucket.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import llavamed_jax as lm
from benchmarks import runs
from llavamed_jax import chat
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.cli import common, serve, train, verify_release
from llavamed_jax.cli import convert as convert_cli
from llavamed_jax.cli import eval as eval_cli
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.utils import buckets, paths
from llavamed_jax.utils.buckets import Bucket
from llavamed_jax.utils.nested import flatten
from tests.support import stores

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.py") if path.stem != "common")
CONFIG = str(ROOT / "configs" / "demo.py")
COMMANDS = {"train": train.main, "eval": eval_cli.main, "convert": convert_cli.main, "chat": chat.main,
            "verify-release": verify_release.main}
# Flags of the commands that name something else than a path.
OTHERS = {"--help", "--base_name", "--quantize", "--kv_cache", "--peak", "--calibration_rows", "--template", "--dtype", "--mesh", "--preflight", "--profile", "--coordinator", "--num_processes", "--process_id",
          "--endpoint", "--model", "--concurrency", "--timeout", "--control", "--suite", "--dry_run", "--layout", "--add_image_tokens",
          "--add_pad_token", "--image_size", "--seed", "--tolerance", "--tensors_only", "--system", "--temperature", "--max_new_tokens", "--steps"}
ADDRESSES = ["gs://bucket/x", "s3://bucket/x", "S3://b/x.json", "https://example.org/x", "file:///x", "hf://me/x", "az+x.1://b"]


@pytest.fixture
def parsers(monkeypatch):
    """Every parser that the commands make, by command, and of `convert` by command of it."""
    found = {}

    def stop(self, argv=None, *_):
        found[self.prog] = self
        raise UsageError("stopped")

    monkeypatch.setattr(common.Parser, "parse_known_args", stop)
    for main in COMMANDS.values():
        main([])
    for parser in list(found.values()):
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                found.update({each.prog: each for each in action.choices.values()})
    monkeypatch.undo()
    return found


def flags_of_paths(parser):
    for action in parser._actions:
        flag = action.option_strings[-1] if action.option_strings else action.dest
        if flag not in OTHERS and action.nargs != 0 and not isinstance(action, argparse._SubParsersAction):
            yield flag, action


def test_every_flag_of_every_command_refuses_addresses(parsers, capsys):
    capsys.readouterr()
    tried = set()
    for prog, parser in parsers.items():
        for flag, action in flags_of_paths(parser):
            assert action.type is None, f"{prog} {flag}: a Path would forget what was typed"
            groups = [g._group_actions for g in parser._mutually_exclusive_groups if g.required and action not in g._group_actions]
            others = [other for other in parser._actions if other.required and other is not action] + [group[0] for group in groups]
            required = [word for other in others for word in (*other.option_strings, (other.choices or ["x"])[0])]
            name = action.option_strings[-1] if action.option_strings else action.metavar
            for value in ADDRESSES[:2]:
                if name == "--checkpoint" or (prog, name) == ("train.py", "--workdir") or "convert" in prog and name in ("PATH", "A", "B"):
                    value = value.replace("://", "x://")  # these may be in a bucket
                words = [*required, flag, value] if action.option_strings else [value, *required]
                with pytest.raises(UsageError, match="; a path on this machine ") as caught:
                    parser.parse_known_args(words)
                assert f" is the address '{value}'; a path" in str(caught.value) and (str(caught.value).startswith(flag) or not action.option_strings)
            tried.add(flag)
    assert {"--config", "--workdir", "--checkpoint", "--vision_tower", "--tokenizer", "--out", "--predictions", "--against",
            "--write_llava", "--preflight_json", "--image",
            "--projector", "--decoder", "--vision", "--base", "--adapter", "--target", "--delta", "path", "a", "b",
            "--images", "--vqa_rad", "--stock_tower"} <= tried
    assert len(parsers) >= 12


MAY_BE_BUCKETS = {("train", "--workdir"), ("convert", "inspect"), ("convert", "preset:small")}


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("command, words", [
    ("train", ["--config", "configs/demo.py:vqa", "--workdir"]),
    ("train", ["--config", "configs/finetune.py", "--preflight", "cpu-1", "--preflight_json"]),
    ("eval", ["--config", "configs/eval/vqa_rad.py:demo", "--checkpoint", "preset:small", "--workdir"]),
    ("eval", ["--config", "configs/eval/vqa_rad.py:demo", "--write_llava"]),
    ("convert", ["import", "--checkpoint", "preset:small", "--out"]), ("convert", ["inspect"]), ("convert", ["verify", "preset:small"]),
    ("chat", ["--checkpoint", "preset:small", "--image"])])
def test_commands_exit_with_2_and_write_nothing(command, words, address, tmp_path, monkeypatch, capsys):
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    if address[:5] in ("gs://", "s3://") and (command, words[-1]) in MAY_BE_BUCKETS:
        for package in ("gcsfs", "s3fs"):
            monkeypatch.setitem(sys.modules, package, None)
        for wrong in (address.replace("/x", ""), address.replace("/x", "/a//b")):
            assert COMMANDS[command]([*words, wrong]) == 2
            assert f"{wrong!r} is not an address in a bucket; gs://BUCKET/KEY or" in capsys.readouterr().err
        assert COMMANDS[command]([*words, address]) == 1
        printed = capsys.readouterr()
        assert "is not installed: pip install 'llavamed-jax[cloud]'" in printed.err and printed.err.count("error: ") == 1
        assert os.listdir(tmp_path) == ["configs"]
        return
    assert COMMANDS[command]([*words, address]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and f"is the address {address!r}" in printed.err
    assert os.listdir(tmp_path) == ["configs"]


@pytest.fixture(scope="module")
def in_a_bucket(tmp_path_factory):
    """The address of a tiny model, and the directory that was copied there."""
    folder = tmp_path_factory.mktemp("bucket")
    tree = runs.write_start(folder / "tree")
    with stores.running("memory", folder / "cache") as scheme:
        url = stores.address(scheme)
        Bucket(url).upload(tree, [path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()])
        yield url, tree


@pytest.mark.parametrize("main, words", [
    (eval_cli.main, ["--config", "configs/eval/vqa_rad.py:demo", "--workdir", "{out}"]), (chat.main, []),
    (serve.main, ["--port", "0", "--no_page", "--quantize", "int8"])], ids=["eval", "chat", "serve"])
def test_commands_open_a_checkpoint_in_a_bucket(main, words, in_a_bucket, tmp_path, monkeypatch, capsys):
    """Up to the weights, which are not put on a device."""
    url, tree = in_a_bucket
    opened = []

    def stop(checkpoint, *_, **__):
        opened.append(checkpoint)
        raise UserError("it was opened")

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("llavamed_jax.assistant.load_params", stop)
    monkeypatch.setattr("llavamed_jax.serving.service.Service.start", lambda self, load: load(lambda stage: None))
    assert main([*(word.format(out=tmp_path / "out") for word in words), "--checkpoint", url]) == 1
    assert "it was opened" in capsys.readouterr().err
    (checkpoint,) = opened
    assert buckets.is_local_copy(checkpoint.directory) and checkpoint.config == open_checkpoint(tree).config
    name = next(iter(checkpoint.tensors))
    assert np.array_equal(checkpoint.read(name), open_checkpoint(tree).read(name))


def test_a_processor_needs_no_weights_of_a_bucket(in_a_bucket, monkeypatch):
    url, tree = in_a_bucket
    read, download = [], Bucket.download
    monkeypatch.setattr(Bucket, "download", lambda self, directory, names: (read.extend(names), download(self, directory, names))[1])
    shutil.rmtree(buckets.local_copies(), ignore_errors=True)
    processor = lm.Processor.load(url)
    assert processor.config == lm.Processor.load(tree).config and processor.encode("a") == lm.Processor.load(tree).encode("a")
    assert read and all(name.startswith("model/") for name in read)
    with pytest.raises(UsageError, match=f"{url}/checkpoints/3 has no manifest.json: there is no such step"):
        lm.Processor.load(f"{url}/checkpoints/3")


def test_convert_reads_from_a_bucket(in_a_bucket, tmp_path, capsys):
    """What it writes is a directory; `--out` in a bucket is refused, as above."""
    url, tree = in_a_bucket
    assert convert_cli.main(["import", "--checkpoint", url, "--out", str(tmp_path / "tree")]) == 0
    assert convert_cli.main(["export", "--checkpoint", url, "--layout", "transformers", "--out", str(tmp_path / "exported")]) == 0
    for path in (tree, tmp_path / "tree", tmp_path / "exported"):
        assert convert_cli.main(["verify", url, str(path), "--tensors_only"]) == 0
    assert convert_cli.main(["inspect", url]) == 0 and f"{url}: tree layout" in capsys.readouterr().out
    assert convert_cli.main(["export", "--checkpoint", str(tree), "--layout", "llava", "--out", f"{url}/exported"]) == 2
    assert f"--out is the address '{url}/exported'; a path on this machine was expected" in capsys.readouterr().err
    assert "exported" not in str(Bucket(url).entries())


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_key_of_a_path_refuses_addresses(config):
    """Of every config: whatever text it holds or may hold, but for names of servers, and what is asked."""
    keys = [key for key, value in flatten(common.load_config(str(config))).items() if value is None or isinstance(value, str)]
    assert len(keys) > 3
    for key in keys:
        if key in ("epochs", "total_steps", "data.mean_text", "data.mean_length"):  # numbers, which may be open
            continue
        address = "https://bucket/x" if key == "init" else "gs://bucket/x"
        override = [f"{key}={address}"]
        if key.split(".")[-1] in ("endpoint", "model", "question"):
            common.load_config(str(config), override)
        else:
            with pytest.raises(UsageError, match=rf"the config key '{key}' is the address '{address}'; a path on this machine "):
                common.load_config(str(config), override)


def test_keys_that_hold_lists_and_configs_that_hold_addresses(tmp_path):
    for value in ('[{"path": "a.json"}, {"path": "gs://b/a.json"}]', '[{"path": "a.json", "images": "s3://b/images"}]'):
        with pytest.raises(UsageError, match="the config key 'data.train' is the address '(gs|s3)://b/"):
            common.load_config("configs/demo.py:vqa", [f"data.train={value}"])
    (tmp_path / "c.py").write_text("from ml_collections import ConfigDict\ndef get_config(arg=''):\n"
                                   "    return ConfigDict(dict(init='gs://b/x', data=dict(workers=1, root='s3://b/x')))\n", encoding="utf-8")
    with pytest.raises(UsageError, match="the config key 'data.root' is the address 's3://b/x'"):
        common.load_config(str(tmp_path / "c.py"))


def test_what_is_no_address(tmp_path, monkeypatch):
    for path in ("gs:/x", "gs:x", "a/b://c", "C:\\x", "preset:small", "me/model@v1", "", "../gs://x", "://x", "1://x"):
        assert not paths.is_address(path), path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gs:").mkdir()
    parser = common.Parser()
    parser.add_argument("--workdir", metavar="DIR")
    parser.add_argument("--endpoint", metavar="URL")
    parser.add_argument("--system", metavar="TEXT")
    assert parser.parse_args(["--workdir", "gs:/x", "--endpoint", "http://h/v1", "--system", "see https://h"]).workdir == "gs:/x"


def test_python_refuses_them_too(tmp_path):
    for call in (lambda: lm.load("file://b/x"), lambda: lm.load("preset:small", vision_tower="gs://b/x"),
                 lambda: lm.load("preset:small", adapter="gs://b/x"),
                 lambda: lm.load("preset:small", tokenizer="gs://b/x"), lambda: lm.Processor.load("https://b/x")):
        with pytest.raises(UsageError, match="is the address '(gs|file|https)://b/x'"):
            call()


def test_scripts_refuse_them_too():
    assert paths.local("x/y") == Path("x/y")
    with pytest.raises(argparse.ArgumentTypeError, match="'gs://b/x' is an address; a path on this machine was expected"):
        paths.local("gs://b/x")
    for script in [*(ROOT / "samples").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert "type=Path" not in script.read_text(encoding="utf-8"), script


@pytest.mark.parametrize("encoding, path, hint", [
    ("utf-8", "a\udcff", ""), ("ascii", "\udcc3\udcbc", r" \(the locale's encoding is ascii: set PYTHONUTF8=1\)"),
    ("iso8859-1", "\xc3\xbc", r" \(the locale's encoding is iso8859-1: set PYTHONUTF8=1\)")])
def test_paths_that_are_not_utf8(encoding, path, hint, monkeypatch):
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode(encoding, "surrogateescape"))
    monkeypatch.setattr(paths.sys, "getfilesystemencoding", lambda: encoding)
    for value in (path, Path(path), [dict(path="plain", images=path)]):
        with pytest.raises(UsageError, match=f"--workdir is .*; a name in UTF-8 was expected{hint}$"):
            paths.check("--workdir", value)
    for call in (lambda: lm.load(path), lambda: lm.load("preset:small", tokenizer=path), lambda: lm.Processor.load(path),
                 lambda: common.load_config(CONFIG, [f"init={path}"])):
        with pytest.raises(UsageError, match=f"a name in UTF-8 was expected{hint}"):
            call()
    for value in ("plain", None, 3, ["plain", 1.5, None], {}):
        paths.check("--workdir", value)


@pytest.mark.parametrize("checkpoint", ["gs://bucket/runs/mine", "s3://bucket/runs/mine", "runs/mine"])
def test_a_server_reads_a_bucket_once(monkeypatch, checkpoint):
    """The weights and the programs, which are compiled at the same time, come from one copy; the name stays the address's."""
    from llavamed_jax import assistant
    from llavamed_jax.checkpoints import hub
    from llavamed_jax.cli import compilation_cache
    from llavamed_jax.serving import warm_up

    read, loaded, compiled = [], [], []
    engine = SimpleNamespace(shards=1, batch_size=1)
    monkeypatch.setattr(hub, "local", lambda path, *_, **__: read.append(path) or Path("/copies/checkpoints/5"))
    monkeypatch.setattr(assistant, "load", lambda path, **_: loaded.append(path) or SimpleNamespace(
        name=Path(path).name, tower="x", engine=engine))
    monkeypatch.setattr(warm_up, "compile_while_loading", lambda path, *_: compiled.append(path))
    monkeypatch.setattr(warm_up, "warm_up", lambda *_: None)
    monkeypatch.setattr(compilation_cache, "enable", lambda: None)
    model = serve._load(serve._parser().parse_args(["--checkpoint", checkpoint]), lambda words: None)
    place = "/copies/checkpoints/5" if "://" in checkpoint else checkpoint
    assert (read, loaded, compiled) == ([checkpoint] if "://" in checkpoint else [], [place], [place])
    assert model.name == "mine"
