"""The programs that a run or an evaluation would run, from shapes alone: no data, no weights, no device.

Axis letters: B rows, T positions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config import PRESETS, LlavaConfig, preset
from llavamed_jax.errors import UsageError, cut, short
from llavamed_jax.parallel.mesh import batch_sharding
from llavamed_jax.pipeline.packing import Update, rows_an_update
from llavamed_jax.training.program import Program, bytes_a_device, open_mesh
from llavamed_jax.training.recipe import TABLE
from llavamed_jax.training.rows import check_positions, check_rows, row_multiple
from llavamed_jax.training.start import PRESET
from llavamed_jax.training.step import make_train_step
from llavamed_jax.training.throughput import training_flops


def shapes_of(path: str, name: str | None = None, vision_tower: str | None = None) -> tuple[LlavaConfig, str]:
    """A model's shapes, and where they are from, in words.

    Args:
      path: `preset:NAME`, or a checkpoint, whose config is read.
      name: a recipe's; where its start is not there yet, the preset that ends this name is taken.
      vision_tower: in place of a checkpoint's own; a preset keeps its own, which the words say.
    """
    own = f", with its own tower and not {vision_tower}" if vision_tower else ""
    known = path.removeprefix(PRESET)
    if path.startswith(PRESET) and known in PRESETS:
        return preset(known), path + own
    if not path.startswith(PRESET) and (name is None or os.path.isdir(path)):
        return open_checkpoint(path, vision_tower).config, path
    is_absent = not path.startswith(PRESET) and not os.path.exists(path)
    known = name.split()[-1] if name and is_absent else ""
    if known not in PRESETS:
        raise UsageError(f"the config key 'init' is {short(path)}, which is no directory here; a checkpoint's, or preset:NAME with NAME "
                         f"one of {', '.join(PRESETS)}, was expected")
    return preset(known), f"preset:{known} ({cut(path)} is not here){own}"


@dataclass(frozen=True)
class Training:
    """An update of a recipe on a mesh, and what it works on.

    Attributes:
      update: rows, their length, and the samples that they hold. micro_batches, image_slots: as in a run.
      mean_length: tokens a sample, as the recipe states it, cut to `max_length`.
    """

    program: Program
    update: Update
    micro_batches: int
    image_slots: int
    mean_length: float

    @classmethod
    def of(cls, cfg: ConfigDict, config: LlavaConfig, devices: Sequence[jax.Device], memory: int) -> Training:
        """Settles what a run would settle, with the recipe's mean length in place of the data's.

        Rows have room for as many images as samples of the mean length; a run tries numbers around that on its data.
        """
        check_positions(cfg, config)
        mesh = open_mesh(cfg, config, devices, memory)
        trainable = tuple(entry for entry in cfg.trainable if isinstance(entry, str))
        rows: tuple[int, ...] = ()
        if len(trainable) < len(cfg.trainable) and config.use_start_end:
            trainable, rows = tuple(cfg.trainable), (config.decoder.vocab_size - 2, config.decoder.vocab_size - 1)
        program = Program.of(cfg, config, mesh, 100, trainable, rows)
        multiple = row_multiple(cfg, mesh)
        mean_length = min(cfg.data.mean_length, cfg.max_length)  # to which samples are cut
        if cfg.data.packing:
            if 0 < cfg.data.row_length < mean_length:
                raise UsageError(f"the config key 'data.row_length' is {cfg.data.row_length}; data.mean_length, {mean_length} tokens, or "
                                 "more was expected, for a sample must fit")
            update = rows_an_update(cfg.batch_size, mean_length, multiple, cfg.data.row_length, longest=mean_length)
            slots = -(-update.row_length // mean_length)
        else:
            check_rows(cfg, multiple)
            update = Update(cfg.max_length, cfg.batch_size, cfg.batch_size, None)
            slots = 1
        return cls(program, update, cfg.micro_batches, slots, mean_length)

    def lower(self):
        """The update, lowered for the mesh's devices."""
        program = self.program
        step = make_train_step(program.loss(), program.optimizer, program.schedule, program.mesh, program.shardings, self.micro_batches,
                               program.weighting)
        return step.lower(program.abstract_state(), self.batch())

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The rows of an update as `step.place` lays them."""
        rows, B, T = batch_sharding(self.program.mesh), self.update.rows, self.update.row_length
        vision = self.program.model.cfg.vision
        batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)
                 for name in ("input_ids", "labels", "positions", "segment_ids")}
        shape = (B, self.image_slots, vision.image_size, vision.image_size, vision.num_channels)
        return {**batch, "pixel_values": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)}

    def bytes(self) -> dict[str, int]:
        """Of each device: parameters, optimizer, and gradients as the optimizer takes them."""
        state = self.program.abstract_state()
        return dict(parameters=bytes_a_device((state.trainable, state.frozen)), optimizer=bytes_a_device(state.opt_state),
                    gradients=bytes_a_device(state.trainable))

    @property
    def tokens(self) -> int:
        """Positions an update, of rows that are full."""
        return self.update.rows * self.update.row_length

    def flops(self) -> float:
        """FLOPs of an update whose rows are full of samples of the mean length, an image each."""
        length = self.mean_length
        samples = self.tokens / length
        trained = {name: math.prod(x.shape) for name, x in self.program.abstract_state().trainable.items()}
        return training_flops(self.program.model.cfg, trained, self.tokens, samples * length * (length + 1) / 2, samples)

    def least_traffic(self) -> float:
        """Bytes that each device must receive for an update.

        A weight that is spread over fsdp is gathered for the forward pass and again for the backward one, where there is one,
        and its gradient is summed into parts; over data the part is summed; with tp the activations are, after each of a
        layer's two halves. All in the dtype of the computation, once a micro-batch. The table and the head are gathered once:
        the one has no backward pass that reads it, the loss has its gradient along.
        """
        program, mesh, total = self.program, self.program.mesh, 0.0
        state, width = program.abstract_state(), jnp.dtype(program.model.dtype).itemsize
        data, fsdp, tp = (mesh.shape[axis] for axis in ("data", "fsdp", "tp"))
        for name, x in {**state.trainable, **state.frozen}.items():
            is_spread = any(axis == "fsdp" or isinstance(axis, tuple) and "fsdp" in axis for axis in x.sharding.spec)
            shard = math.prod(x.sharding.shard_shape(x.shape)) * width
            is_trained = name in state.trainable
            if is_spread:
                whole, once = shard * fsdp, name in (TABLE, "decoder/lm_head/kernel", "projector/linear_0/kernel")
                passes = 1 if name.startswith("vision_tower/") and not is_trained or once else 2
                total += whole * (passes + is_trained) * (fsdp - 1) / fsdp
            elif is_trained:
                total += shard * 2 * (fsdp - 1) / fsdp
            total += is_trained * shard * 2 * (data - 1) / data
        decoder, tokens = program.model.cfg.decoder, self.tokens / self.micro_batches / (data * fsdp)
        sums = 2 * decoder.num_layers * (2 + (program.model.remat != "none"))  # forward, backward, and forward again
        total += sums * tokens * decoder.hidden_size * width * 2 * (tp - 1) / tp
        return self.micro_batches * total
