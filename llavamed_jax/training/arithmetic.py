"""What the last bits of an update depend on beside the recipe, and warnings when a run goes on with something else."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jaxlib
import numpy as np

from llavamed_jax.errors import some
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.training.program import Program
from llavamed_jax.utils import machine


def used(program: Program) -> dict[str, str]:
    """What the last bits of an update depend on, beside the recipe. A host's cores count where they compute."""
    device = program.mesh.devices.flat[0]
    host = {"CPU cores": str(machine.cpu_cores()), "CPU": machine.cpu_model()} if device.platform == "cpu" else {}
    return {"dtype": np.dtype(program.model.dtype).name, "attention": program.model.attention, "jax": jax.__version__,
            "jaxlib": jaxlib.__version__, "device": device.device_kind, "runtime": " ".join(device.client.platform_version.split()),
            **host, "mesh": str(dict(program.mesh.shape)), "processes": str(distributed.process_count()),
            **agreement.compiler_flags(),
            "matmul precision": str(jax.config.jax_default_matmul_precision)}


def warnings(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Warnings of an arithmetic that has changed: the run goes on, and is no longer equal to the uninterrupted one to the bit."""
    lines = [f"warning: {what} was {before[what] or 'empty'} and is {now[what] or 'empty'} now: the run goes on with other roundings"
             for what in now if what in before and before[what] != now[what]]
    if before.get("device") == now["device"] and (unknown := now.keys() - before.keys()):  # of an earlier version
        lines.append(f"warning: the step does not say with which {some(sorted(unknown))} it was saved: the run may go on with other "
                     "roundings")
    return lines
