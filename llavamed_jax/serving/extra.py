"""Checks that the packages of the extra `[serve]` are installed."""

from __future__ import annotations

import importlib.util

from llavamed_jax.errors import UserError

_PACKAGES = ("fastapi", "prometheus_client", "uvicorn")


def check_installed() -> None:
    """Raises UserError if a package that the server needs is not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"{' and '.join(missing)}, which the server needs, {'is' if len(missing) == 1 else 'are'} not "
                        "installed: pip install 'llavamed-jax[serve]'")
