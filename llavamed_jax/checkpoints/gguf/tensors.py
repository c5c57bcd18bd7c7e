"""The tensors of a GGUF file under transformers' names, with the rows of queries and keys in transformers' order."""

from __future__ import annotations

import re

import numpy as np

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.gguf.config import is_ignored
from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.layout import match
from llavamed_jax.config import DecoderConfig

# llama.cpp rotates neighbouring pairs of a head for these, and permutes queries and keys for it.
_PERMUTED = ("llama",)


def decoder_tensors(file: GgufFile, decoder: DecoderConfig) -> dict[str, Tensor]:
    """Returns the weights of a decoder.

    Args:
      file: the GGUF file.
      decoder: its config.

    Returns:
      Tensors by the names in a directory of transformers, in torch's orientation, float32. Each is read when it is
      needed.

    Raises:
      UserError: lists tensors that are missing, unexpected or of another shape.
    """
    import gguf

    architecture = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == decoder.architecture)
    of_gguf = gguf.get_tensor_name_map(architecture, decoder.num_layers)
    spellings, shapes = {}, {}
    for name, spec in names.decoder_specs(decoder).items():
        torch = names.decoder_torch_name(spec)
        spellings[torch] = (of_gguf.get_name(torch, try_suffixes=(".weight", ".bias")) or torch,)
        shapes[torch] = names.torch_shape(name, spec.shape)
    found = match(file.path, file.tensors, spellings, shapes, is_ignored, "metadata")
    return {name: _in_order(name, tensor, decoder) for name, tensor in found.items()}


def _in_order(name: str, tensor: Tensor, decoder: DecoderConfig) -> Tensor:
    """Undoes llama.cpp's permutation of a tensor of queries or keys; returns others unchanged.

    `convert_hf_to_gguf.py` interleaves the halves of a head, rows 0, H/2, 1, H/2 + 1, … (`LlamaModel.permute`).
    """
    kind = re.search(r"\.(q|k)_proj\.(weight|bias)$", name)
    if decoder.architecture not in _PERMUTED or kind is None:
        return tensor
    heads = decoder.num_heads if kind[1] == "q" else decoder.num_kv_heads

    def load() -> np.ndarray:
        pairs = tensor.load().reshape(heads, decoder.head_dim // 2, 2, -1)
        return pairs.swapaxes(1, 2).reshape(tensor.shape)

    return Tensor(tensor.shape, tensor.dtype, load)
