"""docs/interface.md and the code name the same things: every flag, key, Python call and number, in both directions."""

import argparse
import ast
import inspect
import re
import runpy
from pathlib import Path

import pytest
from ml_collections import ConfigDict

import llavamed_jax as lm
from llavamed_jax import chat
from llavamed_jax.cli import convert_program as convert_cli
from llavamed_jax.cli import eval as eval_cli
from llavamed_jax.cli import serve as serve_cli
from llavamed_jax.cli import train as train_cli
from llavamed_jax.cli import verify_release
from llavamed_jax.config import PRESETS
from llavamed_jax.curation import __main__ as curation
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.scoring import captions, registry, score
from llavamed_jax.evaluation.scoring.programs import PROGRAMS as PROGRAMS_OF_SCORING
from llavamed_jax.preflight.topologies import KINDS
from llavamed_jax.serving import batch
from llavamed_jax.training import recipe as recipe_schema

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "interface.md").read_text(encoding="utf-8")
PROGRAMS = {
    "train.py": train_cli.train,
    "eval.py": eval_cli.program,
    "serve.py": serve_cli.program,
    "python -m llavamed_jax.serving.batch": batch.program,
    "python -m llavamed_jax.chat": chat.program,
    "make verify-release": verify_release._program,
}
OVERRIDE = "--config.KEY"  # of the commands that take a recipe


def section(title: str) -> str:
    """What stands under a heading, up to the next one of any level."""
    found = re.search(
        rf"^#+ {re.escape(title)}\n(.*?)(?=^#+ |\Z)", re.sub(r"^```.*?^```", "", PAGE, flags=re.M | re.S), re.M | re.S
    )
    assert found, f"docs/interface.md has no heading {title!r}"
    return found[1]


def first_column(title: str) -> list[str]:
    """The code in the first column of a section's table, row by row; one cell may name several things."""
    rows = [re.split(r"(?<!\\)\|", line)[1] for line in section(title).splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row)]


def flags_on_page(title: str) -> set[str]:
    return {re.match(r"--[\w.-]+", name)[0] for name in first_column(title)}


class Parsing(Exception):
    """A command line is about to be parsed."""


@pytest.fixture
def parser_of(monkeypatch):
    """A program's parser; nothing is run."""

    def keep(parser, *_):
        raise Parsing(parser)

    def run(program):
        monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", keep)
        with pytest.raises(Parsing) as caught:
            program([])
        return caught.value.args[0]

    return run


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    """Hidden ones too: whoever writes a script wants them all."""
    return {option for action in parser._actions for option in action.option_strings if option.startswith("--")} - {
        "--help"
    }


@pytest.mark.parametrize("title", PROGRAMS)
def test_flags_are_those_of_the_commands(title, parser_of):
    has_recipe = "--config" in flags_of(parser := parser_of(PROGRAMS[title]))
    assert flags_on_page(title) == flags_of(parser) | ({OVERRIDE} if has_recipe else set())


