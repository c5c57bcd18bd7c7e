"""LLaVA-Med in JAX: load a checkpoint and ask it about an image. Subpackages are imported by name.

The names below are imported when they are first used, so that `llavamed_jax.config` alone does not bring JAX.
"""

from __future__ import annotations

import importlib

from llavamed_jax.config import IMAGE_TOKEN

__all__ = ["load", "LlavaMed", "Completion", "Processor", "IMAGE_TOKEN"]
__version__ = "0.1.0"

_HOMES = {"load": "assistant", "LlavaMed": "assistant", "Completion": "assistant", "Processor": "processor"}


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"llavamed_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'llavamed_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """What is meant to be used, imported yet or not, in place of the modules that happen to be."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
