"""AdamW with linear warm-up, cosine decay and clipping: the defaults of HF's Trainer, with which the original trains."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from llavamed_jax.errors import UsageError

# Biases and the scales of norms are not decayed (HF's Trainer; spec 4.3).
NOT_DECAYED = re.compile(r".*/(scale|bias)")


def warmup_cosine(peak: float, warmup_ratio: float, total_steps: int) -> optax.Schedule:
    """HF's `get_cosine_schedule_with_warmup`: from 0 to `peak` over ceil(ratio * steps), then half a cosine to 0.

    Update n (from 0) is done with the value at n, so the first update of a run that warms up changes nothing.
    """
    warmup = math.ceil(warmup_ratio * total_steps)
    # optax needs a step after the warm-up, which a run that only warms up does not reach.
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, decay_steps=max(total_steps, warmup + 1))


def build(cfg: ConfigDict, total_steps: int, names: Sequence[str],
          undecayed: Sequence[str] = ()) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimizer of the trainable parameters, a flat dict by name.

    Args:
      cfg: the recipe's `optimizer`. `overrides` is a list of (regex, peak learning rate) for some of the parameters,
        as upstream's `mm_projector_lr`; the first that matches a whole name counts.
      total_steps: number of updates of the run, warm-up included.
      names: names of the trainable parameters.
      undecayed: those that weight decay leaves alone beside biases and scales of norms: a table of which some rows are
        trained, since decay knows no rows and would shrink the others.

    Returns:
      The optax transformation, and the schedule of the learning rate without overrides.

    Raises:
      UsageError: an override that matches no trainable parameter, or none that those before it leave.
    """
    schedule = warmup_cosine(cfg.learning_rate, cfg.warmup_ratio, total_steps)
    steps = [
        optax.clip_by_global_norm(cfg.clip_norm) if cfg.clip_norm else optax.identity(),
        _scale_by_adam(cfg.b1, cfg.b2, cfg.eps, cfg.mu_dtype),
        optax.add_decayed_weights(cfg.weight_decay, mask={
            name: not NOT_DECAYED.fullmatch(name) and name not in undecayed for name in names}),
    ]
    if cfg.overrides:
        steps.append(_scale_by_name(_factors(cfg.overrides, cfg.learning_rate, names)))
    return optax.chain(*steps, optax.scale_by_learning_rate(schedule)), schedule


def _scale_by_adam(b1: float, b2: float, eps: float, mu_dtype: str) -> optax.GradientTransformation:
    """optax's Adam with torch's bias corrections.

    optax takes 1 - b^t in float32, which for b2 = 0.999 is 1.3e-5 off at every t: all updates would be 6e-6 too small, and
    after 50 updates losses 1e-5 from torch's, whose corrections are computed in float64.
    """
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)

    def update(updates, state, params=None):
        updates, state = adam.update(updates, state, params)
        t = state.count
        factor = (1 - b1**t) / _one_minus_power(b1, t) * jnp.sqrt(_one_minus_power(b2, t) / (1 - b2**t))
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformation(adam.init, update)


def _one_minus_power(b: float, t):
    """1 - b^t to the precision of float32."""
    return -jnp.expm1(t * math.log(b)) if b else jnp.float32(1)


def _factors(overrides: Sequence[tuple[str, float]], base: float, names: Sequence[str]) -> dict[str, float]:
    """Learning rate of each parameter, as a fraction of the base."""
    left = list(names)
    for regex, _ in overrides:
        if not any(re.fullmatch(regex, name) for name in names):
            raise UsageError(f"the config key 'optimizer.overrides' has {regex!r}, which matches no trainable parameter")
        if not any(re.fullmatch(regex, name) for name in left):
            raise UsageError(f"the config key 'optimizer.overrides' has {regex!r}, all of whose parameters an entry before it matches; "
                             "the first entry that matches counts, so the narrower one was expected first")
        left = [name for name in left if not re.fullmatch(regex, name)]
    rates = {name: next((rate for regex, rate in overrides if re.fullmatch(regex, name)), base) for name in names}
    return {name: rate / base for name, rate in rates.items()}


def _scale_by_name(factors: Mapping[str, float]) -> optax.GradientTransformation:
    return optax.stateless(lambda updates, params: {name: update * factors[name] for name, update in updates.items()})


def state_shardings(optimizer: optax.GradientTransformation, params: Mapping[str, jax.Array],
                    shardings: Mapping[str, jax.sharding.Sharding], replicated: jax.sharding.Sharding):
    """Shardings of the optimizer's state: each moment lies like its parameter, counters are everywhere."""
    abstract = jax.eval_shape(optimizer.init, params)
    return optax.tree.map_params(optimizer, lambda _, sharding: sharding, abstract, dict(shardings),
                                 transform_non_params=lambda _: replicated)