def test_flags_are_those_of_the_conversions(parser_of):
    commands = next(
        action for action in parser_of(convert_cli.program)._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    assert set(re.findall(r"^#### convert ([\w-]+)$", PAGE, re.M)) == set(commands)
    for name, parser in commands.items():
        assert flags_on_page(f"convert {name}") == flags_of(parser), name


def curation_parsers(parser_of) -> dict[str, argparse.ArgumentParser]:
    """The parser of each command of the room; the command line adds the flags of the one that is typed."""
    found = {}
    for name in curation.COMMANDS:
        parser = parser_of(lambda _, name=name: curation.program([name]))
        (commands,) = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
        found[name] = commands.choices[name]
    return found


def test_flags_are_those_of_the_curation(parser_of):
    parsers = curation_parsers(parser_of)
    assert set(re.findall(r"^#### curation ([\w-]+)$", PAGE, re.M)) == set(parsers)
    for name, parser in parsers.items():
        assert flags_on_page(f"curation {name}") == flags_of(parser), name


def test_what_a_flag_may_be_is_said(parser_of):
    """Every choice of a flag stands in its row; a flag that is required says so, or its section's text does."""
    for title in PROGRAMS:
        for action in parser_of(PROGRAMS[title])._actions:
            if not action.option_strings:  # a file, which the section's text names
                assert action.metavar in section(title), f"{title} {action.metavar}"
                continue
            row = next(
                (
                    line
                    for line in section(title).splitlines()
                    if line.startswith(f"| `{(action.option_strings or ['?'])[-1]} ")
                ),
                "",
            )
            assert not action.required or "required" in row, f"{title} {action.option_strings}"
            if action.choices and "as of" not in row:
                assert all(str(choice) in row for choice in action.choices), f"{title} {action.option_strings}"


def test_flags_in_the_text_exist(parser_of):
    known = set().union(*(flags_of(parser_of(program)) for program in PROGRAMS.values()))
    commands = next(
        action for action in parser_of(convert_cli.program)._actions if isinstance(action, argparse._SubParsersAction)
    ).choices
    known = known.union(*map(flags_of, (*commands.values(), *curation_parsers(parser_of).values()))) | {"--help"}
    assert not {flag for flag in re.findall(r"(?<![\w-])--[a-z]\w*", PAGE)} - known


def keys_of(recipe: Path, argument: str = "") -> set[str]:
    config = runpy.run_path(str(recipe))["get_config"](argument)
    return set(_leaves(config, ""))


def _leaves(config, prefix):
    for key in config:
        value = config.get_oneway_ref(key).get()
        if isinstance(value, ConfigDict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key


RECIPES = [
    path for path in sorted((ROOT / "configs").glob("*.py")) if "def get_config" in path.read_text(encoding="utf-8")
]
EVALUATIONS = [
    path
    for path in sorted((ROOT / "configs" / "eval").glob("*.py"))
    if "def get_config" in path.read_text(encoding="utf-8")
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_keys_are_those_of_every_recipe(recipe):
    keys = first_column("Keys of a training recipe")
    assert set(keys) == keys_of(recipe) and len(keys) == len(set(keys))


def plain(cell: str) -> str:
    """A cell's text without code marks, and without links in brackets to other pages."""
    return re.sub(r" \(\[[^\]]*\]\([^)]*\)\)", "", cell.strip()).replace("`", "")


def test_the_table_of_training_keys_is_the_schema():
    """Row by row, in the order of the recipes: key, type and range, default, meaning."""
    rows = [line.split("|")[1:-1] for line in section("Keys of a training recipe").splitlines() if line.startswith("| `")]
    assert [tuple(map(plain, row)) for row in rows] == [
        (name, key.values(), key.otherwise(), key.meaning) for name, key in recipe_schema.SCHEMA.items()
    ]


@pytest.mark.parametrize("argument", ["v15", "v1", "llava15,13b", "small"])
def test_keys_do_not_depend_on_the_arguments(argument):
    assert set(first_column("Keys of a training recipe")) == keys_of(ROOT / "configs" / "finetune.py", argument)


def test_keys_are_those_of_the_evaluations():
    keys = first_column("Keys of an evaluation")
    assert len(keys) == len(set(keys))
    assert set(keys) == set().union(*map(keys_of, EVALUATIONS))


def test_which_evaluation_has_a_key_is_said():
    """The second column: all, all but some, some by name, or `the same` as the row above."""
    names = {path.stem for path in EVALUATIONS}
    with_judge = {name for name, path in zip(sorted(names), EVALUATIONS, strict=True) if "judge.model" in keys_of(path)}
    wanted: set[str] = set()
    for line in section("Keys of an evaluation").splitlines():
        if not line.startswith("| `"):
            continue
        key, who = (cell.strip() for cell in line.split("|")[1:3])
        listed = set(re.findall(r"`(\w+)`", who))
        wanted = (
            wanted
            if who == "the same"
            else with_judge
            if who.startswith("those with open answers")
            else names - listed
            if who.startswith("all")
            else listed
        )
        assert wanted == {path.stem for path in EVALUATIONS if key.strip("`") in keys_of(path)}, key


def test_names_of_data_sets_presets_and_machines():
    assert all(f"`{path.stem}`" in section("eval.py") for path in EVALUATIONS)
    assert all(f"`{name}`" in section("A checkpoint PATH") for name in PRESETS)
    assert set(re.findall(r"`([\w-]+)`", re.split(r"COUNT\s+is", section("Topologies"))[0])) - {"KIND-COUNT"} == set(
        KINDS
    )


def test_numbers_of_an_evaluation_are_named():
    text = section("metrics.json")
    named = set(re.findall(r"`(\w+)`", text))
    assert {*registry.names_of("paper", "strict"), *score.GROUPS, *asked.KEYS} <= named
    assert {
        captions.BLEU[0],
        captions.BLEU[-1],
        captions.SENTENCE_BLEU[0],
        captions.SENTENCE_BLEU[-1],
        "rouge_l",
    } <= named


def test_programs_by_which_answers_are_scored_are_named():
    """Wherever a page lists them, with their data sets; and the version that is installed for a comparison is the one that was read."""
    (row,) = [line for line in section("Keys of an evaluation").splitlines() if line.startswith("| `scoring` |")]
    for name, program in PROGRAMS_OF_SCORING.items():
        names = re.search(rf"`{name}`(?: \(([^)]*)\))?", row)[1] or row.split("|")[2]  # without a list: all that have the key
        assert set(re.findall(r"`(\w+)`", names)) == set(program.sets), name
        assert f"`{name}`" in section("metrics.json") and f"`{name}.jsonl`" in section("The workdir of an evaluation")
        assert f"scoring={name}" in (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    pins = re.findall(r"^HARNESS_\w+ := (\S+)==(\S+)", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    versions = " ".join(program.version for program in PROGRAMS_OF_SCORING.values())
    assert len(pins) == 2 and all(f"{package} {version}" in versions for package, version in pins)


CALLS = re.findall(r"^\| `((?:lm|metrics)\.[\w.]+\(.*?\))` \|", PAGE, re.M)


@pytest.mark.parametrize("call", CALLS)
def test_python_calls_have_these_arguments_and_defaults(call):
    tree = ast.parse(call, mode="eval").body
    home, *names = ast.unparse(tree.func).split(".")
    target = {"lm": lm, "metrics": metrics}[home]
    for name in names:
        target = getattr(target, name)
    wanted = [(argument.id, inspect.Parameter.empty) for argument in tree.args]
    wanted += [(keyword.arg, ast.literal_eval(keyword.value)) for keyword in tree.keywords]
    found = [(p.name, p.default) for p in inspect.signature(target).parameters.values() if p.name != "self"]
    assert found == wanted


def test_the_public_names_are_there():
    assert len(CALLS) >= 20
    for name in lm.__all__:
        assert f"`lm.{name}" in PAGE, name


def test_make_targets_are_those_of_the_makefile():
    targets = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1].split()
    assert {name.split()[1] for name in first_column("make") if name.startswith("make ")} == set(targets)
