"""Exports in the PyTorch layouts: tensor by tensor into safetensors shards, under a temporary name until all is there."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import names, preprocessor_file
from llavamed_jax.checkpoints.card import model_card
from llavamed_jax.checkpoints.generation_file import FILE as GENERATION
from llavamed_jax.checkpoints.generation_file import copy_files, settings_for
from llavamed_jax.checkpoints.processor_files import write_processor
from llavamed_jax.checkpoints.reader import Checkpoint
from llavamed_jax.checkpoints.tokenizer_files import ids_in_transformers
from llavamed_jax.checkpoints.torch_files import DTYPES, Tensor
from llavamed_jax.config import OURS
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import write_json

SHARD_BYTES = 5 * 10**9  # as transformers cut checkpoints of this size
VOCABULARY = ("decoder/embed_tokens/embedding", "decoder/lm_head/kernel")
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Progress = Callable[[Iterable[str]], Iterable[str]]  # wraps the names on their way, to show where the work stands


def export(checkpoint: Checkpoint, out: str | Path, layout: str = "transformers", progress: Progress = iter) -> None:
    """Writes a checkpoint as a directory in a PyTorch layout, with a model card.

    Args:
      out: a directory that does not exist or is empty. It appears when it is complete.
      layout: `transformers` (`LlavaForConditionalGeneration` loads it) or `llava` (the original's own). Where the config
        says LLaVA-Med v1.0, whose checkpoints hold no tower, `llava` puts the tower into a directory inside `out`.
    Raises:
      UserError: `out` holds something, the layout cannot hold this model, its tokenizer does not fit, the disk is full, or the
        weights are no model's (`Checkpoint.sound`).
    """
    cfg = checkpoint.config
    config, ids = llava_to_hf(cfg, layout), None
    spelled = {name: spellings[0] for name, spellings in names.torch_names(cfg, layout).items()}
    if layout == "transformers" and cfg.image_token_id is None:
        ids = ids_in_transformers(cfg.decoder.vocab_size, checkpoint.files)
        config = llava_to_hf(cfg, layout, ids)
        padded = _padded_vocabulary(checkpoint, cfg.rows_in_transformers(ids))
        checkpoint = checkpoint.replace(tensors={**checkpoint.tensors, **padded})
    with new_directory(out, total_bytes(checkpoint.tensors), checkpoint.sources) as temporary:
        _write_text_files(checkpoint, temporary, layout, ids)  # first: what is wrong with a tokenizer shows before the long work
        checkpoint = checkpoint.sound()
        if layout == "llava" and cfg.source == "llava":
            tower = {name: spellings[0] for name, spellings in names.torch_names(cfg, "clip").items()}
            spelled = {name: key for name, key in spelled.items() if name not in tower}
            directory = temporary / Path(config["mm_vision_tower"]).name
            directory.mkdir()
            write_safetensors(directory, _in_torch(checkpoint, tower), progress, {"format": "pt"})
            write_json(directory / "config.json", {"architectures": ["CLIPVisionModel"], **cfg.vision.to_hf()})
            write_json(directory / preprocessor_file.FILE, preprocessor_file.written(cfg, is_transformers=False))  # which v1.0 reads here
        write_safetensors(temporary, _in_torch(checkpoint, spelled), progress, {"format": "pt"})
        config["dtype"] = config["torch_dtype"] = checkpoint.tensors[VOCABULARY[0]].dtype.name
        write_json(temporary / "config.json", config)
    checkpoint.tally.warn()


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """What the tensors take on disk."""
    return sum(map(_bytes, tensors.values()))


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _in_torch(checkpoint: Checkpoint, spelled: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors under torch names, in torch's orientation."""
    def convert(name, tensor):
        return Tensor(names.torch_shape(name, tensor.shape), tensor.dtype, lambda: names.to_torch(name, tensor.load()))
    return {key: convert(name, checkpoint.tensors[name]) for name, key in spelled.items()}


def _padded_vocabulary(checkpoint: Checkpoint, rows: int) -> dict[str, Tensor]:
    """The tables over the vocabulary with the rows that transformers' layout has beyond ours, each the mean of the others."""
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


def _write_text_files(checkpoint: Checkpoint, out: Path, layout: str, ids: tuple[int, int] | None) -> None:
    """The model card, and tokenizer and preprocessor files as they came; where `<image>` and `<pad>` get `ids`, those that
    transformers' `AutoProcessor` reads."""
    cfg, files = checkpoint.config, checkpoint.files
    (out / "README.md").write_text(model_card(checkpoint, layout, ids), encoding="utf-8")
    kept = out
    if layout == "transformers":
        write_json(out / GENERATION, settings_for(cfg, files.get(GENERATION), ids[1] if ids else None))
        if ids:
            write_processor(cfg, files, out)
            kept = out / OURS  # from where an import takes them, so that nothing of this layout stays
            kept.mkdir()
    copy_files(cfg, files, kept)
    if kept == out:
        preprocessor_file.make_equal(cfg, out, layout == "transformers")
    else:
        preprocessor_file.make_equal(cfg, kept, cfg.source == "transformers", is_needed=False)


def write_safetensors(directory: Path, tensors: Mapping[str, Tensor], progress: Progress = iter,
                      metadata: dict[str, str] | None = None) -> None:
    """Writes `model.safetensors`, or shards of at most `SHARD_BYTES` (one tensor may be larger) with an index.

    In memory are the tensor that is being written and the next one.
    """
    shards, sizes = [[]], [0]
    for name, tensor in tensors.items():
        size = _bytes(tensor)
        if shards[-1] and sizes[-1] + size > SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    shards = [{name: tensors[name] for name in sorted(shard, key=lambda name: -tensors[name].dtype.itemsize)} for shard in shards]
    files = ["model.safetensors"] if len(shards) == 1 else [
        f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    arrays = _read_ahead(tensor for shard in shards for tensor in shard.values())
    on_their_way = iter(progress([name for shard in shards for name in shard]))
    for file, shard in zip(files, shards):
        _write_shard(directory / file, shard, (array for _, array in zip(on_their_way, arrays)), metadata)
    for _ in on_their_way:  # lets the progress see its end
        pass
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(directory / "model.safetensors.index.json", {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _read_ahead(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """The arrays in order; while one is written, a thread reads and turns the next."""
    with ThreadPoolExecutor(1) as thread:
        ahead = None
        for tensor in tensors:
            # The file's bytes are those of a whole array: a view would be written as it lies in memory.
            ready, ahead = ahead, thread.submit(lambda tensor: np.asarray(tensor.load(), order="C"), tensor)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def _write_shard(file: Path, tensors: Mapping[str, Tensor], arrays: Iterable[np.ndarray], metadata: dict[str, str] | None) -> None:
    """One safetensors file: the header's length (8 bytes), the header as JSON, and the tensors one after another.

    The library's own `serialize_file` wants every tensor of a file in memory at once.
    Args:
      tensors: widest type first, so that each begins at a multiple of its size, as the header's padding to 8 does.
    """
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + _bytes(tensor)
        header[name] = dict(dtype=_DTYPE_NAMES[tensor.dtype], shape=list(tensor.shape), data_offsets=[start, end])
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, tensor), array in zip(tensors.items(), arrays):
            if (array.shape, array.dtype) != (tensor.shape, tensor.dtype):
                raise ValueError(f"{name} was read as {array.dtype} {array.shape}; {tensor.dtype} {tensor.shape} was expected")
            out.write(array.reshape(-1).view(np.uint8))
