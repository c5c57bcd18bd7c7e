"""Builds AdamW with linear warm-up, cosine decay and clipping.

The defaults are those of HF's Trainer, with which the original trains.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError
from llavamed_jax.training import layers

# Biases and the scales of norms are not decayed (as in transformers' Trainer).
NOT_DECAYED = re.compile(r".*/(scale|bias)")


def warmup_cosine(peak: float, warmup_ratio: float, total_steps: int) -> optax.Schedule:
    """Returns HF's `get_cosine_schedule_with_warmup`.

    The learning rate rises from 0 to `peak` over ceil(ratio * steps) updates, then falls to 0 along half a cosine.

    Update n, counted from 0, uses the value at n, so the first update of a run with warm-up changes nothing.

    Args:
      peak: the highest learning rate.
      warmup_ratio: the share of updates that warm up, from 0 to 1.
      total_steps: number of updates of the run.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    # optax needs a step after the warm-up; a run that only warms up does not reach it.
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps=max(total_steps, warmup + 1))


def build(cfg: ConfigDict, total_steps: int, names: Sequence[str], undecayed: Sequence[str] = (),
          depths: layers.Depths | None = None, partly_trained: Mapping[str, np.ndarray] | None = None,
          ) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of the trainable parameters, a flat dict by name.

    Args:
      cfg: the recipe's `optimizer`. `overrides` is a list of (regex, peak learning rate) for some of the parameters,
        as upstream's `mm_projector_lr`; the first regex that matches a whole name, or that of a layer, applies.
      total_steps: number of updates of the run, warm-up included.
      names: names of the trainable parameters.
      undecayed: names without weight decay, besides biases and scales of norms: a table of which only some rows are
        trained, since weight decay would shrink its other rows.
      depths: the number of layers of each parameter (`layers.depths`); None for parameters that are not stacks.
      partly_trained: which layers are trained, for stacks of which some are not (`layers.partly_trained`). Only those
        are decayed.

    Returns:
      The optax transformation, and the schedule of the learning rate without overrides.

    Raises:
      UsageError: an override matches no trainable parameter, or only parameters that earlier overrides match.
    """
    schedule = warmup_cosine(cfg.learning_rate, cfg.warmup_ratio, total_steps)
    partly_trained, depths = partly_trained or {}, depths or dict.fromkeys(names, 0)
    decayed = {name for name in names if not NOT_DECAYED.fullmatch(name) and name not in undecayed}
    steps = [
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        _scale_by_adam(cfg.b1, cfg.b2, cfg.eps, cfg.mu_dtype),
        optax.add_decayed_weights(cfg.weight_decay, mask={
            name: name in decayed and name not in partly_trained for name in names}),
    ]
    if cfg.weight_decay and partly_trained:
        rates = {name: cfg.weight_decay * trained for name, trained in partly_trained.items() if name in decayed}
        steps.append(_decay_layers(rates))
    if cfg.overrides:
        steps.append(_scale_by_name(_factors(cfg.overrides, cfg.learning_rate, names, depths, partly_trained)))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule)), schedule


def _scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformation:
    """Returns optax's Adam with torch's bias corrections.

    Optax computes 1 - b^t in float32, which for b2 = 0.999 is 1.3e-5 off at every t: all updates would be 6e-6 too
    small, and after 50 updates losses would be 1e-5 from torch's, which computes the corrections in float64.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, state, params)
        t = state.count
        factor = (1 - b1**t) / _one_minus_power(b1, t) * jnp.sqrt(_one_minus_power(b2, t) / (1 - b2**t))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(adam.init, update)


def _one_minus_power(b: float, t):
    """Returns 1 - b^t to the precision of float32."""
    return -jnp.expm1(t * math.log(b)) if b else jnp.float32(1)


def _factors(overrides: Sequence[tuple[str, float]], base: float, names: Sequence[str], depths: layers.Depths,
             partly_trained: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the learning rate of each parameter as a fraction of the base, [L] for a stack and else []."""
    left = {name: partly_trained.get(name, np.ones(depths[name] or (), bool)) for name in names}
    rates = {name: np.full(depths[name] or (), base) for name in names}
    for regex, rate in overrides:
        found = {name: layers.matched(regex, name, depths[name]) for name in names}
        if not any((found[name] & partly_trained.get(name, True)).any() for name in names):
            raise UsageError(f"the config key 'optimizer.overrides' has {regex!r}, which matches no trainable "
                             "parameter")
        found = {name: found[name] & left[name] for name in names}
        if not any(each.any() for each in found.values()):
            raise UsageError(f"the config key 'optimizer.overrides' has {regex!r}, but earlier entries match all its "
                             "parameters; the first match counts, so the narrower entry was expected first")
        rates = {name: np.where(found[name], rate, rates[name]) for name in names}
        left = {name: left[name] & ~found[name] for name in names}
    return {name: rate / base for name, rate in rates.items()}


def _scale_by_name(factors: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    def scaled(update, factor):
        if factor.min() == factor.max():
            return update * float(factor.min())
        return update * layers.along_layers(factor, update.ndim).astype(update.dtype)
    return optax.stateless(lambda updates, params: {name: scaled(update, factors[name])
                                                    for name, update in updates.items()})


def _decay_layers(rates: Mapping[str, np.ndarray]) -> optax.GradientTransformation:
    """Adds the decay of the layers of stacks, at rates [L] by name; 0 leaves a layer as it is."""
    def decayed(name, update, param):
        rate = layers.along_layers(rates[name], param.ndim).astype(param.dtype)
        return jnp.where(rate > 0, update + rate * param, update)
    return optax.stateless(lambda updates, params: {
        name: decayed(name, update, params[name]) if name in rates else update for name, update in updates.items()})


def state_shardings(optimizer: optax.GradientTransformation, params: Mapping[str, jax.Array],
                    shardings: Mapping[str, jax.sharding.Sharding], replicated: jax.sharding.Sharding):
    """Returns the shardings of the optimizer's state: a moment has its parameter's sharding, counters are replicated.

    Args:
      optimizer: as `build` returns it.
      params: the trainable parameters by name, arrays or shapes.
      shardings: the sharding of each parameter.
      replicated: the sharding of the counters.
    """
    return like_state(optimizer, jax.eval_shape(optimizer.init, params), dict(shardings), replicated)


def like_state(optimizer: optax.GradientTransformation, state, by_param: Mapping[str, Any], otherwise: Any):
    """Returns a tree of the optimizer's state: for a moment what belongs to its parameter, for counters `otherwise`.

    Args:
      optimizer: as `build` returns it.
      state: its state, arrays or shapes.
      by_param: a leaf for each parameter.
      otherwise: the leaf of all that is not a moment.
    """
    return optax.tree.map_params(optimizer, lambda _, leaf: leaf, state, by_param,
                                 transform_non_params=lambda _: otherwise)
