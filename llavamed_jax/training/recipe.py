"""The schema of a training recipe: type, range and meaning of every key.

A recipe is checked before any file is read. This module does not import jax: the command line reads the schema before
jax may be imported.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ml_collections import ConfigDict

from llavamed_jax.config import PRESET, QUANTIZED
from llavamed_jax.config.adapter import MOST_RANK
from llavamed_jax.errors import UsageError
from llavamed_jax.utils.nested import flatten

TABLE = "decoder/embed_tokens/embedding"  # [V,D]; a recipe may train single rows of it
WEIGHTINGS = ("token", "sample")  # of the loss
COMPUTED = ("bfloat16", "float32", "fp8")
SMALLEST = 2.0**-126  # float32's smallest normal number: devices flush smaller ones to 0
# Adam moves each parameter by about the learning rate: a larger rate destroys a model in one update.
LARGEST_RATE = 10.0
LIST = (list, tuple)
REQUIRED = object()  # each recipe states the value itself
_WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", list: "list", tuple: "list"}


@dataclass(frozen=True)
class Key:
    """The type, range and meaning of the values that a recipe may set under a key.

    Attributes:
      types: types of the value; a bool does not count as an integer.
      meaning: what the key does, in a few words for a user.
      default: the value that `configs/common.py` sets; REQUIRED if each recipe must set its own.
      is_open: whether the value may be None.
      choices: all values, if there are few.
      more_than: exclusive lower bound of a number; None for no such bound.
      least: inclusive lower bound of a number; None for no such bound.
      less_than: exclusive upper bound of a number; None for no such bound.
      most: inclusive upper bound of a number; None for no such bound.
      longest: the most characters of a text; None for no limit.
    """

    types: tuple[type, ...]
    meaning: str
    default: Any = REQUIRED
    is_open: bool = False
    choices: tuple[str, ...] = ()
    more_than: float | None = None
    least: float | None = None
    less_than: float | None = None
    most: float | None = None
    longest: int | None = None

    @property
    def share(self) -> str | None:
        """The range of a share between 0 and 1, in words; None for other keys."""
        if self.least != 0 or 1 not in (self.most, self.less_than):
            return None
        return "0 to 1" if self.most == 1 else "0 or more and less than 1"

    def values(self) -> str:
        """Returns type and range in words, such as `integer, more than 0, at most 10,000`."""
        words = [_WORDS[kind] for kind in self.types if not (self.choices and kind is str)]
        said = [" or ".join(dict.fromkeys([*words, *self.choices]))]
        said += [f"at most {self.longest} characters"] if self.longest is not None else []
        if self.share:
            said.append(self.share)
        else:
            said += [f"more than {self.more_than}"] if self.more_than is not None else []
            said += [f"{self.least} or more"] if self.least is not None else []
            said += [f"at most {self.most:,}"] if self.most is not None else []
        return ", ".join(said)

    def otherwise(self) -> str:
        """Returns the value that holds if a recipe does not set the key: `required`, `none`, or the default."""
        if self.default is REQUIRED:
            return "required"
        if self.default is None:
            return "none"
        return str(self.default).lower() if isinstance(self.default, bool) else str(self.default)


def _text(meaning: str, default: Any = REQUIRED, **rest) -> Key:
    return Key((str,), meaning, default, **rest)


def _open(meaning: str, *types: type, **rest) -> Key:
    return Key(types or (str,), meaning, None, is_open=True, **rest)


def _integer(meaning: str, default: Any = REQUIRED, **rest) -> Key:
    return Key((int,), meaning, default, **rest)


def _number(meaning: str, default: Any = REQUIRED, **rest) -> Key:
    return Key((float,), meaning, default, **rest)


def _flag(meaning: str, default: bool) -> Key:
    return Key((bool,), meaning, default)


# In the order of the recipes. A number above its upper bound would be a typing error and would exhaust the memory with
# processes, plans or arrays, or overflow a 32-bit counter.
SCHEMA: Mapping[str, Key] = MappingProxyType({
    "name": _text("the run's name in its log", longest=200),  # every line of the log has it
    "init": _text("the checkpoint PATH that the run starts from"),
    "vision_tower": _open("a vision tower that replaces the one of init"),
    "tokenizer": _open("a tokenizer that replaces the one of init"),
    "template": _open("the prompt template; none takes the one of init"),
    "protocol": _open("VQA-RAD's training rows", choices=("clean", "paper")),
    "data.train": Key((str, *LIST), "a LLaVA file, a data set in its own layout, a folder of shards, or a list of "
                                    "{path, images, weight}"),
    "data.images": _open("the directory of the images; none if the data set has its own"),
    "data.validation": _open("data for loss and closed accuracy, computed at each save by checkpoint.every_steps"),
    "data.samples": _open("data for the sample answers of samples_every; none takes data.validation, else data.train"),
    "data.packing": _flag("whether several samples share a row", True),
    "data.row_length": _integer("tokens per packed row; 0 picks 8,192, 4,096, 2,048, or a length that makes the "
                                 "batch", 0, least=0, most=2**17),
    "data.mean_text": _open("mean tokens of a sample's text; preflight, which reads no data, adds the positions that "
                            "the model has for the images; a run measures its own", int, more_than=0),
    "data.mean_images": _number("mean images per sample, as data.mean_text", 1.0, least=0, most=1000),
    "data.mean_length": _open("mean tokens per sample, images included, in place of data.mean_text", int, more_than=0),
    "data.workers": _integer("processes that read and tokenize; 0 reads in the training process", 8,
                             least=0, most=1024),
    "data.skip_limit": _number("the share of samples, and of images, that may be unusable before the run stops", 0.5,
                               least=0, most=1),
    "batch_size": _integer("samples per update; an epoch with fewer samples is one update, unless total_steps is given",
                           more_than=0, most=2**20),
    "micro_batches": Key((int, str), "the number of micro-batches per update; auto picks the fewest that have at most "
                                     "16,384 positions, or one row, on a device", choices=("auto",), more_than=0),
    "batch_size_may_grow": _flag("whether packed rows may make updates of other than batch_size samples, by more than "
                                 "a tenth; else such a mesh is refused", False),
    "epochs": _open("the length of the run in epochs; none if total_steps is given", int, more_than=0, most=10_000),
    "total_steps": _open("the length of the run in updates; none if epochs is given", int, more_than=0, most=10**9),
    "max_length": _integer("the most tokens per sample; longer samples are cut and counted", more_than=0),
    "loss_weighting": _text("whether each supervised token, or each sample, has the same weight", "token",
                            choices=WEIGHTINGS),
    "trainable": Key(LIST, "regular expressions over names of parameters, or of single layers "
                           "(vision_tower/layers_-[1-4]/.*: the last four); a pair of the embedding's name and a "
                           "list of tokens trains only their rows"),
    "quantize": _open("rounds the frozen kernels of the decoder's layers, beside which factors are trained (QLoRA)",
                      choices=QUANTIZED),
    "optimizer.learning_rate": _number("the peak learning rate", more_than=0, most=LARGEST_RATE),
    "optimizer.warmup_ratio": _number("the share of updates in the warm-up", least=0, most=1),
    "optimizer.weight_decay": _number("AdamW's weight decay", least=0),
    "optimizer.clip_norm": _number("the largest norm of a gradient; 0 turns clipping off", least=0),
    "optimizer.b1": _number("AdamW's decay rate of the first moment", least=0, less_than=1),
    "optimizer.b2": _number("AdamW's decay rate of the second moment", least=0, less_than=1),
    "optimizer.eps": _number("AdamW's epsilon", more_than=0),
    "optimizer.mu_dtype": _text("the dtype of AdamW's first moment", "float32", choices=("float32", "bfloat16")),
    "optimizer.overrides": Key(LIST, "pairs of a regular expression, over the names that trainable has, and a "
                                     "learning rate; the first match counts", ()),
    "lora.rank": _integer("the rank of the factors beside the kernels (LoRA); 0 for none", 0, least=0, most=MOST_RANK),
    "lora.alpha": _number("the numerator of their scale, alpha / rank", 16.0, more_than=0),
    "lora.dropout": _number("the share of the inputs of the factors that training sets to 0", 0.0, least=0,
                            less_than=1),
    "lora.rslora": _flag("scales by alpha / sqrt(rank)", False),
    "lora.targets": Key(LIST, "regular expressions over the names of modules with factors, one a layer",
                        (r"decoder/layers_\d+/.*_proj",)),
    "mesh.data": _integer("devices that hold different rows and whole parameters; -1 on one axis takes the remaining "
                          "devices", 1),
    "mesh.fsdp": _integer("devices that hold different rows and shards of the parameters", -1),
    "mesh.tp": _integer("devices over which heads, feed-forward and vocabulary are split", 1),
    "mesh.slices": _integer("the number of TPU slices", 1, more_than=0),
    "mesh.auto": _flag("picks data and fsdp from devices and memory", False),
    "remat": _text("what a layer keeps for its backward pass; auto picks by memory what computes least again", "auto",
                   choices=("auto", "none", "full", "qkvo", "attention", "minimal")),
    "compute": _open("the dtype of the computation; none takes bfloat16, on a CPU float32; fp8 is bfloat16 with the "
                     "products of the decoder's layers in FP8", choices=COMPUTED),
    "attention": _text("the attention kernel; auto picks it by device", "auto",
                       choices=("auto", "xla", "splash", "flash")),
    "checkpoint.every_steps": _integer("updates between saves; 0 saves only by time and at the end", 500, least=0),
    "checkpoint.every_minutes": Key((float, int), "minutes between saves; 0 saves only by count", 30.0, least=0),
    "checkpoint.keep": _integer("the number of saved steps that are kept", 2, more_than=0),
    "checkpoint.keep_best": _flag("also keeps the step with the lowest validation loss", False),
    "log_every": _integer("updates per line of metrics.jsonl", 10, more_than=0),
    "samples_every": _integer("updates between sample answers; 0 turns them off", 200, least=0),
    "nan_limit": _integer("the run ends after so many updates in a row that are not finite or learn nothing", 10,
                          more_than=0),
    "seed": _integer("the seed of data order, initialisation and sampling", least=0),
})


def help_text(width: int) -> str:
    """Lists every key with type, range, default and meaning, in lines of at most `width` characters."""
    lines = []
    for name, key in SCHEMA.items():
        otherwise = key.otherwise() if key.default is REQUIRED else f"default {key.otherwise()}"
        lines += textwrap.wrap(f"{name}: {key.values()}; {otherwise}", width, subsequent_indent="  ")
        lines += textwrap.wrap(key.meaning, width, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines)


# Keys that a recipe may lack that writes out all keys itself: they were added later, and a run does not read them.
_ADDED = {"data.mean_text", "data.mean_images"}


def check(cfg: ConfigDict) -> None:
    """Checks a recipe, and gives it the defaults of the keys in `_ADDED` that it lacks.

    Raises:
      UsageError: a missing or unknown key, or a value with which no run could start.
    """
    values = flatten(cfg)
    if "data.mean_length" in values and not _ADDED <= set(values):
        with cfg.unlocked():
            for key in _ADDED - set(values):
                cfg.data[key.removeprefix("data.")] = SCHEMA[key].default
        values = flatten(cfg)
    missing, unknown = sorted(set(SCHEMA) - set(values)), sorted(set(values) - set(SCHEMA))
    if missing or unknown:
        found = (("lacks the config keys", missing), ("has the unknown config keys", unknown))
        raise UsageError("; ".join(f"the recipe {verb} {', '.join(keys)}" for verb, keys in found if keys))
    for key, value in values.items():
        _check_value(key, value)
    if cfg.epochs is None and cfg.total_steps is None:
        raise UsageError("the config keys 'epochs' and 'total_steps' are both none; one of them was expected")
    if cfg.data.mean_length is None and cfg.data.mean_text is None:
        raise UsageError("the config keys 'data.mean_text' and 'data.mean_length' are both none; one of them was "
                         "expected, because preflight plans with it")
    if isinstance(cfg.micro_batches, int) and cfg.batch_size % cfg.micro_batches and not cfg.data.packing:
        raise UsageError(f"the config key 'batch_size' is {cfg.batch_size}; "
                         f"a multiple of micro_batches ({cfg.micro_batches}) was expected")
    for axis, free in (("data", (1, -1)), ("fsdp", (1, -1)), ("tp", (1,))):
        if cfg.mesh.auto and cfg.mesh[axis] not in free:
            raise UsageError(f"the config key 'mesh.{axis}' is {cfg.mesh[axis]}, but mesh.auto picks data and fsdp and "
                             f"leaves tp at 1; {' or '.join(map(str, free))} was expected")
    if cfg.quantize is not None and not cfg.lora.rank:
        raise UsageError(f"the config key 'quantize' is {cfg.quantize!r} and lora.rank is 0; a rank was expected, "
                         "since rounded kernels cannot be trained")
    if cfg.compute == "fp8" and cfg.lora.rank:
        raise UsageError(f"the config key 'compute' is 'fp8' and lora.rank is {cfg.lora.rank}; 0 was expected, because "
                         "FP8 is for training all of the decoder's kernels")
    if cfg.lora.rank and not cfg.lora.targets:
        raise UsageError("the config key 'lora.targets' is empty; regular expressions over modules' names, such as "
                         "decoder/layers_\\d+/.*_proj, were expected")
    if cfg.vision_tower is not None and cfg.init.startswith(PRESET):
        raise UsageError(f"the config key 'vision_tower' is {cfg.vision_tower!r}, but init is {cfg.init!r}, whose "
                         "tower is random; none was expected, or a checkpoint as init")
    if cfg.checkpoint.keep_best and not cfg.data.validation:
        raise UsageError("the config key 'checkpoint.keep_best' is true, but data.validation is none; data for the "
                         "validation loss was expected")


def _check_value(name: str, value: Any) -> None:
    key = SCHEMA[name]

    def refuse(expected: str, what: str | None = None):
        raise UsageError(f"the config key {name!r} {what or f'is {value!r}'}; {expected} was expected")

    if value is None and key.is_open:
        return
    if type(value) not in key.types:  # not isinstance: a bool is an instance of int
        refuse(" or ".join([kind.__name__ for kind in key.types] + ["none"] * key.is_open))
    if key.choices and isinstance(value, str) and value not in key.choices:
        numbers = ["a number"] * (int in key.types)
        refuse(" or ".join([*key.choices, *numbers, *["None"] * key.is_open]))
    if isinstance(value, str):
        _check_text(name, key, value)
    if type(value) in (int, float):
        _check_number(key, value, refuse)
    if name == "trainable":
        if not value:
            raise UsageError("the config key 'trainable' is empty; regular expressions over parameter names "
                             "were expected")
        for entry in value:
            _check_rows(entry) if isinstance(entry, LIST) else _check_regex(name, entry)
    if name == "lora.targets":
        for regex in value:
            _check_regex(name, regex)
    if name == "optimizer.overrides":
        for entry in value:
            _check_override(name, entry)


def _check_text(name: str, key: Key, value: str) -> None:
    if key.longest is not None and len(value) > key.longest:
        raise UsageError(f"the config key {name!r} has {len(value):,} characters; at most {key.longest} were expected, "
                         "because every line of the log contains it")
    if not value and key.longest is None:
        raise UsageError(f"the config key {name!r} is empty; text{' or none' if key.is_open else ''} was expected")


def _check_number(key: Key, value: float, refuse) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        refuse("a finite number")
    is_below = key.least is not None and value < key.least
    is_above = key.most is not None and value > key.most or key.less_than is not None and value >= key.less_than
    if key.share and (is_below or is_above):
        refuse(key.share)
    if is_above:
        refuse(f"at most {key.most}")
    if key.more_than is not None and 0 < value < SMALLEST:
        refuse(f"at least {SMALLEST:.2g}", f"is {value!r}, which is 0 in float32")
    if key.more_than is not None and value <= key.more_than:
        refuse(f"more than {key.more_than}")
    if is_below:
        refuse(f"{key.least} or more")


def _check_rows(entry) -> None:
    is_pair = len(entry) == 2 and entry[0] == TABLE and isinstance(entry[1], (list, tuple))
    if not is_pair or not entry[1] or not all(isinstance(token, str) for token in entry[1]):
        raise UsageError(f"the config key 'trainable' has {entry!r}; "
                         f"a regular expression, or a pair of {TABLE!r} and tokens, was expected")


def _check_override(key: str, entry) -> None:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise UsageError(f"the config key {key!r} has {entry!r}; "
                         "pairs of a regular expression and a learning rate were expected")
    regex, rate = entry
    _check_regex(key, regex)
    if type(rate) not in (int, float) or not 0 <= rate <= LARGEST_RATE:  # NaN is in no range
        raise UsageError(f"the config key {key!r} gives {regex!r} the learning rate {rate!r}; "
                         f"0 to {LARGEST_RATE:g} was expected")


def _check_regex(key: str, regex) -> None:
    if not isinstance(regex, str):
        raise UsageError(f"the config key {key!r} has {regex!r}; "
                         "a regular expression over parameter names was expected")
    try:
        re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"the config key {key!r} has {regex!r}, which is not a valid regular expression: "
                         f"{error}") from None
