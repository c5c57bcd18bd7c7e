"""Opens a checkpoint of any kind.

Opening reads the config, the headers of the weight files, and the values of a few tensors that tell what the files
hold (rotary frequencies, and a head that is tied to the embeddings). `Checkpoint.read` reads any other tensor: from
`.safetensors` files by position, from `.bin` files through a memory map (`torch/files.py`). Opening is strict: the
config and the files must have the same tensors, of the same shapes, or one error names those that differ.
"""

from __future__ import annotations

import functools
from pathlib import Path

from llavamed_jax.checkpoints import hub
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import kind_of, read_config, replace_tower, text_files, torch_config
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.soundness import is_zero
from llavamed_jax.checkpoints.torch.files import has_weights, read_weights
from llavamed_jax.checkpoints.torch.layout import canonical
from llavamed_jax.checkpoints.torch.tower import fetch_tower, find_tower, tower_tensors
from llavamed_jax.checkpoints.torch.tower_shape import is_tower
from llavamed_jax.config import projector_depth
from llavamed_jax.config.hf import BUILD, is_transformers, not_obeyed, tower_name
from llavamed_jax.errors import UserError, warn


def open_checkpoint(path: str | Path, vision_tower: str | Path | None = None, seed: int = 0) -> Checkpoint:
    """Opens a checkpoint of any kind.

    Args:
      path: a directory in a PyTorch layout, this project's own tree or one step of it, `owner/name[@revision]` of a
        hub, or `preset:NAME` for random weights.
      vision_tower: a tower, as a directory or by name, that replaces the checkpoint's own. A directory with a
        `config.json` and no weights gives the shape of the tower's tensors in the checkpoint.
      seed: seed of a preset's random weights.

    Raises:
      UserError: there is no checkpoint, or it has another architecture, or tensors are missing, unexpected or
        misshapen.
    """
    path, kind = kind_of(path)
    vision_tower = None if vision_tower is None else hub.local(vision_tower)
    if kind == "preset":
        checkpoint = random_checkpoint(read_config(path), seed)
    elif kind == "tree":
        from llavamed_jax.checkpoints.tree.model import open_tree  # imported here, since Orbax takes seconds to import

        checkpoint = open_tree(path)
    else:
        return _open_torch(Path(path), vision_tower)
    return checkpoint if vision_tower is None else _with_tower(checkpoint, vision_tower)


def _open_torch(directory: Path, vision_tower: Path | None) -> Checkpoint:
    weights = functools.cache(lambda: read_weights(directory))
    config, raw, assumed = torch_config(directory, vision_tower, weights)
    layout = "transformers" if is_transformers(raw) else "llava"
    found = weights()
    for sentence in not_obeyed(raw):
        warn(f"{directory}: {sentence}")
    if (layout == "llava" and projector_depth(config.projector_type)
            and not any("mm_projector." in key for key in found)):
        raise UserError(f"{directory} holds no projector (model.mm_projector), so it is a plain decoder: {BUILD}")
    tower_directory = vision_tower
    has_tower = layout == "transformers" or any(map(is_tower, found))
    if vision_tower is not None and has_tower and not has_weights(vision_tower):
        tower_directory, tower = None, f"the tensors in the checkpoint, of the shape in {vision_tower}"
    elif vision_tower is not None:
        tower = f"{vision_tower}, as asked for"
    elif has_tower:
        tower = "the tensors in the checkpoint" + (f", {assumed}" if assumed else "")
    else:
        name = tower_name(raw)
        tower_directory = find_tower(directory, name) or fetch_tower(directory, name)
        tower = f"{tower_directory}, which mm_vision_tower names"
    rows = (raw.get("text_config") or {}).get("vocab_size") if layout == "transformers" else None
    if tower_directory is None:
        tensors = canonical(directory, found, config, layout, rows=rows)
    else:
        without = {key: tensor for key, tensor in found.items() if not is_tower(key)}
        tensors = canonical(directory, without, config, layout, ("vision_tower/",), rows) | tower_tensors(
            config, tower_directory)
    frequencies = [tensor for key, tensor in found.items() if key.endswith("rotary_emb.inv_freq")]
    is_delta = any(is_zero(tensor.load()) for tensor in frequencies)  # a delta's are a difference, so zeros (quirk Q33)
    beside = vision_tower or tower_directory or (find_tower(directory, tower_name(raw)) if layout == "llava" else None)
    return Checkpoint(config, layout, directory, tensors, text_files(directory), tower, tower_directory=beside,
                      is_delta=is_delta)


def _with_tower(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    config = replace_tower(checkpoint.config, directory)
    kept = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("vision_tower/")}
    return checkpoint.replace(config=config, tensors=kept | tower_tensors(config, directory),
                              tower=f"{directory}, as asked for",
                              tower_directory=directory)
