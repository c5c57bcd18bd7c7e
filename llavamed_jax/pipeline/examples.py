"""Converts training records to rows of fixed length: pure functions, which run in the loader's worker processes.

    tokens     [BOS] <image>  what  …  answer [EOS]
    row        [BOS] i1 … iP  what  …  answer [EOS] [BOS] i1 …  0 …  0    input_ids, IMAGE_TOKEN at i1 … iP
    labels       -100 … -100  -100  …  answer [EOS] -100 …     -100 …     not shifted
    positions    0   1  …                             0   1  …  0 …
    segment_ids  1   1  …                        1    2   2  …  0 …  0    samples from 1 on, 0 is padding

B rows of T positions; I image slots a row, H and W pixels, uint8: a quarter of the bytes of the float32 pixels that the
model makes of them on the device. This module does not use JAX: a worker process never touches a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from llavamed_jax.config import IGNORE, IMAGE_TOKEN
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.utils import worker_notes


@dataclass(frozen=True)
class Example:
    """A tokenised record, with images expanded and cut to length; its images are not read yet.

    Attributes:
      ids: token ids.
      labels: one label an id, not shifted; IGNORE where no loss is computed.
      images: the sources of its images, in order.
      is_truncated: whether the record was cut.
      num_surplus: images of the record without a marker, or lost by the cut.
      is_supervised: whether any label is not IGNORE.
    """

    ids: list[int]
    labels: list[int]
    images: list[str]
    is_truncated: bool
    num_surplus: int
    is_supervised: bool


def tokenize(record: dict, processor: Processor, max_length: int) -> Example:
    """Tokenises a record and keeps its first `max_length` positions.

    An image is never cut (the original may cut inside one).

    Args:
      record: an object with `id`, `conversations` and `image`, a list of sources.
      processor: the model's processor.
      max_length: the most positions of a sample.

    Returns:
      The example.

    Raises:
      UserError: the template cannot hold the conversation; the error names the record.
    """
    try:
        ids, labels = processor.training_example(record["conversations"], len(record["image"]), max_length)
        ids, labels = processor.expand(ids, labels) if record["image"] else (ids, labels)
    except ValueError as error:
        raise UserError(f"record {record['id']!r}: {error}") from error
    kept = cut(ids, max_length, processor.tokens_per_image)
    num_images = ids[:kept].count(IMAGE_TOKEN) // processor.tokens_per_image if record["image"] else 0
    num_surplus = record.get("surplus", 0) + len(record["image"]) - num_images
    is_supervised = labels[:kept].count(IGNORE) < kept
    return Example(ids[:kept], labels[:kept], record["image"][:num_images], kept < len(ids), num_surplus, is_supervised)


def cut(ids: Sequence[int], max_length: int, tokens_per_image: int | None) -> int:
    """Returns how many positions of expanded `ids` to keep: `max_length`, or fewer if that is inside an image."""
    if len(ids) <= max_length:
        return len(ids)
    if ids[max_length] != IMAGE_TOKEN or not max_length:
        return max_length
    inside = list(ids[:max_length]).count(IMAGE_TOKEN) % tokens_per_image
    return max_length - inside


def empty_batch(rows: int, length: int, num_images: int, image_size: int | None) -> dict[str, np.ndarray]:
    """Makes a batch of padding in row form.

    Args:
      rows: B.
      length: T.
      num_images: I; 0 for a run without images.
      image_size: H and W in pixels.

    Returns:
      `input_ids`, `labels`, `positions` and `segment_ids`, int32 [B,T]; with images also `pixel_values`, uint8
      [B,I,H,W,3], and `num_images`, int32 [B].
    """
    batch = dict(
        input_ids=np.zeros((rows, length), np.int32), labels=np.full((rows, length), IGNORE, np.int32),
        positions=np.zeros((rows, length), np.int32), segment_ids=np.zeros((rows, length), np.int32))
    if num_images:
        batch["pixel_values"] = np.zeros((rows, num_images, image_size, image_size, 3), np.uint8)
        batch["num_images"] = np.zeros(rows, np.int32)
    return batch


def fill_row(batch: dict[str, np.ndarray], row: int, samples: Sequence[tuple[Example, np.ndarray]]) -> None:
    """Writes samples with their images, uint8 [i,H,W,3], one after another into a row of padding."""
    start = slot = 0
    for segment, (example, pixels) in enumerate(samples, 1):
        end = start + len(example.ids)
        batch["input_ids"][row, start:end] = example.ids
        batch["labels"][row, start:end] = example.labels
        batch["positions"][row, start:end] = np.arange(end - start)
        batch["segment_ids"][row, start:end] = segment
        if len(pixels):
            batch["pixel_values"][row, slot:slot + len(pixels)] = pixels
            batch["num_images"][row] += len(pixels)
        start, slot = end, slot + len(pixels)


def read_images(example: Example, processor: Processor) -> tuple[np.ndarray, dict | None]:
    """Reads the images of an example.

    Args:
      example: the example.
      processor: the model's processor.

    Returns:
      uint8 [i,H,W,3] and None, or an empty array and {"image", "reason"} of the first image that cannot be read.
    """
    arrays = []
    for source in example.images:
        worker_notes.reading(source)
        try:
            arrays.append(processor.images_uint8([source])[0])
        except UserError as error:
            return np.zeros((0,)), {"image": source, "reason": str(error)}
    return np.stack(arrays) if arrays else np.zeros((0,)), None
