"""Reads the weight files that PyTorch writes, as tensors that are read one by one on demand.

`.safetensors` files are checked by their own library and read by position: copying out of the library's memory map
takes ten times the processor time on pages that are not in memory yet. `.bin` files are pickles, which can execute
code: they are opened by `torch.load(weights_only=True)`, which builds tensors and refuses all else, and memory-mapped.
"""

from __future__ import annotations

import functools
import json
import os
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch import compressed
from llavamed_jax.errors import UserError, some
from llavamed_jax.utils.files import open_file, read_json

DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
INTEGERS = {"I32": np.dtype(np.int32), "I64": np.dtype(np.int64)}  # of packed kernels
_TORCH_DTYPES = {"torch.float64": "F64", "torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
# The files that transformers reads: the first of them that a directory has, or has the index of. Others beside them,
# such as the shards of an earlier save or `consolidated.safetensors`, are not read.
WHOLE = ("model.safetensors", "pytorch_model.bin")
# Of a directory without them, the first pattern of which it has an index or files is read. A run's directory has other
# .bin files too (training_args.bin, optimizer.bin).
PATTERNS = ("model-*.safetensors", "*.safetensors", "pytorch_model*.bin", "open_clip_pytorch_model*.bin")
# An adapter's files: what PEFT writes, and the whole tensors that LLaVA's training writes beside it.
ADAPTER_CONFIG, ADAPTER_OTHERS = "adapter_config.json", "non_lora_trainables.bin"
ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


def read_weights(directory: Path) -> dict[str, Tensor]:
    """Reads every tensor of a directory's weight files by its name there; `_found` says which files these are.

    Kernels of few bits in compressed-tensors' format are tensors of one name, as other kernels (`compressed`).

    Raises:
      UserError: there are no weights or only an adapter's; a file is missing, damaged or holds more than tensors; an
        index is wrong.
    """
    refuse_adapter(directory)
    index, files = _found(directory)
    name = next(iter(files), "") if index is None else index.name.removesuffix(".index.json")
    if name.endswith(".bin"):
        return _read_shards(directory, index, files, read_bin)
    compressed.refuse_other_formats(directory)
    return compressed.unpacked(directory, _read_shards(directory, index, files, _read_safetensors_file))


def _found(directory: Path, wholes: Sequence[str] = WHOLE,
           patterns: Sequence[str] = PATTERNS) -> tuple[Path | None, list[str]]:
    """Returns the index of a directory's weights, None without one, and the names of their files; [] without weights.

    As in transformers, `model.safetensors` comes before `model.safetensors.index.json`, and both before other names.
    """
    for name in wholes:
        index = directory / f"{name}.index.json"
        if (directory / name).is_file():
            return None, [name]
        if index.is_file():
            return index, shards(index)
    for pattern in patterns:
        index = next(iter(sorted(directory.glob(f"{pattern}.index.json"))), None)
        if index is not None:
            return index, shards(index)
        if files := sorted(file.name for file in directory.glob(pattern)):
            return None, files
    return None, []


def refuse_adapter(directory: Path) -> None:
    """Raises UserError for a directory with a LoRA adapter.

    PEFT writes an adapter alone; LLaVA's training writes `non_lora_trainables.bin` and the model's config beside it.
    """
    of_adapter = sorted(file.name for pattern in (ADAPTER_CONFIG, "adapter_model*", ADAPTER_OTHERS)
                        for file in directory.glob(pattern))
    is_whole = any(file.name not in of_adapter
                   for pattern in PATTERNS for file in directory.glob(f"{pattern}*"))
    if of_adapter and (not is_whole or any(name.startswith("adapter_model") for name in of_adapter)):
        raise UserError(f"{directory} holds an adapter ({of_adapter[0]}); a whole model's weights were expected: "
                        "`convert merge-lora` makes them of an adapter and its base")


def weight_files(directory: Path) -> list[Path]:
    """Returns the files from which `read_weights` reads tensors, and their index; [] if there are none."""
    index, files = _found(directory)
    return [*([] if index is None else [index]), *(directory / file for file in files)]


def has_weights(directory: Path) -> bool:
    """Returns whether a directory has files that `read_weights` would read, complete or not."""
    return any(any(directory.glob(f"{pattern}*")) for pattern in PATTERNS)


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """Reads the `.safetensors` files as `read_weights` does, and no other files."""
    index, files = _found(directory, WHOLE[:1], PATTERNS[:2])
    return _read_shards(directory, index, files, _read_safetensors_file)


def read_file(file: Path) -> dict[str, Tensor]:
    """Reads the tensors of one `.safetensors` or `.bin` file."""
    return _read_safetensors_file(file) if file.suffix == ".safetensors" else read_bin(file)


def weight_map(index: Path) -> dict[str, str]:
    """Reads tensor name -> file from a `*.index.json`. Raises UserError for an invalid index."""
    found = read_json(index).get("weight_map")
    if not isinstance(found, dict) or not found or not all(isinstance(shard, str) for shard in found.values()):
        raise UserError(f"{index} has no weight_map that names a file for each tensor")
    for shard in sorted(set(found.values())):
        # A checkpoint is untrusted: its index must not point to other files of this machine, or a fetch to other
        # patterns.
        if not re.fullmatch(r"(?!\.{1,2}$)[\w.()+@ -]{1,255}", shard):
            raise UserError(f"{index} names the file {shard[:80]!r}; the name of a file beside it was expected")
    return found


def shards(index: Path) -> list[str]:
    """Returns the names of the files that an index names."""
    return sorted(set(weight_map(index).values()))


def _read_shards(directory: Path, index: Path | None, files: list[str],
                 read: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    owners = {} if index is None else weight_map(index)
    if not files:
        raise UserError(_no_weights(directory))
    _check_presence(directory, files)
    tensors: dict[str, Tensor] = {}
    for shard in files:
        found = read(directory / shard)
        odd = next((name for name in found if not name.isprintable()), None)
        if odd is not None:  # the name would be printed, and a terminal executes control characters
            raise UserError(f"{directory / shard} holds a tensor named {odd[:80]!r}; names without control characters "
                            "were expected")
        absent = [name for name, owner in owners.items() if owner == shard and name not in found]
        if absent:
            raise UserError(f"{index} names {some(absent)} in {shard}, which does not hold such tensors")
        # Tensors that the index does not name are kept, so that matching the tensors reports them.
        found = {name: t for name, t in found.items() if owners.get(name, shard) == shard}
        twice = [name for name in found if name in tensors]
        if twice:
            raise UserError(f"{directory / shard} holds {some(twice)}, which another file there holds too")
        tensors |= found
    return tensors


def _no_weights(directory: Path) -> str:
    if (directory / "mm_projector.bin").is_file():
        return (f"{directory} holds only a projector (mm_projector.bin); a whole model was expected: "
                "`convert build --decoder BASE --vision TOWER --projector FILE` joins it with its base")
    return f"{directory} holds no weights; .safetensors or pytorch_model*.bin files were expected"


def _check_presence(directory: Path, shards: list[str]) -> None:
    """Raises UserError for the first missing shard: one of `shards`, or one that a `…-00001-of-00003…` implies."""
    families = set()
    for shard in shards:
        if not (directory / shard).is_file():
            raise UserError(f"the shard {directory / shard} is missing")
        numbered = re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\..*)", shard)
        if numbered:
            families.add((numbered[1], len(numbered[2]), numbered[3] + numbered[4] + numbered[5], int(numbered[4])))
    for start, digits, end, count in sorted(families):
        for i in range(1, count + 1):
            if not (directory / f"{start}{i:0{digits}d}{end}").is_file():
                raise UserError(f"the shard {directory / f'{start}{i:0{digits}d}{end}'} is missing")


def check_content(file: Path) -> None:
    """Raises UserError if the file is missing, or is the pointer that a clone without git-lfs leaves in its place."""
    try:
        with open_file(file) as stream:
            is_pointer = stream.read(len(_LFS_POINTER)) == _LFS_POINTER
    except FileNotFoundError:
        raise UserError(f"the file {file} is missing") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    if is_pointer:
        raise UserError(f"{file} is a pointer of git-lfs, not the file itself: `git lfs pull` in its repository "
                        "fetches it")


def _read_safetensors_file(file: Path) -> dict[str, Tensor]:
    check_content(file)
    try:
        handle = safe_open(file, framework="np")
        source = open(file, "rb")  # stays open while any of its tensors may be read
        header_bytes = int.from_bytes(source.read(8), "little")
        offsets = {name: entry["data_offsets"][0] for name, entry in json.loads(source.read(header_bytes)).items()
                   if name != "__metadata__"}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}") from None
    tensors = {}
    for name in handle.keys():
        view = handle.get_slice(name)
        kinds = INTEGERS if name.endswith(compressed.INTEGERS) else DTYPES
        if view.get_dtype() in kinds:
            shape, dtype, offset = tuple(view.get_shape()), kinds[view.get_dtype()], 8 + header_bytes + offsets[name]
            tensors[name] = Tensor(shape, dtype, functools.partial(_read_at, source, offset, shape, dtype))
        elif not names.is_buffer(name):
            raise UserError(f"{name} in {file} is of type {view.get_dtype()}; one of {', '.join(kinds)} was expected")
    return tensors


