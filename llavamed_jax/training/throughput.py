"""Computes the FLOPs of an update, the peak FLOP/s of devices (for MFU), and the counts of a batch.

One convention: FLOPs are those of the mathematics (without recomputation and padding), attention is causal and within a
sample, the vision tower is included, and a frozen weight costs no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from llavamed_jax.config import LlavaConfig

# Dense bfloat16 peak of one JAX device in FLOP/s (vendors' data sheets), by its exact `device_kind`: a name that merely
# begins like a known one may be another machine, and a wrong peak is worse than none.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak FLOP/s of a device; None for a device that the table lacks (a CPU, a new machine)."""
    return PEAK_FLOPS.get(device_kind)


def training_flops(cfg: LlavaConfig, trained: Mapping[str, int], tokens: int, attended: int, images: int) -> float:
    """Returns the FLOPs of one update: 2 N a token forward, as much for the input's gradient, as much for the weight's.

    Inputs need a gradient above the lowest trained parameter, weights if they are trained: 6 N if the decoder is
    trained, 4 N if gradients only pass through it to the projector, 2 N below all trained parameters. The products
    within attention have two inputs and no weight. The projector itself, a thousandth, is left out.

    Args:
      cfg: the model's shapes.
      trained: size of each trained parameter by name.
      tokens: positions that are not padding, images included.
      attended: (query, key) pairs of attention, as `batch_counts` counts them.
      images: images that are not padding.
    """
    decoder = cfg.decoder
    head = decoder.hidden_size * decoder.vocab_size
    layers = decoder.matmul_parameters - head
    attention = 4.0 * decoder.num_layers * decoder.num_heads * decoder.head_dim * attended
    is_tower_trained = any(name.startswith("vision_tower/") for name in trained)
    through_layers = is_tower_trained or any(
        n.startswith(("projector/", "decoder/embed_tokens/", "decoder/layers")) for n in trained)
    through_head = through_layers or "decoder/norm/scale" in trained
    weights = sum(size for name, size in trained.items() if name.startswith("decoder/") and name.endswith("kernel"))
    if decoder.tie_word_embeddings:
        weights += trained.get("decoder/embed_tokens/embedding", 0)
    matmuls = 2.0 * tokens * (layers * (1 + through_layers) + head * (1 + through_head) + weights)
    tower = images * cfg.vision_flops_per_image() * (3 if is_tower_trained else 1)
    return matmuls + attention * (3 if through_layers else 1) + tower


def batch_counts(batch: Mapping[str, np.ndarray], window: int | None = None) -> dict[str, int]:
    """Counts a batch's samples, tokens (positions that are not padding), images, and the slots for both.

    A row's segments are numbered from 1, so its highest segment id is its number of samples. Positions restart with
    each segment, so a token at position p attends to p + 1 keys, or to as many as a sliding `window` allows:
    `attended`.

    Args:
      batch: numpy arrays: `segment_ids` and `positions` [B,T], and with images `num_images` [B] and `pixel_values`
        [B,I,...].
      window: keys of the sliding window; None for full attention.
    """
    segments = batch["segment_ids"]  # [B,T]
    keys = batch["positions"][segments != 0].astype(np.int64) + 1
    images = batch.get("num_images", np.zeros(0, int))  # [B]; absent in a run on text alone
    slots = images.size * batch["pixel_values"].shape[1] if images.size else 0
    return dict(samples=int(segments.max(axis=1).sum()), tokens=keys.size, positions=segments.size,
                attended=int(np.minimum(keys, window or keys.max(initial=0)).sum()), images=int(images.sum()),
                image_slots=slots)


def peak_memory() -> int | None:
    """Returns the peak bytes in use on the fullest of this process's devices; None if no device reports it (a CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s), default=None)
