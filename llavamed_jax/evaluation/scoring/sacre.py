"""Corpus BLEU as sacreBLEU (Post 2018) computes it, which papers since 2019 state by its signature.

It differs from `captions.BLEU`: words are those of the tokenizer 13a (case and punctuation count), and an order without
a match is smoothed (`exp`). The signature is `nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp`. The package, of the extra
`[reports]`, counts and computes; without it the metric is None. Axis letters: C columns of `parts`.
"""

import functools
import importlib.util
from collections.abc import Sequence

import numpy as np

from llavamed_jax.evaluation.scoring.statistics import Score

NAME = "sacrebleu"
ORDERS = 4
COLUMNS = 2 * ORDERS + 3


def is_there() -> bool:
    """Returns whether the package is installed."""
    return importlib.util.find_spec("sacrebleu") is not None


@functools.cache
def _bleu():
    from sacrebleu.metrics import BLEU  # of an extra

    return BLEU(effective_order=True)  # matters only for the score of a sentence, which is not used


def parts(prediction: str, reference: str) -> list[int]:
    """Returns the counts of one text that BLEU sums over texts, [C].

    The columns are the matches of each order, the n-grams of each order, the tokens of the prediction, the tokens of
    the reference, and 1 for the text.
    """
    found = _bleu().sentence_score(prediction, [reference])
    return [*found.counts, *found.totals, found.sys_len, found.ref_len, 1]


def percent(sums: np.ndarray) -> np.ndarray:
    """Returns BLEU in percent, [..., 1], from sums of `parts`, [..., C]; NaN for sums over no text."""
    rows = sums.reshape(-1, COLUMNS)
    return np.array([_percent(row) for row in rows.astype(int).tolist()], dtype=float).reshape(*sums.shape[:-1], 1)


def _percent(row: list[int]) -> float:
    if not row[-1]:
        return float("nan")
    matches, totals, (predicted, wanted) = row[:ORDERS], row[ORDERS:2 * ORDERS], row[2 * ORDERS:-1]
    return _bleu().compute_bleu(matches, totals, predicted, wanted, smooth_method="exp").score


def score(predictions: Sequence[str], references: Sequence[str | None]) -> Score:
    """Returns the metric as a score over items.

    Args:
      predictions: the answers.
      references: the reference texts; None for an item that is no caption.
    """
    nothing = [0] * COLUMNS
    counts = [nothing if reference is None or not is_there() else parts(text, reference)
              for text, reference in zip(predictions, references, strict=True)]
    return Score((NAME,), np.array(counts, dtype=float).reshape(len(counts), COLUMNS), percent)
