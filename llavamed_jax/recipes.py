"""Reads the arguments of a recipe, which stand after the colon of `--config FILE.py:…`.

The arguments are `v15|v1|llava15`, `7b|13b`, `small`, `epochs=N`, `protocol=clean|paper` and the recipe's own words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llavamed_jax.errors import UsageError


@dataclass(frozen=True)
class RecipeArguments:
    """The arguments of a recipe.

    Attributes:
      family: `v15`, `v1` or `llava15`.
      size: `7b` or `13b`.
      small: whether the small model is trained in place of the one that `family` and `size` name.
      epochs: number of epochs; None if the recipe has no such argument.
      protocol: `clean` or `paper`; None if the recipe has no such argument.
      word: one of the recipe's own words; None if the recipe has no such words.
    """

    family: str = "v15"
    size: str = "7b"
    small: bool = False
    epochs: int | None = None
    protocol: str | None = None
    word: str | None = None

    @property
    def preset(self) -> str:
        """The name of the model's shape in `config.PRESETS`."""
        return "small" if self.small else f"{self.family}-{self.size}"


_CHOICES = {"family": ("v15", "v1", "llava15"), "size": ("7b", "13b"), "small": ("small",)}


def recipe_arguments(text: str, *, epochs: int | None = None, protocol: str | None = None,
                     words: Sequence[str] = (), has_models: bool = True, has_small: bool = True) -> RecipeArguments:
    """Reads the comma-separated arguments of a recipe.

    Args:
      text: the text after the colon of `--config FILE.py:…`.
      epochs: the recipe's default number of epochs; None if the recipe has no such argument.
      protocol: the recipe's default protocol; None if the recipe has no such argument.
      words: the recipe's own words (the demo's stages), of which one may be given; the first is the default.
      has_models: whether the recipe trains the models of `_CHOICES`.
      has_small: whether the recipe trains the model `small`, if not `has_models`.

    Returns:
      The arguments, with the defaults for those that are absent.

    Raises:
      UsageError: an argument is unknown or repeated, a value is wrong, or `v15` is combined with `13b`, which was never
        released.
    """
    found: dict[str, Any] = {}
    choices = _CHOICES if has_models else {"small": ("small",)} if has_small else {}
    kinds = {word: kind for kind, group in choices.items() for word in group} | {word: "word" for word in words}
    for item in filter(None, text.split(",")):
        name, is_assignment, value = item.partition("=")
        if is_assignment and name == "epochs" and epochs is not None:
            if not value.isdigit() or int(value) < 1:
                raise UsageError(f"the recipe argument {item!r} is wrong; epochs=N with N of at least 1 was expected")
            kind, value = "epochs", int(value)
        elif is_assignment and name == "protocol" and protocol is not None:
            if value not in ("clean", "paper"):
                raise UsageError(f"the recipe argument {item!r} is wrong; protocol=clean or protocol=paper was "
                                 "expected")
            kind = "protocol"
        elif item in kinds:
            kind, value = kinds[item], item
        else:
            known = [*kinds, *(["epochs=N"] if epochs is not None else []),
                     *(["protocol=clean|paper"] if protocol else [])]
            raise UsageError(f"the recipe argument {item!r} does not exist; one of {', '.join(known)} was expected")
        if kind in found:
            raise UsageError(f"the recipe argument {item!r} contradicts or repeats {found[kind]!r}")
        found[kind] = value
    if "small" in found and ("family" in found or "size" in found):
        other = found.get("family") or found["size"]
        raise UsageError(f"the recipe argument 'small' names a model itself; it cannot be used with {other!r}")
    found["small"] = "small" in found
    result = RecipeArguments(**{"epochs": epochs, "protocol": protocol, "word": words[0] if words else None, **found})
    if (result.family, result.size) == ("v15", "13b"):
        raise UsageError("the recipe argument '13b' can be used only with v1 or llava15 (Vicuna); v15 is Mistral 7b")
    return result