def _read_at(file: BinaryIO, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Reads an array at an offset of a file without moving the file's position, so several threads may read."""
    array = np.empty(shape, dtype)
    missing = memoryview(array.reshape(-1).view(np.uint8))
    while missing:
        try:
            count = os.preadv(file.fileno(), [missing], offset)  # at most 2 GiB at a time
        except OSError as error:
            raise UserError(f"{file.name} cannot be read: {error.strerror}") from None
        if count == 0:
            raise UserError(f"{file.name} was truncated while it was read")
        missing, offset = missing[count:], offset + count
    return array


def read_bin(file: Path) -> dict[str, Tensor]:
    """Reads the tensors of a state dict that `torch.save` wrote.

    Raises:
      UserError: torch is not installed; the pickle would run code; the file is damaged, or holds something else.
    """
    try:
        import torch  # an extra, since most checkpoints are safetensors
    except ImportError:
        raise UserError(f"{file} needs torch, which is not installed: pip install "
                        "'llavamed-jax[torch]'") from None
    check_content(file)
    try:
        with warnings.catch_warnings(action="ignore"):  # about odd pickles, which are refused or read in any case
            # Files from before torch 1.6 are not zip archives and cannot be memory-mapped.
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except UnpicklingError as error:
        unsafe = re.search(r"(?:GLOBAL|class) (\w+\.[\w.]*\w)", str(error))
        if unsafe:
            raise UserError(f"{file} was refused: its pickle calls {unsafe[1]}; only tensors were "
                            "expected") from None
        raise UserError(f"{file} is not a complete file of torch.save") from None
    except MemoryError:
        raise
    except Exception:  # for a damaged archive torch may raise RuntimeError, EOFError, KeyError, AttributeError, …
        raise UserError(f"{file} is not a complete file of torch.save") from None
    if not isinstance(state, Mapping) or not all(
            isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in state.items()):
        raise UserError(f"{file} holds something other than named tensors; a state dict was expected")
    tensors = {}
    for name, tensor in state.items():
        if odd := _what_is_odd(tensor):
            if names.is_buffer(name):
                continue
            raise UserError(f"{name} in {file} {odd}")
        dtype = DTYPES[_TORCH_DTYPES[str(tensor.dtype)]]
        tensors[name] = Tensor(tuple(tensor.shape), dtype, lambda tensor=tensor, dtype=dtype: _to_numpy(tensor, dtype))
    return tensors


def _what_is_odd(tensor) -> str | None:
    """Says why a torch tensor cannot be a weight here; None if it can."""
    import torch
    if tensor.layout is not torch.strided:
        return "is a sparse tensor; a dense one was expected"
    if tensor.is_nested:
        return "is a nested tensor; a dense one was expected"
    if str(tensor.dtype) not in _TORCH_DTYPES:
        quantised = ", and quantised weights cannot be read" if tensor.is_quantized else ""
        return f"is of type {tensor.dtype}{quantised}; one of {', '.join(_TORCH_DTYPES)} was expected"
    if tensor.device.type != "cpu":
        return f"is on the device {tensor.device}, so its values are not in the file"
    return None


def _to_numpy(tensor, dtype: np.dtype) -> np.ndarray:
    import torch
    tensor = tensor.detach().resolve_neg().contiguous()  # a view may have a bit that negates the file's values
    if dtype == DTYPES["BF16"]:  # numpy has bfloat16 only through ml_dtypes, and torch does not convert it
        return tensor.view(torch.int16).numpy().view(dtype)
    return tensor.numpy()
