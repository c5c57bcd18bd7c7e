"""Compiles one update of training.

Axis letters: B rows, T positions, I images a row, M micro-batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from llavamed_jax.models.decoders.llama import head_kernel
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel import xla
from llavamed_jax.parallel.mesh import batch_sharding, constrain, replicated
from llavamed_jax.training import optimizer as optimizers
from llavamed_jax.training.losses import chunked_cross_entropy, num_samples, num_supervised
from llavamed_jax.training.state import TrainState, merge

Batch = Mapping[str, jax.Array]
LossFn = Callable[[dict, Batch], tuple[jax.Array, jax.Array]]

DROPOUT = "dropout"  # a batch's random key
MODEL_INPUTS = ("input_ids", "labels", "positions", "segment_ids", "pixel_values")
# If an update changes the parameters by less than this (root mean square), it moves nothing, since float32 holds seven
# digits: only parameters that were exactly 0 change.
STILL = 1e-14


def llava_loss(model: Llava, weighting: str = "token") -> LossFn:
    """Returns the loss of a model: (parameters, rows) -> (sum of losses, count).

    Args:
      model: the model.
      weighting: the recipe's `loss_weighting` (`losses.cross_entropy`).
    """

    def loss(params: dict, batch: Batch):
        rngs = {"dropout": batch[DROPOUT]} if DROPOUT in batch else None
        hidden = model.apply({"params": params}, batch["input_ids"], batch.get("pixel_values"), batch["positions"],
                             batch["segment_ids"], rngs=rngs, method="hidden")
        return chunked_cross_entropy(hidden, head_kernel(params), batch["labels"], batch["segment_ids"],
                                     weighting=weighting)

    return loss


def make_train_step(loss_fn: LossFn, optimizer: optax.GradientTransformation, schedule: optax.Schedule, mesh: Mesh,
                    shardings: TrainState, micro_batches: int = 1,
                    weighting: str = "token",
                    dropout_seed: int | None = None) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """Returns the compiled update.

    Args:
      loss_fn: as `llava_loss` returns it.
      optimizer: as `optimizer.build` returns it.
      schedule: as `optimizer.build` returns it.
      mesh: the mesh that the model's sharding constraints refer to.
      shardings: shardings of the state (`state.state_shardings`); the new state keeps them.
      micro_batches: M; the batch is computed in M parts, and the update is that of the whole batch.
      weighting: weighting of the loss. With `sample` the gradient is divided by all samples of the batch: a sample
        without a supervised token counts with a gradient of 0, as in HF's Trainer.
      dropout_seed: seed of an adapter's dropout, which differs with every update and micro-batch; None for no dropout.

    Returns:
      (state, batch) -> (state, metrics). The old state is donated: do not use it again. Metrics are float32 scalars:
      `loss` (the mean of tokens, or of the means of samples), `tokens` (supervised), `grad_norm` (before clipping),
      `learning_rate`, `moved` (0 if the update was below `STILL`), `skipped` (1 if the loss, or the norm of the
      gradient or of the update, was not finite). If loss or gradient were not finite, parameters and optimizer stay as
      they were. If only the update was not, the numbers that would not be finite stay, with their moments; the others
      move, and the optimizer counts the update.
    """

    def step(state: TrainState, batch: Batch):
        def loss(trainable, rows):
            return loss_fn(merge(trainable, state.frozen), rows)

        key = None if dropout_seed is None else jax.random.fold_in(jax.random.key(dropout_seed), state.step)
        total, count, grads = _accumulate(loss, state.trainable, batch, micro_batches, key)
        tokens, divisor = count, count
        if weighting == "sample":
            tokens, divisor = num_supervised(batch["labels"], batch["segment_ids"]), num_samples(batch["segment_ids"])
        grads = jax.tree.map(lambda g: g / jnp.maximum(divisor, 1.0), grads)
        grad_norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(total) & jnp.isfinite(grad_norm)

        # From here on one pass over the state computes, chooses, sums and writes; with a second sum XLA makes it two.
        # A finite gradient may overflow in the optimizer, which would ruin all later updates: a number that would
        # overflow stays as it was, with its moments.
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        moved = optax.apply_updates(state.trainable, updates)
        is_taken = jax.tree.map(lambda x: is_finite & jnp.isfinite(x), moved)
        trainable = jax.tree.map(jnp.where, is_taken, moved, state.trainable)
        change = optax.tree.norm(jax.tree.map(jnp.subtract, moved, state.trainable))
        still = STILL * math.sqrt(sum(x.size for x in moved.values()))
        is_whole = is_finite & jnp.isfinite(change)
        opt_state = jax.tree.map(jnp.where, optimizers.like_state(optimizer, opt_state, is_taken, is_finite), opt_state,
                                 state.opt_state)

        metrics = dict(loss=total / jnp.maximum(count, 1.0), tokens=tokens, grad_norm=grad_norm,
                       learning_rate=schedule(state.step - state.skipped),
                       moved=(change > still).astype(jnp.float32), skipped=1.0 - is_whole)
        state = state.replace(step=state.step + 1, skipped=state.skipped + (1 - is_finite.astype(jnp.int32)),
                              trainable=trainable, opt_state=opt_state)
        return state, metrics

    compiled = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)),
                       compiler_options=xla.options(mesh.devices.flat[0].platform, xla.UPDATE))
    return _within(mesh, compiled)


def make_eval_step(loss_fn: LossFn, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]:
    """Returns the compiled validation step: (state, batch) -> (sum of losses, count), as the loss returns them."""
    return _within(mesh, jax.jit(lambda state, batch: loss_fn(state.params, batch), out_shardings=replicated(mesh)))


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> Batch:
    """Places the model's inputs on the devices: this process's rows of a batch, numpy arrays [B,...]."""
    rows = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # with several processes JAX counts this as an implicit transfer
        return {name: jax.make_array_from_process_local_data(rows, batch[name])
                for name in MODEL_INPUTS if name in batch}


def _accumulate(loss, trainable, batch: Batch, micro_batches: int, key: jax.Array | None):
    """Returns (sum of losses, count, gradient of the sum) over all micro-batches; each gets a random key of its own.

    It adds sums, not means: micro-batches differ in supervised tokens, and the mean of their means is another loss.
    """
    value_and_grad = jax.value_and_grad(loss, has_aux=True)
    keys = {} if key is None else {DROPOUT: jax.random.split(key, micro_batches)}
    if micro_batches == 1:
        (total, count), grads = value_and_grad(trainable, {**batch, **{name: each[0] for name, each in keys.items()}})
        return total, count, grads

    def split(x):  # [B,...] -> [M,B/M,...]; strided, so that every device keeps its rows
        x = x.reshape(x.shape[0] // micro_batches, micro_batches, *x.shape[1:]).swapaxes(0, 1)
        return constrain(x, None, "act_batch", *[None] * (x.ndim - 2))

    def add(carry, rows):
        (total, count), grads = value_and_grad(trainable, rows)
        return jax.tree.map(jnp.add, carry, (total, count, grads)), None

    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zeros, {**jax.tree.map(split, dict(batch)), **keys})[0]


def _within(mesh: Mesh, compiled):
    """Returns a compiled function that runs with the mesh in context, where the model's constraints look for it."""

    def call(*args):
        with jax.set_mesh(mesh):
            return compiled(*args)

    call.lower = lambda *args: _lower(mesh, compiled, args)
    return call


def _lower(mesh, compiled, args):
    with jax.set_mesh(mesh):
        return compiled.lower(*args)
