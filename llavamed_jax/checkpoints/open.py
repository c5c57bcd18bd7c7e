"""Opens a checkpoint of any kind.

Opening reads the config, the headers of the weight files, and the values of a few tensors that tell what the files
hold (rotary frequencies, and a head that is tied to the embeddings). `Checkpoint.read` reads any other tensor: from
`.safetensors` files by position, from `.bin` files through a memory map (`torch/files.py`). Opening is strict: the
config and the files must have the same tensors, of the same shapes, or one error names those that differ.
"""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.checkpoints import hub
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import kind_of, read_config, replace_tower
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.torch.open import open_torch
from llavamed_jax.checkpoints.torch.tower import tower_tensors


def open_checkpoint(path: str | Path, vision_tower: str | Path | None = None, seed: int = 0) -> Checkpoint:
    """Opens a checkpoint of any kind.

    Args:
      path: a directory in a PyTorch layout, this project's own tree or one step of it, which may also be at
        `gs://BUCKET/KEY` or `s3://BUCKET/KEY`, `owner/name[@revision]` of a hub, or `preset:NAME` for random weights.
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
        return open_torch(Path(path), vision_tower)
    return checkpoint if vision_tower is None else _with_tower(checkpoint, vision_tower)


def _with_tower(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    config = replace_tower(checkpoint.config, directory)
    kept = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("vision_tower/")}
    return checkpoint.replace(config=config, tensors=kept | tower_tensors(config, directory),
                              tower=f"{directory}, as asked for",
                              tower_directory=directory)
