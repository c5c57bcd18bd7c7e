"""Computes the loss of next-token prediction, with or without the logits of a whole batch in memory.

Axis letters: B rows, T positions, D model width, V vocabulary, N = B*T positions of one device, C positions a chunk.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from llavamed_jax.config import IGNORE
from llavamed_jax.parallel.mesh import RULES, constrain, spec_of

# A chunk is an eighth of the positions, so that most unsupervised positions are skipped, within bounds: smaller chunks
# make thin matrix products, larger ones make float32 logits of more than 262 MB at a vocabulary of 32,000.
CHUNK_SHARE, SMALLEST_CHUNK, LARGEST_CHUNK = 8, 128, 2048


def cross_entropy(logits: jax.Array, labels: jax.Array, segment_ids: jax.Array,
                  weighting: str = "token") -> tuple[jax.Array, jax.Array]:
    """Returns the summed cross-entropy of the supervised tokens, each given the tokens before it in its segment.

    The label of position t is the token *at* t, as PyTorch's models take it; the shift happens here. No position
    predicts the first token of a segment, so the loss of a row of several samples is that of those samples alone.

    Args:
      logits: [B,T,V], any float type; reduced in float32.
      labels: int [B,T], `IGNORE` where a token is not supervised.
      segment_ids: int [B,T], 0 is padding; the positions of one sample in a row have one id, from 1 on.
      weighting: `token` weighs every supervised token alike. `sample` weighs every sample alike: a token weighs one
        over the number of supervised tokens of its sample.

    Returns:
      (sum, count), float32 scalars; the caller divides once all counts are known. With `token` the sum of the losses
      and the number of supervised tokens; with `sample` the sum of the samples' mean losses and the number of samples
      that have a supervised token.
    """
    targets = _targets(labels, segment_ids)
    weights, count = _weights(targets, segment_ids, weighting)
    losses, _ = _losses(logits.astype(jnp.float32), targets, weights)
    return jnp.sum(losses), count


def chunked_cross_entropy(hidden: jax.Array, kernel: jax.Array, labels: jax.Array, segment_ids: jax.Array,
                          chunk: int | None = None, weighting: str = "token") -> tuple[jax.Array, jax.Array]:
    """Computes `cross_entropy(hidden @ kernel, ...)`, with the logits of only C positions in memory at a time.

    Unsupervised positions (images, questions, padding) are never multiplied with the head. The gradient is computed
    together with the loss, from the same logits, so the backward pass recomputes none; frozen inputs get no gradient.
    On a mesh each device computes its own rows and its part of the vocabulary, and the head's gradient crosses the
    network once, not once a chunk.

    Args:
      hidden: [B,T,D], the head's input, in the dtype of the computation.
      kernel: [D,V], any float type; its gradient is summed in float32.
      labels: as in `cross_entropy`.
      segment_ids: as in `cross_entropy`.
      chunk: C; None picks it.
      weighting: as in `cross_entropy`.

    Returns:
      As `cross_entropy`. The result can be differentiated once, by reverse mode, in `hidden` and `kernel`.
    """
    targets = _targets(labels, segment_ids)
    weights, count = _weights(targets, segment_ids, weighting)
    return _loss_sum(hidden, kernel, targets, weights, chunk), count


def num_supervised(labels: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Returns the number of supervised tokens in int [B,T] rows, a float32 scalar."""
    return _count(_targets(labels, segment_ids))


def num_samples(segment_ids: jax.Array) -> jax.Array:
    """Returns the number of samples in int [B,T] rows, supervised or not, a float32 scalar."""
    return jnp.sum(jnp.max(segment_ids, axis=1), dtype=jnp.float32)


def _targets(labels, segment_ids):
    """Returns the token that each position predicts, or IGNORE, as int [B,T]."""
    # The labels are shifted, not the logits: a slice of [B,T,V] would copy the largest array of the step.
    targets = jnp.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE)
    next_segments = jnp.pad(segment_ids[:, 1:], ((0, 0), (0, 1)))
    return jnp.where((next_segments == segment_ids) & (segment_ids != 0), targets, IGNORE)


def _count(targets):
    return jnp.sum(targets != IGNORE, dtype=jnp.float32)


