"""The loss of next-token prediction, with and without the logits of a whole batch in memory.

Axis letters: B rows, T positions, D model width, V vocabulary, N = B*T positions of one device, C positions a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from llavamed_jax.config import IGNORE
from llavamed_jax.parallel.mesh import RULES, constrain, spec_of

# An eighth of the positions at a time, so that those without supervision can be left out in good measure, within
# bounds: less makes thin matrix products, more makes float32 logits of more than 262 MB at 32,000 pieces.
CHUNK_SHARE, SMALLEST_CHUNK, LARGEST_CHUNK = 8, 128, 2048


def cross_entropy(logits: jax.Array, labels: jax.Array, segment_ids: jax.Array,
                  weighting: str = "token") -> tuple[jax.Array, jax.Array]:
    """Cross-entropy of each supervised token given everything before it in its segment.

    The label of position t is the token *at* t, as PyTorch's models take it; the shift happens here. A token that
    opens a segment is predicted by nothing, so a row of several samples has the loss of those samples alone.

    Args:
      logits: [B,T,V], any float type; reduced in float32.
      labels: int [B,T], `IGNORE` where a token is not supervised.
      segment_ids: int [B,T], 0 is padding; the positions of one sample in a row have one id, from 1 on.
      weighting: `token`: every supervised token weighs alike. `sample`: every sample does, so a token weighs one over
        the number of supervised tokens of its sample.

    Returns:
      (sum, count), float32 scalars: means are taken where all counts are known. With `token` the sum of the losses and
      the number of supervised tokens; with `sample` the sum of the samples' mean losses and the number of samples that
      have a supervised token.
    """
    targets = _targets(labels, segment_ids)
    weights, count = _weights(targets, segment_ids, weighting)
    losses, _ = _losses(logits.astype(jnp.float32), targets, weights)
    return jnp.sum(losses), count


def chunked_cross_entropy(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, segment_ids: jax.Array,
                          chunk: int | None = None, weighting: str = "token") -> tuple[jax.Array, jax.Array]:
    """`cross_entropy(hidden @ kernel, ...)`, of which only C positions' logits exist at a time.

    Positions that teach nothing (images, questions, padding) are never multiplied with the head. The gradient is
    computed along with the loss, while a chunk's logits are there, so the backward pass computes none of them again;
    of what is frozen none is computed. On a mesh each device works through its own rows and its part of the
    vocabulary, and the head's gradient crosses the network once, not once a chunk.

    Args:
      hidden: [B,T,D], what the head reads, in the dtype of the computation.
      kernel: [D,V], any float type; its gradient is summed in float32.
      labels, segment_ids, weighting: as of `cross_entropy`.
      chunk: C; None picks it.

    Returns:
      As `cross_entropy`. It can be differentiated once, by reverse mode, in `hidden` and `kernel`.
    """
    targets = _targets(labels, segment_ids)
    weights, count = _weights(targets, segment_ids, weighting)
    return _loss_sum(hidden, kernel, targets, weights, chunk), count


def num_supervised(labels: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Number of tokens of int [B,T] rows that the loss is taken of, a float32 scalar."""
    return _count(_targets(labels, segment_ids))


def num_samples(segment_ids: jax.Array) -> jax.Array:
    """Number of samples in int [B,T] rows, those without a supervised token too, a float32 scalar."""
    return jnp.sum(jnp.max(segment_ids, axis=1), dtype=jnp.float32)


def _targets(labels, segment_ids):
    """int [B,T]: the token that a position is to predict, or IGNORE."""
    # Labels move instead of logits: a slice of [B,T,V] would be a second copy of the largest array of the step.
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    next_segments = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((next_segments == segment_ids) & (segment_ids != 0), targets, IGNORE)


def _count(targets):
    return jnp.sum(targets != IGNORE, dtype=jnp.float32)


def _weights(targets, segment_ids, weighting: str):
    """(float32 [B,T] that the losses are multiplied with, None for 1 each; the count that belongs to their sum)."""
    if weighting == "token":
        return None, _count(targets)
    is_supervised = targets != IGNORE
    length = targets.shape[1] + 1  # of the segment ids
    counts = jax.vmap(lambda ids, x: jnp.bincount(ids, x, length=length))(segment_ids, is_supervised.astype(jnp.int32))
    here = jnp.take_along_axis(counts, segment_ids, axis=1)
    weights = jnp.where(is_supervised, 1.0 / jnp.maximum(here, 1), 0.0).astype(jnp.float32)
    return weights, jnp.sum(counts > 0, dtype=jnp.float32)


def _losses(logits, targets, weights=None, axis: str | None = None):
    """float32 [...,V], int [...] -> losses [...], and their gradient by the logits [...,V], both times `weights` [...].

    `axis` is the mesh axis over which the vocabulary is spread, for a caller that sees its own part of it only.
    """
    if axis is None:
        first, peak, total = 0, lambda x: x, lambda x: x
    else:
        first = jax.lax.axis_index(axis) * logits.shape[-1]
        peak, total = functools.partial(jax.lax.pmax, axis_name=axis), functools.partial(jax.lax.psum, axis_name=axis)
    # A comparison, not a gather: it fuses into the reductions, its gradient is no scatter, and V may be sharded.
    is_target = first + jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == targets[..., None]
    highest = peak(jax.lax.stop_gradient(jnp.max(logits, axis=-1, keepdims=True)))
    powers = jnp.exp(logits - highest)
    normalizer = total(jnp.sum(powers, axis=-1, keepdims=True))
    target_logits = total(jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1))
    is_supervised = targets != IGNORE
    losses = jnp.where(is_supervised, (jnp.log(normalizer) + highest)[..., 0] - target_logits, 0.0)
    by_logits = jnp.where(is_supervised[..., None], powers / normalizer - is_target, 0.0)
    return (losses, by_logits) if weights is None else (losses * weights, by_logits * weights[..., None])


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _loss_sum(hidden, kernel, targets, weights, chunk):
    return _loss_and_gradients(hidden, kernel, targets, weights, chunk, (False, False))[0]


