"""How an image becomes a tower's pixels, as transformers' `CLIPImageProcessor` and `LlavaImageProcessor` do it.

    padded to a square?  ->  resized  ->  centre cut out  ->  × scale  ->  (x - mean) / std

Whether images are padded is `LlavaConfig.image_aspect_ratio`; mean and standard deviation are the `VisionConfig`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavamed_jax.config.checks import check_fields
from llavamed_jax.errors import UserError, short

RESAMPLE = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")  # Pillow's filters, by their numbers
MAX_EDGE = 13_377  # whose square is the most pixels that an image may have


@dataclass(frozen=True)
class ImageSettings:
    """The steps between an image and its normalised pixels; as they stand here they are CLIP's.

    Attributes:
      resize: () leaves an image as large as it is, (n,) makes its shortest edge n, (h, w) makes it h x w, whatever its
        shape; None makes the shortest edge that of the tower's input.
      is_cropped: the centre is cut out, of the size of the tower's input; what is lacking at an edge is black.
      resample: the filter of the resizing, one of `RESAMPLE`.
      scale: values from 0 to 255 are multiplied with it.
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
            raise UserError(f"the image config has resize {short(self.resize)}; at most two edges from 1 to {MAX_EDGE} were "
                            "expected")

    @classmethod
    def of(cls, value: "ImageSettings | Mapping[str, Any]") -> "ImageSettings":
        """From what stands in a config.json of ours."""
        return value if isinstance(value, cls) else cls(**value)

    def words(self, size: int) -> str:
        """The steps before normalisation, for a tower of `size` x `size` pixels."""
        edges = (size,) if self.resize is None else self.resize
        kinds = {0: "not resized", 1: "shortest edge to {}", 2: "to height {} and width {}"}
        resized = kinds[len(edges)].format(*edges) + f" ({self.resample})" * bool(edges)
        return f"{resized}{', centre cut out' * self.is_cropped}{', not normalised' * (not self.is_normalized)}"

    def fills(self, size: int, is_padded: bool) -> bool:
        """Whether every image becomes `size` x `size` pixels, as the tower takes them."""
        if self.is_cropped or self.resize == (size, size):
            return True
        return is_padded and self.resize in (None, (size,))
