"""Exports in the PyTorch layouts: tensor by tensor into safetensors shards, under a temporary name until all is there."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.files import new_directory, write_json
from llavamed_jax.checkpoints.processor_files import write_processor
from llavamed_jax.checkpoints.reader import Checkpoint, Tensor
from llavamed_jax.config import OURS

SHARD_BYTES = 2 * 10**9  # also what an export holds in memory
VOCABULARY = ("decoder/embed_tokens/embedding", "decoder/lm_head/kernel")

Progress = Callable[[Iterable[str]], Iterable[str]]  # wraps the names on their way, to show where the work stands


def export(checkpoint: Checkpoint, out: str | Path, layout: str = "transformers", progress: Progress = iter) -> None:
    """Writes a checkpoint as a directory in a PyTorch layout.

    Args:
      out: a directory that does not exist or is empty. It appears when it is complete.
      layout: `transformers` (`LlavaForConditionalGeneration` loads it) or `llava` (the original's own). Where the config
        says LLaVA-Med v1.0, whose checkpoints hold no tower, `llava` puts the tower into a directory inside `out`.
    Raises:
      UserError: `out` holds something, or the layout cannot hold this model.
    """
    cfg = checkpoint.config
    config = cfg.to_hf(layout)
    spelled = {name: spellings[0] for name, spellings in names.torch_names(cfg, layout).items()}
    if layout == "transformers":
        checkpoint = checkpoint.replace(tensors={**checkpoint.tensors, **_padded_vocabulary(checkpoint)})
    with new_directory(out) as temporary:
        if layout == "llava" and cfg.source == "llava":
            tower = {name: spellings[0] for name, spellings in names.torch_names(cfg, "clip").items()}
            spelled = {name: key for name, key in spelled.items() if name not in tower}
            directory = temporary / Path(config.get("mm_vision_tower") or "vision_tower").name
            directory.mkdir()
            write_safetensors(directory, _in_torch(checkpoint, tower), progress, {"format": "pt"})
            write_json(directory / "config.json", {"architectures": ["CLIPVisionModel"], **cfg.vision.to_hf()})
        write_safetensors(temporary, _in_torch(checkpoint, spelled), progress, {"format": "pt"})
        _write_text_files(checkpoint, temporary, layout)
        config["dtype"] = config["torch_dtype"] = checkpoint.tensors[VOCABULARY[0]].dtype.name
        write_json(temporary / "config.json", config)


def _in_torch(checkpoint: Checkpoint, spelled: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under torch names, in torch's orientation."""
    def convert(name, tensor):
        return Tensor(names.torch_shape(name, tensor.shape), tensor.dtype, lambda: names.to_torch(name, tensor.load()))
    return {key: convert(name, checkpoint.tensors[name]) for name, key in spelled.items()}


def _padded_vocabulary(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """The tables over the vocabulary with the rows that transformers' layout has beyond ours, each the mean of the others."""
    added = checkpoint.config.transformers_vocab_size - checkpoint.config.decoder.vocab_size

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


def _write_text_files(checkpoint: Checkpoint, out: Path, layout: str) -> None:
    """Tokenizer and preprocessor files as they came; for transformers' layout, those that its `AutoProcessor` reads."""
    adds_tokens = layout == "transformers" and checkpoint.config.image_token_id is None
    if adds_tokens and checkpoint.files:
        write_processor(checkpoint.config, checkpoint.files, out)
    kept = out / OURS if adds_tokens and checkpoint.files else out
    kept.mkdir(exist_ok=True)
    for name, file in checkpoint.files.items():
        shutil.copyfile(file, kept / name)


def write_safetensors(directory: Path, tensors: Mapping[str, Tensor], progress: Progress = iter,
                      metadata: dict[str, str] | None = None) -> None:
    """Writes `model.safetensors`, or shards of at most `SHARD_BYTES` (one tensor may be larger) with an index."""
    shards, sizes = [[]], [0]
    for name, tensor in tensors.items():
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        if shards[-1] and sizes[-1] + size > SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    names_on_their_way = iter(progress([name for shard in shards for name in shard]))
    for file, shard in zip(files, shards):
        # save_file writes the buffer of a view as it lies in memory, so a view must be copied first.
        arrays = {name: np.ascontiguousarray(tensors[name].load()) for name, _ in zip(shard, names_on_their_way)}
        save_file(arrays, directory / file, metadata)
    for _ in names_on_their_way:  # lets the progress see its end
        pass
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})
