"""Attention's backends on the accelerator that is here: `python benchmarks/attention.py [--small]`.

Each kernel beside XLA's attention: output and gradients of packed rows, relative to their largest number, and the time of a
forward and a backward pass; on NVIDIA also cuDNN's kernel, which knows no segments, for its time. A row a case is printed and
appended to benchmarks/results/attention.jsonl. On a CPU (--small) the kernels run interpreted, which says nothing about speed.
Axis letters: B rows, T positions, N query heads, K key/value heads, H head width.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import append_row, circumstances, median_seconds
from llavamed_jax.models.attention.backend import BACKENDS, ELSEWHERE, AttentionMask, attention
from llavamed_jax.utils.paths import local

ROOT = Path(__file__).resolve().parent.parent


def packed(B: int, T: int, samples: int):
    """int32 [B,T] twice: positions and segments of rows that so many samples of one length fill, but for a last tenth."""
    length = T * 9 // 10 // samples
    at = np.arange(T)
    segments = np.where(at < length * samples, at // length + 1, 0)
    positions = np.where(segments > 0, at % length, at - length * samples)
    return tuple(jnp.asarray(np.tile(x, (B, 1)), jnp.int32) for x in (positions, segments))


def passes(backend: str, mask: AttentionMask | None):
    """(q, k, v, weights) -> output and gradients."""
    def total(q, k, v, weights):
        if backend == "cudnn":
            out = jax.nn.dot_product_attention(q, k.swapaxes(1, 2), v.swapaxes(1, 2), is_causal=True, implementation="cudnn")
        else:
            out = attention(q, k, v, mask, backend)
        return jnp.sum(out.astype(jnp.float32) * weights), out
    return jax.jit(lambda *args: jax.value_and_grad(total, (0, 1, 2), has_aux=True)(*args))


def case(B: int, T: int, N: int, K: int, H: int, samples: int, window: int | None, dtype, repeats: int) -> dict:
    positions, segments = packed(B, T, samples)
    mask = AttentionMask(positions, positions, segments, segments, window)
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H)
    args = [jax.random.normal(key, shape, jnp.float32).astype(dtype) for key, shape in zip(keys, shapes)]
    weights = jax.random.normal(keys[3], shapes[0], jnp.float32) * (segments != 0)[..., None, None]
    platform = jax.devices()[0].platform
    kernels = [backend for name, backend in BACKENDS.get(platform, ELSEWHERE).items() if name not in ("auto", "xla")]
    row = dict(case="attention", shapes=f"B {B}, T {T}, N {N}, K {K}, H {H}, {samples} samples a row, window {window}",
               dtype=jnp.dtype(dtype).name, differences={}, milliseconds={})
    flat = lambda result: [np.asarray(x, np.float32) for x in (result[0][1], *result[1])]
    wanted = flat(passes("xla", mask)(*[x.astype(jnp.float32) for x in args], weights))
    is_real = np.asarray(segments != 0)
    for backend in ["xla", *kernels]:
        run = passes(backend, mask)
        found = flat(run(*args, weights))
        found[0], reference = found[0][is_real], [wanted[0][is_real], *wanted[1:]]
        row["differences"][backend] = [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(found, reference)]
        row["milliseconds"][backend] = 1e3 * median_seconds(lambda run=run: run(*args, weights), repeats)
    if platform == "gpu":
        run = passes("cudnn", None)
        row["milliseconds"]["cudnn, causal alone"] = 1e3 * median_seconds(lambda: run(*args, weights), repeats)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="small shapes, for a CPU")
    parser.add_argument("--out", default=ROOT / "benchmarks/results/attention.jsonl", type=local, metavar="FILE")
    args = parser.parse_args()
    cases = [(1, 96, 4, 2, 16, 3, None, jnp.float32, 1)] if args.small else [
        (2, 2048, 32, 8, 128, 3, None, jnp.float32, 3), (2, 2048, 32, 8, 128, 3, 256, jnp.bfloat16, 10),
        (4, 2048, 32, 8, 128, 2, None, jnp.bfloat16, 10), (1, 8192, 32, 8, 128, 8, None, jnp.bfloat16, 10),
        (1, 8192, 32, 32, 128, 8, None, jnp.bfloat16, 10)]
    for shape in cases:
        append_row(args.out, {**case(*shape), **circumstances()})


if __name__ == "__main__":
    main()
