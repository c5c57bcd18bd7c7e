"""Opens a GGUF file with the gguf library: checked metadata, and tensors that are dequantised on demand."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import check_content
from llavamed_jax.config.checks import is_plain
from llavamed_jax.errors import UserError, at, cut, exists, short
from llavamed_jax.utils.files import open_file

SUFFIX = ".gguf"
_MAGIC = b"GGUF"
_AT_ONCE = 2**20  # values that are dequantised together: the library holds several arrays of their size
_SHARDS = "split.count"
_WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list"}


def is_gguf(path: str | Path) -> bool:
    """Returns whether a path stands for a GGUF file: it ends in .gguf, or is a file where directories are expected."""
    is_there = exists(path)
    return is_there and Path(path).is_file() or Path(path).suffix == SUFFIX and not (is_there and Path(path).is_dir())


class GgufFile:
    """An open GGUF file.

    Attributes:
      path: the file.
      tensors: float32 tensors by their names in the file, in torch's orientation; `load` gives what
        `gguf.quants.dequantize` gives.
      types: the types of the tensors by name, such as Q4_1.
      keys: the names of the metadata.
    """

    def __init__(self, path: str | Path):
        """Reads the header.

        Raises:
          UserError: the gguf library is not installed; the file is missing, truncated, damaged, big-endian, one of
            several shards or no language model; a tensor is of a type that the library does not dequantise.
        """
        self.path = Path(path)
        if not exists(path):
            raise at(path, f"{cut(str(path), 200)} does not exist; a GGUF file was expected")
        check_content(self.path)
        with open_file(self.path) as stream:
            start = stream.read(len(_MAGIC))
        if start != _MAGIC:
            raise UserError(f"{path} is not a GGUF file: it begins with {start!r}, where {_MAGIC!r} was expected")
        reader = _opened(self.path)
        self._fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        self.keys = tuple(self._fields)
        self._check_kind()
        self.tensors = {tensor.name: self._tensor(tensor) for tensor in reader.tensors}
        self.types = sorted({tensor.tensor_type.name for tensor in reader.tensors})
        odd = next((name for name in (*self.tensors, *self.keys) if not name.isprintable()), None)
        if odd is not None:  # the name would be printed, and a terminal executes control characters
            raise UserError(f"{path} holds the name {odd[:80]!r}; names without control characters were expected")

    def _check_kind(self) -> None:
        kind = self.get("general.type", str, "model")
        if kind != "model":
            raise UserError(f"{self.path} has general.type {short(kind)}; model was expected")
        shards = self.get(_SHARDS, int, 1)
        if shards > 1:
            raise UserError(f"{self.path} is one of {shards} shards ({_SHARDS}); one whole file was expected: "
                            "`llama-gguf-split --merge` joins them")

    def _tensor(self, tensor: Any) -> Tensor:
        where, kind = f"{tensor.name} in {self.path}", tensor.tensor_type
        if not _is_dequantised(kind):
            raise UserError(f"{where} is of type {kind.name}, which the gguf library does not dequantise; a type of "
                            "weights, such as F16 or Q4_K, was expected")
        shape = tuple(map(int, reversed(tensor.shape.tolist())))
        data = tensor.data  # not the whole `tensor` in the closure: its metadata is as large as the tokenizer
        return Tensor(shape, np.dtype(np.float32), functools.partial(_dequantised, data, kind, shape))

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """Returns a value of the metadata.

        Args:
          key: its name.
          kind: the type that it must have: str, int, float (which accepts an integer), bool or list.
          default: the value of a missing key; without a default, a missing key is an error.

        Returns:
          The value. A float32 is the shortest decimal that rounds to it: 1e-05, as in a config.json, and not
          9.999999747378752e-06.

        Raises:
          UserError: the key is missing, or has a value of another type.
        """
        if key not in self._fields:
            if default is ...:
                raise UserError(f"{self.path} lacks {key} in its metadata; {_WORDS[kind]} was expected")
            return default
        value, kinds = self._value(key), (int, float) if kind is float else (kind,)
        if not is_plain(value, kinds):
            raise UserError(f"{self.path} has {key} {short(value)}; {_WORDS[kind]} was expected")
        return float(value) if kind is float else value

    def strings(self, key: str) -> list[str]:
        """Returns a list of texts, as `get`."""
        return self._list(key, (str,), "texts")

    def integers(self, key: str) -> list[int]:
        """Returns a list of whole numbers, as `get`."""
        return self._list(key, (int,), "whole numbers")

    def numbers(self, key: str) -> list[float]:
        """Returns a list of numbers, as `get`."""
        return self._list(key, (int, float), "numbers")

    def _list(self, key: str, kinds: tuple[type, ...], words: str) -> list:
        found = self.get(key, list)
        if not all(is_plain(each, kinds) for each in found):
            raise UserError(f"{self.path} has {key} {short(found)}; a list of {words} was expected")
        return found

    def _value(self, key: str) -> Any:
        field = self._fields[key]
        try:
            value = field.contents()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} has {key} with bytes that are not UTF-8 ({error.reason})") from None
        return float(str(np.float32(value))) if field.types[0].name == "FLOAT32" else value

    def per_layer(self, key: str, default: Any = ...) -> int:
        """Returns a count that the file may list for every layer. Raises UserError if layers differ, or as `get`."""
        if key in self._fields and isinstance(self._value(key), list):
            counts = self.integers(key)
            if len(set(counts)) != 1:
                raise UserError(f"{self.path} has {key} {short(counts)}; the same number for all layers was expected")
            return counts[0]
        return self.get(key, int, default)


def _dequantised(data: np.ndarray, kind: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Dequantises a tensor in groups of rows, so that the library's own intermediate arrays stay small."""
    from gguf import quants

    out = np.empty(shape, np.float32)
    rows = max(1, _AT_ONCE // max(1, out[:1].size))
    with np.errstate(all="ignore"):  # a damaged scale is reported where weights are checked
        for start in range(0, len(data), rows):
            out[start:start + rows] = quants.dequantize(data[start:start + rows], kind)
    return out


@functools.cache
def _is_dequantised(kind: Any) -> bool:
    """Returns whether the library dequantises a type, from a block of zeros."""
    import gguf

    block = np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, kind)
    except NotImplementedError:
        return False
    return True


