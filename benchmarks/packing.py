"""What packing saves in training: `python benchmarks/packing.py [--root VQA_RAD] [--tokenizer FILE] [--out DIR]`.

The small model's loss and gradient (projector and decoder trained) on real batches of VQA-RAD's training questions, unpacked
and packed in rows of several lengths, turn by turn; medians of processor seconds, and the supervised tokens a second that they
make. On a CPU the attention that rows share costs what their length squared costs, so short rows win; a row of packing.jsonl each.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import ROOT, append_row, circumstances, random_params
from llavamed_jax.config import IGNORE, preset
from llavamed_jax.datasets.training import TrainingData, read_training
from llavamed_jax.models import llava
from llavamed_jax.pipeline import lengths, loader, sizes
from llavamed_jax.pipeline.packing import Layout, Plan, Stream
from llavamed_jax.pipeline.trial import Trial
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.training.step import llava_loss
from llavamed_jax.utils.paths import local

MAX_LENGTH, SAMPLES = 160, 32  # of configs/vqa_rad.py:small, and of an update


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    sample = ROOT / "samples" / "vqa_rad"
    parser.add_argument("--root", type=local, default=sample, help="VQA-RAD in its official layout")
    parser.add_argument("--tokenizer", type=local, default=sample / "tokenizer.model")
    parser.add_argument("--batches", type=int, default=7)
    parser.add_argument("--out", type=local, default=ROOT / "benchmarks" / "results", help="directory of packing.jsonl, to which rows are appended")
    args = parser.parse_args()
    config, tokenizer = preset("small"), Tokenizer.load(args.tokenizer)
    config = config.replace(decoder=replace(config.decoder, vocab_size=tokenizer.vocab_size))
    processor = Processor(config, tokenizer)
    data = read_training(args.root)
    found = lengths.measure(data, processor, MAX_LENGTH)
    loss_fn = llava_loss(llava.Llava(config, jnp.float32, scan=True))
    params = random_params(config, scan=True)
    trained = {name: params[name] for name in ("projector", "decoder")}
    gradient = jax.jit(jax.grad(lambda trained, batch: loss_fn({**params, **trained}, batch)[0]))
    forms = {row_length: batches(data, processor, found, row_length, args.batches) for row_length in (0, 256, 512, 1024)}
    seconds = {row_length: [] for row_length in forms}
    for batch in (form[0] for form in forms.values()):
        jax.block_until_ready(gradient(trained, batch))
    for turn in range(args.batches):
        for row_length, form in forms.items():
            start = time.process_time()
            jax.block_until_ready(gradient(trained, form[turn]))
            supervised = int((form[turn]["labels"] != IGNORE).sum())
            seconds[row_length].append((time.process_time() - start) / supervised)
    for row_length, form in forms.items():
        segments = np.concatenate([batch["segment_ids"] for batch in form])
        append_row(args.out / "packing.jsonl", dict(
            packed=bool(row_length), row_length=segments.shape[1], rows=len(form[0]["segment_ids"]),
            image_slots=form[0]["pixel_values"].shape[1], samples_an_update=round(segments.max(axis=1).sum() / len(form), 1),
            padding=round(float((segments == 0).mean()), 4),
            supervised_tokens_a_processor_second=round(1 / statistics.median(seconds[row_length]), 1), preset="small",
            vocabulary=config.decoder.vocab_size,
            data=str(args.root.name), load=round(os.getloadavg()[0], 1), **circumstances()))
    return 0


def batches(data: TrainingData, processor: Processor, found: lengths.Lengths, row_length: int, count: int) -> list[dict]:
    """Updates of about SAMPLES samples, in packed rows, or for 0 unpacked."""
    stream = Stream.of(data, 0)
    if row_length:
        # For each row length as many rows as hold about SAMPLES samples.
        rows = sizes.rows_an_update(SAMPLES, found.mean, 1, row_length=row_length).rows
        layout = Layout(row_length, Trial(stream, found, 9.0).image_slots(row_length), rows, True)
    else:
        layout = Layout(MAX_LENGTH, found.max_images, SAMPLES, False)
    made = loader.batches(data, processor, Plan(stream, found, layout), MAX_LENGTH)
    names = ("input_ids", "labels", "positions", "segment_ids", "pixel_values")
    taken = [{name: batch[name] for name in names} for batch, _ in zip(made, range(count))]
    made.close()
    return taken


if __name__ == "__main__":
    raise SystemExit(main())
