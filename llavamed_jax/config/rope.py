"""How a decoder's rotary frequencies are scaled for longer texts than it was trained with: `rope_scaling` of transformers up to 4.57,
`rope_parameters` since 5.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from llavamed_jax.config.checks import as_object, check_fields, number
from llavamed_jax.errors import UserError, short

# What each type needs beside its name. Of the others, `dynamic` and `longrope` change with a text's length, and `yarn` scales the
# tables too; none of them was seen in a LLaVA.
_KEYS = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}


@dataclass(frozen=True)
class RopeScaling:
    """`linear` divides every frequency by `factor`; `llama3` divides the slow ones and leaves the fast ones as they are.

    Attributes:
      original_max_position_embeddings: of `llama3`, the length that it was trained with before.
    """

    rope_type: str
    factor: float
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    original_max_position_embeddings: int | None = None

    def __post_init__(self):
        check_fields(self, "rope_scaling ")
        if self.rope_type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise UserError(f"rope_scaling has low_freq_factor {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                            "the first below the second was expected")

    def to_hf(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_rope(config: Mapping[str, Any], theta: Any, positions: int) -> tuple[float, RopeScaling | None]:
    """The base of the frequencies and how they are scaled, of a decoder's config in either spelling.

    Args:
      theta: the base where the config says none.
      positions: its `max_position_embeddings`.

    Raises:
      UserError: a type of scaling that this model does not have, by its name, or a key that is missing or is no number.
    """
    new, old = (as_object(config.get(key) or {}, key) for key in ("rope_parameters", "rope_scaling"))
    rope, name = (old, "rope_scaling") if old else (new, "rope_parameters")  # as transformers 5 takes them
    for value in (config.get("rope_theta"), rope.get("rope_theta")):
        theta = theta if value is None else value
    partial = rope.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise UserError(f"the decoder's partial_rotary_factor is {short(partial)}; rotation of whole heads (1) was expected")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default" and not any(isinstance(value, Mapping) for value in rope.values()):
        return number(theta, "rope_theta"), None
    if not isinstance(kind, str) or kind not in _KEYS:
        raise UserError(f"the decoder's {name} is {short(dict(rope))}; plain rotary embedding, linear or llama3 was expected")
    lacking = [key for key in _KEYS[kind] if rope.get(key) is None]
    if lacking:
        raise UserError(f"the decoder's {name} of type {kind} lacks {', '.join(lacking)}")
    before = config.get("original_max_position_embeddings", rope.get("original_max_position_embeddings", positions))
    numbers = {key: number(rope[key], f"{name}.{key}") for key in _KEYS[kind]}
    return number(theta, "rope_theta"), RopeScaling(kind, **numbers, original_max_position_embeddings=before if kind == "llama3" else None)
