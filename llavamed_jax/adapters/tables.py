"""Fits tables over the vocabulary to a model whose table has another number of rows.

Exports in transformers' layout fill a table up, for `<image>`, `<pad>` and a multiple of 64: an adapter that was
trained on one has more rows than the model that was exported, and an adapter of that model fewer than the export.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.export.tokenizer import IMAGE, PAD
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.errors import UserError
from llavamed_jax.text.tokenizer import TOKENIZERS, Tokenizer

TABLE, HEAD = "decoder/embed_tokens/embedding", "decoder/lm_head"
AXES = {TABLE: 0, f"{HEAD}/kernel": 1}  # of the vocabulary
_FILLED = 128  # no export fills a table up with so many rows


def check_rows(where: str, rows: int, checkpoint: Checkpoint, adapter: Path) -> None:
    """Raises UserError if a token that the model or the adapter uses has no row in the other's table.

    Args:
      where: the file and the tensor, for the error.
      rows: rows of the adapter's table.
      checkpoint: the base.
      adapter: the adapter's directory, which may have a tokenizer of its own.
    """
    own = checkpoint.config.decoder.vocab_size
    if rows == own:
        return
    files = checkpoint.files if rows < own else _own_files(adapter)
    needed = _tokens(files)
    if needed is None and abs(rows - own) >= _FILLED:
        raise UserError(f"{where} has {rows} rows; {own}, as this model has, was expected, or a few more or fewer, as "
                        "an export fills a table up")
    if needed is not None and needed > min(rows, own):
        whose = "model" if rows < own else "adapter"
        raise UserError(f"{where} has {rows} rows, this model's table has {own}, and the tokenizer of the {whose} has "
                        f"{needed} tokens; a row for each token was expected in both")


def other_tokens(checkpoint: Checkpoint, adapter: Path) -> list[str]:
    """Returns special tokens of an adapter's own tokenizer whose ids are others in the base's; [] without one.

    Args:
      checkpoint: the base.
      adapter: the adapter's directory.
    """
    ours, theirs = (next((files[name] for name in TOKENIZERS if name in files), None)
                    for files in (checkpoint.files, _own_files(adapter)))
    if theirs is None:
        return []
    theirs = Tokenizer.load(theirs)
    ours = None if ours is None else Tokenizer.load(ours)
    known = ours.vocab_size if ours else 0
    found = [(theirs.token_of(i), i < known and ours.token_of(i)) for i in range(_needed(theirs))]
    return [token for token, own in found if token is not None and token != own]


def _own_files(adapter: Path) -> dict[str, Path]:
    return {name: adapter / name for name in TOKENIZERS if (adapter / name).is_file()}


def fitted(name: str, tensor: Tensor, base: Tensor) -> Tensor:
    """Returns an adapter's tensor; a table with the base's number of rows: more are cut, missing ones are the base's.

    Args:
      name: the canonical name.
      tensor: the adapter's tensor, in this project's orientation.
      base: the base's.
    """
    axis = AXES.get(name, 0)
    rows, own = tensor.shape[axis], base.shape[axis]

    def load() -> np.ndarray:
        found = np.take(tensor.load(), range(min(rows, own)), axis)
        if rows >= own:
            return found
        return np.concatenate([found, np.take(base.load(), range(rows, own), axis).astype(found.dtype)], axis)

    return tensor if rows == own else Tensor(base.shape, tensor.dtype, load)


def fitted_factor(factor: Tensor, rows: int, axis: int) -> Tensor:
    """Returns the head's factor B, [r,V] or torch's [V,r], for V `rows`; missing ones are 0, which changes nothing.

    Args:
      factor: the factor.
      rows: the new V.
      axis: the axis of V.
    """
    shape = (*factor.shape[:axis], rows, *factor.shape[axis + 1:])

    def load() -> np.ndarray:
        found = np.take(factor.load(), range(min(rows, factor.shape[axis])), axis)
        return np.pad(found, [(0, new - old) for new, old in zip(shape, found.shape, strict=True)])

    return factor if factor.shape == shape else Tensor(shape, factor.dtype, load)


def _tokens(files: Mapping[str, Path]) -> int | None:
    """Returns how many rows a tokenizer's tokens need, but for `<image>` and `<pad>`, which no prompt here has.

    None without a tokenizer.
    """
    file = next((files[name] for name in TOKENIZERS if name in files), None)
    return None if file is None else _needed(Tokenizer.load(file))


def _needed(tokenizer: Tokenizer) -> int:
    needed = tokenizer.vocab_size
    while needed and tokenizer.token_of(needed - 1) in (IMAGE, PAD):
        needed -= 1
    return needed
