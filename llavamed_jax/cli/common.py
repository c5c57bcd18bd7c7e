"""The parts that all command lines share: flags, config files, messages and exit statuses.

Nothing here imports jax: `run` must set the memory fraction before the first import, and `--help` answers at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import os
import re
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavamed_jax.cli import processes
from llavamed_jax.config import KV_CACHES, QUANTIZED
from llavamed_jax.errors import UsageError, UserError, cut, short
from llavamed_jax.recipes import recipe_arguments  # noqa: F401  (users' recipes may import it from here)
from llavamed_jax.utils import paths, signals, streams, terminal

if TYPE_CHECKING:  # not before a command listens to signals
    from ml_collections import ConfigDict


def command(load: Callable[[], Callable[[list[str]], int | None]], argv: Sequence[str] | None = None,
            has: str = "the run had begun", is_forked: bool = False) -> int:
    """Runs a command and returns its exit status: listens to signals, then imports its program, then runs it (`run`).

    A process that was started for the command (`argv` is None) gets usable standard streams and exits here, without the
    interpreter's own shutdown, in which running native threads would crash (XLA's compile threads with jax 0.10.2).

    Args:
      load: imports the program, which may take a while.
      argv: the arguments, without the program's name; None for those of the process.
      has: the end of the message "interrupted before …", for a signal that ends the command at once.
      is_forked: whether the program joins other processes; `processes.join` then starts the thread that waits for
        signals.
    """
    with signals.listening(signals.Phase(f"error: interrupted before {has}", grace=0), is_command=True):
        if argv is None:
            streams.keep_open()
            streams.outlast()
        if not is_forked:
            signals.watch()
        status = run(lambda words: load()(words), argv)
        if argv is None:
            signals.leave(status)
        return status


def run(program: Callable[[list[str]], int | None], argv: Sequence[str] | None = None) -> int:
    """Runs a program, and converts its errors to one line on stderr and an exit status; cleans its output.

    `program` takes the arguments, `argv` or those of the process, and returns an exit status or None for 0.

    Returns:
      0 done, 1 failed (`UserError`), 2 wrong command line, config or value (`UsageError`), or the value of `program`.
    """
    streams.keep_open()
    with terminal.cleaned():
        return _run(program, list(sys.argv[1:] if argv is None else argv))


def _run(program: Callable[[list[str]], int | None], argv: list[str]) -> int:
    # JAX's default of 75 % looks like running out of memory. JAX raises if both names of the setting are given.
    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")
    said = None
    try:
        status = program(argv) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
    except UserError as error:
        status, said = 2 if isinstance(error, UsageError) else 1, str(error)
    except KeyboardInterrupt as error:
        status, said = 1, str(error) or "interrupted"
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # otherwise Python reports the error again at exit
        status, said = 1, "the output was closed before everything was written"
    except Exception as error:
        status, said = 1, _of_the_system(error)
        if said is None:
            if not processes.is_joined():
                raise
            processes.trace(error)
            said = f"{type(error).__name__}: {error}".splitlines()[0]
    signals.enter(signals.over(status))
    if said is not None:
        processes.complain(said)
    processes.part(status, said)
    return status


def _of_the_system(error: Exception) -> str | None:
    """Returns a sentence about an operating system error on a file; None for other errors."""
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):  # from `tempfile`, in any library
        return f"a temporary directory is needed ({error.strerror}); set TMPDIR to a writable directory"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{cut(str(error.filename), 300)}: {error.strerror}"
    is_nul = isinstance(error, ValueError) and "embedded null" in str(error)
    return "a path contains a NUL character, which is not valid in a file name" if is_nul else None


_NO_PATHS = ("URL", "TEXT", "NAME")  # metavars of flags that may hold an address
_NO_PATH_KEYS = ("endpoint", "model", "question")  # last parts of such config keys


class _Once(argparse.Action):
    """Stores a flag's value, and refuses a second, different one: argparse would silently take the last."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = parser.given.setdefault(self.dest, values)
        if repr(given) != repr(values):  # NaN does not equal NaN
            parser.error(f"{option_string} is given twice, with {short(given)} and with {short(values)}; one value was "
                         "expected")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that reports one sentence, and accepts no abbreviated flags and no flag with two values.

    Args:
      may_be_buckets: the flags and arguments, beside `--checkpoint`, that may be `gs://…` or `s3://…`.
      **kwargs: as for ArgumentParser.

    Attributes:
      given: the values of a command line, by flag.
    """

    def __init__(self, may_be_buckets: Sequence[str] = (), **kwargs):
        self._may_be_buckets = {"--checkpoint", *may_be_buckets}
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.given: dict[str, Any] = {}
        for name in (None, "store"):
            self.register("action", name, _Once)

    def error(self, message: str):
        """Raises UsageError with the message."""
        raise UsageError(f"{message}; `{self.prog} --help` lists the flags")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """Parses known flags; raises UsageError for NUL characters, and for paths that are addresses or not UTF-8."""
        strange = next((word for word in args or () if "\0" in word), None)
        if strange is not None:
            self.error(f"the argument {short(strange)} contains a NUL character")
        self.given = {}
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            if action.metavar not in _NO_PATHS:
                name = (*action.option_strings, action.metavar or action.dest)[0]
                paths.check(name, getattr(found, action.dest, None), name in self._may_be_buckets)
        return found, rest

    def parse_with_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Parses `argv`; returns the flags, and the overrides `KEY=VALUE` of `--config.KEY=VALUE`."""
        args, rest = self.parse_known_args(argv)
        overrides, words = [], iter(rest)
        for word in words:
            if not word.startswith("--config."):
                self.error(f"unknown flag or argument {word!r}")
            key_value = word.removeprefix("--config.")
            if "=" not in key_value:
                value = next(words, None)
                if value is None:
                    self.error(f"{word} has no value; {word}=VALUE was expected")
                key_value = f"{key_value}={value}"
            overrides.append(key_value)
        return args, overrides


