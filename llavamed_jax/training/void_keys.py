"""Finds config keys that another key makes void; a run warns of each before it starts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.registry import SETS
from llavamed_jax.errors import short
from llavamed_jax.training.layers import Depths, matched
from llavamed_jax.training.optimizer import NOT_DECAYED
from llavamed_jax.training.recipe import SCHEMA, TABLE


def sentences(cfg: ConfigDict) -> list[str]:
    """Returns a sentence for each key that is not used: `the config key KEY is VALUE and is not used: …`."""
    return [_sentence(*each) for each in _void(cfg)]


def of_optimizer(cfg: ConfigDict, names: Sequence[str], undecayed: Sequence[str] = (), depths: Depths | None = None,
                 partly_trained: Mapping[str, np.ndarray] | None = None) -> list[str]:
    """Returns a sentence for each key of `cfg.optimizer` that is not used.

    Args:
      cfg: the recipe.
      names: names of the trained parameters.
      undecayed: trained parameters without weight decay, besides biases and scales of norms.
      depths: the number of layers of each parameter (`layers.depths`); None for parameters that are not stacks.
      partly_trained: which layers are trained, for stacks of which some are not (`layers.partly_trained`).
    """
    found: list[tuple[str, object, str]] = []
    regexes = [regex for regex, _ in cfg.optimizer.overrides]
    depths, partly_trained = depths or dict.fromkeys(names, 0), partly_trained or {}
    is_overridden = {name: np.any([matched(regex, name, depths[name]) for regex in regexes], axis=0) for name in names}
    if regexes and all((is_overridden[name] | ~partly_trained.get(name, np.True_)).all() for name in names):
        found.append(("optimizer.learning_rate", cfg.optimizer.learning_rate,
                      "optimizer.overrides match all trained parameters"))
    if cfg.optimizer.weight_decay and all(NOT_DECAYED.fullmatch(name) or name in undecayed for name in names):
        found.append(("optimizer.weight_decay", cfg.optimizer.weight_decay,
                      "trainable names only biases, scales of norms and single rows, which do not decay"))
    return [_sentence(*each) for each in found]


def _sentence(key: str, value: object, why: str) -> str:
    return f"the config key {key!r} is {short(value)} but has no effect: {why}"


def _void(cfg: ConfigDict) -> Iterator[tuple[str, object, str]]:
    if cfg.epochs is not None and cfg.total_steps is not None:
        yield "epochs", cfg.epochs, f"total_steps is {cfg.total_steps}"
    if cfg.data.row_length and not cfg.data.packing:
        yield "data.row_length", cfg.data.row_length, "data.packing is false"
    if cfg.data.mean_length is not None and cfg.data.mean_text is not None:
        yield "data.mean_text", cfg.data.mean_text, f"data.mean_length is {cfg.data.mean_length}"
    if cfg.batch_size_may_grow and not cfg.data.packing:
        yield "batch_size_may_grow", cfg.batch_size_may_grow, "data.packing is false"
    if cfg.data.samples and not cfg.samples_every:
        yield "data.samples", cfg.data.samples, "samples_every is 0"
    if cfg.checkpoint.keep_best and not cfg.checkpoint.every_steps:
        yield "checkpoint.keep_best", True, "checkpoint.every_steps is 0, so only the last step is validated"
    if not cfg.lora.rank:
        for key in cfg.lora:
            if cfg.lora[key] != SCHEMA[f"lora.{key}"].default:
                yield f"lora.{key}", cfg.lora[key], "lora.rank is 0"
    if any(isinstance(entry, str) and re.fullmatch(entry, TABLE) for entry in cfg.trainable):
        for entry in cfg.trainable:
            if not isinstance(entry, str):
                yield "trainable", tuple(entry), f"another entry trains all of {TABLE}"
    for entry in [] if isinstance(cfg.data.train, str) else cfg.data.train:
        if hasattr(entry, "keys") and entry.get("images") is not None and _has_own_images(_layout(entry.get("path"))):
            yield "data.train", dict(entry), "the images are in the folder that the data set's own layout names"
    sources = list(_sources(cfg))
    if cfg.protocol == "paper" and not any(layout in SETS and "protocol" in SETS[layout].follows
                                           for layout, _ in sources):
        yield "protocol", "paper", "none of the data has VQA-RAD's own layout"
    if cfg.data.images is not None and all(_has_own_images(layout) or has_images for layout, has_images in sources):
        yield "data.images", cfg.data.images, "all data sets have their own folder of images"


def _sources(cfg: ConfigDict) -> Iterator[tuple[str | None, bool]]:
    """Yields (layout, whether the recipe names its images) of every source that the recipe reads."""
    train = [cfg.data.train] if isinstance(cfg.data.train, str) else list(cfg.data.train)
    for entry in [*train, cfg.data.validation, cfg.data.samples if cfg.samples_every else None]:
        is_mixed = hasattr(entry, "keys")
        path = entry.get("path") if is_mixed else entry
        if isinstance(path, str):
            yield _layout(path), is_mixed and entry.get("images") is not None


def _has_own_images(layout: str | None) -> bool:
    """Returns whether the images of a data set lie where its own layout says."""
    return layout in SETS and "images" not in SETS[layout].follows


def _layout(path: object) -> str | None:
    return detect.layout_of(Path(path)) if isinstance(path, str) else None
