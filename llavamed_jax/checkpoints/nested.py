"""Converts between parameter names with slashes and nested dicts."""

from __future__ import annotations

from collections.abc import Mapping


def nest(flat: Mapping[str, object]) -> dict:
    """Nests a flat dict: `{"a/b": x}` -> `{"a": {"b": x}}`."""
    tree: dict = {}
    for name, value in flat.items():
        *parents, leaf = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict:
    """Reverses `nest`."""
    flat = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {prefix + key: value})
    return flat
