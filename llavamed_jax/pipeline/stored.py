"""Lengths that shards carry, and whether their images are those that a processor needs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from llavamed_jax.datasets.shards import ShardRecords
from llavamed_jax.errors import UserError, warn_once
from llavamed_jax.processor import Processor
from llavamed_jax.utils.hashes import sha256, sha256_of

_TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
                    "added_tokens.json")


def key(processor: Processor, max_length: int, version: int) -> str:
    """Returns a name for what the lengths of given records depend on, the same on every machine.

    Args:
      processor: tokenizer, template, and positions of an image.
      max_length: tokens of a sample.
      version: of the way lengths are measured.
    """
    config, file = processor.config, Path(processor.tokenizer.file)
    files = [file] if file.is_file() else [file / name for name in _TOKENIZER_FILES if (file / name).is_file()]
    parts = [version, max_length, processor.template_name, processor.tokens_per_image, processor.max_length,
             config and config.use_start_end, [sha256_of(each) for each in files]]
    return sha256(json.dumps(parts))[:24]


def preprocessing(processor: Processor) -> dict[str, Any]:
    """Returns what decides the pixels of an image: size, mode, colour of the padding, and the steps of resizing."""
    found: dict[str, Any] = {"size": processor.image_size, "mode": processor.image_mode}
    if processor.config is not None:
        vision = processor.config.vision
        color = list(vision.pad_color) if processor.image_mode == "pad" and vision.pad_color else None
        steps = dataclasses.asdict(vision.images)
        found |= {"pad_color": color, "resize": steps["resize"] and list(steps["resize"]),
                  "is_cropped": steps["is_cropped"], "resample": steps["resample"]}
    return json.loads(json.dumps(found))


def lengths_of(source: ShardRecords, processor: Processor, max_length: int, version: int) -> dict[str, Any] | None:
    """Returns the lengths that shards carry for a processor; None if they were written for another one.

    Raises:
      UserError: the images in the shards are not those that the processor makes.
    """
    needed = preprocessing(processor)
    made = {name: value for name, value in source.images.items() if name in needed}
    if made != needed:
        name = next(name for name in needed if made.get(name) != needed[name])
        raise UserError(f"the images in {source.folder} were made for {name} {made.get(name)}, but this model needs "
                        f"{needed[name]}; write the shards again with this model as --checkpoint")
    found = source.lengths(key(processor, max_length, version))
    if found is None:
        warn_once(f"{source.folder} has no lengths for this tokenizer, template and max_length {max_length}, so every "
                  "sample is read once to measure it")
    return found


def save_arrays(file, tokens: np.ndarray, images: np.ndarray, lost: np.ndarray, rest: dict) -> None:
    """Writes the arrays that `lengths_of` reads."""
    np.savez(file, tokens=tokens, images=images, lost=lost, rest=np.array(json.dumps(rest)))
