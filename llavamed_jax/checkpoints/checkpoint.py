"""A checkpoint: its config, its tensors under canonical names, and its tokenizer and preprocessor files."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.soundness import Tally, norms_are_small
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UserError


@dataclass(frozen=True)
class Checkpoint:
    """Config, tensors under canonical names, and the files that belong to them.

    Attributes:
      config: the model's config.
      layout: `llava`, `transformers`, `tree` (this project's own), `preset` (random weights) or `built`
        (`build.build`).
      directory: the checkpoint's directory; None for `preset` and `built`.
      tensors: every tensor, including those of the tower that the model does not use.
      files: tokenizer and preprocessor files by name.
      tower: describes the vision tower in words, for the log.
      step: the training step of a tree, whose tensors replace the base's; None for the base alone and other layouts.
      tower_directory: the directory of the tower's config or tensors, if it is not the checkpoint's own.
      is_delta: whether buffers show that these tensors are the difference of two models; norms may show it too.
      adapter_directory: the directory of an adapter in another layout that was put onto this checkpoint.
      changed: names of whole tensors that the step of a run, or an adapter's directory, has in place of the base's.
      tally: counts the losses when tensors are cast.
    """

    config: LlavaConfig
    layout: str
    directory: Path | None
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Path]
    tower: str
    step: int | None = None
    tower_directory: Path | None = None
    is_delta: bool = False
    adapter_directory: Path | None = None
    changed: frozenset[str] = frozenset()
    tally: Tally = field(default_factory=Tally, compare=False, repr=False)

    def read(self, name: str) -> np.ndarray:
        """Reads the tensor of a canonical name, in this project's orientation and in its own dtype."""
        return self.tensors[name].load()

    @property
    def few_bits(self) -> str | None:
        """How the files have kernels rounded, `int8` or `int4`; None if no kernel is of few bits."""
        return next((tensor.few_bits.name for tensor in self.tensors.values() if tensor.few_bits), None)

    @property
    def unused(self) -> list[str]:
        """The tensors that the model does not compute with (`names.unused_names`)."""
        return names.unused_names(self.config)

    @property
    def sources(self) -> list[Path]:
        """The directories of somebody else's files, in which nothing may be written, since a new file may change them.

        A tree is a workdir, where exports may be written.
        """
        own = [self.directory] if self.directory is not None and self.layout in ("llava", "transformers") else []
        return own if self.adapter_directory is None else [*own, self.adapter_directory]

    def replace(self, **changes) -> "Checkpoint":
        """Returns a copy with other values of some attributes."""
        return dataclasses.replace(self, **changes)

    def cast(self, dtype) -> "Checkpoint":
        """Returns the checkpoint with every tensor read as `dtype`; None keeps each tensor's own dtype.

        A kernel of few bits is rounded once, from its exact values.
        """
        if dtype is None:
            return self
        dtype = np.dtype(dtype)
        return self.replace(tensors={
            name: Tensor(t.shape, dtype, lambda name=name, load=t.load: self.tally.cast(name, load(), dtype),
                         t.few_bits)
            for name, t in self.widened().tensors.items()})

    def widened(self) -> "Checkpoint":
        """Returns the checkpoint with kernels of few bits read as float32, their exact values."""
        return self.replace(tensors={name: tensor.widened() for name, tensor in self.tensors.items()})

    def doubt(self) -> str | None:
        """Says why these tensors are not a model's, as far as a few small ones show; None if they may be."""
        if not self.is_delta and not norms_are_small(self.tensors):
            return None
        what = "buffers of zeros" if self.is_delta else "norms of about 0"
        return (f"{self.directory} is not a model but a delta: it has {what}, as the difference of two models does; "
                "`convert apply-delta --base LLAMA --delta THIS --out DIR` turns it into a model")

    def sound(self) -> "Checkpoint":
        """Returns the checkpoint with every tensor checked when it is read, for computing with it or writing it.

        The caller calls `tally.warn` after reading.

        Raises:
          UserError: the checkpoint is a delta; when a tensor is read, it has NaN or infinite values.
        """
        if doubt := self.doubt():
            raise UserError(doubt)
        where = f"{self.directory}: " if self.directory else ""

        def checked(name: str, t: Tensor) -> Tensor:
            if t.few_bits is None:
                return Tensor(t.shape, t.dtype, lambda: self.tally.look(name, t.load(), where))

            def widen() -> np.ndarray:
                self.tally.widened.setdefault(t.dtype.name, set()).add(name)
                return self.tally.look(name, t.load(), where)
            stored = t.few_bits._replace(load=lambda: self.tally.look_scales(name, t.few_bits.load(), where))
            return Tensor(t.shape, t.dtype, widen, stored)

        return self.replace(tensors={name: checked(name, t) for name, t in self.tensors.items()})
