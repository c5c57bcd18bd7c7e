"""Adds LLaVA-Med v1.0's image tokens to a tokenizer and to the tables over its vocabulary.

Source: `initialize_vision_tokenizer` in `llava/model/llava.py` of LLaVA-Med v1.0.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.errors import UserError
from llavamed_jax.text.image_positions import END, PAD, PATCH, START
from llavamed_jax.text.special_tokens import read_special_tokens
from llavamed_jax.utils.files import read_json, write_json

_AT_ONCE = ((PAD,), (PATCH,), (START, END))  # groups of rows that are added together, in this order
# Canonical name -> axis of the vocabulary.
TABLES = {"decoder/embed_tokens/embedding": 0, "decoder/lm_head/kernel": 1}
_PLACEMENT = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)


def add_image_tokens(checkpoint: Checkpoint, scratch: Path, deviation: float = 0.02, seed: int = 0,
                     has_pad: bool = False) -> tuple[Checkpoint, list[str]]:
    """Adds `<im_patch>`, `<im_start>` and `<im_end>` to a checkpoint's vocabulary, each after the existing tokens.

    New rows of the embedding and the head are the mean of all rows before them; `<im_start>` and `<im_end>` get the
    same row. The row of `<im_patch>`, which image features replace, is drawn as the original's
    `resize_token_embeddings` draws it.

    Args:
      checkpoint: the checkpoint.
      scratch: a directory for the changed tokenizer files.
      deviation: standard deviation of the drawn row (`initializer_range` of the decoder's config).
      seed: seed of the drawn row.
      has_pad: adds `[PAD]` before them, as the original does with `--version v0` to a tokenizer without padding.

    Returns:
      The checkpoint, and the tokens that were added.

    Raises:
      UserError: there is no tokenizer, or its pieces and the rows of the embedding table differ in number.
    """
    config, files = checkpoint.config, checkpoint.files
    vocabulary = _vocabulary(files)
    if not vocabulary:
        raise UserError("there are no tokenizer files to add image tokens to; tokenizer.model or tokenizer.json was "
                        "expected")
    wanted = [token for group in _AT_ONCE for token in group if has_pad or token != PAD]
    new, rows = [token for token in wanted if token not in vocabulary], config.decoder.vocab_size
    pieces = max(vocabulary.values()) + 1
    if new and pieces != rows:
        raise UserError(f"the tokenizer has {pieces} pieces and the embedding table {rows} rows; image tokens can be "
                        "added only if both numbers are equal")
    tensors = {**checkpoint.tensors, **{
        name: _longer(checkpoint.tensors[name], axis, new, deviation, [seed, zlib.crc32(name.encode())])
        for name, axis in TABLES.items() if name in checkpoint.tensors and new}}
    ids = {token: rows + i for i, token in enumerate(new)}
    config = config.replace(decoder=dataclasses.replace(config.decoder, vocab_size=rows + len(new)), use_start_end=True)
    return checkpoint.replace(config=config, tensors=tensors,
                              files={**files, **_write_tokens(files, ids, scratch)}), new


def _longer(table: Tensor, axis: int, new: list[str], deviation: float, seed: list[int]) -> Tensor:
    def load() -> np.ndarray:
        rows = table.load()
        for group in _AT_ONCE:
            count = sum(token in new for token in group)
            if group == (PATCH,):
                row = deviation * np.random.default_rng(seed).standard_normal(rows.shape[1 - axis], np.float32)
            elif count:
                row = rows.mean(axis=axis, dtype=np.float32)
            if count:
                rows = np.concatenate([rows, *[np.expand_dims(row.astype(rows.dtype), axis)] * count], axis)
        return rows
    shape = list(table.shape)
    shape[axis] += len(new)
    return Tensor(tuple(shape), table.dtype, load)


def _vocabulary(files: Mapping[str, Path]) -> dict[str, int]:
    """Returns pieces and added tokens with their ids; {} without a tokenizer."""
    source = next((files[name] for name in ("tokenizer.model", "tokenizer.json") if name in files), None)
    if source is None:
        return {}
    try:
        if source.suffix == ".model":
            import sentencepiece
            model = sentencepiece.SentencePieceProcessor(model_file=str(source))
            found = {model.id_to_piece(i): i for i in range(model.vocab_size())}
        else:
            found = dict(read_json(source)["model"]["vocab"])
        if "tokenizer.json" in files:
            found |= {token["content"]: int(token["id"])
                      for token in read_json(files["tokenizer.json"]).get("added_tokens", ())}
    except UserError:
        raise
    except Exception as error:  # SentencePiece raises RuntimeError; a damaged file may raise anything
        raise UserError(f"the tokenizer {', '.join(map(str, files.values()))} cannot be read "
                        f"({type(error).__name__})") from None
    return found | {token.text: token.id for token in read_special_tokens(files).added}


def _write_tokens(files: Mapping[str, Path], ids: Mapping[str, int], scratch: Path) -> dict[str, Path]:
    """Writes the files that list added tokens, with `ids` added; `added_tokens.json` for a SentencePiece model too."""
    entries = {i: dict(content=token, **_PLACEMENT) for token, i in ids.items()}
    out = {}
    if "tokenizer.json" in files:
        tokenizer = read_json(files["tokenizer.json"])
        tokenizer["added_tokens"] = [*tokenizer.get("added_tokens", ()),
                                     *({"id": i, **entry} for i, entry in entries.items())]
        out["tokenizer.json"] = scratch / "tokenizer.json"
        out["tokenizer.json"].write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    settings = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] |= {str(i): entry for i, entry in entries.items()}
    if PAD in ids:
        settings["pad_token"] = PAD
    if PAD in ids or "added_tokens_decoder" in settings:
        out["tokenizer_config.json"] = scratch / "tokenizer_config.json"
        write_json(out["tokenizer_config.json"], settings)
    if "tokenizer.model" in files or "added_tokens.json" in files:
        before = read_json(files["added_tokens.json"]) if "added_tokens.json" in files else {}
        out["added_tokens.json"] = scratch / "added_tokens.json"
        write_json(out["added_tokens.json"], {**before, **ids})
    return out