def load_config(spec: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """Loads `FILE.py[:ARGUMENTS]`, a Python file with `get_config(arg="") -> ConfigDict`; applies overrides, locks it.

    Args:
      spec: the file, and after a colon the text that is passed to its `get_config`.
      overrides: `KEY=VALUE`, as in `override`.

    Raises:
      UsageError: the file does not exist, raises or lacks `get_config`, or an override is invalid.
    """
    name, _, argument = spec.partition(":")
    path = Path(name)
    if path.is_dir():
        raise UsageError(f"the config file {name} is a directory; one file was expected{_neighbours(path / '*.py')}")
    if not path.is_file():
        what = ("is a pipe or a device; one file was expected" if os.path.exists(path)
                else f"does not exist{_neighbours(path)}")
        raise UsageError(f"the config file {name} {what}")
    try:
        with _configs_importable(path):
            get_config = runpy.run_path(str(path)).get("get_config")
            if get_config is None:
                raise UsageError(f"the config file {name} defines no get_config(arg){_neighbours(path)}")
            config = get_config(argument)
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        line = next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(path)),
                    None)
        where = f" at line {line}" if line else ""
        raise UsageError(f"the config file {name} raised {type(error).__name__}{where}: {error}") from error
    from ml_collections import ConfigDict

    if not isinstance(config, ConfigDict):
        raise UsageError(f"get_config of {name} returned {type(config).__name__}; an ml_collections.ConfigDict was "
                         "expected")
    config.lock()
    return override(config, overrides)


