"""What a training recipe may say: every key, checked before anything is read or written."""

from __future__ import annotations

import math
import re

from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError
from llavamed_jax.models.stacking import REMAT_POLICIES
from llavamed_jax.training.losses import WEIGHTINGS
from llavamed_jax.training.state import TABLE
from llavamed_jax.utils.nested import flatten

# Dotted key -> the types of its value; `None` where the value may be left open.
KEYS: dict[str, tuple] = {
    "name": (str,), "init": (str,), "vision_tower": (str, None), "tokenizer": (str, None), "template": (str, None),
    "data.train": (str, list, tuple), "data.images": (str, None), "data.validation": (str, None), "protocol": (str, None),
    "data.samples": (str, None),
    "data.packing": (bool,), "data.row_length": (int,), "data.mean_length": (int,), "data.workers": (int,),
    "data.skip_limit": (float,),
    "batch_size": (int,), "micro_batches": (int,), "epochs": (int, None), "total_steps": (int, None), "max_length": (int,),
    "loss_weighting": (str,), "trainable": (list, tuple),
    "optimizer.learning_rate": (float,), "optimizer.warmup_ratio": (float,), "optimizer.weight_decay": (float,),
    "optimizer.clip_norm": (float,), "optimizer.b1": (float,), "optimizer.b2": (float,), "optimizer.eps": (float,),
    "optimizer.mu_dtype": (str,), "optimizer.overrides": (list, tuple),
    "mesh.data": (int,), "mesh.fsdp": (int,), "mesh.tp": (int,), "mesh.slices": (int,), "mesh.auto": (bool,),
    "remat": (str,), "attention": (str,),
    "checkpoint.every_steps": (int,), "checkpoint.every_minutes": (float, int), "checkpoint.keep": (int,),
    "checkpoint.keep_best": (bool,), "log_every": (int,), "samples_every": (int,), "nan_limit": (int,), "seed": (int,),
}

# Values that a key may have, where they are few.
CHOICES: dict[str, tuple] = {
    "remat": ("none", *REMAT_POLICIES), "attention": ("auto", "xla", "splash", "flash"), "optimizer.mu_dtype": ("float32", "bfloat16"),
    "protocol": ("clean", "paper", None), "loss_weighting": WEIGHTINGS,
}
POSITIVE = ("batch_size", "micro_batches", "epochs", "total_steps", "max_length", "log_every", "nan_limit", "checkpoint.keep",
            "data.mean_length", "optimizer.learning_rate", "optimizer.eps", "mesh.slices")
NOT_NEGATIVE = ("data.row_length", "data.workers", "optimizer.warmup_ratio", "optimizer.weight_decay",
                "optimizer.clip_norm", "checkpoint.every_steps", "checkpoint.every_minutes", "samples_every", "seed")
SMALLEST = 2.0**-126  # float32's smallest number of full precision: devices take less for 0
# Adam moves each parameter by about the learning rate: beyond this nothing is left of a model after one update. The others are
# a process each, a plan each, an array each, or counters of 32 bits: what is larger was mistyped, and would fill the memory.
LARGEST_RATE = 10.0
LARGEST = {"optimizer.learning_rate": LARGEST_RATE, "data.workers": 1024, "data.row_length": 2**17, "batch_size": 2**20,
           "epochs": 10_000, "total_steps": 10**9}
LONGEST_NAME = 200
SHARES = {"optimizer.b1": "0 or more and less than 1", "optimizer.b2": "0 or more and less than 1", "optimizer.warmup_ratio": "0 to 1",
          "data.skip_limit": "0 to 1"}


