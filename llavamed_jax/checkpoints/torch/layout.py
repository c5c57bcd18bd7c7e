"""Matches the tensors of files, under the names of a layout, with canonical names; one error lists all differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UserError, count_of, some, warn_once


def match(where: Path, found: Mapping[str, Tensor], spellings: Mapping[str, Iterable[str]],
          shapes: Mapping[str, tuple[int, ...]], ignore: Callable[[str], bool] = names.is_buffer,
          config: str = "config.json") -> dict[str, Tensor]:
    """Finds every canonical name among the tensors of a file.

    Args:
      where: the directory or file, for the error.
      found: tensors by their names in the file.
      spellings: canonical name -> the names it may have in the file.
      shapes: canonical name -> shape in the file.
      ignore: returns whether a name in the file needs no match.
      config: what gives the shapes, for the error.

    Returns:
      Canonical name -> the tensor as it is in the file.

    Raises:
      UserError: lists missing, unexpected and misshapen tensors, with shapes.
    """
    taken = {name: next((s for s in spelled if s in found), None) for name, spelled in spellings.items()}
    missing = [f"{next(iter(spellings[n]))} {list(shapes[n])}" for n, key in taken.items() if key is None]
    matched = set(taken.values())
    unexpected = [f"{key} {list(t.shape)}" for key, t in found.items() if key not in matched and not ignore(key)]
    misshapen = [f"{key} is {list(found[key].shape)} where {list(shapes[n])} was expected"
                 for n, key in taken.items() if key is not None and found[key].shape != tuple(shapes[n])]
    problems = [f"{len(items)} tensor{'s' * (len(items) > 1)} {word}: {some(items)}"
                for word, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
                if items]
    if problems:
        raise UserError(f"{where} does not fit its {config}; {'; '.join(problems)}")
    return {name: found[key] for name, key in taken.items()}


def canonical(where: Path, found: Mapping[str, Tensor], config: LlavaConfig, layout: str, without: tuple[str, ...] = (),
              rows: int | None = None, ignore: Callable[[str], bool] = names.is_buffer) -> dict[str, Tensor]:
    """Returns the tensors of a PyTorch layout under canonical names and in this project's orientation.

    Args:
      where: the directory, for errors.
      found: tensors by their names in the files.
      config: the model's config.
      layout: the layout of the names (`names.torch_names`).
      without: prefixes of parts (`vision_tower/`) to leave out.
      rows: rows of the vocabulary in the files, if they have more than the config (config.rows_in_transformers); the
        additional rows are left out.
      ignore: returns whether a name in the files needs no match.

    Raises:
      UserError: as `match`; the files have a head, though the config says that it is the embedding.
    """
    specs = names.specs(config)
    spellings = {n: spelled for n, spelled in names.torch_names(config, layout).items() if not n.startswith(without)}
    shapes = {name: names.torch_shape(name, specs[name].shape) for name in spellings}
    for name in ("decoder/embed_tokens/embedding", "decoder/lm_head/kernel"):
        if rows is not None and name in shapes:
            shapes[name] = (rows, *shapes[name][1:])
    if config.decoder.tie_word_embeddings:
        found = _without_tied_head(where, found, spellings, layout)
    _check_positions(where, found, spellings, config)
    is_dropped = names.dropped(config, layout)
    if dropped := sorted(filter(is_dropped, found)):
        warn_once(f"{where}: {count_of(len(dropped), 'tensor')} of the vision tower that LLaVA does not read "
                  f"{'is' if len(dropped) == 1 else 'are'} left out: {some(dropped)}")
    taken = match(where, found, spellings, shapes, lambda key: ignore(key) or is_dropped(key))
    return {name: from_torch(name, tensor, specs[name].shape) for name, tensor in taken.items()}


def _check_positions(where: Path, found: Mapping[str, Tensor], spellings: Mapping[str, Iterable[str]],
                     config: LlavaConfig) -> None:
    """Raises UserError if the tower's position table is that of another image size than the config's."""
    vision = config.vision
    table = next((found[s] for name, spelled in spellings.items() if "vision_tower/embeddings/position" in name
                  for s in spelled if s in found), None)
    rows = table.shape[-2] if table is not None and len(table.shape) > 1 else vision.num_positions
    if rows == vision.num_positions:
        return
    edge = math.isqrt(max(rows - vision.class_tokens, 0))
    is_square = edge > 0 and edge**2 + vision.class_tokens == rows
    fits = f", which is that of {edge * vision.patch_size} pixels" if is_square else ""
    raise UserError(f"{where} does not fit its config.json: image_size is {vision.image_size}, for which the vision "
                    f"tower has {vision.num_positions} positions, and its position table has {rows}{fits}; `convert "
                    "build --image_size N` interpolates the table of a tower whose config fits it")


def from_torch(name: str, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Returns a tensor of torch's orientation in this project's; a vocabulary longer than `shape` is cut."""
    rows = names.torch_shape(name, shape)[0]
    return Tensor(shape, tensor.dtype, lambda: names.from_torch(name, tensor.load()[:rows]), tensor.few_bits)


def to_torch(name: str, tensor: Tensor) -> Tensor:
    """Reverses `from_torch` for a tensor of a whole vocabulary."""
    return Tensor(names.torch_shape(name, tensor.shape), tensor.dtype, lambda: names.to_torch(name, tensor.load()))


def _without_tied_head(where: Path, found: Mapping[str, Tensor], spellings: Mapping[str, Iterable[str]],
                       layout: str) -> Mapping[str, Tensor]:
    """Drops the second copy of a tied head, which `.bin` files have; UserError if it differs from the embedding."""
    table = next((found[s] for s in spellings.get("decoder/embed_tokens/embedding", ()) if s in found), None)
    heads = [s for s in names.head_names(layout) if s in found]
    for head in heads:
        if table is None or found[head].shape != table.shape or not np.array_equal(found[head].load(), table.load()):
            raise UserError(f"{where} has tie_word_embeddings set in its config.json, and {head} differs from the "
                            "embedding table")
    return {key: tensor for key, tensor in found.items() if key not in heads}
