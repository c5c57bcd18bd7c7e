"""Imports the packages of the extra `[curation]`."""

from __future__ import annotations

import importlib
from types import ModuleType

from llavamed_jax.errors import UserError


def needed(package: str, use: str) -> ModuleType:
    """Imports a package of the extra.

    Args:
      package: the module's name, such as `httpx` or `lxml.etree`.
      use: what the package does here, as the end of "which …".

    Raises:
      UserError: the package is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"{package.partition('.')[0]}, which {use}, is not installed: pip install "
                        "'llavamed-jax[curation]'") from None
