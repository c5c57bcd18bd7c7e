"""Reads a vision tower from its own directory: a `CLIPVisionModel`, or a `CLIPModel` without its text half."""

from __future__ import annotations

import re
from pathlib import Path

from llavamed_jax.checkpoints import hub, open_clip, preprocessor_file
from llavamed_jax.checkpoints.names import is_buffer
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import read_weights, refuse_adapter
from llavamed_jax.checkpoints.torch.layout import canonical
from llavamed_jax.config import LlavaConfig, VisionConfig
from llavamed_jax.config.towers import check_kind, tower_from_hf
from llavamed_jax.config.towers.vit import BIOMEDCLIP, is_biomedclip
from llavamed_jax.errors import UserError, at, exists, short
from llavamed_jax.utils.files import read_json


def find_tower(directory: Path, name: str | None) -> Path | None:
    """Finds the directory that `mm_vision_tower` names: an absolute path, or its last part in or beside `directory`."""
    if not name:
        return None
    last = Path(name).name
    candidates = [Path(name)] if Path(name).is_absolute() else []
    candidates += [directory / last, directory.resolve().parent / last] if last not in ("", "..") else []
    return next((c for c in candidates if exists(c / "config.json") or exists(c / open_clip.FILE)), None)


def fetch_tower(directory: Path, name: str | None, weights: bool = True) -> Path:
    """Fetches the tower that `mm_vision_tower` names on a hub.

    Args:
      directory: the checkpoint's directory, for errors.
      name: the value of `mm_vision_tower`.
      weights: False fetches only configs and processor files.

    Raises:
      UserError: the hub has no such model; the sentence asks for `vision_tower=PATH`.
    """
    reason, hubs = "", BIOMEDCLIP if is_biomedclip(name) else name
    if hubs and hub.is_hub_name(hubs):
        try:
            return hub.local(hubs, weights)
        except UserError as error:
            reason = f" ({error})"
    raise UserError(f"{directory} names the vision tower {short(name)}, which lies neither inside nor beside "
                    f"it{reason}; vision_tower=PATH (--vision_tower PATH) was expected")


def tower_config(directory: Path) -> VisionConfig:
    """Reads the config of a directory's tower, with the settings of its preprocessor.

    Raises:
      UserError: the directory has no config, or no vision tower of a known kind.
    """
    refuse_adapter(directory)
    if not (open_clip.is_open_clip(directory) or (directory / "config.json").is_file()):
        raise at(directory, f"the vision tower {directory} holds no config.json; a tower's directory was expected")
    raw = open_clip.tower_json(directory) if open_clip.is_open_clip(directory) else read_json(directory / "config.json")
    # Checked, since other models have a vision_config too.
    check_kind(raw.get("model_type", "clip"), f"the vision tower {directory} has model_type")
    try:
        vision = tower_from_hf(raw)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    found = preprocessor_file.read(directory, vision.image_size, kind=vision.image_processor)
    return vision if found is None else found.applied_to(vision)


def check_width(directory: Path, vision: VisionConfig, expected: int | None) -> None:
    """Raises UserError if the projector was made for a tower of another width."""
    if expected not in (None, vision.hidden_size):
        raise UserError(f"the vision tower {directory} has width {vision.hidden_size}; the projector expects "
                        f"{short(expected)}")


def tower_tensors(config: LlavaConfig, directory: Path) -> dict[str, Tensor]:
    """Reads the tower's tensors by canonical name; their shapes must be those of `config.vision`."""
    is_of_others = re.compile(config.vision.elsewhere).fullmatch
    found = read_weights(directory)
    found = open_clip.tower_tensors(found) if open_clip.is_open_clip(directory) else found
    return canonical(directory, found, config, "tower",
                     ignore=lambda key: bool(is_buffer(key) or is_of_others(key)))
