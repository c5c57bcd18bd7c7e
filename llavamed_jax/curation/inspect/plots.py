"""Draws plots as SVG texts, which a page holds and no network is needed for."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from markupsafe import Markup, escape

_WIDTH = 1070
_COLORS = ("#3f7cac", "#5f97c0", "#82b1d2", "#a6c8e0", "#c6dcec")
_OTHER, _INK, _SOFT = "#e6ebf0", "#1c2733", "#5d6b7a"
MOST_VERBS, _NOUNS = 16, 5
_LETTER = 6.6  # pixels of a letter of 12 px, at most
_BINS = 40


def bars(counts: Mapping[str, int], whole: int) -> Markup:
    """Draws one bar for each name, with its count and share of the whole."""
    names = sorted(counts, key=lambda name: (-counts[name], name))
    most = max(counts.values(), default=1)
    lines = []
    for row, name in enumerate(names):
        y, width = 24 * row, 600 * counts[name] / most
        says = f"{counts[name]:,} ({100 * counts[name] / max(whole, 1):.1f} %)"
        lines += [_text(190, y + 15, name, "end", _most=28), _box(200, y + 3, max(width, 1), 16, _COLORS[0]),
                  _text(206 + width, y + 15, says, color=_SOFT)]
    return _svg(lines, 24 * len(names), "bar chart")


def histogram(values: Sequence[int], unit: str) -> Markup:
    """Draws how often lengths occur, up to the 99th percentile; the last bar has all longer ones."""
    array = np.asarray(values)
    top = max(float(np.percentile(array, 99)), 1.0)
    width = max(1, math.ceil(top / _BINS))
    counts = np.bincount(np.minimum(array // width, math.ceil(top / width)))
    most, step, lines = counts.max(), (_WIDTH - 20) / len(counts), []
    for place, count in enumerate(counts):
        height = 120 * count / most
        says = f"{place * width:,} {unit} and more" if place == len(counts) - 1 else (
            f"{place * width:,} to {(place + 1) * width - 1:,} {unit}" if width > 1 else f"{place} {unit}")
        box = _box(10 + place * step, 125 - height, step - 1, height, _COLORS[0])
        lines.append(f"<g><title>{says}: {count:,}</title>{box}</g>")
        if place % max(1, len(counts) // 10) == 0:
            lines.append(_text(10 + place * step, 142, f"{place * width:,}", color=_SOFT))
    return _svg(lines, 150, f"histogram of lengths in {unit}")


def verb_nouns(counts: Mapping[tuple[str, str], int]) -> Markup:
    """Draws a bar of the same length for each of the most frequent verbs, divided among its most frequent nouns."""
    verbs: Counter[str] = Counter()
    for (verb, _), count in counts.items():
        verbs[verb] += count
    lines = []
    for row, (verb, total) in enumerate(sorted(verbs.items(), key=lambda item: (-item[1], item[0]))[:MOST_VERBS]):
        y, x = 30 * row, 150.0
        lines.append(_text(140, y + 19, f"{verb}  {total:,}", "end"))
        nouns = sorted(((count, noun) for (one, noun), count in counts.items() if one == verb),
                       key=lambda item: (-item[0], item[1]))
        parts = [(noun, count, color) for (count, noun), color in zip(nouns[:_NOUNS], _COLORS, strict=False)]
        if rest := sum(count for count, _ in nouns[_NOUNS:]):
            parts.append((f"{len(nouns) - _NOUNS} others", rest, _OTHER))
        for place, (noun, count, color) in enumerate(parts):
            width = (_WIDTH - 160) * count / total
            label = f"{noun} {count:,}"
            if len(label) * _LETTER > width - 6:
                label = noun if len(noun) * _LETTER <= width - 6 else ""
            ink = "#fff" if place < 2 and color != _OTHER else _INK
            drawn = _box(x, y + 3, max(width - 1, 0.5), 24, color)
            drawn += _text(x + 4, y + 19, label, color=ink) if label else ""
            lines.append(f"<g><title>{escape(verb)} {escape(noun)}: {count:,}</title>{drawn}</g>")
            x += width
    return _svg(lines, 30 * min(len(verbs), MOST_VERBS), "verbs and nouns of the questions")


def _box(x: float, y: float, width: float, height: float, color: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" fill="{color}"/>'


def _text(x: float, y: float, text: str, anchor: str = "start", color: str = _INK, _most: int = 80) -> str:
    text = text if len(text) <= _most else text[:_most - 1] + "…"
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}">{escape(text)}</text>'


def _svg(lines: Sequence[str], height: float, label: str) -> Markup:
    body = "\n".join(lines)
    box = f"0 0 {_WIDTH} {max(height, 1):.0f}"
    return Markup(f'<svg class="plot" viewBox="{box}" role="img" aria-label="{escape(label)}">\n{body}\n</svg>')
