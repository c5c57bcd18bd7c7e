"""Opens what a run trains on: its weights, data and program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.tree import base
from llavamed_jax.errors import count_of
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.training import alike, settings, void_keys
from llavamed_jax.training.program import Program, open_mesh
from llavamed_jax.training.rows import Data
from llavamed_jax.training.start import open_start, with_own_tokenizer


def open_inputs(cfg: ConfigDict, workdir: Path, total_steps: int | None, step: int | None,
                earlier: Mapping) -> tuple[Checkpoint, Data, Program, int]:
    """Opens the weights, the data and the program of a run, and checks that they are the same in all processes.

    Args:
      cfg: the recipe.
      workdir: the run's directory.
      total_steps: updates of the run; None if they follow from the data.
      step: the step that the run resumes from; None to begin.
      earlier: the record of this step; {} to begin.

    Returns:
      The weights, the data, the program, and the updates of the run.
    """
    checkpoint = open_start(cfg) if step is None else base.open_base(workdir)
    agreement.check_same(lambda: alike.model(cfg, workdir, checkpoint, step))
    start = cfg if step is None else with_own_tokenizer(cfg)
    mesh = open_mesh(cfg, checkpoint.config)
    agreement.check_same(lambda: alike.mesh(mesh))
    with distributed.after_first():  # the other processes read what process 0 has cached of large data
        data = Data.open(start, checkpoint, mesh, workdir, earlier.get("settled"))
    total_steps = total_steps or data.total_steps()
    agreement.check_same(lambda: alike.data(data, total_steps))
    program = Program.build(settings.open_remat(start), checkpoint, mesh, total_steps)
    chosen = settings.of_run(start, program, data.plan.layout, earlier.get("settled") or {})
    agreement.check_same(lambda: alike.chosen(chosen))
    data = data.with_micro_batches(chosen.micro_batches)
    return checkpoint, data, settings.with_remat(program, chosen.remat), total_steps


def describe(source: str, cfg: ConfigDict, data: Data, program: Program, total_steps: int) -> None:
    """Prints what is trained, on what data and devices, and warns of keys that are not used."""
    print(f"{source}; {count_of(len(data.train), 'sample')}, {count_of(total_steps, 'update')} of {cfg.batch_size}, "
          f"{program.describe()}",
          *data.describe(), *(f"warning: {line}" for line in [*void_keys.sentences(cfg), *program.void(cfg)]),
          sep="\n", flush=True)