def _opened(path: Path) -> Any:
    """Opens a file with the library's reader. Raises UserError for a file that it cannot read."""
    try:
        reader = _reader_class()
    except ImportError as error:
        raise UserError(f"{path} can be read with the gguf library only, which is not installed ({error}): pip install "
                        "'llavamed-jax[gguf]'") from None
    try:
        found = reader(path)
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{path} has a header for which there is no memory") from None
    except Exception as error:  # ValueError, KeyError, IndexError, UnicodeDecodeError, … of a damaged file
        # numpy writes np.uint32(999) for 999.
        words = cut(re.sub(r"np\.\w+\((\d+)\)", r"\1", " ".join(str(error).split())), 200).rstrip(".")
        raise UserError(f"{path} is not a complete GGUF file: {words or type(error).__name__}") from None
    if found.byte_order != "I":
        raise UserError(f"{path} is a big-endian GGUF file; a little-endian one was expected")
    return found


@functools.cache
def _reader_class() -> Callable[[Path], Any]:
    import gguf

    class Reader(gguf.GGUFReader):
        """The library's reader, which takes what lies beyond the end of a file for empty and would not stop.

        It replaces `_get`, tried with gguf 0.19. Plain arrays take a tenth of the time of `np.memmap`'s. Without
        `_get` in a later version, files are read as the library reads them.
        """

        def _get(self, offset: int, dtype: Any, count: int = 1, override_order: str | None = None) -> np.ndarray:
            order = self.byte_order if override_order is None else override_order
            dtype, count, offset = np.dtype(dtype).newbyteorder(order), int(count), int(offset)
            end, size = offset + dtype.itemsize * count, len(self.data)
            if end > size:
                raise UserError(f"{self.data.filename} is not a complete GGUF file: it has {size:,} bytes, but its "
                                f"header describes {end:,}")
            return np.frombuffer(self.data, dtype, count, offset)

    return Reader
