"""Tables of tensors, from which torch names, shapes and logical axes follow.

A line of a table has this project's name, the torch name, and a letter for each dimension; `#` stands for the number of
a layer. A letter has a size, which the part's config gives, and a logical axis (`parallel.mesh.RULES`): D width of the
part, F feed-forward width, V vocabulary, N query heads x head width, K key/value heads x head width. Letters without an
axis: H head width, C colours, p patch edge, T positions of an image.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

_AXES = {"D": "embed", "F": "mlp", "V": "vocab", "N": "heads", "K": "kv_heads"}


class Row(NamedTuple):
    """A line of a table.

    Attributes:
      name: this project's name below the part's, such as `layers_#/mlp/fc1/kernel`.
      torch: the torch name below the part's prefix.
      letters: a letter for each dimension, in this project's orientation.
    """

    name: str
    torch: str
    letters: tuple[str, ...]

    @property
    def axes(self) -> tuple[str | None, ...]:
        """The logical axis of each dimension, or None for a whole dimension; a vector of width D is not sharded."""
        return (None,) if self.letters == ("D",) else tuple(map(_AXES.get, self.letters))


@functools.cache
def rows(table: str) -> tuple[Row, ...]:
    """Returns the lines of a table."""
    lines = [line.split() for line in table.splitlines() if line.strip()]
    return tuple(Row(name, torch, tuple(letters)) for name, torch, *letters in lines)


def kernel_axes(table: str, module: str) -> tuple[str | None, ...]:
    """Returns the logical axes of the kernel of a layer's module, by its name inside the layer (`mlp/up_proj`).

    Raises:
      ValueError: the table lacks the kernel.
    """
    name = f"layers_#/{module}/kernel"
    for row in rows(table):
        if row.name == name:
            return row.axes
    raise ValueError(f"a module asks for the axes of {name}, which has no line in the table of tensors")