def check(cfg: ConfigDict) -> None:
    """Raises UsageError for a key that is missing or unknown, and for a value that no run could start with."""
    values = flatten(cfg)
    missing, unknown = sorted(set(KEYS) - set(values)), sorted(set(values) - set(KEYS))
    if missing or unknown:
        raise UsageError("; ".join(f"the recipe {verb} {', '.join(keys)}" for verb, keys in
                                   (("lacks the config keys", missing), ("has the unknown config keys", unknown)) if keys))
    for key, value in values.items():
        _check_value(key, value)
    if cfg.epochs is None and cfg.total_steps is None:
        raise UsageError("the config keys 'epochs' and 'total_steps' are both open; one of them was expected")
    if cfg.batch_size % cfg.micro_batches:
        raise UsageError(f"the config key 'batch_size' is {cfg.batch_size}; a multiple of micro_batches ({cfg.micro_batches}) was expected")
    for axis, free in (("data", (1, -1)), ("fsdp", (1, -1)), ("tp", (1,))):
        if cfg.mesh.auto and cfg.mesh[axis] not in free:
            raise UsageError(f"the config key 'mesh.{axis}' is {cfg.mesh[axis]} beside mesh.auto, which picks data and fsdp and leaves "
                             f"tp at 1; {' or '.join(map(str, free))} was expected")
    if cfg.vision_tower is not None and cfg.init.startswith("preset:"):
        raise UsageError(f"the config key 'vision_tower' is {cfg.vision_tower!r} beside init {cfg.init!r}, whose tower is random; none, or "
                         "a checkpoint as init, was expected")
    if cfg.checkpoint.keep_best and not cfg.data.validation:
        raise UsageError("the config key 'checkpoint.keep_best' is true, but data.validation names no data to judge by")


def _check_value(key: str, value) -> None:
    kinds = KEYS[key]
    is_open = value is None and None in kinds
    if not is_open and type(value) not in kinds:  # `type`, for a bool is an int to isinstance
        names = " or ".join({None: "none"}.get(k) or k.__name__ for k in kinds)
        raise UsageError(f"the config key {key!r} is {value!r}; {names} was expected")
    if key in CHOICES and value not in CHOICES[key]:
        raise UsageError(f"the config key {key!r} is {value!r}; {' or '.join(map(str, CHOICES[key]))} was expected")
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"the config key {key!r} is {value!r}; a finite number was expected")
    if key in SHARES and not (0 <= value < 1 or value == 1 and SHARES[key] == "0 to 1"):
        raise UsageError(f"the config key {key!r} is {value!r}; {SHARES[key]} was expected")
    if not is_open and key in LARGEST and value > LARGEST[key]:
        raise UsageError(f"the config key {key!r} is {value!r}; at most {LARGEST[key]} was expected")
    if key == "name" and len(value) > LONGEST_NAME:
        raise UsageError(f"the config key 'name' has {len(value):,} characters; it stands in every line of the log: at most {LONGEST_NAME} "
                         "were expected")
    if value == "" and key != "name":
        raise UsageError(f"the config key {key!r} is empty; text{' or none' if None in kinds else ''} was expected")
    if not is_open and key in POSITIVE and 0 < value < SMALLEST:
        raise UsageError(f"the config key {key!r} is {value!r}, which is 0 in float32; at least {SMALLEST:.2g} was expected")
    if not is_open and key in POSITIVE and value <= 0:
        raise UsageError(f"the config key {key!r} is {value!r}; more than 0 was expected")
    if not is_open and key in NOT_NEGATIVE and value < 0:
        raise UsageError(f"the config key {key!r} is {value!r}; 0 or more was expected")
    if key == "trainable":
        if not value:
            raise UsageError("the config key 'trainable' is empty; regular expressions over parameter names were expected")
        for entry in value:
            _check_rows(entry) if isinstance(entry, (list, tuple)) else _check_regex(key, entry)
    if key == "optimizer.overrides":
        for entry in value:
            _check_override(key, entry)


def _check_rows(entry) -> None:
    is_pair = len(entry) == 2 and entry[0] == TABLE and isinstance(entry[1], (list, tuple))
    if not is_pair or not entry[1] or not all(isinstance(token, str) for token in entry[1]):
        raise UsageError(f"the config key 'trainable' has {entry!r}; a regular expression, or a pair of {TABLE!r} and tokens, was expected")


def _check_override(key: str, entry) -> None:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise UsageError(f"the config key {key!r} has {entry!r}; pairs of a regular expression and a learning rate were expected")
    regex, rate = entry
    _check_regex(key, regex)
    if type(rate) not in (int, float) or not 0 <= rate <= LARGEST_RATE:  # NaN is in no range
        raise UsageError(f"the config key {key!r} gives {regex!r} the learning rate {rate!r}; 0 to {LARGEST_RATE:g} was expected")


def _check_regex(key: str, regex) -> None:
    if not isinstance(regex, str):
        raise UsageError(f"the config key {key!r} has {regex!r}; a regular expression over parameter names was expected")
    try:
        re.compile(regex)
    except (re.error, RecursionError, OverflowError) as error:
        raise UsageError(f"the config key {key!r} has {regex!r}, which is no regular expression: {error}") from None
