"""What the head and its loss cost a training step: `python benchmarks/loss.py [--out DIR]`.

The small model with 32,000 pieces, float32, on a CPU. Three ways to the same loss, in turns in one process:
  whole        the logits of all positions, [B,T,V]
  checkpoint   chunks whose logits are computed once more in the backward pass
  chunked      what training uses: chunks whose gradient is computed with the loss, positions without supervision left out
Each row has medians, ratios to `whole`, and what the compiler says of memory. Axis letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from benchmarks.measure import append_row, circumstances, random_params
from llavamed_jax.config import IGNORE, IMAGE_TOKEN, preset
from llavamed_jax.models.decoders.llama import head_kernel
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import losses, optimizer, state
from llavamed_jax.training.step import make_train_step, put_batch
from llavamed_jax.utils.paths import local

ADAMW = ConfigDict(dict(learning_rate=2e-5, warmup_ratio=0.0, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
                        mu_dtype="float32", overrides=()))
STAGES = {"pretrain": ("projector/.*",), "finetune": ("projector/.*", "decoder/.*")}
# Share of a row that is supervised, from its end: everything but the image, or an answer.
CASES = (("finetune", 0.8), ("finetune", 0.1), ("pretrain", 0.1))


def whole(hidden, kernel, labels, segments):
    return losses.cross_entropy(jnp.matmul(hidden, kernel), labels, segments)


def checkpoint(hidden, kernel, labels, segments, chunk=256):
    """Chunks of T of all rows; one token is seen again, for labels are shifted within a chunk."""
    size = -(-(hidden.shape[1] - 1) // (hidden.shape[1] * hidden.shape[0] // chunk))

    def chunk_loss(carry, start):
        part = [jax.lax.dynamic_slice_in_dim(x, start, size + 1, 1) for x in padded]
        total, count = losses.cross_entropy(jnp.matmul(part[0], kernel), *part[1:])
        return (carry[0] + total, carry[1] + count), None

    padded = [jnp.pad(x, ((0, 0), (0, size)) + ((0, 0),) * (x.ndim - 2)) for x in (hidden, labels, segments)]
    return jax.lax.scan(jax.checkpoint(chunk_loss), (jnp.float32(0), jnp.float32(0)), jnp.arange(0, hidden.shape[1] - 1, size))[0]


WAYS = {"whole": whole, "checkpoint": checkpoint, "chunked": losses.chunked_cross_entropy}


class Program:
    """The compiled step of one stage with one way to the loss."""

    def __init__(self, cfg, params, trainable, way, batch):
        model, self.mesh = Llava(cfg, scan=True, remat="full"), make_mesh("data=1", jax.devices()[:1])

        def loss(params, rows):
            hidden = model.apply({"params": params}, rows["input_ids"], rows["pixel_values"], rows["positions"], rows["segment_ids"],
                                 method="hidden")
            return way(hidden, head_kernel(params), rows["labels"], rows["segment_ids"])

        update, schedule = optimizer.build(ADAMW, 10**9, list(state.partition(params, trainable)[0]))
        shardings = state.state_shardings(cfg, params, trainable, update, self.mesh)
        self.state = state.create(params, shardings, update, jnp.float32)
        self.step = make_train_step(loss, update, schedule, self.mesh, shardings)
        memory = self.step.lower(self.state, put_batch(batch, self.mesh)).compile().memory_analysis()
        self.temporaries = memory.temp_size_in_bytes

    def __call__(self, rows) -> tuple[float, float]:
        start = time.perf_counter()
        self.state, out = self.step(self.state, rows)
        loss = float(out["loss"])
        return time.perf_counter() - start, loss


def batch_of(cfg, B: int, T: int, supervised: float) -> dict:
    rng, P, S = np.random.default_rng(0), cfg.tokens_per_image, cfg.vision.image_size
    ids = rng.integers(3, cfg.decoder.vocab_size, (B, T)).astype(np.int32)
    ids[:, 1 : 1 + P] = IMAGE_TOKEN
    labels = np.where(np.arange(T) >= round(T * (1 - supervised)), ids, IGNORE)
    return dict(input_ids=ids, labels=labels, segment_ids=np.ones((B, T), np.int32),
                positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)), pixel_values=rng.standard_normal((B, 1, S, S, 3), np.float32))


def measure(cfg, params, stage: str, B: int, T: int, supervised: float, repeats: int) -> dict:
    batch = batch_of(cfg, B, T, supervised)
    programs = {name: Program(cfg, params, STAGES[stage], way, batch) for name, way in WAYS.items()}
    rows = put_batch(batch, make_mesh("data=1", jax.devices()[:1]))
    runs = {name: [] for name in programs}
    for _ in range(repeats + 1):  # in turns, so that a busy machine disturbs all alike; the first is a warm-up
        for name, program in programs.items():
            runs[name].append(program(rows))
    seconds = {name: statistics.median(s for s, _ in values[1:]) for name, values in runs.items()}
    first = {name: values[0][1] for name, values in runs.items()}
    return dict(shapes=f"B {B}, T {T}, V {cfg.decoder.vocab_size}", stage=stage, supervised=supervised, seconds=seconds,
                ratio={name: s / seconds["whole"] for name, s in seconds.items()},
                temporary_bytes={name: p.temporaries for name, p in programs.items()},
                largest_relative_loss_difference=float(np.max([abs(x / first["whole"] - 1) for x in first.values()])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=local, default="benchmarks/results", metavar="DIR", help="directory of loss.jsonl, to which rows are appended")
    parser.add_argument("--commit", metavar="SHA", help="commit to record in the rows; default: the one of git")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    args = parser.parse_args()
    cfg = preset("small")
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, vocab_size=32000))
    params = jax.tree.map(np.asarray, random_params(cfg, scan=True))
    for stage, supervised in CASES:
        append_row(Path(args.out) / "loss.jsonl", {"case": "loss", "preset": "small", "dtype": "float32", **measure(
            cfg, params, stage, 8, 256, supervised, args.repeats), **circumstances(args.commit)})


if __name__ == "__main__":
    main()
