"""What a run says while it trains: `metrics.jsonl`, TensorBoard, a bar on a terminal or lines in a pipe; and its MFU."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from llavamed_jax.config import LlavaConfig
from llavamed_jax.training.workdir import cut_back

# Dense bfloat16 peak of one JAX device in FLOP/s, by how `device_kind` begins (vendors' data sheets).
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100": 989e12, "NVIDIA A100": 312e12, "NVIDIA L4": 121e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v4": 275e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device, None where no data sheet was looked up (a CPU)."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if device_kind.startswith(kind)), None)


def training_flops(cfg: LlavaConfig, trained: Mapping[str, int], tokens: int, samples: int, images: int) -> float:
    """FLOPs that the mathematics of one update asks for; recomputation and padding are not counted.

    A matrix multiplication costs as much again for the gradient of its input, and as much again for the gradient of its
    weight, the last where that weight is trained; attention's own products have two inputs and no weight. The decoder's
    inputs always need their gradient, for the projector lies below it; the projector itself, a thousandth, is left out.

    Args:
      trained: size of each trained parameter by name.
      tokens: positions that are not padding, images' included.
      samples, images: in the batch.
    """
    decoder = cfg.decoder
    forward = decoder.forward_flops_per_token(tokens // max(samples, 1))
    matmul = 2.0 * decoder.matmul_parameters
    is_matmul = lambda name: name.startswith("decoder/") and name.endswith("kernel")
    share = sum(size for name, size in trained.items() if is_matmul(name)) / decoder.matmul_parameters
    if decoder.tie_word_embeddings and "decoder/embed_tokens/embedding" in trained:
        share += trained["decoder/embed_tokens/embedding"] / decoder.matmul_parameters
    per_token = forward + matmul * (1 + share) + 2 * (forward - matmul)
    is_tower_trained = any(name.startswith("vision_tower/") for name in trained)
    return tokens * per_token + images * cfg.vision_flops_per_image() * (3 if is_tower_trained else 1)


def batch_counts(batch: Mapping[str, np.ndarray]) -> dict[str, int]:
    """What a batch of rows holds: samples, positions that are not padding, images, and the room for both.

    A row's segments are numbered from 1, so its highest segment id is its number of samples.
    """
    segments = batch["segment_ids"]  # [B,T]
    images = batch.get("num_images", np.zeros(0, int))  # [B]; a run on text alone has none
    slots = images.size * batch["pixel_values"].shape[1] if images.size else 0
    return dict(samples=int(segments.max(axis=1).sum()), tokens=int((segments != 0).sum()), positions=segments.size,
                images=int(images.sum()), image_slots=slots)


class MetricsWriter:
    """Writes the metrics of a run that begins at `step`; what an interrupted run logged after that is taken back.

    Args:
      workdir: gets `metrics.jsonl`, `tensorboard/`, and `skipped.jsonl` where there is something to put in it.
      step: updates done so far.
      total_steps: of the whole run.
      name: in front of the progress.
    """

    def __init__(self, workdir: Path, step: int, total_steps: int, name: str):
        for log in ("metrics.jsonl", "skipped.jsonl"):
            cut_back(workdir / log, step)
        self._skipped = workdir / "skipped.jsonl"
        self._file = open(workdir / "metrics.jsonl", "a")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1)
        self._total = total_steps
        self._name = name
        # A bar overwrites itself; where nobody watches, that would be one endless line.
        self._bar = tqdm(total=total_steps, initial=step, desc=name, unit="step") if sys.stderr.isatty() else None

    def advance(self, step: int, loss: float) -> None:
        """Moves the bar on."""
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(step - self._bar.n)

    def write(self, step: int, metrics: Mapping[str, float | int | None]) -> None:
        """One line of `metrics.jsonl`, the same in TensorBoard, and where there is no bar a line for whoever reads along."""
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}, allow_nan=False) + "\n")  # JSON has no NaN: null
        self._file.flush()
        for key, value in finite.items():
            if value is not None:
                self._board.add_scalar(key, value, step)
        if self._bar is None or "loss" not in metrics:  # the bar shows the training loss itself
            self.say(f"{self._name} {step}/{self._total} · " + " · ".join(_shown(metrics)))

    def skipped(self, step: int, entries: Iterable[Mapping]) -> None:
        """A line of `skipped.jsonl` for each sample that an update had to do without."""
        for entry in entries:
            with open(self._skipped, "a") as file:
                file.write(json.dumps({"step": step, **entry}) + "\n")

    def say(self, text: str) -> None:
        """A line on stdout that leaves the bar whole."""
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._board.close()
        self._file.close()


def troubles(metrics: Mapping[str, float | int | None]) -> list[str]:
    """What a run had to do without, in words; nothing where there was nothing."""
    words = dict(updates_skipped="updates skipped (not finite)", samples_skipped="samples skipped (see skipped.jsonl)",
                 samples_truncated="samples cut at max_length", samples_unsupervised="samples without a supervised token")
    return [f"{metrics[key]} {text}" for key, text in words.items() if metrics.get(key)]


def _shown(metrics: Mapping[str, float | int | None]) -> Iterable[str]:
    formats = dict(loss="loss {:.4f}", validation_loss="validation loss {:.4f}", learning_rate="learning rate {:.2e}",
                   grad_norm="gradient {:.3f}", tokens_per_second="{:,.0f} tokens/s", mfu="MFU {:.1%}")
    shown = [form.format(metrics[key]) for key, form in formats.items() if metrics.get(key) is not None]
    known = {*formats, "samples", "tokens", "padding_fraction", "image_padding_fraction"}
    evaluated = [f"{key} {value:.4g}" for key, value in metrics.items() if key not in known and isinstance(value, float)]
    return [*shown, *evaluated, *troubles(metrics)]
