"""XLA's flags for this project's programs, by platform.

Each flag stands with what it changes in the compiled program (docs/preflight.md has the figures). A flag that the user
sets in XLA_FLAGS or LIBTPU_INIT_ARGS is left as the user has it.
"""

from __future__ import annotations

import os

import jaxlib.version

UPDATE, ENGINE = "update", "engine"
FLAGS: dict[str, dict[str, dict[str, bool | int | str]]] = {
    "gpu": {
        # XLA plans for this many percent of the memory. At its default it computes values again that would have fit: it
        # splits the backward pass of SwiGLU into three kernels that read 195 GB where one reads 90. Whether a program
        # fits is judged by its peak, at 95 % of the memory.
        UPDATE: {"xla_gpu_memory_limit_slop_factor": 150,
                 # Collectives run beside kernels; by itself XLA lets them on Hopper only.
                 "xla_gpu_enable_latency_hiding_scheduler": True,
                 # The stacks of a scan, what its rounds save and the gradients, are not filled with zeros first: each
                 # round writes its own slice.
                 "xla_gpu_enable_dus_accumulator_zero_init_elimination": True,
                 # Gradients whose shards have this many bytes or more are summed and scattered by themselves, as soon
                 # as they are there; XLA would wait for the last ones of a layer.
                 "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**20,
                 # Weights of a megabyte or more are gathered one by one: of a tower's layer the first product waits for
                 # its own kernels only.
                 "xla_gpu_all_gather_combine_threshold_bytes": 2**20},
        # Products of one input with kernels of fewer MB are merged, for which the kernels are copied into one in every
        # round: of 64 rows 3.2 of 26.7 GB a token. Kernels that may be joined are (`models.joined`).
        ENGINE: {"xla_gpu_dot_merger_threshold_mb": 0,
                 # The sums of a product stay whole. XLA would split them where rows are few and products are Triton's,
                 # write the parts in float32 and add them up in a kernel of its own: 64 rows read 22.9 GB a token in
                 # place of 21.5, and one row has 447 kernels in place of 351.
                 "xla_gpu_experimental_force_split_k": 1},
    },
    "tpu": {
        # Weights are gathered whole before they are used. By default XLA for a v6e passes shards round the devices
        # within each product, and again in the backward pass: 2.2 times the bytes.
        UPDATE: {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"},
    },
}


# The first version of jaxlib that is known to have a flag; an older one ends the compilation with an error.
_SINCE = {"xla_gpu_enable_dus_accumulator_zero_init_elimination": (0, 10, 2),
          "xla_gpu_experimental_force_split_k": (0, 10, 2)}


def options(platform: str, of: str) -> dict[str, bool | int | str] | None:
    """Returns the `compiler_options` of a program; None if it has none.

    Args:
      platform: the devices' platform.
      of: `UPDATE`, a step of training, or `ENGINE`, a program that generates.
    """
    given = " ".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")).split()
    taken = {word.removeprefix("--").partition("=")[0] for word in given}
    flags = FLAGS.get(platform, {}).get(of, {})
    has = lambda name: jaxlib.version.__version_info__ >= _SINCE.get(name, ())
    return {name: value for name, value in flags.items() if name not in taken and has(name)} or None
