"""Compares the number of questions that were read with the published numbers of a data set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from llavamed_jax.datasets.registry import SETS
from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, OPEN, VqaSample, all_images, first_names
from llavamed_jax.errors import count_of

_COUNTED = {OPEN: "open", CLOSED: "closed", CHOICE: "multiple choice", CAPTION: "to be described"}


def describe(samples: Sequence[VqaSample], name: str, split: str, variant: str = "") -> str:
    """Returns one line with the counts of `samples`, and whether they equal the published ones.

    For a file in LLaVA-Med's format, the line names the data set with the same counts, if there is one.

    Args:
      samples: the questions.
      name: a name in `registry.SETS`.
      split: the split.
      variant: VQA-RAD's protocol, SLAKE's language or PathVQA's form; `(split, variant)` is a key of `published`.
    """
    kinds = Counter(sample.answer_type for sample in samples)
    images = first_names(all_images(samples))
    counts = (len(samples), len(set(images.values())), kinds[OPEN], kinds[CLOSED])
    shown = [kind for kind in _COUNTED if kinds[kind]] if kinds.keys() - {OPEN, CLOSED} else (OPEN, CLOSED)
    parts = ", ".join(f"{kinds[kind]} {_COUNTED[kind]}" for kind in shown)
    asked = f"{count_of(counts[0], 'question')} on {count_of(counts[1], 'image')}"
    line = f"{name} {split}{f' ({variant})' if variant else ''}: {asked}, {parts}"
    if name in SETS and SETS[name].is_conversations:
        same = [other.name for other in SETS.values()
                if any(of == split and wanted == counts for (of, _), wanted in other.published.items())]
        return line + (f", as published of {' or '.join(same)}" if same else "")
    published = SETS[name].published.get((split, variant)) if name in SETS else None
    if published is None or all(wanted in (None, count) for wanted, count in zip(published, counts, strict=True)):
        return line + (", as published" if published else "")
    parts = ", ".join(
        f"{count} {kind}" for count, kind in zip(published[2:], ("open", "closed"), strict=True) if count is not None)
    on = "" if published[1] is None else f" on {published[1]} images"
    return f"{line}; published: {published[0]} questions{on}" + (parts and f", {parts}")
