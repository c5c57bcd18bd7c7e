"""Flash attention for NVIDIA GPUs: Pallas kernels that read only the keys that a query attends to.

Each query attends to the keys [first, own position], which expresses a causal mask within segments and a window. So no
mask is stored, and blocks of other segments are not read. Algorithm: FlashAttention-2 (arXiv 2307.08691); the kernel
for the keys' gradients also sums over the query heads of a group.

Axis letters: B batch, T positions, N query heads, K key/value heads, G = N/K, H head width.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from llavamed_jax.parallel.mesh import on_each_device

# Rows and columns of a tile. A program holds one tile of its output and walks over narrower tiles of the other operand;
# on an Ada GPU all of them must fit in 99 KB of shared memory with heads of 128.
FORWARD, BACKWARD, WALK = 128, 64, 32
SMALLEST = 16  # the smallest tile of the matrix units
NEVER = -1e30  # score of a masked key; finite, since differences of scores are computed
LOG2_E = math.log2(math.e)


def flash_attention(q, k, v, mask, interpret: bool = False):
    """Computes causal attention within segments and window; scores and softmax in float32.

    The kernels use the order of the positions in a row, not their numbers: within a segment positions must be
    consecutive, and a segment must be contiguous. On a mesh each device computes its own rows and heads.

    Args:
      q: [B,T,N,H]; H a power of two of at least 16 on a GPU.
      k: [B,K,T,H].
      v: [B,K,T,H].
      mask: `attention.AttentionMask` with the same positions for queries and keys.
      interpret: interprets the kernels, on platforms other than GPUs.

    Returns:
      [B,T,N,H]. The checkpoint name `context` saves it under rematerialisation, with the residuals of the backward
      pass.
    """
    T = q.shape[1]
    extra = -T % min(FORWARD, tile(T))
    segments = jnp.zeros(q.shape[:2], jnp.int32) if mask.q_segments is None else mask.q_segments
    # Padding comes last, as a segment of its own.
    segments = jnp.pad(segments, ((0, 0), (0, extra)), constant_values=-1)
    q = jnp.pad(q, ((0, 0), (0, extra), (0, 0), (0, 0)))
    k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, extra), (0, 0))) for x in (k, v))
    work = functools.partial(_on_one_device, window=mask.window, interpret=interpret)
    queries, keys = ("act_batch", None, "act_heads", None), ("act_batch", "act_heads", None, None)
    work = on_each_device(work, (queries, keys, keys, ("act_batch", None)), queries)
    return work(q, k, v, segments)[:, :T]


# Products of a kernel for each query, key and number of a head.
_PRODUCTS = {"flash_forward": 2, "flash_prefill": 2, "flash_decode": 2, "flash_whole": 2, "flash_backward_queries": 3,
             "flash_backward_keys": 4}


def flops(kernel: str, queries: tuple[int, ...], attended: float) -> float:
    """Returns the FLOPs of a kernel of this file, of `cached` or of `whole`; 0 for a kernel of another name.

    Args:
      kernel: its name, such as `flash_forward`.
      queries: (B, T, N, H).
      attended: keys that a query attends to on average; of `flash_whole`, whose queries attend to all, it is not read.
    """
    attended = queries[1] if kernel == "flash_whole" else attended
    return 2.0 * _PRODUCTS.get(kernel, 0) * math.prod(queries) * attended


def _on_one_device(q, k, v, segments, *, window, interpret):
    first, last = seen(segments, window)
    return _attention(interpret, q, k, v, first, last)


def seen(segments, window: int | None):
    """Returns the first key that each query attends to, and the last query that attends to each key.

    Args:
      segments: int32 [B,T].
      window: width of the sliding window; None for no window.

    Returns:
      (first, last), int32 [B,T] both.
    """
    B, T = segments.shape
    at = jnp.arange(T, dtype=jnp.int32)
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    ends = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (0, 1)), constant_values=True)
    first = jax.lax.cummax(jnp.where(begins, at, 0), axis=1)
    last = jax.lax.cummin(jnp.where(ends, at, T - 1), axis=1, reverse=True)
    if window is not None:
        first, last = jnp.maximum(first, at - (window - 1)), jnp.minimum(last, at + (window - 1))
    return first, last


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(interpret, q, k, v, first, last):
    return _forward(interpret, q, k, v, first)[0]


def _with_residuals(interpret, q, k, v, first, last):
    out, log_sum = (checkpoint_name(x, "context") for x in _forward(interpret, q, k, v, first))
    return out, (q, k, v, first, last, out, log_sum)


def _gradients(interpret, kept, by_out):
    q, k, v, first, last, out, log_sum = kept
    # The softmax's own part of the gradient, equal for all keys of a query.
    delta = jnp.einsum("BTNH,BTNH->BNT", out, by_out, preferred_element_type=jnp.float32)
    by_q = _backward_queries(interpret, q, k, v, first, by_out, log_sum, delta)
    by_k, by_v = _backward_keys(interpret, q, k, v, first, last, by_out, log_sum, delta)
    return by_q, by_k, by_v, None, None


_attention.defvjp(_with_residuals, _gradients)


def _forward(interpret, q, k, v, first):
    return flash_over(interpret, q, k, v, first, jnp.zeros(q.shape[:1], jnp.int32), "flash_forward")


def flash_over(interpret, q, k, v, first, start, name: str, length: int | None = None):
    """Attends from consecutive queries to the keys [first, own position].

    Args:
      interpret: interprets the kernel.
      q: [B,T,N,H]; T is a power of two, or a multiple of `FORWARD`.
      k: [B,K,S,H].
      v: [B,K,S,H].
      first: int32 [B,T], the first key that each query attends to.
      start: int32 [B], the position of each row's first query among the keys.
      name: name of the kernel.
      length: number of queries that are not padding. Keys after the last of them may be NaN and are masked. None: no
        key is NaN.

    Returns:
      The output [B,T,N,H], and the base-2 logarithm of the softmax's normalizer, float32 [B,N,T].
    """
    B, T, N, H = q.shape
    S = k.shape[2]
    G, (block, walk) = N // k.shape[1], _tiles(T, FORWARD, min(BACKWARD, S))

    def kernel(q_ref, k_ref, v_ref, first_ref, start_ref, out_ref, sum_ref):
        i, offset = pl.program_id(0), start_ref[0]
        q, begin = q_ref[...], first_ref[...]
        rows = offset + i * block + jnp.arange(block)

        def step(j, carry):
            here = pl.ds(j * walk, walk)
            scores, is_seen = _scores(q, k_ref[here, :], rows, j * walk + jnp.arange(walk), begin)
            v = v_ref[here, :]
            if length is not None:  # a weight of 0 does not mask a NaN
                v = jnp.where((j * walk + jnp.arange(walk) < offset + length)[:, None], v, 0)
            return folded(carry, scores, is_seen, v)

        empty = jnp.zeros((block, H), jnp.float32), jnp.full(block, NEVER, jnp.float32), jnp.zeros(block, jnp.float32)
        end = jnp.minimum((offset + (i + 1) * block + walk - 1) // walk, S // walk)
        out, top, total = jax.lax.fori_loop(jnp.min(begin) // walk, end, step, empty)
        out_ref[...] = (out / total[:, None]).astype(out_ref.dtype)
        sum_ref[...] = top + jnp.log2(total)

    queries = pl.BlockSpec((None, block, None, H), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, None, S, H), lambda i, b, n: (b, n // G, 0, 0))
    return pl.pallas_call(
        kernel, grid=(T // block, B, N), interpret=interpret, name=name,
        in_specs=[queries, keys, keys, pl.BlockSpec((None, block), lambda i, b, n: (b, i)),
                  pl.BlockSpec((None, 1), lambda i, b, n: (b, 0))],
        out_specs=[queries, pl.BlockSpec((None, None, block), lambda i, b, n: (b, n, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, v.dtype), jax.ShapeDtypeStruct((B, N, T), jnp.float32)],
        compiler_params=triton.CompilerParams(num_warps=8, num_stages=2))(q, k, v, first, start[:, None])


def _backward_queries(interpret, q, k, v, first, by_out, log_sum, delta):
    """Returns the gradient by q, [B,T,N,H]. The program of a tile of queries walks over the keys they attend to."""
    B, T, N, H = q.shape
    G, block, walk = N // k.shape[1], *_tiles(T, BACKWARD, WALK)

    def kernel(q_ref, k_ref, v_ref, first_ref, by_out_ref, sum_ref, delta_ref, by_q_ref):
        i = pl.program_id(0)
        q, by_out, begin, log_sum, delta = (ref[...] for ref in (q_ref, by_out_ref, first_ref, sum_ref, delta_ref))
        rows = i * block + jnp.arange(block)

        def step(j, by_q):
            here = pl.ds(j * walk, walk)
            k = k_ref[here, :]
            scores, is_seen = _scores(q, k, rows, j * walk + jnp.arange(walk), begin)
            weights = jnp.where(is_seen, jnp.exp2(scores - log_sum[:, None]), 0.0)
            by_scores = weights * (dot(by_out, v_ref[here, :].T) - delta[:, None])
            return by_q + dot(by_scores.astype(k.dtype), k)

        by_q = jax.lax.fori_loop(jnp.min(begin) // walk, ((i + 1) * block + walk - 1) // walk, step,
                                 jnp.zeros((block, H), jnp.float32))
        by_q_ref[...] = (by_q * H**-0.5).astype(by_q_ref.dtype)

    queries = pl.BlockSpec((None, block, None, H), lambda i, b, n: (b, i, n, 0))
    keys = pl.BlockSpec((None, None, T, H), lambda i, b, n: (b, n // G, 0, 0))
    numbers = pl.BlockSpec((None, None, block), lambda i, b, n: (b, n, i))
    return pl.pallas_call(
        kernel, grid=(T // block, B, N), interpret=interpret, name="flash_backward_queries",
        in_specs=[queries, keys, keys, pl.BlockSpec((None, block), lambda i, b, n: (b, i)), queries, numbers, numbers],
        out_specs=queries, out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2))(q, k, v, first, by_out, log_sum, delta)


def _backward_keys(interpret, q, k, v, first, last, by_out, log_sum, delta):
    """Returns the gradients by k and v, [B,K,T,H].

    The program of a tile of keys walks over the queries of all heads of its group that attend to them.
    """
    B, T, N, H = q.shape
    K, (block, walk) = k.shape[1], _tiles(T, BACKWARD, WALK)
    G = N // K

    def kernel(q_ref, k_ref, v_ref, first_ref, last_ref, by_out_ref, sum_ref, delta_ref, by_k_ref, by_v_ref):
        j = pl.program_id(0)
        k, v = k_ref[...], v_ref[...]
        columns = j * block + jnp.arange(block)
        begin, end = (j * block) // walk, jnp.max(last_ref[...]) // walk + 1

        def step(t, carry):
            by_k, by_v = carry
            g, i = t // (end - begin), begin + t % (end - begin)
            here = pl.ds(i * walk, walk)
            q, by_out = q_ref[here, g, :], by_out_ref[here, g, :]
            scores, is_seen = _scores(q, k, i * walk + jnp.arange(walk), columns, first_ref[here])
            weights = jnp.where(is_seen, jnp.exp2(scores - sum_ref[g, here][:, None]), 0.0)
            by_v += dot(weights.T.astype(by_out.dtype), by_out)
            by_scores = weights * (dot(by_out, v.T) - delta_ref[g, here][:, None])
            return by_k + dot(by_scores.T.astype(q.dtype), q), by_v

        zeros = jnp.zeros((block, H), jnp.float32)
        by_k, by_v = jax.lax.fori_loop(0, G * (end - begin), step, (zeros, zeros))
        by_k_ref[...] = (by_k * H**-0.5).astype(by_k_ref.dtype)
        by_v_ref[...] = by_v.astype(by_v_ref.dtype)

    keys = pl.BlockSpec((None, None, block, H), lambda j, b, n: (b, n, j, 0))
    queries = pl.BlockSpec((None, T, G, H), lambda j, b, n: (b, 0, n, 0))
    numbers = pl.BlockSpec((None, G, T), lambda j, b, n: (b, n, 0))
    return pl.pallas_call(
        kernel, grid=(T // block, B, K), interpret=interpret, name="flash_backward_keys",
        in_specs=[queries, keys, keys, pl.BlockSpec((None, T), lambda j, b, n: (b, 0)),
                  pl.BlockSpec((None, block), lambda j, b, n: (b, j)), queries, numbers, numbers],
        out_specs=[keys, keys],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=2))(q, k, v, first, last, by_out, log_sum, delta)


def _tiles(T: int, block: int, walk: int) -> tuple[int, int]:
    """Returns the tile sizes, each at most the padded T."""
    return min(block, T), min(walk, T)


def tile(n: int) -> int:
    """Returns the rows of a tile that holds n: a power of two that the matrix units take."""
    return max(SMALLEST, 1 << (n - 1).bit_length())


def folded(carry, scores, is_seen, v):
    """Updates an online softmax with a tile of keys.

    Args:
      carry: the sum of the values [rows,H], weighted relative to 2 ** top; top, the largest score so far [rows]; and
        the sum of the weights [rows]; all float32.
      scores: times log2(e), float32 [rows,columns].
      is_seen: where a query attends to a key, bool [rows,columns].
      v: values [columns,H]; they must not be NaN, even where `is_seen` is False.

    Returns:
      The new carry.
    """
    out, top, total = carry
    new_top = jnp.maximum(top, jnp.max(jnp.where(is_seen, scores, NEVER), axis=1))
    weights = jnp.where(is_seen, jnp.exp2(scores - new_top[:, None]), 0.0)
    shrink = jnp.exp2(top - new_top)
    out = out * shrink[:, None] + dot(weights.astype(v.dtype), v)
    return out, new_top, total * shrink + jnp.sum(weights, axis=1)


def _scores(q, k, rows, columns, begin):
    """Returns a tile's scores times log2(e), float32 [rows,columns], and where a query attends to a key, bool."""
    scores = dot(q, k.T) * (q.shape[-1] ** -0.5 * LOG2_E)
    return scores, (columns[None, :] >= begin[:, None]) & (columns[None, :] <= rows[:, None])


def dot(a, b):
    """Returns the product of two tiles, summed in float32."""
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
