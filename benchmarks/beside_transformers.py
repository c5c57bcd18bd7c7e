"""The small model here and in transformers on CPU torch: `python benchmarks/beside_transformers.py [--out DIR]`.

A guard against regressions, not a claim: same weights, same batch, float32, both sides in turns in one process, medians.
The ratio (their time over ours) is the result. Axis letters: B rows, T positions.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import numpy as np
import torch
import transformers
from ml_collections import ConfigDict

from benchmarks.measure import append_row, circumstances
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config import IGNORE, IMAGE_TOKEN, OURS, preset
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Request
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import optimizer, state
from llavamed_jax.training.step import llava_loss, make_train_step, put_batch
from llavamed_jax.utils.paths import local

TRAINABLE = ["projector/.*", "decoder/.*"]  # stage 2
LEARNING_RATE = 2e-5


class Pair:
    """The same model on both sides, and a batch of rows with one image each."""

    def __init__(self, B: int, T: int):
        cfg = preset("small")
        shapes = llava_to_hf(cfg, "transformers")
        del shapes[OURS]  # which would have the rows that an export adds taken off again
        hf = transformers.LlavaConfig(**shapes)
        hf.text_config.eos_token_id = hf.text_config.pad_token_id = None  # nothing ends early
        torch.manual_seed(0)
        self.torch = transformers.LlavaForConditionalGeneration(hf).float()
        with torch.no_grad():
            for p in self.torch.parameters():
                p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5 if p.ndim > 1 else 1 + 0.1 * torch.randn_like(p))
        with tempfile.TemporaryDirectory() as directory:
            self.torch.save_pretrained(directory)
            self.checkpoint = open_checkpoint(directory)
            self.unrolled, self.stacked = (load_params(self.checkpoint, scan=scan) for scan in (False, True))
        self.cfg = self.checkpoint.config
        P, S = cfg.tokens_per_image, cfg.vision.image_size
        rng = np.random.default_rng(0)
        self.ids = rng.integers(3, cfg.decoder.vocab_size, (B, T)).astype(np.int32)
        self.ids[:, 1 : 1 + P] = IMAGE_TOKEN
        self.pixels = rng.standard_normal((B, S, S, 3)).astype(np.float32)
        self.torch_ids = torch.tensor(np.where(self.ids == IMAGE_TOKEN, hf.image_token_id, self.ids)).long()
        self.torch_pixels = torch.tensor(self.pixels).permute(0, 3, 1, 2).contiguous()


def in_turns(ours, theirs, repeats: int) -> dict:
    """Medians of both, run in turns so that a busy machine disturbs both alike; the first run of each is not counted."""
    times = {ours: [], theirs: []}
    for _ in range(repeats + 1):
        for side, seconds in times.items():
            start = time.perf_counter()
            jax.block_until_ready(side())
            seconds.append(time.perf_counter() - start)
    a, b = (statistics.median(seconds[1:]) for seconds in times.values())
    return dict(seconds=a, seconds_transformers=b, ratio=b / a)


def train_step(B: int, T: int, repeats: int) -> dict:
    """One AdamW update of projector and decoder, tower frozen, loss over the text."""
    pair, mesh = Pair(B, T), make_mesh("data=1", jax.devices()[:1])
    labels = np.where(pair.ids == IMAGE_TOKEN, IGNORE, pair.ids)
    batch = dict(input_ids=pair.ids, labels=labels, segment_ids=np.ones((B, T), np.int32), pixel_values=pair.pixels[:, None],
                 positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)))
    adamw = ConfigDict(dict(learning_rate=LEARNING_RATE, warmup_ratio=0.0, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999,
                            eps=1e-8, mu_dtype=None, overrides=()))
    names, _ = state.partition(pair.stacked, TRAINABLE)
    update, schedule = optimizer.build(adamw, 10**9, list(names))
    shardings = state.state_shardings(pair.cfg, pair.stacked, TRAINABLE, update, mesh)
    train_state = state.create(pair.stacked, shardings, update, np.float32)
    step = make_train_step(llava_loss(Llava(pair.cfg, scan=True)), update, schedule, mesh, shardings)
    rows, losses = put_batch(batch, mesh), ([], [])

    def ours():
        nonlocal train_state
        train_state, out = step(train_state, rows)
        losses[0].append(float(out["loss"]))

    model = pair.torch.train()
    model.model.vision_tower.requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    torch_labels = torch.tensor(labels).long()

    def theirs():
        adam.zero_grad()
        loss = model(input_ids=pair.torch_ids, pixel_values=pair.torch_pixels, labels=torch_labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        losses[1].append(float(loss))

    result = in_turns(ours, theirs, repeats)
    apart = float(np.max([abs(a - b) / b for a, b in zip(*losses, strict=True)]))  # NaN where a loss is
    return dict(shapes=f"B {B}, T {T}", **result, largest_relative_loss_difference=apart)


def prefill(B: int, T: int, repeats: int) -> dict:
    """Images and prompts to the first token of each row."""
    pair = Pair(B, T)
    engine = Engine(pair.cfg, jax.device_put(pair.unrolled), batch_size=B)
    requests = [Request(ids.tolist(), [image], 1) for ids, image in zip(pair.ids, pair.pixels, strict=True)]
    tokens = {}

    def ours():
        tokens["ours"] = [row[0] for row in engine.generate(requests)]

    @torch.no_grad()
    def theirs():
        logits = pair.torch.eval()(input_ids=pair.torch_ids, pixel_values=pair.torch_pixels, logits_to_keep=1).logits
        tokens["theirs"] = logits[:, -1].argmax(-1).tolist()

    result = in_turns(ours, theirs, repeats)
    return dict(shapes=f"B {B}, T {T}", **result, equal_tokens=tokens["ours"] == tokens["theirs"])


def greedy_decode(B: int, T: int, new_tokens: int, repeats: int) -> dict:
    """Whole generation: images, prompts and `new_tokens` greedy tokens a row, cached on both sides."""
    pair = Pair(B, T)
    cfg = pair.cfg.replace(decoder=pair.cfg.decoder.__class__(**{**vars(pair.cfg.decoder), "eos_token_id": -5}))
    engine = Engine(cfg, jax.device_put(pair.unrolled), batch_size=B)
    requests = [Request(ids.tolist(), [image], new_tokens) for ids, image in zip(pair.ids, pair.pixels, strict=True)]
    tokens = {}

    def ours():
        tokens["ours"] = engine.generate(requests)

    def theirs():
        out = pair.torch.eval().generate(input_ids=pair.torch_ids, pixel_values=pair.torch_pixels, do_sample=False,
                                         attention_mask=torch.ones_like(pair.torch_ids), max_new_tokens=new_tokens)
        tokens["theirs"] = out[:, T:].tolist()

    result = in_turns(ours, theirs, repeats)
    return dict(shapes=f"B {B}, T {T}, {new_tokens} new tokens", **result, equal_tokens=tokens["ours"] == tokens["theirs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=local, default="benchmarks/results", metavar="DIR",
                        help="directory of beside_transformers.jsonl, to which rows are appended")
    parser.add_argument("--commit", metavar="SHA", help="commit to record in the rows; default: the one of git")
    parser.add_argument("--repeats", type=int, default=5, metavar="N")
    args = parser.parse_args()
    for name, row in (("train_step", lambda: train_step(8, 128, args.repeats)), ("prefill", lambda: prefill(8, 128, args.repeats)),
                      ("greedy_decode", lambda: greedy_decode(8, 64, 64, args.repeats))):
        append_row(Path(args.out) / "beside_transformers.jsonl",
                   {"case": name, "preset": "small", "dtype": "float32", **row(), **circumstances(args.commit)})


if __name__ == "__main__":
    main()
