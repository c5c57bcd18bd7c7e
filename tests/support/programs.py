"""Fewer programs to compile: a model's forward pass as one, where Flax alone would compile each of its operations, and one for all
models of a config."""

import contextlib
import functools

import jax
import pytest

from llavamed_jax import assistant
from llavamed_jax.generation import engine


@functools.partial(jax.jit, static_argnames=("model", "method"))
def apply(model, params, *args, method=None, **kwargs):
    """`model.apply`. Equal models share the program of a shape: not for code that a test exchanges."""
    return model.apply({"params": params}, *args, method=method, **kwargs)


@contextlib.contextmanager
def shared():
    """In this context, loaded models of equal configs share their programs, as `Engine(programs=…)` has engines share them: for tests
    that load a model several times. Not for code that a test exchanges, nor for counts of compilations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Programs", functools.cache(engine.Programs))
        patch.setattr(assistant, "Llava", functools.cache(assistant.Llava))
        yield
