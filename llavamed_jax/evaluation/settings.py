"""Checks an eval config without reading data or a model."""

from __future__ import annotations

import math

from ml_collections import ConfigDict

from llavamed_jax.config import MOST_BEAMS
from llavamed_jax.errors import UsageError, short
from llavamed_jax.evaluation.scoring.programs import OURS, PROGRAMS
from llavamed_jax.utils.nested import flatten


def check_settings(cfg: ConfigDict) -> None:
    """Raises UsageError for a value that is invalid for every kind of evaluation."""
    if cfg.protocol not in ("clean", "paper"):
        raise UsageError(f"protocol is {cfg.protocol!r}; clean or paper was expected")
    scorings = (OURS, *PROGRAMS)
    if cfg.get("scoring", OURS) not in scorings:
        raise UsageError(f"scoring is {cfg.scoring!r}; {', '.join(scorings[:-1])} or {scorings[-1]} was expected")
    for key, value in flatten(cfg.to_dict()).items():
        if value is None and key.startswith(("judge.", "seed")):
            raise UsageError(f"{key} is none; a number was expected")
    check_generation(cfg)
    if not 0 <= cfg.seed < 2**31:
        raise UsageError(f"seed is {cfg.seed}; 0 to {2**31 - 1} was expected")


def check_generation(cfg: ConfigDict) -> None:
    """Raises UsageError for invalid values under `generation`."""
    for key, value in cfg.generation.items():
        if value is None:
            raise UsageError(f"generation.{key} is none; a number was expected")
    for key, most in (("max_new_tokens", 131072), ("batch_size", 4096), ("num_beams", MOST_BEAMS)):
        if cfg.generation[key] < 1:
            raise UsageError(f"generation.{key} is {short(cfg.generation[key])}; at least 1 was expected")
        if cfg.generation[key] > most:
            raise UsageError(f"generation.{key} is {short(cfg.generation[key])}; at most {most} was expected")
    if not 0 <= cfg.generation.temperature < math.inf:  # a NaN raises too
        raise UsageError(f"generation.temperature is {cfg.generation.temperature}; a number of at least 0 was expected")
    if cfg.generation.num_beams > 1 and cfg.generation.temperature > 0:
        raise UsageError(f"generation.num_beams is {cfg.generation.num_beams} and generation.temperature is "
                         f"{cfg.generation.temperature}, but beam search does not sample; temperature 0 was expected")


