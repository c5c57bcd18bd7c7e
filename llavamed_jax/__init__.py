"""LLaVA-Med in JAX: loads a checkpoint and answers questions about images.

`load`, `LlavaMed`, `Completion` and `Processor` are imported when they are first used, so that importing
`llavamed_jax.config` alone does not import JAX. Subpackages are imported by name.
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
    """Returns the public names, imported yet or not, and leaves out the submodules that happen to be imported."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})
