"""Captions and reports: BLEU and ROUGE-L between a generated and a reference text, as caption evaluations define them.

`bleu_n` is BLEU of the whole set (Papineni et al. 2002): n-gram matches of all texts are added up before anything is
divided, orders 1 to n weigh the same, one brevity penalty. It is what report-generation papers print. `sentence_bleu_n` is
the mean over texts, which every text moves alike, but where a text without any match of an order counts as 0. Both are
unsmoothed. `rouge_l` is the mean F1 of the longest common subsequence (Lin 2004), as the package rouge-score 0.1.2 computes
it without a stemmer. Neither sees whether a report is clinically right; the metrics that try to, need models of their own
(`NOT_COMPUTED`). N items; C columns of `bleu_parts`.
"""

import re
import sys
from collections.abc import Sequence

import numpy as np

from llavamed_jax.datasets.sample import CAPTION
from llavamed_jax.evaluation.metrics import bleu_score
from llavamed_jax.evaluation.scoring.metric import Metric

ORDERS = 4
BLEU = tuple(f"bleu_{n}" for n in range(1, ORDERS + 1))
SENTENCE_BLEU = tuple(f"sentence_bleu_{n}" for n in range(1, ORDERS + 1))
NOT_COMPUTED = ("CheXbert F1", "RadGraph F1", "RadCliQ", "GREEN", "BERTScore")
"""Clinical and learned metrics, which need weights that are not part of this project."""

_WORD = re.compile(r"[^\W_]+")
_ROUGE_WORD = re.compile(r"[a-z0-9]+")  # rouge-score's tokens: other letters part words and are lost


def words(text: str) -> list[str]:
    """Lower-cased runs of letters and digits, of any script: punctuation is not scored."""
    return _WORD.findall(text.lower())


def bleu_parts(prediction: str, reference: str) -> list[float]:
    """What BLEU adds up for one text, [C]: matches and n-grams of each order, words of prediction and reference, texts.

    Counting is nltk's: matches clipped by the reference, at least one n-gram where a text is shorter than n.
    """
    modified_precision, predicted, wanted = bleu_score().modified_precision, words(prediction), words(reference)
    counts = [modified_precision([wanted], predicted, n) for n in range(1, ORDERS + 1)]
    # A `Fraction` that nltk does not reduce: its numerator and denominator are the counts.
    return [*(c.numerator for c in counts), *(c.denominator for c in counts), len(predicted), len(wanted), 1]


def bleu_percent(sums: np.ndarray) -> np.ndarray:
    """BLEU-1 to BLEU-4 in percent, [..., 4], of sums of `bleu_parts`, [..., C]; NaN where no text was added."""
    matches, totals = sums[..., :ORDERS], sums[..., ORDERS:2 * ORDERS]
    predicted, wanted, texts = np.moveaxis(sums[..., 2 * ORDERS:], -1, 0)
    # nltk's: an order without a match counts as the smallest float, unless no word matches at all.
    precisions = np.where(matches > 0, matches / np.maximum(totals, 1), sys.float_info.min)
    means = np.cumsum(np.log(precisions), axis=-1) / np.arange(1, ORDERS + 1)
    # The brevity penalty, for predictions shorter than the references; without a predicted word no word matches.
    penalty = np.minimum(0, 1 - wanted / np.maximum(predicted, 1))
    scores = 100 * np.exp(means + penalty[..., None]) * (matches[..., :1] > 0)
    return np.where(texts[..., None] > 0, scores, np.nan)


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the longest common subsequence of words; 0 where there is none."""
    predicted, wanted = (_ROUGE_WORD.findall(text.lower()) for text in (prediction, reference))
    common = longest_common_subsequence(predicted, wanted)
    return 2 * common / (len(predicted) + len(wanted)) if common else 0.0


def longest_common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Its length. Bit-parallel (Hyyrö 2004): a row of the table is one whole number, so thousands of words take milliseconds."""
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
    """The metrics of one text that are averaged, as fractions: `rouge_l` and `SENTENCE_BLEU`."""
    sentence = bleu_percent(np.array(bleu_parts(prediction, reference), dtype=float)) / 100
    return {"rouge_l": rouge_l(prediction, reference)} | dict(zip(SENTENCE_BLEU, map(float, sentence), strict=True))


CAPTION_METRICS = Metric("captions", CAPTION, ("rouge_l", *SENTENCE_BLEU),
                         lambda answered: item_values(answered.text, str(answered.sample.answer)))
