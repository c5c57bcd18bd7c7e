"""Infers the shape of a vision tower from its tensors in a checkpoint that lacks the tower's config.

That happens if `mm_vision_tower` names a directory of the machine on which the model was trained. Width, depth, patch,
positions and feed-forward width follow from the tensors. Heads, activation and eps do not: OpenAI's CLIP has heads of
64, quick_gelu and 1e-5 at each of its widths. Towers of other widths have other heads (CLIP-H: 80), so they need a
config. A checkpoint may also hold a tower that lacks its last layer.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config import KNOWN_TOWERS, VisionConfig
from llavamed_jax.errors import UserError, short

CLIP_WIDTHS = (768, 1024)  # of ViT-B and ViT-L
_HEAD_WIDTH = 64
_POSITIONS = "embeddings.position_embedding.weight"


def is_tower(key: str) -> bool:
    """Returns whether a tensor of an original's or transformers' layout belongs to the tower, by its name."""
    return key.startswith(("vision_tower.", "model.vision_tower."))


def known_shape(name: str) -> VisionConfig | None:
    """Returns the config of the stock tower that a directory's name stands for; None for an unknown name."""
    return {Path(known).name: config for known, config in KNOWN_TOWERS.items()}.get(Path(name).name)


def without_last_layer(name: str | None, vision: VisionConfig, found: Mapping[str, Tensor]) -> VisionConfig | None:
    """Returns the config of a tower in a checkpoint from which LLaVA's code deleted the last layer before training.

    Args:
      name: the tower's name in the checkpoint's config.
      vision: the config of the tower that the name stands for, or that a directory gives.
      found: the tensors of the checkpoint's files.

    Returns:
      The config of one layer fewer than the stock tower has; None if the checkpoint has no tower, or a whole one.
    """
    layers = {int(at[1]) for at in (re.search(r"\.layers\.(\d+)\.", key) for key in found if is_tower(key)) if at}
    stock = (known_shape(name) if name else None) or vision
    if not vision.original_deletes_last or layers != {*range(stock.num_layers - 1)}:
        return None
    return dataclasses.replace(vision, num_layers=len(layers))


def shape_of_tensors(directory: Path, name: str, found: Mapping[str, Tensor]) -> tuple[VisionConfig, str]:
    """Infers the tower's config from its tensors.

    Args:
      directory: the checkpoint's directory, for errors.
      name: the tower's name in the checkpoint's config.
      found: the tensors of the checkpoint's files, including the tower's.

    Returns:
      The config, and in words what is assumed.

    Raises:
      UserError: the tensors are not a CLIP tower's, or CLIP has no tower of their width.
    """
    start = next((key.removesuffix(_POSITIONS) for key in found if is_tower(key) and key.endswith(_POSITIONS)), None)
    kernels = {key: tensor.shape for key, tensor in found.items() if start is not None and key.startswith(start)}
    positions = kernels.get(f"{start}{_POSITIONS}", ())
    patch = kernels.get(f"{start}embeddings.patch_embedding.weight", ())
    feed_forward = kernels.get(f"{start}encoder.layers.0.mlp.fc1.weight", ())
    layers = {int(at[1]) for at in map(re.compile(re.escape(start or "") + r"encoder\.layers\.(\d+)\.").match, kernels)
              if at}
    edge = math.isqrt(max(positions[0] - 1, 0)) if len(positions) == 2 else 0
    is_clip = (len(patch) == 4 and patch[2] == patch[3] and len(feed_forward) == 2 and edge
               and edge**2 + 1 == positions[0])
    if not is_clip:
        raise UserError(f"{directory} names the vision tower {short(name)}, which is not here, and its tensors are not "
                        "those of a CLIP ViT; vision_tower=PATH (--vision_tower PATH) was expected")
    width = patch[0]
    if width not in CLIP_WIDTHS:
        raise UserError(f"{directory} names the vision tower {short(name)}, which is not here; its tensors have width "
                        f"{width}, which no CLIP tower has, so the number of heads is unknown; give a directory with "
                        "the tower's config.json as vision_tower=PATH (--vision_tower PATH); if it has no weights, the "
                        "checkpoint's are used")
    vision = VisionConfig(width, feed_forward[0], len(layers), width // _HEAD_WIDTH, edge * patch[2], patch[2],
                          num_channels=patch[1])
    return vision, (f"which give its shape; {vision.num_heads} heads, {vision.hidden_act} and eps "
                    f"{vision.layer_norm_eps:g} are assumed, as in CLIP, because mm_vision_tower {short(name)} is not "
                    "here")
