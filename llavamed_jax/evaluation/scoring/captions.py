"""Scores captions and reports: BLEU and ROUGE-L between a generated and a reference text.

`bleu_n` is corpus BLEU (Papineni et al. 2002): n-gram matches are summed over all texts before the division, orders 1
to n have equal weights, and there is one brevity penalty. Papers on report generation print this number.
`sentence_bleu_n` is the mean of the BLEU of each text. Every text has the same weight there, but a text without a match
of some order counts as 0. Both are unsmoothed. `rouge_l` is the mean F1 of the longest common subsequence (Lin 2004),
as the package rouge-score 0.1.2 computes it without a stemmer; `rouge_l_summary` is that of the package rouge
(`rouge_summary.py`), and `sacrebleu` that of sacreBLEU (`sacre.py`). These metrics do not measure whether a report is
clinically right; metrics that try to do so need models of their own (`NOT_COMPUTED`). Axis letters: N items, C columns
of `bleu_parts`.
"""

import re
import sys
from collections.abc import Sequence

import numpy as np

from llavamed_jax.datasets.sample import CAPTION
from llavamed_jax.evaluation.metrics import bleu_score
from llavamed_jax.evaluation.scoring.metric import Metric
from llavamed_jax.evaluation.scoring.rouge_summary import rouge_l_summary

ORDERS = 4
BLEU = tuple(f"bleu_{n}" for n in range(1, ORDERS + 1))
SENTENCE_BLEU = tuple(f"sentence_bleu_{n}" for n in range(1, ORDERS + 1))
NOT_COMPUTED = ("CheXbert F1", "RadGraph F1", "RadCliQ", "GREEN", "BERTScore")
"""Clinical and learned metrics, which need weights that are not part of this project."""

_WORD = re.compile(r"[^\W_]+")
_ROUGE_WORD = re.compile(r"[a-z0-9]+")  # rouge-score's tokens: any other character ends a word and is dropped


def words(text: str) -> list[str]:
    """Returns the lower-cased runs of letters and digits, in any script; punctuation is dropped."""
    return _WORD.findall(text.lower())


def bleu_parts(prediction: str, reference: str) -> list[float]:
    """Returns the counts of one text that BLEU sums over texts, [C].

    The columns are the matches of each order, the n-grams of each order, the words of the prediction, the words of the
    reference, and 1 for the text. nltk counts: matches are clipped by the reference, and a text shorter than n counts
    as one n-gram.
    """
    modified_precision, predicted, wanted = bleu_score().modified_precision, words(prediction), words(reference)
    counts = [modified_precision([wanted], predicted, n) for n in range(1, ORDERS + 1)]
    # nltk returns a `Fraction` that it does not reduce, so numerator and denominator are the counts.
    return [*(c.numerator for c in counts), *(c.denominator for c in counts), len(predicted), len(wanted), 1]


def bleu_percent(sums: np.ndarray) -> np.ndarray:
    """Returns BLEU-1 to BLEU-4 in percent, [..., 4], from sums of `bleu_parts`, [..., C]; NaN for sums over no text."""
    matches, totals = sums[..., :ORDERS], sums[..., ORDERS:2 * ORDERS]
    predicted, wanted, texts = np.moveaxis(sums[..., 2 * ORDERS:], -1, 0)
    # As in nltk, an order without a match counts as the smallest float, unless no word matches at all.
    precisions = np.where(matches > 0, matches / np.maximum(totals, 1), sys.float_info.min)
    means = np.cumsum(np.log(precisions), axis=-1) / np.arange(1, ORDERS + 1)
    # The logarithm of the brevity penalty. If no word is predicted, no word matches, and the score is 0 below.
    penalty = np.minimum(0, 1 - wanted / np.maximum(predicted, 1))
    scores = 100 * np.exp(means + penalty[..., None]) * (matches[..., :1] > 0)
    return np.where(texts[..., None] > 0, scores, np.nan)


def rouge_l(prediction: str, reference: str) -> float:
    """Returns the F1 of the longest common subsequence of words, a fraction."""
    predicted, wanted = (_ROUGE_WORD.findall(text.lower()) for text in (prediction, reference))
    common = longest_common_subsequence(predicted, wanted)
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Returns the length of the longest common subsequence.

    The algorithm is bit-parallel (Hyyrö 2004): a row of the table is one integer, so thousands of words take
    milliseconds.
    """
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for word in second:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & everywhere
    return len(first) - row.bit_count()


def item_values(prediction: str, reference: str) -> dict[str, float]:
    """Returns the metrics of one text that are averaged over texts, as fractions: both ROUGE-L and `SENTENCE_BLEU`."""
    sentence = bleu_percent(np.array(bleu_parts(prediction, reference), dtype=float)) / 100
    rouges = {"rouge_l": rouge_l(prediction, reference), "rouge_l_summary": rouge_l_summary(prediction, reference)}
    return rouges | dict(zip(SENTENCE_BLEU, map(float, sentence), strict=True))


CAPTION_METRICS = Metric("captions", CAPTION, ("rouge_l", "rouge_l_summary", *SENTENCE_BLEU),
                         lambda answered: item_values(answered.text, str(answered.sample.answer)))