def override(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Sets keys of a config, checks its paths and texts, and returns it.

    Args:
      config: a locked config; it is changed.
      overrides: `KEY=VALUE` with dots for levels. The value is read with the type of the key.

    Raises:
      UsageError: a key is unknown or has two values, or a value is invalid or has another type.
    """
    from llavamed_jax.utils.nested import flatten

    given: dict[str, str] = {}
    for each in overrides:
        key, _, value = each.partition("=")
        if given.setdefault(key, value) != value:
            raise UsageError(f"--config.{key} is given twice, with {short(given[key])} and with {short(value)}; one "
                             "value was expected")
        _apply(config, each)
    values = flatten(config)
    for key, value in values.items():
        if key.rpartition(".")[2] not in _NO_PATH_KEYS:
            paths.check(f"the config key {key!r}", value, may_be_bucket=key == "init")
    strange = next((key for key, value in values.items() if "\0" in _texts(value)), None)
    if strange is not None:
        raise UsageError(f"the config key {strange!r} contains a NUL character, which is not valid in a path or text")
    return config


@contextlib.contextmanager
def _configs_importable(path: Path) -> Iterator[None]:
    """Lets the recipe at `path` import `configs.common` from any working directory and with any installation.

    Inside the block `configs` is the folder of that name that holds the recipe, then this project's, then those on
    Python's path. Modules that were imported before as `configs`, from another checkout, are set aside: two recipes may
    have two `configs/common.py`.
    """
    def imported() -> dict[str, Any]:
        return {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "configs"}

    own = [folder for file in (path.absolute(), path.resolve()) for folder in file.parents if folder.name == "configs"]
    before, modules = list(sys.path), imported()
    for name in modules:
        del sys.modules[name]
    try:
        sys.path[:0] = [str(folder.parent) for folder in own]
        is_package = any((folder / "__init__.py").is_file() for folder in own)
        package = importlib.import_module("configs") if is_package else types.ModuleType("configs")
        ours = Path(__file__).resolve().parents[2] / "configs"
        package.__path__ = [str(folder) for folder in (*own, ours, *(Path(folder) / "configs" for folder in before))]
        sys.modules["configs"] = package
        yield
    finally:
        sys.path[:] = before
        for name in imported():
            del sys.modules[name]
        sys.modules.update(modules)


def _texts(value: Any) -> str:
    """Joins all texts in a value of a config."""
    return (value if isinstance(value, str)
            else "\n".join(map(_texts, value)) if isinstance(value, (list, tuple)) else "")


def _neighbours(path: Path) -> str:
    """Returns a hint: the config files in the folder of a missing one."""
    found = []
    for file in sorted(path.parent.glob("*.py")) if path.parent.is_dir() else []:
        with contextlib.suppress(OSError):
            if file.is_file() and b"def get_config" in file.read_bytes():
                found.append(file.name)
    return f"; {path.parent} holds {', '.join(found)}" if found else ""


def _apply(config: ConfigDict, override: str) -> None:
    from ml_collections import ConfigDict

    from llavamed_jax.training import recipe
    from llavamed_jax.utils.nested import flatten
    key, _, text = override.partition("=")
    *parents, leaf = key.split(".")
    node: Any = config
    for part in parents:
        node = node[part] if isinstance(node, ConfigDict) and part in node else None
    if not isinstance(node, ConfigDict) or leaf not in node:
        known = list(flatten(config))
        near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the keys are {', '.join(known)}"
        raise UsageError(f"the config key {key!r} does not exist; {hint}")
    if isinstance(node[leaf], ConfigDict):
        raise UsageError(f"the config key {key!r} is a group; one of {', '.join(f'{key}.{k}' for k in node[leaf])} was "
                         "expected")
    if text.lower() == "none" and key in recipe.SCHEMA and recipe.SCHEMA[key].is_open:
        with config.ignore_type():
            node[leaf] = None
    elif key == "data.train":  # a file, or a list of weighted files
        with config.ignore_type():
            node[leaf] = _parse(key, text, None, tuple) if text.startswith("[") else text
    elif key in recipe.SCHEMA and recipe.SCHEMA[key].types == (int, str):  # a number or a word
        with config.ignore_type():
            node[leaf] = int(text) if re.fullmatch(r"-?\d+", text) else text
    else:
        node[leaf] = _parse(key, text, node[leaf], node.get_type(leaf))


def _parse(key: str, text: str, current: Any, kind: type) -> Any:
    """Reads `text` as `kind`, the type of a config key."""
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if text.lower() == "none" and (current is None or kind in (int, float)):
            return None  # the number is unset; the code that needs it raises
        if kind in (int, float, str):
            return kind(text)
        value = ast.literal_eval(text)
        if isinstance(value, (list, tuple)) and kind in (list, tuple):
            return kind(value)
    except (ValueError, SyntaxError, KeyError, RecursionError, MemoryError):  # the last two for thousands of brackets
        pass
    wanted = {bool: "true or false", int: "an integer", float: "a number", tuple: "a list such as [\"a\", \"b\"]",
              list: "a list such as [\"a\", \"b\"]"}
    raise UsageError(f"the config key {key!r} is {text!r}; {wanted.get(kind, kind.__name__)} was expected")


# For epilogs.
MODEL_FLAGS = ("model: --vision_tower PATH --tokenizer PATH --template NAME --dtype TYPE --mesh SIZES\n"
               f"       --adapter PATH --quantize {'|'.join(QUANTIZED)} --kv_cache {'|'.join(KV_CACHES)}")


def add_model_flags(parser: argparse.ArgumentParser, is_listed: bool = True) -> None:
    """Adds the arguments of `llavamed_jax.load` as flags; if not `is_listed`, the epilog lists them (`MODEL_FLAGS`)."""
    group = parser.add_argument_group("model") if is_listed else parser
    said = (lambda text: text) if is_listed else (lambda _: argparse.SUPPRESS)
    group.add_argument("--vision_tower", metavar="PATH", help=said("a vision tower that replaces the checkpoint's own"))
    group.add_argument("--tokenizer", metavar="PATH", help=said("a tokenizer that replaces the checkpoint's own"))
    group.add_argument("--template", metavar="NAME", help=said("a prompt template, such as v1.5:mistral_instruct"))
    dtypes = ("float32", "bfloat16", "float16")
    group.add_argument("--dtype", metavar="TYPE", choices=dtypes,
                       help=said("float32, bfloat16 or float16; default: float32 on a CPU, else bfloat16"))
    group.add_argument("--mesh", metavar="SIZES", help=said("device mesh, such as data=2,tp=4; default: one device"))
    group.add_argument("--adapter", metavar="PATH", help=said("a LoRA adapter of the checkpoint"))
    group.add_argument("--quantize", metavar="TYPE", choices=QUANTIZED,
                       help=said(f"rounds the decoder's kernels: {', '.join(QUANTIZED)}"))
    group.add_argument("--kv_cache", metavar="TYPE", choices=KV_CACHES, help=said("int8 halves the key/value cache"))


def check_model_flags(args: argparse.Namespace) -> None:
    """Raises UsageError if a template or a preset does not exist, before anything is loaded or written."""
    from llavamed_jax.config import preset
    from llavamed_jax.text.templates import get_template
    checks = ([("--checkpoint", preset, args.checkpoint.removeprefix("preset:"))]
              if args.checkpoint.startswith("preset:") else [])
    checks += [("--template", get_template, args.template)] if args.template is not None else []
    for flag, check, value in checks:
        try:
            check(value)
        except UserError as error:
            raise UsageError(f"{flag}: {error}") from error


def load_assistant(args: argparse.Namespace, place: str | None = None):
    """Loads the LlavaMed of `--checkpoint` and the flags of `add_model_flags`; prints its vision tower to stderr.

    Args:
      args: the flags.
      place: where the checkpoint lies on this machine, if it has been fetched already.
    """
    check_model_flags(args)
    from llavamed_jax.assistant import load  # imports jax
    from llavamed_jax.cli import compilation_cache
    compilation_cache.enable()
    model = load(place or args.checkpoint, dtype=args.dtype, mesh=args.mesh, vision_tower=args.vision_tower,
                 tokenizer=args.tokenizer, template=args.template, adapter=args.adapter, quantize=args.quantize,
                 kv_cache=args.kv_cache)
    model.name = Path(args.adapter or args.checkpoint).name if place else model.name
    print(terminal.sentence(f"{args.checkpoint}: vision tower: {model.tower}"), file=sys.stderr)  # stdout has answers
    return model