def _forward(hidden, kernel, targets, weights, chunk):
    value = lambda x: None if x is None else x.value
    total, *gradients = _loss_and_gradients(hidden.value, kernel.value, targets.value, value(weights), chunk,
                                            (hidden.perturbed, kernel.perturbed))
    return total, gradients


def _backward(chunk, gradients, cotangent):
    return *(None if g is None else g * cotangent.astype(g.dtype) for g in gradients), None, None


_loss_sum.defvjp(_forward, _backward, symbolic_zeros=True)


def _loss_and_gradients(hidden, kernel, targets, weights, chunk, wanted):
    """The sum of the losses, and its gradients by hidden and kernel (None where not wanted), each in its own dtype."""
    # Cast and gathered once; in the loop it would be once a chunk.
    whole = constrain(kernel.astype(hidden.dtype), None, "vocab")
    work = functools.partial(_on_one_device, chunk=chunk, wanted=wanted)
    if jax.sharding.get_abstract_mesh().empty:
        total, by_hidden, by_kernel = work(hidden, whole, targets, weights)
    else:
        rows, positions = spec_of(("act_batch", None, None)), spec_of(("act_batch", None))
        # The gradient is written by hand, so nothing here is differentiated and the check of replication has no use.
        total, by_hidden, by_kernel = jax.shard_map(
            functools.partial(_on_a_mesh, work), in_specs=(rows, spec_of((None, "vocab")), positions, positions),
            out_specs=(spec_of(()), rows, spec_of(("embed", "vocab"))), check_vma=False)(hidden, whole, targets, weights)
    return total, by_hidden, None if by_kernel is None else by_kernel.astype(kernel.dtype)


def _on_a_mesh(work, hidden, kernel, targets, weights):
    """`work` on this device's rows and part of the vocabulary; sums over the other rows, the kernel's laid as the kernel."""
    total, by_hidden, by_kernel = work(hidden, kernel, targets, weights, row_axes=RULES["act_batch"], vocab_axis=RULES["vocab"])
    if by_kernel is not None:
        by_kernel = jax.lax.psum(by_kernel, tuple(axis for axis in RULES["act_batch"] if axis != RULES["embed"]))
        by_kernel = jax.lax.psum_scatter(by_kernel, RULES["embed"], scatter_dimension=0, tiled=True)
    return jax.lax.psum(total, RULES["act_batch"]), by_hidden, by_kernel


def _on_one_device(hidden, kernel, targets, weights, *, chunk, wanted, row_axes=None, vocab_axis=None):
    """[B,T,D], [D,V], [B,T], [B,T] -> sum of losses, gradients [B,T,D] and float32 [D,V], of one device's part of B and V."""
    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    N, C = y.size, chunk or _chunk(y.size)
    is_supervised = y != IGNORE
    slots = -(-N // C) * C
    order = jnp.flatnonzero(is_supervised, size=slots, fill_value=N)  # supervised positions first; N is none
    trips = (jnp.sum(is_supervised, dtype=jnp.int32) + C - 1) // C
    if row_axes is not None:  # devices wait for each other anyhow, and loops that talk must go round alike
        trips = jax.lax.pmax(trips, row_axes)

    def work(i, carry):
        total, by_x, by_kernel = carry
        at = jax.lax.dynamic_slice(order, (i * C,), (C,))
        x_, y_ = x.at[at].get(mode="fill", fill_value=0), y.at[at].get(mode="fill", fill_value=IGNORE)
        w_ = None if weights is None else weights.reshape(-1).at[at].get(mode="fill", fill_value=0)
        losses, by_logits = _losses(jnp.matmul(x_, kernel, preferred_element_type=jnp.float32), y_, w_, vocab_axis)
        by_logits = by_logits.astype(x.dtype)  # at most 1 in size; a float32 operand would take the slow matrix units
        if by_x is not None:
            part = jnp.einsum("CV,DV->CD", by_logits, kernel, preferred_element_type=jnp.float32)
            part = part if vocab_axis is None else jax.lax.psum(part, vocab_axis)
            by_x = jax.lax.dynamic_update_slice(by_x, part.astype(x.dtype), (i * C, 0))
        if by_kernel is not None:
            by_kernel += jnp.einsum("CD,CV->DV", x_, by_logits, preferred_element_type=jnp.float32)
        return total + jnp.sum(losses), by_x, by_kernel

    start = (jnp.float32(0), jnp.zeros((slots, x.shape[1]), x.dtype) if wanted[0] else None,
             jnp.zeros(kernel.shape, jnp.float32) if wanted[1] else None)
    total, by_x, by_kernel = jax.lax.fori_loop(0, trips, work, start)
    if by_x is not None:  # back to where they came from
        rank = jnp.where(is_supervised, jnp.cumsum(is_supervised) - 1, slots)
        by_x = by_x.at[rank].get(mode="fill", fill_value=0).reshape(hidden.shape)
    return total, by_x, by_kernel


def _chunk(positions: int) -> int:
    share = -(-positions // CHUNK_SHARE // SMALLEST_CHUNK) * SMALLEST_CHUNK
    return min(positions, max(SMALLEST_CHUNK, share), LARGEST_CHUNK)
