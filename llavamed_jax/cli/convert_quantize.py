"""The flags of `python -m convert export` that round kernels, and what they do."""

from __future__ import annotations

import argparse
import dataclasses

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.export.few_bits import Rounding
from llavamed_jax.errors import UsageError
from llavamed_jax.quantized.rounding import ROUNDED
from llavamed_jax.utils import progress

CALIBRATION_ROWS = 128


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.add_argument("--quantize", metavar="TYPE",
                        help="int8 or int4: rounds the decoder's kernels, in compressed-tensors' format")
    parser.add_argument("--calibrate", metavar="PATH",
                        help="training data on which int4 is calibrated (GPTQ)")
    parser.add_argument("--images", metavar="DIR", help="the folder with the images of --calibrate")
    parser.add_argument("--calibration_rows", type=int, metavar="N",
                        help=f"samples of --calibrate (default {CALIBRATION_ROWS})")


def check_flags(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that do not belong together."""
    if args.calibrate is not None and args.quantize != "int4":
        raise UsageError("--calibrate is for int4; --quantize int4 was expected beside it")
    for flag in ("images", "calibration_rows"):
        if args.calibrate is None and getattr(args, flag) is not None:
            raise UsageError(f"--{flag} can be used only with --calibrate")
    if args.calibration_rows is not None and args.calibration_rows < 1:
        raise UsageError(f"--calibration_rows is {args.calibration_rows}; at least 1 was expected")


def rounding_of(checkpoint: Checkpoint, args: argparse.Namespace, dtype: type | None) -> tuple[Rounding, Checkpoint]:
    """Returns the rounding that the flags ask for, and the checkpoint with all but its rounded kernels cast to `dtype`.

    The kernels are rounded from their own dtype, with scales of `dtype`.
    """
    rounding = Rounding.of(checkpoint, args.quantize, dtype)
    if args.calibrate is not None:
        rounding = _calibrated(checkpoint, rounding, args)
    exact = {name: tensor for name, tensor in checkpoint.tensors.items() if ROUNDED.fullmatch(name)}
    return rounding, checkpoint.replace(tensors={**checkpoint.cast(dtype).tensors, **exact})


def _calibrated(checkpoint: Checkpoint, rounding: Rounding, args: argparse.Namespace) -> Rounding:
    from llavamed_jax.checkpoints.export.calibrate import calibrated  # imports jax
    from llavamed_jax.pipeline.calibration import read_rows
    from llavamed_jax.processor import Processor
    rows = read_rows(args.calibrate, args.images, Processor.from_checkpoint(checkpoint),
                     args.calibration_rows or CALIBRATION_ROWS)
    print(f"calibrating with {len(rows)} samples of {args.calibrate}, {sum(len(ids) for ids, _ in rows)} positions")
    return dataclasses.replace(rounding, calibrate=lambda: calibrated(checkpoint, rows, rounding.group, rounding.dtype,
                                                                      progress.over))
