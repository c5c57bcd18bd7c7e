"""The kinds of vision tower. A new kind is a file here, a line of `TOWERS`, and its module in `models/towers`.

This package does not import jax: a processor reads configs in programs without jax.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llavamed_jax.config.checks import as_object
from llavamed_jax.config.towers.clip import VisionConfig
from llavamed_jax.config.towers.siglip import SiglipConfig
from llavamed_jax.config.towers.vit import BIOMEDCLIP, VitConfig, is_biomedclip
from llavamed_jax.errors import UserError, short

# By `model_type` of a config.json.
TOWERS: dict[str, type[VisionConfig]] = {
    "clip": VisionConfig,
    "clip_vision_model": VisionConfig,
    "siglip": SiglipConfig,
    "siglip_vision_model": SiglipConfig,
    "vit": VitConfig,
}
# Towers by the name that an original's `mm_vision_tower` gives.
KNOWN_TOWERS: dict[str, VisionConfig] = {
    name: config for kind in dict.fromkeys(TOWERS.values()) for name, config in kind.known().items()}
# Kinds that are not supported though their name suggests it, and what to take instead.
_REFUSED = dict.fromkeys(
    ("siglip2", "siglip2_vision_model"),
    "SigLIP 2 with images of any shape (NaFlex); a SigLIP 2 of one resolution was expected, whose model_type is siglip")


def known_name(name: str | None) -> str | None:
    """Returns the key of `KNOWN_TOWERS` that an original's `mm_vision_tower` means; None for an unknown name."""
    return BIOMEDCLIP if is_biomedclip(name) else name if name in KNOWN_TOWERS else None


def tower_from_hf(config: Mapping[str, Any]) -> VisionConfig:
    """Reads a tower's config from its `config.json`, or from that of a whole model with a `vision_config`.

    Raises:
      UserError: an unknown kind of tower, or settings that the kind does not have.
    """
    inner = as_object(config.get("vision_config", config), "vision_config")
    kind = inner.get("model_type", config.get("model_type", VisionConfig.model_type))
    check_kind(kind, "the vision tower's model_type is")
    return TOWERS[kind].from_hf(config)


def check_kind(kind: Any, what: str) -> None:
    """Raises UserError for a `model_type` that is no kind of tower.

    Args:
      kind: the value of `model_type`.
      what: the words before the value.
    """
    if isinstance(kind, str) and kind in TOWERS:
        return
    if isinstance(kind, str) and kind in _REFUSED:
        raise UserError(f"{what} {short(kind)}, {_REFUSED[kind]}")
    known = dict.fromkeys(tower.model_type for tower in TOWERS.values())
    raise UserError(f"{what} {short(kind)}; {' or '.join(known)} was expected")


def tower_from_dict(fields: Mapping[str, Any]) -> VisionConfig:
    """Reads a tower's config from this project's own file, where `model_type` names a kind other than CLIP.

    Raises:
      UserError: an unknown kind of tower.
    """
    fields = dict(fields)
    kind = fields.pop("model_type", VisionConfig.model_type)
    if not isinstance(kind, str) or kind not in TOWERS:
        raise UserError(f"the vision config has model_type {short(kind)}; one of {', '.join(TOWERS)} was expected")
    return TOWERS[kind](**fields)
