"""What stands after the colon of `--config FILE.py:…`, read for a recipe: `v15|v1|llava15`, `7b|13b`, `small`, `epochs=N`, …"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llavamed_jax.errors import UsageError


@dataclass(frozen=True)
class RecipeArguments:
    """What a recipe was asked for after the colon. `preset` names the model's shape (`config.PRESETS`)."""

    family: str = "v15"
    size: str = "7b"
    small: bool = False
    epochs: int | None = None
    protocol: str | None = None
    word: str | None = None

    @property
    def preset(self) -> str:
        return "small" if self.small else f"{self.family}-{self.size}"


_CHOICES = {"family": ("v15", "v1", "llava15"), "size": ("7b", "13b"), "small": ("small",)}


def recipe_arguments(text: str, *, epochs: int | None = None, protocol: str | None = None,
                     words: Sequence[str] = (), has_models: bool = True) -> RecipeArguments:
    """Reads `v15|v1|llava15`, `7b|13b`, `small`, `epochs=N` and `protocol=clean|paper`, separated by commas.

    Args:
      text: what stands after the colon of `--config FILE.py:…`.
      epochs, protocol: the recipe's own values; None says that the recipe has no such argument.
      words: words of the recipe's own, of which one may be given (the demo's stages); the first is the default.
      has_models: whether the recipe trains several models; else it has only `small`, which is its own model.
    Raises:
      UsageError: an unknown or repeated argument, a wrong value, or `v15` with `13b`, which was never released.
    """
    found: dict[str, Any] = {}
    choices = _CHOICES if has_models else {"small": ("small",)}
    kinds = {word: kind for kind, group in choices.items() for word in group} | {word: "word" for word in words}
    for item in filter(None, text.split(",")):
        name, is_assignment, value = item.partition("=")
        if is_assignment and name == "epochs" and epochs is not None:
            if not value.isdigit() or int(value) < 1:
                raise UsageError(f"the recipe argument {item!r} is wrong; epochs=N with N of at least 1 was expected")
            kind, value = "epochs", int(value)
        elif is_assignment and name == "protocol" and protocol is not None:
            if value not in ("clean", "paper"):
                raise UsageError(f"the recipe argument {item!r} is wrong; protocol=clean or protocol=paper was expected")
            kind = "protocol"
        elif item in kinds:
            kind, value = kinds[item], item
        else:
            known = [*kinds, *(["epochs=N"] if epochs is not None else []), *(["protocol=clean|paper"] if protocol else [])]
            raise UsageError(f"the recipe argument {item!r} does not exist; one of {', '.join(known)} was expected")
        if kind in found:
            raise UsageError(f"the recipe argument {item!r} contradicts or repeats {found[kind]!r}")
        found[kind] = value
    if "small" in found and ("family" in found or "size" in found):
        other = found.get("family") or found["size"]
        raise UsageError(f"the recipe argument 'small' names a model of its own; it cannot stand beside {other!r}")
    found["small"] = "small" in found
    result = RecipeArguments(**{"epochs": epochs, "protocol": protocol, "word": words[0] if words else None, **found})
    if (result.family, result.size) == ("v15", "13b"):
        raise UsageError("the recipe argument '13b' is Vicuna's size, so with v1 or llava15 only; v15 is Mistral 7b")
    return result
