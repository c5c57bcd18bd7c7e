"""A device cache of projected image features, so that an image is encoded once.

Axis letters: F places, P positions an image, D model width.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Sequence

import numpy as np

from llavamed_jax.config import LlavaConfig
from llavamed_jax.generation.programs import Programs

BATCH = 8  # images that the tower encodes at once
PLACES = 32  # places of the cache at first


class Features:
    """Projected features [F,P,D] of images on the device; the least recently used ones are evicted.

    Args:
      cfg: the model's shapes.
      programs: the compiled programs.
      shards: the batch of images must be a multiple of this.
      places: F at first; a prefill with more images raises F.

    Attributes:
      array: the features [F,P,D]; None before the first image.
    """

    def __init__(self, cfg: LlavaConfig, programs: Programs, shards: int, places: int = PLACES):
        self._cfg, self._programs, self._batch, self._places = cfg, programs, -(-BATCH // shards) * shards, places
        self._shards = shards
        # Image key -> place, the least recently used first.
        self._place_of: collections.OrderedDict[int, int] = collections.OrderedDict()
        self.array = None

    def places(self, params, keys: Sequence[int], images: Sequence[np.ndarray],
               soon: Sequence[tuple[int, np.ndarray]] = ()) -> dict[int, int]:
        """Returns the place of each image, and encodes the images that have no place yet.

        Args:
          params: the unrolled parameter tree.
          keys: the key of each image.
          images: the images, uint8 or normalised float32 [height,width,3].
          soon: (key, image) of images that will be needed soon; they fill up a batch that is not full.

        Returns:
          Image key -> place.
        """
        wanted = dict(zip(keys, images))
        if len(wanted) > self._places or self.array is None:
            self._places = max(self._places, 1 << (len(wanted) - 1).bit_length())
            self._place_of.clear()
            self.array = self._programs.empty_features(self._places)
        new = [key for key in wanted if key not in self._place_of]
        if new:
            room = min(-len(new) % self._batch, self._places - len(wanted))
            along = {key: image for key, image in soon if key not in self._place_of and key not in wanted}
            along = dict(itertools.islice(along.items(), room))
            new, wanted = [*new, *along], wanted | along
        for key in wanted:
            if key in self._place_of:
                self._place_of.move_to_end(key)
        unused = sorted(set(range(self._places)) - set(self._place_of.values()))
        for key in new:
            self._place_of[key] = unused.pop() if unused else self._place_of.popitem(last=False)[1]
        for kind in (np.uint8, np.float32):
            chosen = [key for key in new if (wanted[key].dtype == np.uint8) == (kind is np.uint8)]
            for first in range(0, len(chosen), self._batch):
                self._encode(params, chosen[first : first + self._batch], wanted, kind)
        return {key: self._place_of[key] for key in wanted}

    def _encode(self, params, keys: Sequence[int], images: dict[int, np.ndarray], kind) -> None:
        v = self._cfg.vision
        n = min(self._batch, -(-(1 << (len(keys) - 1).bit_length()) // self._shards) * self._shards)
        pixels = np.zeros((n, v.image_size, v.image_size, v.num_channels), kind)
        places = np.full(n, self._places, np.int32)  # out of bounds: dropped
        for i, key in enumerate(keys):
            pixels[i], places[i] = images[key], self._place_of[key]
        self.array = self._programs.encode(params, self.array, pixels, places)
