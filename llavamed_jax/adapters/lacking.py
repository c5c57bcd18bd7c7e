"""Warns of what an adapter's `adapter_config.json` names and its files do not have, as after an interrupted save.

PEFT fills such factors at random, with B of 0, and computes with the base's kernels, as is done here.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from llavamed_jax.adapters.peft_config import PeftConfig
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import KERNEL
from llavamed_jax.errors import some, warn_once

_LAYER = re.compile(r"layers_(\d+)/")
_HEAD = "decoder/lm_head"


def warn_of_factors(file: Path, settings: PeftConfig, modules: Mapping[str, str], factors: Collection[str],
                    whole: Collection[str], model: LlavaConfig) -> None:
    """Warns of modules that `target_modules` names and that have no factors, and of layers that the config excludes.

    A list of names speaks of the decoder, since LLaVA's training adds the tower after the factors. So a name counts
    in the tower only where some of its layers have factors, or where the decoder has no such module.

    Args:
      file: the adapter's file.
      settings: its config.
      modules: torch's name of every module that can have factors, in every layout -> canonical name.
      factors: torch's names of the modules that have factors.
      whole: canonical names of the adapter's whole tensors.
      model: the model's config.
    """
    present = {modules[module] for module in factors} | {name.removesuffix(KERNEL) for name in whole}
    asked = _asked(settings, modules, factors)
    lacking = [name for name in asked if name not in present and name.startswith("decoder/")
               and not (settings.targets == "all-linear" and name == _HEAD)]
    for target in () if isinstance(settings.targets, str | None) else settings.targets:
        named = {name for name, spellings in asked.items()
                 if any(f".{each}".endswith(f".{target}") for each in spellings)}
        if named & present or any(name.startswith("decoder/") for name in named):
            begun = {_LAYER.sub("", name) for name in named & present}
            named = {name for name in named if _LAYER.sub("", name) in begun}
        lacking += [name for name in named - present if not name.startswith("decoder/") and _is_used(name, model)]
    if lacking:
        warn_once(f"{file} lacks factors of {_words(lacking, modules.values())}, which target_modules of "
                  f"{settings.file.name} names; the base's kernels stand there")
    others = sorted({module for module in factors if not settings.is_of_layer(module)})
    if others:
        warn_once(f"{file} has factors of {_words([modules[module] for module in others], modules.values())}, which "
                  f"layers_to_transform of {settings.file.name} leaves out; they are applied")


def warn_of_saved(file: Path, settings: PeftConfig, canonical: Mapping[str, str], whole: Collection[str]) -> None:
    """Warns of modules in `modules_to_save` of which the adapter has no tensor.

    Args:
      file: the adapter's file.
      settings: its config.
      canonical: torch's name of every tensor, in every layout -> canonical name.
      whole: canonical names of the adapter's whole tensors, those of `non_lora_trainables.bin` too.
    """
    covered = {entry: {name for key, name in canonical.items() if f".{entry}." in f".{key}"}
               for entry in settings.saved}
    lacking = [entry for entry, names in covered.items() if names and names.isdisjoint(whole)]
    if lacking:
        warn_once(f"{file} lacks the tensors of {some(lacking, 3)}, which modules_to_save of {settings.file.name} "
                  "names; the base's stand there")


def _asked(settings: PeftConfig, modules: Mapping[str, str], factors: Iterable[str]) -> dict[str, list[str]]:
    """Returns the modules that PEFT gives factors to, canonical name -> names in the adapter's own layout.

    The layout of a part without factors is unknown: a regular expression has to match all names of a module.
    """
    starts = {(modules[module].split("/")[0], found[0]) for module in factors
              if (found := re.match(r".*?\blayers?\.(?=\d)", module))}
    spellings: dict[str, list[str]] = {}
    for module, name in modules.items():
        own = [start for part, start in starts if part == name.split("/")[0]]
        if not own or not _LAYER.search(name) or module.startswith(tuple(own)):
            spellings.setdefault(name, []).append(module)
    of_all = all if isinstance(settings.targets, str) else any
    return {name: found for name, found in spellings.items() if of_all(map(settings.asks_for, found))}


def _is_used(name: str, model: LlavaConfig) -> bool:
    """Returns whether the projector reads a layer of the tower, or another module that is not the decoder's."""
    layer = _LAYER.search(name)
    return layer is None or int(layer[1]) < model.num_vision_layers_used


def _words(names: Iterable[str], of_model: Iterable[str]) -> str:
    """Returns modules in words, those of several layers together."""
    said, every = [], _by_kind(of_model)
    for kind, numbers in _by_kind(names).items():
        part, _, module = kind.partition("/")
        where = "" if not numbers else "every layer of " if numbers == every[kind] else (
            f"layer{'s' * (len(numbers) > 1)} {some(list(map(str, sorted(numbers))), 5)} of ")
        said.append(f"{module.replace('/', '.')} in {where}the {part.replace('_', ' ')}")
    return some(said, 3)


def _by_kind(names: Iterable[str]) -> dict[str, set[int]]:
    """Returns names without their layers -> the layers."""
    kinds: dict[str, set[int]] = {}
    for name in names:
        kinds.setdefault(_LAYER.sub("", name), set()).update(map(int, _LAYER.findall(name)))
    return kinds
