"""Describes the differences of two records in words."""

from __future__ import annotations

import os
from collections.abc import Mapping

from llavamed_jax.errors import cut, some

_MOST = 40  # characters of a value in a sentence


def changes(earlier: Mapping[str, object], now: Mapping[str, object], when: tuple[str, str] = ("then", "now")) -> str:
    """Describes the differences of two records: a few by name, with their values if these are short.

    The sentence ends with the number of the other differences.

    Args:
      earlier: the earlier record.
      now: the present record.
      when: words for the times of the two records.
    """
    names = [name for name in {**now, **earlier} if earlier.get(name) != now.get(name)]
    return some([_change(name, earlier, now, when) for name in names], 6)


def _change(name: str, earlier: Mapping[str, object], now: Mapping[str, object], when: tuple[str, str]) -> str:
    if name not in earlier or name not in now:
        return f"{name} (missing {when[name in earlier]})"
    is_hash = all(isinstance(value, str) and len(value) in (16, 64) for value in (earlier[name], now[name]))
    if is_hash:
        return name
    before, after = _apart(repr(earlier[name]), repr(now[name]))
    return f"{name} ({before} {when[0]}, {after} {when[1]})"


def _apart(before: str, after: str) -> tuple[str, str]:
    """Cuts two long texts so that their first difference is visible."""
    same = len(os.path.commonprefix([before, after]))
    start = same - _MOST // 2 if same > _MOST * 3 // 4 else 0
    texts = [("…" if start else "") + text[start:] for text in (before, after)]
    return cut(texts[0], _MOST), cut(texts[1], _MOST)
