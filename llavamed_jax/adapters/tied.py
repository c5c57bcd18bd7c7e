"""Whole embedding tables in adapters of a model whose head is its embedding table (`tie_word_embeddings`).

PEFT puts a copy of each module of `modules_to_save` beside the base's, so that table and head are two arrays there: an
adapter with the table alone leaves the base's table as its head. A tied model here, and one that LLaVA trains, has one
array. So an adapter of PEFT's fits if its table and its head are equal, as `ensure_weight_tying` keeps them.

Source: PEFT 0.21's `ModulesToSaveWrapper` and `get_peft_model_state_dict`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llavamed_jax.adapters import tables
from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.errors import UserError

_HEADS = [head for layout in ("transformers", "llava") for head in names.head_names(layout)]


def without_head(file: Path, found: Mapping[str, Tensor], canonical: Mapping[str, str], checkpoint: Checkpoint,
                 is_pefts: bool) -> dict[str, Tensor]:
    """Returns an adapter's whole tensors without those of the head, if the base's head is its embedding table.

    Args:
      file: the file, for the error.
      found: its whole tensors by torch's names.
      canonical: torch's names -> canonical names.
      checkpoint: the base.
      is_pefts: whether the file is PEFT's, for which a missing table or head is the base's; in LLaVA's
        `non_lora_trainables.bin` the table alone stands for both.

    Raises:
      UserError: table and head differ.
    """
    table = next((key for key in found if canonical.get(key) == tables.TABLE), None)
    heads = [key for key in _HEADS if key in found]
    if not checkpoint.config.decoder.tie_word_embeddings or table is None and not heads:
        return dict(found)
    base = checkpoint.tensors[tables.TABLE]
    one = found.get(table, base)
    others = [found[head] for head in heads] or ([base] if is_pefts else [])
    if any(not _are_equal(one, other, is_cut=one is base or other is base) for other in others):
        alone = f"{table or heads[0]} alone" if table is None or not heads else f"{heads[0]} that differs from {table}"
        raise UserError(f"{file} has {alone}, and the head of the base {checkpoint.directory} is its embedding table "
                        "(tie_word_embeddings); an embed_tokens and an lm_head that are equal, as PEFT's "
                        "ensure_weight_tying keeps them, were expected")
    return {key: tensor for key, tensor in found.items() if key not in heads}


def _are_equal(one: Tensor, other: Tensor, is_cut: bool) -> bool:
    """Returns whether two tables [V,D] have the same values; with `is_cut`, in the rows that both have."""
    rows = min(one.shape[0], other.shape[0]) if is_cut else None
    return ((is_cut or one.shape == other.shape) and one.shape[1:] == other.shape[1:]
            and np.array_equal(one.load()[:rows], other.load()[:rows]))
