"""Writes tensors as safetensors, in shards as transformers cuts them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import DTYPES, INTEGERS
from llavamed_jax.errors import UserError
from llavamed_jax.utils.files import write_json

SHARD_BYTES = 5 * 10**9  # as transformers cut checkpoints of this size


_DTYPE_NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}


Progress = Callable[[Iterable[str]], Iterable[str]]  # wraps the names that are worked through, to show the progress


def total_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Returns the bytes of the tensors on disk."""
    return sum(map(_bytes, tensors.values()))


def _bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def write_safetensors(directory: Path, tensors: Mapping[str, Tensor], progress: Progress = iter,
                      metadata: dict[str, str] | None = None, stem: str = "model", is_cut: bool = True) -> None:
    """Writes `model.safetensors`, or shards of at most `SHARD_BYTES` (one tensor may be larger) with an index.

    At most two tensors are in memory: the one that is being written and the next one.

    Args:
      directory: an existing directory.
      tensors: tensors by name.
      progress: wraps the names of the tensors.
      metadata: metadata in the header of each file.
      stem: what the files' names begin with.
      is_cut: whether there may be shards; False writes one file of any size.
    """
    shards, sizes = [[]], [0]
    for name, tensor in tensors.items():
        size = _bytes(tensor)
        if is_cut and shards[-1] and sizes[-1] + size > SHARD_BYTES:
            shards.append([])
            sizes.append(0)
        shards[-1].append(name)
        sizes[-1] += size
    shards = [{name: tensors[name] for name in sorted(shard, key=lambda name: -tensors[name].dtype.itemsize)}
              for shard in shards]
    files = [f"{stem}.safetensors"] if len(shards) == 1 else [
        f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    arrays = _read_ahead(tensor for shard in shards for tensor in shard.values())
    on_their_way = iter(progress([name for shard in shards for name in shard]))
    for file, shard in zip(files, shards):
        _write_shard(directory / file, shard, (array for _, array in zip(on_their_way, arrays)), metadata)
    for _ in on_their_way:  # exhausts the iterator, so that the progress ends
        pass
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        write_json(directory / f"{stem}.safetensors.index.json",
                   {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def write_bin(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a state dict as `torch.save` does. Raises UserError if torch is not installed."""
    try:
        import torch
    except ImportError:
        raise UserError(f"{file.name} needs torch, which is not installed: pip install 'llavamed-jax[torch]'") from None

    def in_torch(tensor: Tensor):
        array = np.array(tensor.load(), order="C")
        if array.dtype == ml_dtypes.bfloat16:  # torch does not read numpy's
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    torch.save({name: in_torch(tensor) for name, tensor in tensors.items()}, file)


def _read_ahead(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yields the arrays in order; while one is written, a thread reads and transposes the next."""
    with ThreadPoolExecutor(1) as thread:
        ahead = None
        for tensor in tensors:
            # C order, since the raw bytes are written: a view's memory has another order.
            ready, ahead = ahead, thread.submit(lambda tensor: np.asarray(tensor.load(), order="C"), tensor)
            if ready is not None:
                yield ready.result()
        if ahead is not None:
            yield ahead.result()


def _write_shard(file: Path, tensors: Mapping[str, Tensor], arrays: Iterable[np.ndarray],
                 metadata: dict[str, str] | None) -> None:
    """Writes one safetensors file: the header's length (8 bytes), the header as JSON, and the tensors in order.

    The library's own `serialize_file` needs every tensor of a file in memory at once.

    Args:
      file: the file to write.
      tensors: tensors by name, the widest dtype first, so that each begins at a multiple of its item size.
      arrays: the tensors' arrays in the same order.
      metadata: metadata in the header.
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
                raise ValueError(f"{name} was read as {array.dtype} {array.shape}; {tensor.dtype} {tensor.shape} was "
                                 "expected")
            out.write(array.reshape(-1).view(np.uint8))
