"""Finds the vision tower that `convert build --vision` names: a tower's own, a whole model's, or a preset's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llavamed_jax.checkpoints import hub
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import tree_root
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.tower import tower_config, tower_tensors
from llavamed_jax.config import PRESET, LlavaConfig, VisionConfig, preset
from llavamed_jax.config.hf import is_original, is_transformers, own_tower_name
from llavamed_jax.errors import UserError, at, exists
from llavamed_jax.utils.files import read_json

PREPROCESSOR = "preprocessor_config.json"
_TOWER = "vision_tower/"


@dataclass(frozen=True)
class Tower:
    """A vision tower.

    Attributes:
      source: what the user named; for a hub's model, its directory.
      name: its name in an export.
      config: its config.
      tensors: returns its tensors by canonical name, given the config of the model that it joins.
      preprocessor: its preprocessor's file; None if it has none.
      feature_layer: the hidden state that a whole model reads; for a tower alone LLaVA's own.
      feature_select: which positions a whole model reads.
    """

    source: str
    name: str
    config: VisionConfig
    tensors: Callable[[LlavaConfig], dict[str, Tensor]]
    preprocessor: Path | None = None
    feature_layer: int = -2
    feature_select: str = "patch"


def tower_of(vision: str | Path, seed: int) -> Tower:
    """Finds a vision tower.

    Args:
      vision: a directory with a tower (`config.towers.TOWERS`) or with a whole model in any layout, a workdir included,
        its name on a hub, or `preset:NAME` for random weights.
      seed: seed of the random weights.

    Raises:
      UserError: there is no tower, or an adapter changes it.
    """
    if (name := str(vision)).startswith(PRESET):
        config = preset(name.removeprefix(PRESET))
        return Tower(name, name, config.vision, lambda config: _of_tower(random_checkpoint(config, seed)), None,
                     config.feature_layer, config.feature_select)
    name = name if not exists(vision) and hub.is_hub_name(vision) else Path(vision).name
    directory = hub.local(vision)
    if not _is_whole(directory):
        file = directory / PREPROCESSOR
        return Tower(str(directory), name, tower_config(directory), lambda config: tower_tensors(config, directory),
                     file if file.is_file() else None)
    model = open_checkpoint(directory)
    config, tensors = model.config, _of_tower(model)
    if any("_lora_" in name for name in tensors):
        raise at(directory, f"an adapter changes the vision tower of {directory}; the directory that `convert "
                            "merge-lora` makes of both was expected")
    return Tower(str(directory), own_tower_name(config) or name, config.vision, lambda _: tensors,
                 model.files.get(PREPROCESSOR), config.feature_layer, config.feature_select)


def _is_whole(directory: Path) -> bool:
    """Returns whether a directory has a whole model: this project's tree, a step of one, or a PyTorch layout."""
    if (tree_root(directory) / "model" / "config.json").is_file():
        return True
    file = directory / "config.json"
    raw = read_json(file) if file.is_file() else {}
    try:
        return isinstance(raw, dict) and raw.get("model_type") != "llama" and (is_transformers(raw) or is_original(raw))
    except UserError:
        return False


def _of_tower(model: Checkpoint) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.tensors.items() if name.startswith(_TOWER)}
