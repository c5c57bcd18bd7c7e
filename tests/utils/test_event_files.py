"""What writes TensorBoard's files: torch is no part of it, and stays what it was for everything else."""

import sys

import pytest

from llavamed_jax.utils import event_files


def test_packages_are_absent_inside_and_as_before_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with event_files._without("this", "json"):
        import json
        with pytest.raises(ImportError):
            import this  # noqa: F401
    assert "this" not in sys.modules
    assert sys.modules["json"] is json, "what is imported already is not hidden"
