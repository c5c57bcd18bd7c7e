"""Lowers the training step of a recipe from shapes alone, without data, weights or devices.

Axis letters: B rows, T positions.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llavamed_jax.adapters.lora import adapter_of, config_with
from llavamed_jax.adapters.open import open_model
from llavamed_jax.checkpoints.load import refuse_few_bits
from llavamed_jax.config import PRESET, PRESETS, LlavaConfig, preset
from llavamed_jax.errors import UsageError, cut, short
from llavamed_jax.parallel.mesh import batch_shards
from llavamed_jax.pipeline.packing import Layout
from llavamed_jax.pipeline.sizes import Update
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.training import fp8, settings
from llavamed_jax.training.losses import most_rounds
from llavamed_jax.training.program import Program, bytes_a_device, open_mesh
from llavamed_jax.training.recipe import TABLE
from llavamed_jax.training.start import with_vocabulary
from llavamed_jax.training.throughput import training_flops
from llavamed_jax.training.update_rows import check_positions, update_of
from llavamed_jax.utils.paths import is_bucket


def shapes_of(path: str, name: str | None = None, vision_tower: str | None = None,
              adapter: str | None = None, tokenizer: str | None = None) -> tuple[LlavaConfig, str]:
    """Returns the shapes of a model, and a phrase that says where they come from.

    Args:
      path: `preset:NAME`, or a checkpoint, of which the config is read.
      name: the name of a recipe, which ends with the name of a preset. That preset is used if the checkpoint does not
        exist yet.
      vision_tower: replaces the tower of a checkpoint. A preset keeps its own tower, and the phrase says so.
      adapter: the directory of an adapter that is put onto the checkpoint; None for none.
      tokenizer: the tokenizer whose vocabulary a preset takes, as a run of it does; None, or one that is not here,
        leaves the preset's own.

    Raises:
      UsageError: `path` is neither a checkpoint nor a preset, and `name` names no preset.
    """
    if adapter is not None:
        return open_model(path, vision_tower, adapter).config, f"{path} with the adapter {adapter}"
    own = f", with its own tower instead of {vision_tower}" if vision_tower else ""
    known = path.removeprefix(PRESET)
    if path.startswith(PRESET) and known in PRESETS:
        if tokenizer is None or not os.path.exists(tokenizer):
            return preset(known), path + own
        return with_vocabulary(preset(known), Tokenizer.load(tokenizer)), f"{path} with the tokens of {tokenizer}{own}"
    if not path.startswith(PRESET) and (name is None or os.path.isdir(path) or is_bucket(path)):
        return open_model(path, vision_tower).config, path
    is_absent = not path.startswith(PRESET) and not os.path.exists(path)
    known = name.split()[-1] if name and is_absent else ""
    if known not in PRESETS:
        raise UsageError(f"the config key 'init' is {short(path)}, which is not a directory here; a checkpoint's "
                         f"directory or preset:NAME was expected, with NAME one of {', '.join(PRESETS)}")
    return preset(known), f"preset:{known} (because {cut(path)} does not exist here){own}"


def few_bits_of(path: str, quantize: str | None, vision_tower: str | None = None,
                adapter: str | None = None) -> str | None:
    """Returns how the kernels of a served model are rounded: as asked, or as its files have them; None if they are not.

    Args:
      path: as for `shapes_of`.
      quantize: how they are to be rounded; None to leave them as they are.
      vision_tower: as for `shapes_of`.
      adapter: as for `shapes_of`.

    Raises:
      UserError: kernels are to be rounded that the files have in few bits.
    """
    if path.startswith(PRESET):
        return quantize
    checkpoint = open_model(path, vision_tower, adapter)
    refuse_few_bits(checkpoint, quantize)
    return quantize or checkpoint.few_bits


def planned_length(cfg: ConfigDict, config: LlavaConfig) -> int:
    """Returns the mean tokens of a sample, at most `max_length`: longer samples are cut.

    It is the recipe's `data.mean_length`, or its text and the positions of its images in this model.
    """
    whole, text, images = (cfg.data[key] for key in ("mean_length", "mean_text", "mean_images"))
    return min(round(text + images * config.image_length) if whole is None else whole, cfg.max_length)


@dataclass(frozen=True)
class Training:
    """An update of a recipe on a mesh.

    Attributes:
      program: the model, mesh, optimizer and shardings of the run.
      update: number and length of the rows, and the number of samples in them.
      image_slots: images per row.
      mean_length: tokens per sample (`planned_length`).
      mean_images: images per sample, as stated by the recipe.
    """

    program: Program
    update: Update
    image_slots: int
    mean_length: float
    mean_images: float

    @classmethod
    def of(cls, cfg: ConfigDict, config: LlavaConfig, devices: Sequence[jax.Device], memory: int) -> Training:
        """Chooses mesh, rows and image slots as a run does, with the recipe's mean length instead of the data's.

        Rows have room for the images of as many samples of the mean length; a run tries numbers around that on its
        data.

        Args:
          cfg: the recipe.
          config: the shapes of the model.
          devices: the devices to compile for.
          memory: bytes of one device.
        """
        if (adapter := adapter_of(cfg)) is not None:
            config = config_with(config, adapter)
        check_positions(cfg, config)
        mesh = open_mesh(cfg, config, devices, memory)
        trainable = tuple(entry for entry in cfg.trainable if isinstance(entry, str))
        rows: tuple[int, ...] = ()
        if len(trainable) < len(cfg.trainable) and config.use_start_end:
            trainable, rows = tuple(cfg.trainable), (config.decoder.vocab_size - 2, config.decoder.vocab_size - 1)
        program = Program.of(settings.open_remat(cfg), config, mesh, 100, trainable, rows)
        mean_length, images = planned_length(cfg, config), cfg.data.mean_images
        if cfg.data.packing and 0 < cfg.data.row_length < mean_length:
            raise UsageError(f"the config key 'data.row_length' is {cfg.data.row_length}; at least the mean length of "
                             f"a sample ({mean_length} tokens) was expected, so that a sample fits")
        update = update_of(cfg, mesh, config, mean_length)
        slots = math.ceil(images * (update.row_length / mean_length if cfg.data.packing else 1))
        return cls(program, update, slots, mean_length, images)

    def longest_sample(self, cfg: ConfigDict) -> int | None:
        """Returns the tokens of the longest sample that the rows hold; None if they hold every one (`max_length`)."""
        return self.update.row_length if self.update.row_length < cfg.max_length else None

    def lower(self):
        """Returns the update, lowered for the devices of the mesh."""
        return settings.lowered(self.program, self.layout, self.micro_batches)

    @property
    def layout(self) -> Layout:
        """The rows of an update."""
        return Layout(self.update.row_length, self.image_slots, self.update.rows, True)

    def candidates(self, cfg: ConfigDict) -> list[settings.Settings]:
        """Returns the settings that may stand for `auto`, in the order in which they are tried."""
        mesh = self.program.mesh
        return settings.candidates(cfg, mesh.devices.flat[0].platform, self.micro_batches,
                                   self.update.rows // batch_shards(mesh))

    def having(self, chosen: settings.Settings) -> Training:
        """Returns the update with other settings."""
        return replace(self, program=settings.with_remat(self.program, chosen.remat),
                       update=replace(self.update, micro_batches=chosen.micro_batches))

    def bytes(self) -> dict[str, int]:
        """Returns the bytes on each device of parameters, optimizer, and gradients as the optimizer takes them."""
        state = self.program.abstract_state()
        return dict(parameters=bytes_a_device((state.trainable, state.frozen)),
                    optimizer=bytes_a_device(state.opt_state), gradients=bytes_a_device(state.trainable))

    @property
    def micro_batches(self) -> int:
        """Number of micro-batches of an update."""
        return self.update.micro_batches

    @property
    def tokens(self) -> int:
        """Number of positions in the rows of an update."""
        return self.update.rows * self.update.row_length

    def flops(self) -> float:
        """Returns the FLOPs of an update with full rows of samples of the mean length and number of images."""
        length = self.mean_length
        samples = self.tokens / length
        attended = samples * length * (length + 1) / 2
        return training_flops(self.program.model.cfg, self.program.trained_sizes(), self.tokens, attended,
                              samples * self.mean_images)

    @property
    def loss_rounds(self) -> int:
        """Rounds of the loss's loop over a device's positions, of a micro-batch whose positions all are supervised."""
        return most_rounds(self.tokens // self.micro_batches // batch_shards(self.program.mesh))

    def least_traffic(self) -> float:
        """Returns a lower bound of the bytes that each device receives for an update.

        A weight that is sharded over `fsdp` is gathered for the forward pass, and again for the backward pass if there
        is one; its gradient is reduce-scattered over `fsdp`, and the shard is all-reduced over `data`. With `tp`, the
        activations are all-reduced after attention and after the feed-forward network of each layer. All of this
        happens in the dtype of the computation, once per micro-batch; weights of FP8 products are gathered in FP8. The
        embedding table and the head are gathered only once: no backward pass reads the table, and the loss computes the
        gradient of the head in its forward pass.
        """
        program, mesh, total = self.program, self.program.mesh, 0.0
        state, width = program.abstract_state(), jnp.dtype(program.model.dtype).itemsize
        data, fsdp, tp = (mesh.shape[axis] for axis in ("data", "fsdp", "tp"))
        held = {**state.trainable, **state.frozen}
        for name, x in ((name, leaf) for name, each in held.items() for leaf in jax.tree.leaves(each)):
            is_spread = any(axis == "fsdp" or isinstance(axis, tuple) and "fsdp" in axis for axis in x.sharding.spec)
            shard = math.prod(x.sharding.shard_shape(x.shape)) * width
            narrow = 1 / width if program.is_fp8 and fp8.is_multiplied(name) else 1
            is_trained = name in state.trainable
            if is_spread:
                whole, once = shard * fsdp, name in (TABLE, "decoder/lm_head/kernel", "projector/linear_0/kernel")
                passes = 1 if name.startswith("vision_tower/") and not is_trained or once else 2
                total += whole * (passes * narrow + is_trained) * (fsdp - 1) / fsdp
            elif is_trained:
                total += shard * 2 * (fsdp - 1) / fsdp
            total += is_trained * shard * 2 * (data - 1) / data
        decoder, tokens = program.model.cfg.decoder, self.tokens / self.micro_batches / (data * fsdp)
        # Two a layer, in the forward pass, the backward pass, and the rematerialised forward pass.
        sums = 2 * decoder.num_layers * (2 + (program.model.remat != "none"))
        total += sums * tokens * decoder.hidden_size * width * 2 * (tp - 1) / tp
        return self.micro_batches * total
