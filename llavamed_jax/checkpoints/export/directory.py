"""Exports in the PyTorch layouts: writes safetensors shards tensor by tensor, under a temporary name until complete."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llavamed_jax.checkpoints import names, preprocessor_file
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.export.card import model_card
from llavamed_jax.checkpoints.export.few_bits import Rounding
from llavamed_jax.checkpoints.export.processor import write_processor
from llavamed_jax.checkpoints.export.tokenizer import ids_in_transformers
from llavamed_jax.checkpoints.generation_file import FILE as GENERATION
from llavamed_jax.checkpoints.generation_file import copy_files, settings_for
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch import compressed
from llavamed_jax.checkpoints.torch.layout import to_torch
from llavamed_jax.checkpoints.torch.write import Progress, total_bytes, write_safetensors
from llavamed_jax.config import OURS
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.errors import UsageError, UserError, warn
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.quantized.rounding import ROUNDED
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import write_json

VOCABULARY = ("decoder/embed_tokens/embedding", "decoder/lm_head/kernel")


def export(checkpoint: Checkpoint, out: str | Path, layout: str = "transformers", progress: Progress = iter,
           rounding: Rounding | None = None) -> dict[str, Tensor]:
    """Writes a checkpoint as a directory in a PyTorch layout, with a model card.

    Args:
      checkpoint: the checkpoint.
      out: a directory that does not exist or is empty. It appears when it is complete.
      layout: `transformers` (`LlavaForConditionalGeneration` loads it) or `llava` (the original's own). For LLaVA-Med
        v1.0, whose checkpoints have no tower, `llava` puts the tower into a directory inside `out`.
      progress: wraps the names of the tensors.
      rounding: how the kernels of the decoder's layers are rounded; None writes them as they are.

    Returns:
      The tensors that were written, by their names in the files.

    Raises:
      UserError: `out` is not empty, the layout cannot hold this model, its tokenizer does not fit, the disk is full, or
        the weights are not a model's (`Checkpoint.sound`).
    """
    cfg = checkpoint.config
    if rounding is not None and layout != "transformers":
        raise UsageError(f"the layout {layout} has no place for kernels of few bits; transformers was expected")
    if cfg.adapter is not None:
        raise UserError(f"{checkpoint.directory} has an adapter, and the layout {layout} has no place for one; "
                        "`convert merge-lora` merges it into the model, and `convert export-lora` writes it alone")
    config, ids = llava_to_hf(cfg, layout), None
    if layout == "llava" and not cfg.decoder.has_original:
        warn(f"LLaVA's own code has no class {cfg.decoder.original_class}, which the export's config.json names, so "
             "only this project reads it; --layout transformers is read elsewhere")
    spelled = {name: spellings[0] for name, spellings in names.torch_names(cfg, layout).items()}
    if layout == "transformers" and cfg.image_token_id is None:
        ids = ids_in_transformers(cfg.decoder.vocab_size, checkpoint.files)
        config = llava_to_hf(cfg, layout, ids)
        padded = padded_vocabulary(checkpoint, cfg.rows_in_transformers(ids))
        checkpoint = checkpoint.replace(tensors={**checkpoint.tensors, **padded})
    size = total_bytes(_in_torch(checkpoint, spelled, rounding) if rounding else checkpoint.tensors)
    with new_directory(out, size, checkpoint.sources) as temporary:
        # First, so that tokenizer errors show before the long work.
        _write_text_files(checkpoint, temporary, layout, ids, rounding)
        checkpoint, written = checkpoint.sound(), {}
        if layout == "llava" and cfg.source == "llava":
            tower = {name: spellings[0] for name, spellings in names.torch_names(cfg, "tower").items()}
            spelled = {name: key for name, key in spelled.items() if name not in tower}
            directory = temporary / Path(config["mm_vision_tower"]).name
            directory.mkdir()
            written = _in_torch(checkpoint, tower)
            write_safetensors(directory, written, progress, {"format": "pt"})
            write_json(directory / "config.json", {"architectures": [cfg.vision.hf_class], **cfg.vision.to_hf()})
            # v1.0's code reads the preprocessor from the tower's directory.
            write_json(directory / preprocessor_file.FILE, preprocessor_file.written(cfg, is_transformers=False))
        kernels = rounding.calibrate() if rounding is not None and rounding.calibrate is not None else {}
        written |= (tensors := _in_torch(checkpoint, spelled, rounding, kernels))
        write_safetensors(temporary, tensors, progress, {"format": "pt"})
        if rounding is not None:
            config["quantization_config"] = compressed.quantization_config(rounding.name, rounding.group)
        config["dtype"] = config["torch_dtype"] = checkpoint.tensors[VOCABULARY[0]].dtype.name
        write_json(temporary / "config.json", config)
    checkpoint.tally.warn()
    return written


def _in_torch(checkpoint: Checkpoint, spelled: Mapping[str, str],
              rounding: Rounding | None = None,
              kernels: Mapping[str, Callable[[], Kernel]] = MappingProxyType({})) -> dict[str, Tensor]:
    """Returns tensors under torch names, in torch's orientation; rounded kernels as compressed-tensors has them.

    Args:
      checkpoint: the checkpoint.
      spelled: canonical name -> torch name.
      rounding: how the kernels of the decoder's layers are rounded; None if they are not.
      kernels: what loads the kernels that are rounded already, by name; others are rounded to the nearest.
    """
    out = {}
    for name, key in spelled.items():
        tensor = checkpoint.tensors[name]
        if rounding is not None and ROUNDED.fullmatch(name):
            dtype = rounding.dtype or tensor.dtype
            out |= compressed.packed(key, rounding.name, tensor.shape, np.dtype(dtype), rounding.group,
                                     kernels.get(name) or functools.partial(rounding.nearest, tensor))
        else:
            out[key] = to_torch(name, tensor)
    return out


def padded_vocabulary(checkpoint: Checkpoint, rows: int) -> dict[str, Tensor]:
    """Returns the tables over the vocabulary with transformers' extra rows, each the mean of the others."""
    added = rows - checkpoint.config.decoder.vocab_size

    def convert(tensor, axis):
        def load():
            table = tensor.load()
            mean = table.mean(axis=axis, keepdims=True, dtype=np.float32).astype(table.dtype)
            return np.concatenate([table, np.repeat(mean, added, axis)], axis)
        shape = list(tensor.shape)
        shape[axis] += added
        return Tensor(tuple(shape), tensor.dtype, load)

    return {name: convert(checkpoint.tensors[name], names.torch_shape(name, (0, 1))[0])
            for name in VOCABULARY if name in checkpoint.tensors and added}


def _write_text_files(checkpoint: Checkpoint, out: Path, layout: str, ids: tuple[int, int] | None,
                      rounding: Rounding | None) -> None:
    """Writes the model card, and copies tokenizer and preprocessor files.

    If `<image>` and `<pad>` get `ids`, the files are those that transformers' `AutoProcessor` reads.
    """
    cfg, files = checkpoint.config, checkpoint.files
    (out / "README.md").write_text(model_card(checkpoint, layout, ids, rounding), encoding="utf-8")
    kept = out
    if layout == "transformers":
        write_json(out / GENERATION, settings_for(cfg, files.get(GENERATION), ids[1] if ids else None))
        if ids:
            write_processor(cfg, files, out)
            kept = out / OURS  # an import takes the original files from here, without this layout's additions
            kept.mkdir()
    copy_files(cfg, files, kept)
    if kept == out:
        preprocessor_file.make_equal(cfg, out, layout == "transformers")
    else:
        preprocessor_file.make_equal(cfg, kept, cfg.source == "transformers", is_needed=False)
