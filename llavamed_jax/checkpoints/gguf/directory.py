"""Turns a GGUF file into a language model's directory of transformers: config, weights, tokenizer files."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from llavamed_jax.checkpoints.gguf.config import config_json, decoder_config, generation_json
from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.checkpoints.gguf.tensors import decoder_tensors
from llavamed_jax.checkpoints.gguf.tokenizer import write_tokenizer
from llavamed_jax.checkpoints.soundness import Tally
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.write import Progress, total_bytes, write_safetensors
from llavamed_jax.config import DecoderConfig
from llavamed_jax.errors import some
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import write_json


class GgufDecoder(NamedTuple):
    """A language model that a GGUF file holds.

    Attributes:
      file: the open file.
      config: the decoder's config.
      tensors: float32 tensors by transformers' names, read when they are needed.
    """

    file: GgufFile
    config: DecoderConfig
    tensors: dict[str, Tensor]

    def write_files(self, directory: Path, dtype: str = "float32") -> None:
        """Writes everything but the weights: `config.json`, `generation_config.json` and the tokenizer files.

        Args:
          directory: an existing directory.
          dtype: the type of the weights that `config.json` names.

        Raises:
          UserError: the file's tokenizer is of a kind that is not known here, or damaged.
        """
        write_json(directory / "config.json", config_json(self.config, dtype))
        write_json(directory / "generation_config.json", generation_json(self.config))
        write_tokenizer(self.file, directory)

    def sentences(self) -> list[str]:
        """Returns what the user should know: the model's name, its types, its licence, settings that are left out."""
        path, licence = self.file.path, self.file.get("general.license", str, "")
        name = self.file.get("general.name", str, "a model without a name")
        out = [f"{path}: {name}, {', '.join(self.file.types)}, licence {licence or 'not stated in its metadata'}"]
        sampling = [key for key in self.file.keys if key.startswith("general.sampling.")]
        if sampling:
            out.append(f"{path} recommends {some(sampling)}, which a call sets here and not a file")
        return out


def read_decoder(path: str | Path) -> GgufDecoder:
    """Reads the header of a GGUF file.

    Args:
      path: the GGUF file.

    Raises:
      UserError: the file cannot be read, or holds a model of another kind.
    """
    file = GgufFile(path)
    config = decoder_config(file)
    return GgufDecoder(file, config, decoder_tensors(file, config))


def import_decoder(path: str | Path, out: str | Path, dtype: np.dtype | type | None = None,
                   progress: Progress = iter) -> tuple[dict[str, Tensor], list[str]]:
    """Writes the directory of transformers that a GGUF file stands for.

    Args:
      path: the GGUF file.
      out: a directory that does not exist or is empty. It appears when it is complete.
      dtype: dtype of the weights; None is float32, in which the library dequantises.
      progress: wraps the names of the tensors.

    Returns:
      The tensors that were written by transformers' names, and sentences about the file.

    Raises:
      UserError: the file cannot be read, holds a model of another kind, or has values that are not finite, in the file
        or in `dtype`.
    """
    decoder, dtype, tally = read_decoder(path), np.dtype(np.float32 if dtype is None else dtype), Tally()

    def checked(name: str, tensor: Tensor) -> Tensor:
        where = f"{path}: "
        return Tensor(tensor.shape, dtype,
                      lambda: tally.cast(where + name, tally.look(name, tensor.load(), where), dtype))

    tensors = {name: checked(name, tensor) for name, tensor in decoder.tensors.items()}
    said = decoder.sentences()
    with new_directory(out, total_bytes(tensors)) as temporary:
        decoder.write_files(temporary, dtype.name)
        del decoder  # the metadata of a large vocabulary take more memory than most tensors
        write_safetensors(temporary, tensors, progress, {"format": "pt"})
    tally.warn()
    return tensors, said
