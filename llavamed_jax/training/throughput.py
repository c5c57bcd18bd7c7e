"""The FLOPs of an update, the peak FLOP/s of devices (for MFU), and what a batch holds.

One convention: FLOPs are those that the mathematics asks for (no recomputation, no padding), attention is causal and within
a sample, the vision tower is included, and what is frozen costs no gradient of its weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from llavamed_jax.config import LlavaConfig

# Dense bfloat16 peak of one JAX device in FLOP/s (vendors' data sheets), by its exact `device_kind`: a name that merely begins
# like a known one may be another machine, and a wrong peak is worse than none.
PEAK_FLOPS = {
    "NVIDIA H200": 989e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 NVL": 835e12, "NVIDIA H100 PCIe": 756e12,
    "NVIDIA A100-SXM4-40GB": 312e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA L4": 121e12, "NVIDIA GeForce RTX 4090": 165e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """FLOP/s of a device; None where no data sheet was looked up (a CPU, a new machine)."""
    return PEAK_FLOPS.get(device_kind)


def training_flops(cfg: LlavaConfig, trained: Mapping[str, int], tokens: int, attended: int, images: int) -> float:
    """FLOPs of one update: forward 2 N a token, as much for the gradient of the input, as much for that of the weight.

    The gradient of an input is needed above the lowest trained parameter, that of a weight where it is trained: 6 N where
    the decoder is trained, 4 N where gradients only pass through it to the projector, 2 N below all that is trained. The
    products within attention have two inputs and no weight. The projector itself, a thousandth, is left out.

    Args:
      trained: size of each trained parameter by name.
      tokens: positions that are not padding, images' included.
      attended: (query, key) pairs of attention, as `batch_counts` counts them.
      images: that are no padding.
    """
    decoder = cfg.decoder
    head = decoder.hidden_size * decoder.vocab_size
    layers = decoder.matmul_parameters - head
    attention = 4.0 * decoder.num_layers * decoder.num_heads * decoder.head_dim * attended
    is_tower_trained = any(name.startswith("vision_tower/") for name in trained)
    through_layers = is_tower_trained or any(n.startswith(("projector/", "decoder/embed_tokens/", "decoder/layers")) for n in trained)
    through_head = through_layers or "decoder/norm/scale" in trained
    weights = sum(size for name, size in trained.items() if name.startswith("decoder/") and name.endswith("kernel"))
    if decoder.tie_word_embeddings:
        weights += trained.get("decoder/embed_tokens/embedding", 0)
    matmuls = 2.0 * tokens * (layers * (1 + through_layers) + head * (1 + through_head) + weights)
    tower = images * cfg.vision_flops_per_image() * (3 if is_tower_trained else 1)
    return matmuls + attention * (3 if through_layers else 1) + tower


def batch_counts(batch: Mapping[str, np.ndarray], window: int | None = None) -> dict[str, int]:
    """What a batch of rows holds: samples, tokens (positions that are not padding), images, and the room for both.

    A row's segments are numbered from 1, so its highest segment id is its number of samples. Positions restart with each
    segment, so a token at position p attends to p + 1 keys, or to as many as a sliding `window` leaves: `attended`.
    """
    segments = batch["segment_ids"]  # [B,T]
    keys = batch["positions"][segments != 0].astype(np.int64) + 1
    images = batch.get("num_images", np.zeros(0, int))  # [B]; a run on text alone has none
    slots = images.size * batch["pixel_values"].shape[1] if images.size else 0
    return dict(samples=int(segments.max(axis=1).sum()), tokens=keys.size, positions=segments.size,
                attended=int(np.minimum(keys, window or keys.max(initial=0)).sum()), images=int(images.sum()), image_slots=slots)


def peak_memory() -> int | None:
    """Most bytes that were in use so far on the fullest of this process's devices; None where a device does not say (a CPU)."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    return max((s["peak_bytes_in_use"] for s in stats if s and "peak_bytes_in_use" in s), default=None)
