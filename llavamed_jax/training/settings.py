"""Chooses `remat` and `micro_batches` where the recipe leaves them to the machine (`auto`).

The settings are tried from the least arithmetic to the least memory, by compiling the update for each, until one fits.
What a run has chosen stands in its `recipe.json` and is kept on resuming.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from llavamed_jax.parallel.mesh import batch_sharding, batch_shards, device_memory
from llavamed_jax.pipeline.packing import Layout
from llavamed_jax.pipeline.sizes import AUTO
from llavamed_jax.training.program import Program
from llavamed_jax.training.step import make_train_step

ORDER = ("minimal", "attention", "qkvo", "full")  # values of remat, from the least arithmetic to the least memory
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Settings:
    """What `auto` may stand for.

    Attributes:
      remat: what a layer keeps for its backward pass.
      micro_batches: parts in which the rows of an update are computed.
    """

    remat: str
    micro_batches: int

    def __str__(self) -> str:
        return f"remat={self.remat} micro_batches={self.micro_batches}"


def candidates(cfg: ConfigDict, platform: str, parts: int, rows: int) -> list[Settings]:
    """Returns the settings that a recipe allows, in the order in which they are tried: at most eight, on a CPU one.

    Args:
      cfg: the recipe.
      platform: the devices' platform; on `cpu` nothing is searched.
      parts: the fewest micro-batches (`sizes.parts_of`), or the recipe's number.
      rows: rows of a device, of which each may be a micro-batch.
    """
    is_searched = platform != "cpu"
    remats = (cfg.remat,) if cfg.remat != AUTO else ORDER if is_searched else ORDER[-1:]
    numbers = dict.fromkeys((parts, max(parts, rows))) if cfg.micro_batches == AUTO and is_searched else (parts,)
    return [Settings(remat, number) for remat in remats for number in numbers]


def first_that_fits(tried: Sequence[Settings], peak_of: Callable[[Settings], int], memory: int,
                    say: Callable[[str], object] = lambda _: None) -> Settings:
    """Returns the first settings whose update fits the memory; the last if none fits.

    Args:
      tried: `candidates`.
      peak_of: compiles the update with settings and returns its bytes on a device; not called for the last ones, which
        are taken whether they fit or not.
      memory: bytes on a device that programs may use.
      say: is told what was found, a line each time.
    """
    for settings in tried[:-1]:
        peak = peak_of(settings)
        say(f"{settings}: {peak / _GIB:.1f} of {memory / _GIB:.1f} GiB{'' if peak <= memory else ', too much'}")
        if peak <= memory:
            return settings
    return tried[-1]


def of_run(cfg: ConfigDict, program: Program, layout: Layout, settled: Mapping[str, Any]) -> Settings:
    """Returns the settings of a run on this machine.

    Args:
      cfg: the recipe.
      program: its program, with any `remat`.
      layout: the rows of an update.
      settled: `resolved` of an earlier part of the run, whose settings are kept; {} to begin. Where the recipe has
        changed since, the setting is absent and is chosen again.
    """
    if "remat" in settled and "micro_batches" in settled:
        return Settings(settled["remat"], layout.micro_batches)
    cfg = cfg.copy_and_resolve_references()
    cfg.remat = settled.get("remat", cfg.remat)
    with cfg.ignore_type():
        cfg.micro_batches = layout.micro_batches if "micro_batches" in settled else cfg.micro_batches

    def peak_of(settings: Settings) -> int:
        try:
            step = lowered(with_remat(program, settings.remat), layout, settings.micro_batches)
            return peak_bytes(step.compile().memory_analysis())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return 2**62  # the compiler gave up

    devices = list(program.mesh.devices.flat)
    rows = (layout.rows + layout.padding_rows) // batch_shards(program.mesh)
    return first_that_fits(candidates(cfg, devices[0].platform, layout.micro_batches, rows), peak_of,
                           device_memory(devices), lambda line: print(line, flush=True))


def with_remat(program: Program, remat: str) -> Program:
    """Returns a program whose layers keep what `remat` says."""
    return dataclasses.replace(program, model=program.model.clone(remat=remat))


def open_remat(cfg: ConfigDict) -> ConfigDict:
    """Returns the recipe with a `remat` that a program can be built with, until `of_run` chooses it."""
    if cfg.remat != AUTO:
        return cfg
    cfg = cfg.copy_and_resolve_references()
    cfg.remat = ORDER[-1]
    return cfg


def lowered(program: Program, layout: Layout, micro_batches: int):
    """Returns the update of a program, lowered for the devices of its mesh from shapes alone."""
    step = make_train_step(program.loss(), program.optimizer, program.schedule, program.mesh, program.shardings,
                           micro_batches, program.weighting, program.dropout_seed)
    return step.lower(program.abstract_state(), abstract_batch(program, layout))


def abstract_batch(program: Program, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the rows of an update as shapes, sharded as `step.put_batch` does."""
    rows, B, T = batch_sharding(program.mesh), layout.rows + layout.padding_rows, layout.row_length
    vision = program.model.cfg.vision
    batch = {name: jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=rows)
             for name in ("input_ids", "labels", "positions", "segment_ids")}
    shape = (B, layout.image_slots, vision.image_size, vision.image_size, vision.num_channels)
    return {**batch, "pixel_values": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)}


def peak_bytes(memory) -> int:
    """Returns the bytes of a compiled program on a device, from its `memory_analysis()`: all that is not given up."""
    return (memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
            + memory.generated_code_size_in_bytes + memory.temp_size_in_bytes)
