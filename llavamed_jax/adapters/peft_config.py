"""Reads PEFT's `adapter_config.json`: rank, alpha and scale of an adapter, or a sentence why it cannot be used.

Source: PEFT 0.21's `LoraConfig`, `get_pattern_key` and `check_target_module_exists`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llavamed_jax.checkpoints.torch.files import ADAPTER_CONFIG
from llavamed_jax.config.adapter import MOST_RANK
from llavamed_jax.config.checks import is_plain
from llavamed_jax.errors import UserError, short
from llavamed_jax.utils.files import read_json

# Keys with values that mean plain LoRA; with others the adapter computes something else.
_PLAIN = {"use_dora": (False, None), "use_qalora": (False, None), "lora_bias": (False, None),
          "fan_in_fan_out": (False, None), "layer_replication": (None,), "megatron_config": (None,),
          "alora_invocation_tokens": (None,), "arrow_config": (None,), "use_bdlora": (None, False),
          "target_parameters": (None, []), "trainable_token_indices": (None, [], {})}
# Ways of initialising that change the base too, so that the factors do not fit the base of the same name.
_CHANGES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_LONGEST = 10_000  # characters
_OF_MODULE = r"(?:.*\.)?(?:%s)"  # what a pattern of ranks is matched as, by PEFT too
# A quantifier over a quantifier, such as (a+)+, can take for ever on a short name, as can a reference to a group.
_SLOW = re.compile(r"[*+}](?:[^()]*\))+[*+{]|\\\d|\(\?(?:\(|P=)")


@dataclass(frozen=True)
class PeftConfig:
    """What an `adapter_config.json` says.

    Attributes:
      file: the file, for errors.
      rank: `r`.
      alpha: `lora_alpha`.
      ranks: `rank_pattern`, module pattern -> rank.
      alphas: `alpha_pattern`, module pattern -> alpha.
      targets: `target_modules`: names, a regular expression, or None if the file does not say.
      use_rslora: whether the scale is alpha / sqrt(r).
      dropout: `lora_dropout`.
      base: `base_model_name_or_path`.
      revision: `revision` of the base on its hub; None for the newest.
      excluded: `exclude_modules`: names or a regular expression.
      saved: `modules_to_save`.
      layers: `layers_to_transform`; empty for all.
      layers_patterns: `layers_pattern`: what stands before a layer's number; empty for any word.
    """

    file: Path
    rank: int
    alpha: float
    ranks: Mapping[str, int] = field(default_factory=dict)
    alphas: Mapping[str, float] = field(default_factory=dict)
    targets: tuple[str, ...] | str | None = None
    use_rslora: bool = False
    dropout: float = 0.0
    base: str | None = None
    revision: str | None = None
    excluded: tuple[str, ...] | str = ()
    saved: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    layers_patterns: tuple[str, ...] = ()

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module, by its torch name."""
        return _by_pattern(self.ranks, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Returns alpha of a module, by its torch name."""
        return _by_pattern(self.alphas, module, self.alpha)

    def is_target(self, module: str) -> bool:
        """Returns whether `target_modules` names a module, by its torch name."""
        if self.targets is None or self.targets == "all-linear":
            return True
        return _is_named(module, self.targets)

    def is_of_layer(self, module: str) -> bool:
        """Returns whether `layers_to_transform` lets a module have factors, by its torch name."""
        if not self.layers or isinstance(self.targets, str | None) or module in self.targets:
            return True
        starts = "|".join(map(re.escape, self.layers_patterns)) or r"[^.]*"
        found = re.match(rf"(?:^|.*?\.)(?:{starts})\.(\d+)\.", module)
        return found is not None and int(found[1]) in self.layers

    def asks_for(self, module: str) -> bool:
        """Returns whether PEFT gives factors to a module of these settings, by its torch name."""
        if self.targets is None or _is_named(module, self.excluded) or any(
                f".{name}." in f".{module}." for name in self.saved):
            return False
        return self.is_target(module) and self.is_of_layer(module)


def read(directory: Path) -> PeftConfig:
    """Reads the `adapter_config.json` of a directory.

    Raises:
      UserError: the file is missing or damaged, or the adapter is not plain LoRA.
    """
    file = directory / ADAPTER_CONFIG
    if not file.is_file():
        raise UserError(f"{directory} holds no {ADAPTER_CONFIG}; the directory of an adapter, as PEFT writes it, was "
                        "expected")
    raw = read_json(file)
    _refuse_others(file, raw)
    ranks, alphas = (_patterns(file, raw, key) for key in ("rank_pattern", "alpha_pattern"))
    return PeftConfig(file, _whole(file, "r", raw.get("r", 8)), _number(file, "lora_alpha", raw.get("lora_alpha", 8)),
                      {key: _whole(file, f"rank_pattern {short(key)}", value) for key, value in ranks.items()},
                      {key: _number(file, f"alpha_pattern {short(key)}", value) for key, value in alphas.items()},
                      _targets(file, raw), _flag(file, raw, "use_rslora"), _share(file, raw.get("lora_dropout") or 0.0),
                      _text(file, raw, "base_model_name_or_path"), _text(file, raw, "revision"),
                      _excluded(file, raw), _listed(raw, "modules_to_save", str),
                      _listed(raw, "layers_to_transform", int), _listed(raw, "layers_pattern", str))


def _refuse_others(file: Path, raw: Mapping[str, Any]) -> None:
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{file} has peft_type {short(kind)}; LORA was expected")
    for key, plain in _PLAIN.items():
        if raw.get(key, plain[0]) not in plain:
            raise UserError(f"{file} has {key} {short(raw[key])}, which is not supported; plain LoRA was expected")
    start = raw.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_THE_BASE):
        raise UserError(f"{file} has init_lora_weights {short(start)}, with which the adapter fits a changed base "
                        "only; an adapter that PEFT converted to plain LoRA (save_pretrained with "
                        "path_initial_model_for_weight_conversion) was expected")


def _patterns(file: Path, raw: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = raw.get(key) or {}
    if not isinstance(found, dict):
        raise UserError(f"{file} has {key} {short(found)}; an object was expected")
    for pattern in found:
        _check_pattern(file, key, pattern, _OF_MODULE)
    return found


def _targets(file: Path, raw: Mapping[str, Any]) -> tuple[str, ...] | str | None:
    found = raw.get("target_modules")
    if isinstance(found, str):
        if found != "all-linear":
            _check_pattern(file, "target_modules", found)
        return found
    if found is None or isinstance(found, list) and all(isinstance(name, str) for name in found):
        return None if found is None else tuple(found)
    raise UserError(f"{file} has target_modules {short(found)}; names, or a regular expression, were expected")


def _excluded(file: Path, raw: Mapping[str, Any]) -> tuple[str, ...] | str:
    """Returns `exclude_modules`; a pattern that cannot be used excludes all, since it only serves for warnings."""
    found = raw.get("exclude_modules")
    if not isinstance(found, str):
        return _listed(raw, "exclude_modules", str)
    try:
        _check_pattern(file, "exclude_modules", found)
    except UserError:
        return ".*"
    return found


def _listed(raw: Mapping[str, Any], key: str, kind: type) -> tuple:
    """Returns the values of a key that serves for warnings alone: of one value, or of a list; others are left out."""
    found = raw.get(key)
    return tuple(value for value in (found if isinstance(found, list) else [found]) if is_plain(value, (kind,)))


def _is_named(module: str, names: tuple[str, ...] | str) -> bool:
    """Returns whether a regular expression matches a module's torch name, or a name is its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _check_pattern(file: Path, key: str, pattern: str, form: str = "%s") -> None:
    try:
        re.compile(form % pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{file} has {key} {short(pattern)}, which is not a regular expression: {error}") from None
    if len(pattern) > _LONGEST or _SLOW.search(pattern):
        raise UserError(f"{file} has {key} {short(pattern)}; a regular expression without nested repetition, which "
                        "could take for ever, was expected")


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    return next((value for key, value in patterns.items() if re.fullmatch(_OF_MODULE % key, module)), default)


def _whole(file: Path, key: str, value: Any) -> int:
    if not is_plain(value, (int,)) or not 1 <= value <= MOST_RANK:
        raise UserError(f"{file} has {key} {short(value)}; a whole number from 1 to {MOST_RANK} was expected")
    return value


def _number(file: Path, key: str, value: Any) -> float:
    if not is_plain(value, (int, float)) or not abs(value) < 1e30:
        raise UserError(f"{file} has {key} {short(value)}; a finite number was expected")
    return float(value)


def _share(file: Path, value: Any) -> float:
    if not is_plain(value, (int, float)) or not 0 <= value < 1:
        raise UserError(f"{file} has lora_dropout {short(value)}; 0 or more and less than 1 was expected")
    return float(value)


def _flag(file: Path, raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key) or False
    if not isinstance(value, bool):
        raise UserError(f"{file} has {key} {short(value)}; true or false was expected")
    return value


def _text(file: Path, raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if not isinstance(value, str | None) or value is not None and not value.isprintable():
        raise UserError(f"{file} has {key} {short(value)}; a text was expected")
    return value or None
