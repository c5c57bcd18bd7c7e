"""A flag or a config key that is given two values is refused, in every command: argparse alone takes the last and says nothing."""

import pytest

from llavamed_jax import chat
from llavamed_jax.cli import common, convert
from llavamed_jax.cli import eval as eval_cli
from llavamed_jax.cli import train as train_cli
from llavamed_jax.errors import UsageError, short
from tests.support.training_runs import ROOT

DEMO = f"{ROOT}/configs/demo.py:vqa"
TRAIN = ["--config", DEMO, "--workdir", "w"]
EVAL = ["--config", f"{ROOT}/configs/eval/vqa_rad.py:demo", "--checkpoint", "c", "--workdir", "w"]
COMMANDS = {"train": (train_cli.main, TRAIN), "eval": (eval_cli.main, EVAL), "chat": (chat.main, ["--checkpoint", "c"]),
            "convert": (convert.main, ["import", "--checkpoint", "c", "--out", "o"])}


@pytest.mark.parametrize("command, more, named", [
    ("train", ["--workdir", "v"], "--workdir is given twice, with 'w' and with 'v'"),
    ("train", ["--workdir=v"], "--workdir is given twice, with 'w' and with 'v'"),
    ("train", ["--config", "x.py"], f"--config is given twice, with {short(DEMO)} and with 'x.py'"),
    ("train", ["--profile", "1:2", "--profile", "1:3"], "--profile is given twice, with (1, 2) and with (1, 3)"),
    ("train", ["--num_processes", "2", "--num_processes", "1"], "--num_processes is given twice, with 2 and with 1"),
    ("train", ["--config.seed=1", "--config.seed=2"], "--config.seed is given twice, with '1' and with '2'"),
    ("train", ["--config.seed", "1", "--config.epochs=9", "--config.seed=2"], "--config.seed is given twice, with '1' and with '2'"),
    ("train", ["--config.data.train=a=1", "--config.data.train=a=2"], "--config.data.train is given twice, with 'a=1' and with 'a=2'"),
    ("train", ["--preflight", "h100-8", "--preflight", "h100-16"], "--preflight is given twice, with 'h100-8' and with 'h100-16'"),
    ("train", ["--preflight", "h100-8", "--config.seed=1", "--config.seed=2"], "--config.seed is given twice"),
    ("eval", ["--checkpoint", "d"], "--checkpoint is given twice, with 'c' and with 'd'"),
    ("eval", ["--against", "a", "--against", "b"], "--against is given twice, with 'a' and with 'b'"),
    ("eval", ["--dtype", "float32", "--dtype", "bfloat16"], "--dtype is given twice, with 'float32' and with 'bfloat16'"),
    ("eval", ["--config.generation.num_beams=1", "--config.generation.num_beams=2"], "--config.generation.num_beams is given twice"),
    ("chat", ["--checkpoint", "d"], "--checkpoint is given twice, with 'c' and with 'd'"),
    ("convert", ["--out", "p"], "--out is given twice, with 'o' and with 'p'"),
])  # fmt: skip
def test_two_values_are_refused_and_named(command, more, named, capsys, tmp_path, monkeypatch):
    main, words = COMMANDS[command]
    monkeypatch.chdir(tmp_path)
    assert main([*words, *more]) == 2
    err = capsys.readouterr().err
    assert f"error: {named}" in err and "one value was expected" in err and len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_one_value_that_is_given_twice_is_taken():
    parser = common.Parser(prog="x")
    parser.add_argument("--name")
    parser.add_argument("--number", type=int)
    parser.add_argument("--share", type=float)
    parser.add_argument("--is_so", action="store_true")
    parser.add_argument("--image", action="append")
    words = ["--name", "a", "--name=a", "--number", "1", "--number", "01", "--is_so", "--is_so", "--image", "a", "--image", "b"]
    args, overrides = parser.parse_with_overrides([*words, "--config.k=1", "--config.k=1"])
    assert str(parser.parse_args(["--share", "nan"]).share) == str(parser.parse_args(["--share", "nan", "--share=NaN"]).share) == "nan"
    assert vars(args) == dict(share=None, name="a", number=1, is_so=True, image=["a", "b"])
    config = common.load_config(f"{ROOT}/configs/demo.py:vqa", ["seed=7", "seed=7"])
    assert config.seed == 7 and overrides == ["k=1", "k=1"]


def test_a_parser_is_used_again_and_again():
    parser = common.Parser(prog="x")
    parser.add_argument("--name", choices=["a", "b"])
    assert [parser.parse_args(["--name", name]).name for name in "ab"] == ["a", "b"]
    with pytest.raises(UsageError, match=r"--name is given twice, with 'b' and with 'a'; one value was expected; `x --help`"):
        parser.parse_args(["--name", "b", "--name", "a"])


def test_groups_and_subcommands_know_it_too():
    parser = common.Parser(prog="x")
    commands = parser.add_subparsers(dest="command")
    inner = commands.add_parser("do")
    inner.add_argument_group("more").add_argument("--a", type=float)
    inner.add_mutually_exclusive_group().add_argument("--b")
    inner.add_argument("path")
    assert vars(parser.parse_args(["do", "p", "--a", "1", "--b", "2"])) == dict(command="do", path="p", a=1.0, b="2")
    for words, said in ((["--a", "1", "--a", "2"], "--a is given twice, with 1.0 and with 2.0"),
                        (["--b", "1", "--b", "2"], "--b is given twice, with '1' and with '2'")):
        with pytest.raises(UsageError, match=said):
            parser.parse_args(["do", "p", *words])
