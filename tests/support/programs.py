"""A model's forward pass as one compiled program, where Flax alone would compile each of its operations."""

import functools

import jax


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *args, method=None, **kwargs):
    """`model.apply`. Equal models share the program of a shape: not for code that a test exchanges."""
    return model.apply({"params": params}, *args, method=method, **kwargs)
