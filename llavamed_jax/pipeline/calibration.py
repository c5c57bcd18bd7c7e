"""Reads samples of training data to calibrate a rounding with."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import UserError
from llavamed_jax.pipeline.examples import read_images, tokenize
from llavamed_jax.processor import Processor

LONGEST = 2048  # positions of a sample that are kept, as in training


def read_rows(path: str | Path, images: str | Path | None, processor: Processor,
              number: int) -> list[tuple[list[int], np.ndarray]]:
    """Reads samples with their images, spread over the data.

    Args:
      path: as `data.train` of a recipe (`datasets.training.read_training`).
      images: the folder of the images; None means that of the layout.
      processor: the model's processor.
      number: samples; fewer are read from data that have fewer.

    Returns:
      For each sample, its token ids with images expanded, and its images, uint8 [I,H,W,3].

    Raises:
      UserError: the data, a record or an image cannot be read.
    """
    data = read_training(path, images)
    places = np.unique(np.linspace(0, data.num_records - 1, min(number, data.num_records)).round().astype(int))
    rows = []
    for place in places:
        example = tokenize(data.record(int(place)), processor, LONGEST)
        pixels, skipped = read_images(example, processor)
        if skipped is not None:
            raise UserError(f"the image {skipped['image']} of {path} cannot be used for calibration: "
                            f"{skipped['reason']}")
        rows.append((example.ids, pixels))
    return rows
