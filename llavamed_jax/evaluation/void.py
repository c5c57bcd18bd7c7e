"""Finds the keys of an eval config that have no effect, so that an evaluation can warn before it starts."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from ml_collections import ConfigDict

from llavamed_jax.datasets.registry import SETS
from llavamed_jax.errors import short
from llavamed_jax.evaluation.chat import KIND as CHAT
from llavamed_jax.evaluation.judging.settings import judge_settings
from llavamed_jax.evaluation.scoring.programs import MEDEVALKIT, PROGRAMS
from llavamed_jax.utils.nested import flatten

# Keys that matter only if a model is asked, and those of them that a server is not told.
_OF_ANSWERS = ("generation.", "organ_question")
_OF_LOCAL = ("generation.batch_size",)
_OF_SCORES = ("judge.", "published", "scoring", "medevalkit.", "seed", "data.trained_on", "data.train")


def sentences(cfg: ConfigDict, typed: Collection[str], source: str) -> list[str]:
    """Returns one sentence for each key that is not used: `the config key KEY is VALUE but has no effect: …`.

    Args:
      cfg: an eval config.
      typed: the dotted keys that the command line sets. An unused value that the recipe itself sets is reported only if
        it asks for something: a data set's own key, a protocol, the images of training data, a judge's settings.
      source: the flag that is given: `preflight`, `checkpoint`, `endpoint`, `predictions` or `write_llava`.
    """
    values, found = flatten(cfg.to_dict()), {}
    if not {"data.name", "protocol"} <= values.keys():
        return []  # not an eval config; the code that reads it raises
    for key, why in _void(cfg, values, typed, source):
        found.setdefault(key, why)
    return [f"the config key {key!r} is {short(values[key])} but has no effect: {why}" for key, why in found.items()]


def _followed(name: str) -> tuple[str, ...] | None:
    """Returns the keys that the reader of this data set obeys beside the common ones; None for an unknown set."""
    if name == CHAT:
        return ("images",)
    return (*SETS[name].follows, "train") if name in SETS else None


def _void(cfg: ConfigDict, values: dict, typed: Collection[str], source: str) -> Iterator[tuple[str, str]]:
    name = cfg.data.name
    followed = _followed(name)
    for key in ("language", "images", "question", "train"):
        if f"data.{key}" in values and followed is not None and key not in followed and f"data.{key}" in typed:
            yield f"data.{key}", f"{name} has no such key"
    if cfg.data.get("trained_on_images") and not cfg.data.get("trained_on"):
        yield "data.trained_on_images", "data.trained_on is empty"
    if cfg.protocol == "paper" and not cfg.data.get("trained_on"):
        if cfg.data.get("held_out"):
            yield "protocol", "with data.held_out each row is asked once, and no rephrasings are training rows"
        elif followed is not None and "protocol" not in followed:
            yield "protocol", f"the key is for VQA-RAD's training rows, and data.name is {name}"
    if cfg.data.get("held_out") and "data.train" in typed:
        yield "data.train", "with data.held_out all rows of the other images are training rows"
    if name == CHAT and "data.split" in typed:
        yield "data.split", "the chat questions have one split"
    for key in ("judge.image_marker", "judge.reading"):
        if key in typed and name != CHAT:
            yield key, f"the key is for chat questions, and data.name is {name}"
    if "judge.model" in values and name != CHAT and not cfg.judge.model:
        usual = flatten(judge_settings().to_dict(), "judge.")
        for key in usual:
            if values[key] != usual[key]:
                yield key, "judge.model is empty"
    scoring = cfg.get("scoring")
    for key in typed:
        if key.startswith("medevalkit.") and scoring != MEDEVALKIT:
            yield key, "scoring is not medevalkit"
        if key in ("medevalkit.slake_twice", "medevalkit.pathvqa_drop") and not cfg.judge.model:
            yield key, "judge.model is empty"
        if key == "judge.model" and scoring == MEDEVALKIT and name == "mmmu_med":
            yield key, "MedEvalKit has no judge for MMMU"
        if key == "judge.model" and scoring in PROGRAMS and PROGRAMS[scoring].is_right is not None:
            yield key, f"scoring={scoring} has no judge"
        if key == "judge.prompt" and scoring == MEDEVALKIT:
            yield key, "scoring=medevalkit has a judge's prompt of its own"
        if source in ("predictions", "write_llava") and key.startswith(_OF_ANSWERS):
            yield key, f"no model is asked with --{source}"
        if source == "write_llava" and key.startswith(_OF_SCORES):
            yield key, "nothing is scored with --write_llava"
        if source == "preflight" and not key.startswith("generation."):
            yield key, "no model is asked with --preflight"
        if source == "endpoint" and key in _OF_LOCAL:
            yield key, "requests to a server are not batched; --concurrency sets how many are in flight"
    if source == "predictions" and cfg.get("organ_question"):
        yield "organ_question", "no model is asked with --predictions"
