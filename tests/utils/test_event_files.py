"""What writes TensorBoard's files: torch is no part of it, and stays what it was for everything else."""

import sys

import pytest

from llavamed_jax.utils import event_files


def test_a_package_is_absent_inside_and_as_before_afterwards(monkeypatch):
    monkeypatch.delitem(sys.modules, "this", raising=False)
    with pytest.raises(ImportError), event_files._without("this"):
        import this  # noqa: F401
    assert "this" not in sys.modules
    with event_files._without("json"):
        import json
    assert sys.modules["json"] is json, "what is imported already is not hidden"
