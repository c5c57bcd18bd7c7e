"""The config of an adapter: which kernels have low-rank factors (LoRA), of which rank, and how they are scaled.

A kernel W [in,out] with an adapter computes `x W + scale (x A) B`, with A [in,r] and B [r,out] beside it in the
parameters. The kernels are named by their modules, one a layer: `decoder/layers_3/self_attn/q_proj`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llavamed_jax.config.checks import as_object, is_plain
from llavamed_jax.errors import UserError, short

MOST_RANK = 2**14
KERNEL = "/kernel"
FACTOR_A, FACTOR_B = "/kernel_lora_a", "/kernel_lora_b"
# Leaves that follow from the config and are in no file: float32 [], or [L] for a stack.
SCALE, DROPOUT = "/kernel_lora_scale", "/kernel_lora_dropout"


@dataclass(frozen=True)
class AdapterRule:
    """The rank of some kernels.

    Attributes:
      regex: has to match a module's whole name; the first rule that matches counts.
      rank: r.
      alpha: the numerator of the scale.
    """

    regex: str
    rank: int
    alpha: float


@dataclass(frozen=True)
class AdapterConfig:
    """The low-rank factors of a model.

    Attributes:
      rules: the kernels with factors.
      use_rslora: whether the scale is alpha / sqrt(r), and not alpha / r.
      dropout: the share of the inputs of A that training sets to 0.
    """

    rules: tuple[AdapterRule, ...]
    use_rslora: bool = False
    dropout: float = 0.0

    def __post_init__(self):
        for rule in self.rules:
            try:
                re.compile(rule.regex)
            except (re.error, TypeError) as error:
                raise UserError(f"the adapter has the target {short(rule.regex)}; a regular expression was expected: "
                                f"{error}") from None
            if not is_plain(rule.rank, (int,)) or not 1 <= rule.rank <= MOST_RANK:
                raise UserError(f"the adapter has the rank {short(rule.rank)}; a whole number from 1 to {MOST_RANK} "
                                "was expected")
            if not is_plain(rule.alpha, (int, float)) or not math.isfinite(rule.alpha):
                raise UserError(f"the adapter has alpha {short(rule.alpha)}; a finite number was expected")
        if not is_plain(self.use_rslora, (bool,)):
            raise UserError(f"the adapter has use_rslora {short(self.use_rslora)}; true or false was expected")
        if not is_plain(self.dropout, (int, float)) or not 0 <= self.dropout < 1:
            raise UserError(f"the adapter has dropout {short(self.dropout)}; 0 or more and less than 1 was expected")

    def rule(self, module: str) -> AdapterRule | None:
        """Returns the rule of a module; None for a kernel without factors."""
        return next((rule for rule in self.rules if re.fullmatch(rule.regex, module)), None)

    def scale(self, rule: AdapterRule) -> float:
        """Returns what the product of the factors is multiplied by."""
        return rule.alpha / (math.sqrt(rule.rank) if self.use_rslora else rule.rank)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> AdapterConfig:
        """Reads the config from this project's own `model/config.json`."""
        fields = as_object(fields, "adapter")
        known = {field.name for field in dataclasses.fields(cls)}
        rules = fields.get("rules")
        if set(fields) - known or not isinstance(rules, list | tuple):
            raise UserError(f"config.json has adapter {short(fields)}; rules, use_rslora and dropout were expected")
        try:
            return cls(**{**fields, "rules": tuple(AdapterRule(**as_object(rule, "adapter.rules")) for rule in rules)})
        except TypeError as error:
            raise UserError(f"config.json has adapter.rules {short(rules)}; regex, rank and alpha were expected: "
                            f"{error}") from None

    def factors(self, kernels: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the factors by name, one a layer.

        Args:
          kernels: shapes of a model's tensors by canonical name; those of matrices under `…/kernel` may have factors.

        Raises:
          UserError: a rule matches no kernel.
        """
        out, unmatched = {}, set(self.rules)
        for name, shape in kernels.items():
            module = name.removesuffix(KERNEL)
            if module == name or len(shape) != 2 or (rule := self.rule(module)) is None:
                continue
            unmatched.discard(rule)
            out |= {module + FACTOR_A: (shape[0], rule.rank), module + FACTOR_B: (rule.rank, shape[1])}
        if unmatched:
            raise UserError(f"the adapter has the target {short(sorted(rule.regex for rule in unmatched)[0])}, which "
                            "matches no kernel of this model; such as decoder/layers_\\d+/self_attn/[qv]_proj was "
                            "expected")
        return out

    def of_stack(self, module: str, depth: int) -> AdapterRule | None:
        """Returns the rule of a stack's kernels `decoder/layers/self_attn/q_proj`; None without factors.

        Args:
          module: the module's name, with `/layers/` for all layers.
          depth: L.

        Raises:
          UserError: the layers differ in rank or alpha, so that their factors do not form one array.
        """
        found = {(rule.rank, rule.alpha) if (rule := self.rule(module.replace("/layers/", f"/layers_{i}/"))) else None
                 for i in range(depth)}
        if len(found) > 1:
            raise UserError(f"the adapter of {module} differs between layers; training scans the layers, so the same "
                            "rank and alpha in all of them was expected")
        rank_and_alpha = found.pop()
        return None if rank_and_alpha is None else AdapterRule(module, *rank_and_alpha)


def is_factor(name: str) -> bool:
    """Returns whether a parameter's name is that of a trained factor A or B."""
    return name.endswith((FACTOR_A, FACTOR_B))


def is_derived(name: str) -> bool:
    """Returns whether a parameter follows from the config: it is in no file, never trained, and always float32."""
    return name.endswith((SCALE, DROPOUT))


def without_factors(names: Iterable[str]) -> list[str]:
    """Returns the names that belong to the model without its adapter."""
    return [name for name in names if not is_factor(name) and not is_derived(name)]
