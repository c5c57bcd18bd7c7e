"""Packs the first samples of a run into rows of several shapes, to choose the shape of the run's rows."""

from __future__ import annotations

import functools

import numpy as np

from llavamed_jax.pipeline import packing
from llavamed_jax.pipeline.lengths import Lengths
from llavamed_jax.pipeline.packing import Stream

SAMPLES = 2048  # that are packed; all if the epoch has no more


class Trial:
    """The first usable samples of the first epoch, packed into rows of the shapes that are asked about.

    Args:
      stream: the order of samples.
      lengths: the lengths of all records.
      image_cost: the tower's work for one image, in tokens of the decoder.
    """

    def __init__(self, stream: Stream, lengths: Lengths, image_cost: float):
        """Raises UserError if the epoch has no usable sample."""
        order, begin = np.zeros(0, np.int32), 0
        while len(order) < SAMPLES and begin < len(stream):
            more = stream.order(0, begin, begin + SAMPLES)
            order, begin = np.concatenate([order, more[lengths.tokens[more] > 0]]), begin + SAMPLES
        if not len(order):
            raise packing.nothing_usable(lengths)
        order = order[:SAMPLES]
        self._tokens, self._images = lengths.tokens[order], lengths.images[order]
        self._least, self._image_cost = lengths.max_images, image_cost
        self._packed = functools.cache(self._pack)

    def _pack(self, row_length: int) -> tuple[int, int]:
        """Returns the number of image slots of a row that needs the least work, and the rows that it makes."""
        full = row_length * self._images.sum() / self._tokens.sum()  # images of a row without padding
        choices = sorted({max(self._least, round(full * share)) for share in (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5)})
        rows = {slots: len(packing.pack(self._tokens, self._images, row_length, slots)) for slots in choices}
        return min(rows.items(), key=lambda made: made[1] * (row_length + made[0] * self._image_cost))

    def image_slots(self, row_length: int) -> int:
        """Returns the number of image slots of a row that needs the least work; 0 for data without images.

        The tower encodes every slot, even an empty one, and a row may run out of slots before it is full of tokens. The
        work of a number of slots is rows x (row_length + slots x image_cost), with the number of rows that grain needs.

        Args:
          row_length: positions of a row, in which every sample fits.
        """
        return self._packed(row_length)[0] if self._least else 0

    def samples_a_row(self, row_length: int) -> float:
        """Returns the mean number of samples of a row of that many positions."""
        return len(self._tokens) / self._packed(row_length)[1]
