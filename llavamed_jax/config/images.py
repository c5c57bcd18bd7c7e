"""Describes how an image becomes a tower's pixels, as in transformers' `CLIPImageProcessor` and `LlavaImageProcessor`.

    padded to a square?  ->  resized  ->  centre cut out  ->  × scale  ->  (x - mean) / std

`LlavaConfig.image_aspect_ratio` says whether images are padded; mean and standard deviation are the `VisionConfig`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavamed_jax.config.checks import check_fields
from llavamed_jax.errors import UserError, short

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's filters, by their numbers
MAX_EDGE = 13_377  # pixels; its square is the most pixels that an image may have


@dataclass(frozen=True)
class ImageSettings:
    """The steps between an image and its normalised pixels; the defaults are CLIP's.

    Attributes:
      resize: () keeps the image's size, (n,) makes its shortest edge n pixels, (h, w) makes it h x w, whatever its
        shape; None makes the shortest edge that of the tower's input.
      is_cropped: whether the centre is cut out, in the size of the tower's input; missing pixels at an edge are black.
      resample: the filter of the resizing, one of `RESAMPLE`.
      scale: factor for the values from 0 to 255.
      is_normalized: whether mean and standard deviation are applied.
    """

    resize: tuple[int, ...] | None = None
    is_cropped: bool = True
    resample: str = "bicubic"
    scale: float = 1 / 255
    is_normalized: bool = True

    def __post_init__(self):
        if isinstance(self.resize, list):  # JSON has no tuples
            object.__setattr__(self, "resize", tuple(self.resize))
        check_fields(self, "image ")
        if self.resample not in RESAMPLE:
            raise UserError(f"the image config has resample {short(self.resample)}; one of {', '.join(RESAMPLE)} was "
                            "expected")
        if len(self.resize or ()) > 2 or not all(1 <= edge <= MAX_EDGE for edge in self.resize or ()):
            raise UserError(f"the image config has resize {short(self.resize)}; at most two edges from 1 to {MAX_EDGE} "
                            "were expected")

    @classmethod
    def of(cls, value: "ImageSettings | Mapping[str, Any]") -> "ImageSettings":
        """Returns the settings for a value of this project's own config.json."""
        return value if isinstance(value, cls) else cls(**value)

    def words(self, size: int) -> str:
        """Describes the steps before normalisation in words, for a tower of `size` x `size` pixels."""
        edges = (size,) if self.resize is None else self.resize
        kinds = {0: "not resized", 1: "shortest edge to {}", 2: "to height {} and width {}"}
        resized = kinds[len(edges)].format(*edges) + f" ({self.resample})" * bool(edges)
        return f"{resized}{', centre cut out' * self.is_cropped}{', not normalised' * (not self.is_normalized)}"

    def fills(self, size: int, is_padded: bool) -> bool:
        """Returns whether every image becomes `size` x `size` pixels, as the tower needs."""
        if self.is_cropped or self.resize == (size, size):
            return True
        return is_padded and self.resize in (None, (size,))