def _weights(targets, segment_ids, weighting: str):
    """Returns (float32 [B,T] weights of the losses, None for 1 each; the count by which to divide their sum)."""
    if weighting == "token":
        return None, _count(targets)
    is_supervised = targets != IGNORE
    length = targets.shape[1] + 1  # of the segment ids
    counts = jax.vmap(lambda ids, x: jnp.bincount(ids, x, length=length))(segment_ids, is_supervised.astype(jnp.int32))
    here = jnp.take_along_axis(counts, segment_ids, axis=1)
    weights = jnp.where(is_supervised, 1.0 / jnp.maximum(here, 1), 0.0).astype(jnp.float32)
    return weights, jnp.sum(counts > 0, dtype=jnp.float32)


def _losses(logits, targets, weights=None, axis: str | None = None):
    """Returns the losses [...] and their gradient by the logits [...,V], both times `weights` [...].

    The logits are float32 [...,V], the targets int [...].

    `axis` is the mesh axis that shards the vocabulary, if the caller holds only its own shard; else None.
    """
    if axis is None:
        first, peak, total = 0, lambda x: x, lambda x: x
    else:
        first = jax.lax.axis_index(axis) * logits.shape[-1]
        peak, total = functools.partial(jax.lax.pmax, axis_name=axis), functools.partial(jax.lax.psum, axis_name=axis)
    # A comparison, not a gather: it fuses into the reductions, its gradient needs no scatter, and V may be sharded.
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
    """Returns the sum of the losses, and its gradients by hidden and kernel, in their dtypes; None where not wanted."""
    # Cast and gather once, outside the loop over chunks.
    whole = constrain(kernel.astype(hidden.dtype), None, "vocab")
    work = functools.partial(_on_one_device, chunk=chunk, wanted=wanted)
    if jax.sharding.get_abstract_mesh().empty:
        total, by_hidden, by_kernel = work(hidden, whole, targets, weights)
    else:
        rows, positions = spec_of(("act_batch", None, None)), spec_of(("act_batch", None))
        # The gradient is hand-written, so shard_map differentiates nothing and its replication check is not needed.
        total, by_hidden, by_kernel = jax.shard_map(
            functools.partial(_on_a_mesh, work), in_specs=(rows, spec_of((None, "vocab")), positions, positions),
            out_specs=(spec_of(()), rows, spec_of(("embed", "vocab"))),
            check_vma=False)(hidden, whole, targets, weights)
    return total, by_hidden, None if by_kernel is None else by_kernel.astype(kernel.dtype)


def _on_a_mesh(work, hidden, kernel, targets, weights):
    """Runs `work` on this device's rows and vocabulary shard, and reduce-scatters the kernel's gradient."""
    total, by_hidden, by_kernel = work(hidden, kernel, targets, weights, row_axes=RULES["act_batch"],
                                       vocab_axis=RULES["vocab"])
    if by_kernel is not None:
        by_kernel = jax.lax.psum(by_kernel, tuple(axis for axis in RULES["act_batch"] if axis != RULES["embed"]))
        by_kernel = jax.lax.psum_scatter(by_kernel, RULES["embed"], scatter_dimension=0, tiled=True)
    return jax.lax.psum(total, RULES["act_batch"]), by_hidden, by_kernel


def _on_one_device(hidden, kernel, targets, weights, *, chunk, wanted, row_axes=None, vocab_axis=None):
    """Returns the sum of losses and gradients [B,T,D] and float32 [D,V] of one device's part of B and V.

    The inputs are [B,T,D], [D,V], [B,T], [B,T].
    """
    x, y = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    N, C = y.size, chunk or _chunk(y.size)
    is_supervised = y != IGNORE
    slots = -(-N // C) * C
    order = jnp.flatnonzero(is_supervised, size=slots, fill_value=N)  # supervised positions first; N fills unused slots
    trips = (jnp.sum(is_supervised, dtype=jnp.int32) + C - 1) // C
    if row_axes is not None:  # loops with collectives must run equally often on all devices
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
    if by_x is not None:  # scatter the gradients back to their positions
        rank = jnp.where(is_supervised, jnp.cumsum(is_supervised) - 1, slots)
        by_x = by_x.at[rank].get(mode="fill", fill_value=0).reshape(hidden.shape)
    return total, by_x, by_kernel


def most_rounds(positions: int) -> int:
    """Returns the rounds of the loop over the chunks if each of a device's positions is supervised."""
    return -(-positions // _chunk(positions))


def _chunk(positions: int) -> int:
    share = -(-positions // CHUNK_SHARE // SMALLEST_CHUNK) * SMALLEST_CHUNK
    return min(positions, max(SMALLEST_CHUNK, share), LARGEST_CHUNK)
