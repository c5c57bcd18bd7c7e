"""A checkpoint: its config, its tensors under canonical names, and the files that travel with it."""

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
    """Config, tensors under canonical names, and the files that travel with them.

    Attributes:
      layout: `llava`, `transformers`, `tree` (this project's own), `preset` (random weights) or `built` (`build.build`).
      directory: None for the last two.
      tensors: every tensor, the unused ones of the tower included.
      files: tokenizer and preprocessor files by name.
      tower: which vision tower this is, in words, for the log.
      step: of a tree, the training step whose tensors are laid over the base.
      tower_directory: where the tower's config or tensors were read, if that is not the checkpoint's own directory.
      is_delta: whether buffers say that these tensors are the difference of two models; the norms may say so too.
      tally: of what a cast of the tensors loses.
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
    tally: Tally = field(default_factory=Tally, compare=False, repr=False)

    def read(self, name: str) -> np.ndarray:
        """The tensor of a canonical name, in this project's orientation and in its own dtype."""
        return self.tensors[name].load()

    @property
    def unused(self) -> list[str]:
        """Tensors that the model does not compute with (`names.unused_names`)."""
        return names.unused_names(self.config)

    @property
    def sources(self) -> list[Path]:
        """Directories inside of which nothing may be written: somebody else's files, where a new one could change what is read.
        A tree is a workdir, where exports may lie.
        """
        return [self.directory] if self.directory is not None and self.layout in ("llava", "transformers") else []

    def replace(self, **changes) -> "Checkpoint":
        return dataclasses.replace(self, **changes)

    def cast(self, dtype) -> "Checkpoint":
        """The same checkpoint with every tensor read as `dtype`; None keeps each tensor's own."""
        if dtype is None:
            return self
        dtype = np.dtype(dtype)
        return self.replace(tensors={
            name: Tensor(t.shape, dtype, lambda name=name, load=t.load: self.tally.cast(name, load(), dtype))
            for name, t in self.tensors.items()})

    def doubt(self) -> str | None:
        """What is wrong with these tensors as a model, in a sentence, as far as a few small ones show; None for nothing."""
        if not self.is_delta and not norms_are_small(self.tensors):
            return None
        what = "buffers of zeros" if self.is_delta else "norms of about 0"
        return (f"{self.directory} is no model but a delta: it has {what}, as the difference of two models has; `convert apply-delta "
                "--base LLAMA --delta THIS --out DIR` makes a model of it")

    def sound(self) -> "Checkpoint":
        """The same checkpoint with every tensor looked at when it is read: for whoever computes with it or writes it.

        Whoever has read what it wanted calls `tally.warn`.

        Raises:
          UserError: a delta. When a tensor is read: NaN or infinite values.
        """
        if doubt := self.doubt():
            raise UserError(doubt)
        where = f"{self.directory}: " if self.directory else ""
        return self.replace(tensors={
            name: Tensor(t.shape, t.dtype, lambda name=name, load=t.load: self.tally.look(name, load(), where))
            for name, t in self.tensors.items()})
