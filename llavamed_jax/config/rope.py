"""The scaling of a decoder's rotary frequencies for texts longer than those of its training.

transformers calls it `rope_scaling` up to 4.57 and `rope_parameters` since 5.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llavamed_jax.config.checks import as_object, check_fields, number
from llavamed_jax.errors import UserError, short

# The keys that each type needs besides its name. Other types are not supported: `dynamic` and `longrope` change with a
# text's length, and `yarn` scales the tables too; no known LLaVA uses one of them.
_KEYS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


@dataclass(frozen=True)
class RopeScaling:
    """`linear` divides every frequency by `factor`; `llama3` divides the low frequencies and keeps the high ones.

    Attributes:
      rope_type: `linear` or `llama3`.
      factor: the divisor of the frequencies.
      low_freq_factor: for `llama3`, the training length over the shortest wavelength that is fully scaled.
      high_freq_factor: for `llama3`, the training length over the longest wavelength that is not scaled.
      original_max_position_embeddings: for `llama3`, the length in tokens of the training before the scaling.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        check_fields(self, "rope_scaling ")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"rope_scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor "
                            f"{self.high_freq_factor}; the first below the second was expected")

    def to_hf(self) -> dict[str, Any]:
        """Returns the settings as transformers' `rope_scaling`."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_rope(config: Mapping[str, Any], theta: Any, positions: int) -> tuple[float, RopeScaling | None]:
    """Reads the base of the frequencies and their scaling from a decoder's config, in either spelling.

    Args:
      config: the content of `config.json`.
      theta: the base if the config has none.
      positions: the config's `max_position_embeddings`.

    Returns:
      The base, and the scaling or None.

    Raises:
      UserError: a type of scaling that this model does not have, or a key that is missing or not a number.
    """
    new, old = (as_object(config.get(key) or {}, key) for key in ("rope_parameters", "rope_scaling"))
    rope, name = (old, "rope_scaling") if old else (new, "rope_parameters")  # the precedence of transformers 5
    for value in (config.get("rope_theta"), rope.get("rope_theta")):
        theta = theta if value is None else value
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(f"the decoder's partial_rotary_factor is {short(partial)}; 1 (rotation of whole heads) was "
                        "expected")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, Mapping) for value in rope.values()):
        return number(theta, "rope_theta"), None
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"the decoder's {name} is {short(dict(rope))}; plain rotary embedding, linear or llama3 was "
                        "expected")
    lacking = [key for key in _KEYS[kind] if rope.get(key) is None]
    if lacking:
        raise UserError(f"the decoder's {name} of type {kind} lacks {', '.join(lacking)}")
    before = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", positions))
    numbers = {key: number(rope[key], f"{name}.{key}") for key in _KEYS[kind]}
    return number(theta, "rope_theta"), RopeScaling(
        kind, **numbers, original_max_position_embeddings=before if kind == "llama3" else None)
