"""`curation records`: any training data to ArrayRecord shards, with images as the model needs them, and an index."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from llavamed_jax.errors import UsageError, UserError, short
from llavamed_jax.utils import signals

_GRACE_S = 20.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--data", metavar="PATH", required=True, help="what data.train of a recipe takes: a LLaVA file, or a data set")
    add("--images", metavar="DIR", help="the folder of the images (default: that of the layout)")
    add("--checkpoint", metavar="PATH", required=True, help="the model to train: its images, tokenizer and template; "
        "no weights are read")
    add("--tokenizer", metavar="PATH", help="a tokenizer that replaces the checkpoint's own")
    add("--template", metavar="NAME", help="the template that the recipe will name, such as v1.5:mistral_instruct")
    add("--max_length", metavar="N", type=int, default=2048, help="tokens a sample, as in the recipe (default 2048)")
    add("--out", metavar="DIR", required=True, help="the folder of the shards, shared by all writers")
    add("--part", metavar="I/N", default="0/1", help="this writer's part, from 0: each of N writers takes another")
    add("--records_a_shard", metavar="N", type=int, default=10_000, help="default 10000")
    add("--format", metavar="NAME", choices=("png", "jpeg"), default="png", help="png (the default) keeps every pixel, "
        "jpeg is smaller")
    add("--quality", metavar="N", type=int, help="of jpeg, 1 to 100 (default 95)")
    add("--workers", metavar="N", type=int, default=0, help="processes that read and encode images (default 0)")


def run(args: argparse.Namespace) -> int | None:
    """Writes one part of the shards; returns the exit status."""
    part, parts, quality = _check(args)
    from llavamed_jax.curation.shard_writer import Writer  # imports grain, which imports jax where it is installed
    from llavamed_jax.datasets import training
    from llavamed_jax.processor import Processor
    processor = Processor.load(args.checkpoint, args.template, tokenizer=args.tokenizer)
    if processor.image_size is None:
        raise UsageError(f"--checkpoint {args.checkpoint} is a bare tokenizer; a checkpoint with a tower was expected")
    data = training.read_training(args.data, args.images)
    out = Path(args.out)
    for part_of_it in ("tokenizer", "template"):
        getattr(processor, part_of_it)  # raises now, and not once for each record
    kept = f"finished shards are kept in {out}, run the same command to go on"
    signals.enter(signals.Phase(f"stopped by {{name}}; {kept}", signals.EXIT_SAVED, grace=_GRACE_S, raises=True))
    try:
        out.mkdir(parents=True, exist_ok=True)
        writer = Writer(out, part, parts, data, processor, args.max_length, args.records_a_shard,
                        {"format": args.format, "quality": quality})
        with writer.alone():
            writer.write(args.workers)
    except KeyboardInterrupt as error:
        print(f"{error}; {kept}", file=sys.stderr)
        return signals.EXIT_SAVED
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}; finished shards are kept") from None
    return None


def _check(args: argparse.Namespace) -> tuple[int, int, int | None]:
    match = re.fullmatch(r"(\d{1,5})/(\d{1,5})", args.part)
    part, parts = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 0 <= part < parts:
        raise UsageError(f"--part is {short(args.part)}; I/N with I from 0 to N - 1 was expected")
    if args.quality is not None and args.format == "png":
        raise UsageError("--quality is for --format jpeg; png keeps every pixel")
    quality = (95 if args.quality is None else args.quality) if args.format == "jpeg" else None
    for name, value, least, most in (("max_length", args.max_length, 1, 2**20), ("workers", args.workers, 0, 256),
                                     ("records_a_shard", args.records_a_shard, 1, 10**7),
                                     ("quality", quality if quality is not None else 95, 1, 100)):
        if not least <= value <= most:
            raise UsageError(f"--{name} is {value}; {least} to {most} was expected")
    return part, parts, quality
