"""Records which software and hardware decide an update's rounding, and warns if a resumed run has others."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping

import jax
import jaxlib
import numpy as np

from llavamed_jax.errors import some
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.training.program import Program
from llavamed_jax.utils import machine


def used(program: Program) -> dict[str, str]:
    """Returns the settings outside the recipe that an update's rounding depends on; on CPUs, the host's cores too."""
    device = program.mesh.devices.flat[0]
    fp8 = {"qwix": importlib.metadata.version("qwix")} if program.is_fp8 else {}
    host = {"CPU cores": str(machine.cpu_cores()), "CPU": machine.cpu_model()} if device.platform == "cpu" else {}
    return {"dtype": np.dtype(program.model.dtype).name, "attention": program.model.attention, "jax": jax.__version__,
            "jaxlib": jaxlib.__version__, "device": device.device_kind,
            "runtime": " ".join(device.client.platform_version.split()),
            **fp8, **host, "mesh": str(dict(program.mesh.shape)), "processes": str(distributed.process_count()),
            **agreement.compiler_flags(),
            "matmul precision": str(jax.config.jax_default_matmul_precision)}


def warnings(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns a warning for each changed setting; the resumed run is then not bit-equal to an uninterrupted one.

    Args:
      before: the settings that the saved step recorded.
      now: the present settings (`used`).
    """
    lines = [f"warning: {what} was {before[what] or 'empty'} and is {now[what] or 'empty'} now: the resumed run rounds "
             "differently"
             for what in now if what in before and before[what] != now[what]]
    if before.get("device") == now["device"] and (unknown := now.keys() - before.keys()):  # saved by an earlier version
        lines.append(f"warning: the saved step does not record {some(sorted(unknown))}: the resumed run may round "
                     "differently")
    return lines
