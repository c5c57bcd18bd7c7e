"""Opens a checkpoint in a PyTorch layout.

Opening reads the config, the headers of the weight files, and the values of a few tensors that tell what the files
hold (rotary frequencies, and a head that is tied to the embeddings).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import text_files, torch_config
from llavamed_jax.checkpoints.soundness import is_zero
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import has_weights, read_weights
from llavamed_jax.checkpoints.torch.layout import canonical
from llavamed_jax.checkpoints.torch.tower import fetch_tower, find_tower, tower_tensors
from llavamed_jax.checkpoints.torch.tower_shape import is_tower
from llavamed_jax.config import projector_depth
from llavamed_jax.config.hf import BUILD, is_transformers, not_obeyed, tower_name
from llavamed_jax.errors import UserError, warn


def open_torch(directory: Path, vision_tower: Path | None) -> Checkpoint:
    """Opens a directory in a PyTorch layout.

    Args:
      directory: the checkpoint's directory.
      vision_tower: the directory of a tower that replaces the checkpoint's own; None keeps its own.

    Raises:
      UserError: as `open_checkpoint`.
    """
    weights = functools.cache(lambda: read_weights(directory))
    config, raw, assumed = torch_config(directory, vision_tower, weights)
    layout, found = "transformers" if is_transformers(raw) else "llava", weights()
    for sentence in not_obeyed(raw):
        warn(f"{directory}: {sentence}")
    if (layout == "llava" and projector_depth(config.projector_type)
            and not any("mm_projector." in key for key in found)):
        raise UserError(f"{directory} holds no projector (model.mm_projector), so it is a plain decoder: {BUILD}")
    tower_directory, tower = _tower_source(directory, vision_tower, raw, found, assumed)
    rows = (raw.get("text_config") or {}).get("vocab_size") if layout == "transformers" else None
    if tower_directory is None:
        tensors = canonical(directory, found, config, layout, rows=rows)
    else:
        without = {key: tensor for key, tensor in found.items() if not is_tower(key)}
        tensors = canonical(directory, without, config, layout, ("vision_tower/",), rows) | tower_tensors(
            config, tower_directory)
    beside = vision_tower or tower_directory or (find_tower(directory, tower_name(raw)) if layout == "llava" else None)
    return Checkpoint(config, layout, directory, tensors, text_files(directory), tower, tower_directory=beside,
                      is_delta=_is_delta(found))


def _tower_source(directory: Path, asked: Path | None, raw: Mapping[str, Any], found: Mapping[str, Tensor],
                  assumed: str) -> tuple[Path | None, str]:
    """Decides where the tensors of the tower come from.

    Args:
      directory: the checkpoint's directory.
      asked: the tower that the caller named; None for the checkpoint's own.
      raw: the content of `config.json`.
      found: the checkpoint's tensors by their names in the files.
      assumed: what is assumed about the tower's shape, in words; "" for nothing.

    Returns:
      The directory with the tensors, None for the checkpoint's own; and the source in words.

    Raises:
      UserError: the tower is neither in the checkpoint nor beside it, and cannot be fetched.
    """
    has_tower = is_transformers(raw) or any(map(is_tower, found))
    if asked is not None and has_tower and not has_weights(asked):
        return None, f"the tensors in the checkpoint, of the shape in {asked}"
    if asked is not None:
        return asked, f"{asked}, as asked for"
    if has_tower:
        return None, "the tensors in the checkpoint" + (f", {assumed}" if assumed else "")
    name = tower_name(raw)
    source = find_tower(directory, name) or fetch_tower(directory, name)
    return source, f"{source}, which mm_vision_tower names"


def _is_delta(found: Mapping[str, Tensor]) -> bool:
    """Returns whether rotary frequencies are zeros, as in a delta, whose buffers are a difference (quirk Q33)."""
    return any(is_zero(tensor.load()) for key, tensor in found.items() if key.endswith("rotary_emb.inv_freq"))
