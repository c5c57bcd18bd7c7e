"""The README's commands are the commands: they parse, their config keys exist, and each stage starts from what an earlier line made."""

import re
import shlex
from pathlib import Path

import pytest

from llavamed_jax.cli import common
from llavamed_jax.cli import convert_program as convert_cli
from llavamed_jax.cli import eval as eval_cli
from llavamed_jax.cli import train as train_cli
from llavamed_jax.training import recipe

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PATH = re.search(r"## The researcher's path\n.*?```sh\n(.*?)```", README, re.DOTALL)[1].splitlines()


def words_of(line: str) -> list[str]:
    return shlex.split(line, comments=True)


class Kept(Exception):
    """A command line that has been parsed."""


@pytest.fixture
def parsed(monkeypatch):
    """The flags of a line by name, from the command's own parser, and its config; nothing is run."""
    original = common.Parser.parse_known_args

    def keep(parser, *arguments):
        found, rest = original(parser, *arguments)
        if parser.prog == "python -m convert":  # which goes on with the parser of a command
            return found, rest
        raise Kept(parser.prog, vars(found))

    def run(line):
        words = words_of(line)
        program = {"train.py": train_cli.train, "eval.py": eval_cli.program, "-m": convert_cli.program}[words[1]]
        monkeypatch.setattr(common.Parser, "parse_known_args", keep)
        with pytest.raises(Kept) as caught:
            program(words[3:] if words[1] == "-m" else words[2:])
        prog, flags = caught.value.args
        overrides = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
        config = common.load_config(str(ROOT / flags["config"]), overrides) if "config" in flags else None
        return prog, flags, config
    return run


def test_the_path_goes_from_parts_to_an_export(parsed):
    made, steps = set(), []
    for line in PATH:
        prog, flags, config = parsed(line)
        if prog == "train.py":
            recipe.check(config)
            if flags["preflight"] is not None:
                continue
        start = config.init if prog == "train.py" else flags.get("checkpoint")
        assert start in made or prog == "python -m convert build", f"{start} of {line!r} is made by no earlier line"
        steps.append((prog.split()[-1], flags.get("config"), start))
        made |= {flags.get("out"), flags.get("workdir")}
    assert steps == [
        ("build", None, None), ("train.py", "configs/pretrain.py", "runs/start"), ("train.py", "configs/finetune.py", "runs/pretrain"),
        ("train.py", "configs/vqa_rad.py", "runs/finetune"), ("eval.py", "configs/eval/vqa_rad.py", "runs/vqa_rad"),
        ("export", None, "runs/vqa_rad")]


def test_the_terminal_answers_as_the_python_example_does():
    """Which is greedy, where the chat by itself draws at the original's temperature."""
    line = next(line for line in README.splitlines() if line.startswith("python -m llavamed_jax.chat"))
    assert README.index(line) < README.index("The same answer in Python:") and words_of(line)[-2:] == ["--temperature", "0"]
