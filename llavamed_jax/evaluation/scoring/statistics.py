"""Bootstrap intervals of scores, and a paired test of the difference of two scores, both over whole images.

Questions about one image are not independent: if a model misreads an image, all of its answers may be wrong. So images
are drawn, or exchanged between two models, and never single questions. scipy draws indices of images, or flags of
exchanged images; the metrics of a draw are computed from one product with the sums of the images. Axis letters: N
items, I images, C columns of sums, M metrics, R resamples.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
EXACT_IMAGES = 16  # if at most this many images differ, all exchanges are tested, up to 65,536
EXCHANGES = 9999  # number of random exchanges if more images differ
_BLOCK = 2**22  # numbers in memory at a time; with many images, resamples are computed in parts
_EQUAL = 1e-9  # percent; two differences closer than this are equal but for rounding


@dataclass(frozen=True)
class Score:
    """M metrics that follow from sums over items.

    Attributes:
      names: the names of the M metrics.
      parts: the contribution of each item to the sums, float64 [N, C].
      percent: computes the metrics in percent [..., M] from sums [..., C]; NaN if no item counts.
    """

    names: tuple[str, ...]
    parts: np.ndarray
    percent: Callable[[np.ndarray], np.ndarray]


def mean(name: str, values: np.ndarray) -> Score:
    """Makes a `Score` of one metric that is a mean over items.

    Args:
      name: the name of the metric.
      values: fractions, float64 [N]; NaN for items that the metric does not apply to.
    """
    applies = ~np.isnan(values)
    return Score((name,), np.stack([np.where(applies, values, 0), applies], axis=-1), _mean_percent)


def _mean_percent(sums: np.ndarray) -> np.ndarray:
    total, count = sums[..., :1], sums[..., 1:]
    return np.divide(100 * total, count, out=np.full_like(total, np.nan), where=count > 0)


@dataclass(frozen=True)
class Resampled:
    """A score, and its metrics in a bootstrap over images.

    Attributes:
      score: the score.
      sums: the sums over the items of each image, float64 [I, C].
      drawn: the metrics of each draw, in percent, float64 [R, M]; R is 0 if there are fewer than two images.
    """

    score: Score
    sums: np.ndarray
    drawn: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """The metrics of all items, in percent, [M]."""
        return self.score.percent(self.sums.sum(axis=0))

    @property
    def support(self) -> np.ndarray:
        """The number of images that have items for each metric, [M]."""
        return np.count_nonzero(~np.isnan(self.score.percent(self.sums)), axis=0)


def resample(scores: Sequence[Score], images: Sequence[str], seed: int) -> list[Resampled]:
    """Draws I images out of I, `RESAMPLES` times, and computes all metrics of each draw.

    The bootstrap is Efron's, clustered by image.

    Args:
      scores: scores of the same N items.
      images: the image of each item.
      seed: seed of the resampling. The same images are drawn for every metric.
    """
    sums = [_by_image(score.parts, images) for score in scores]
    return [Resampled(*each) for each in zip(scores, sums, _draw(scores, sums, seed), strict=True)]


def intervals(resampled: Sequence[Resampled]) -> dict[str, float | None]:
    """Returns metrics in percent and their 95 % intervals, which are percentiles of the draws.

    Returns:
      `NAME`, `NAME_low` and `NAME_high` for each name. The value is None if no item counts, and the interval is None
      if fewer than two images count.
    """
    result = {}
    for each in resampled:
        values, support = each.values, each.support
        for column, name in enumerate(each.score.names):
            result[name] = _number(values[column])
            result[f"{name}_low"], result[f"{name}_high"] = _edges(each.drawn[:, column], support[column])
    return result


def compare(first: Sequence[Resampled], second: Sequence[Resampled], seed: int) -> dict[str, dict]:
    """Compares two models on the same questions: the difference of each metric, its 95 % interval, and a two-sided p.

    The interval is a paired bootstrap of the difference over images: each draw uses the same images for both models. p
    comes from the exchange test over images (Fisher's randomisation test; for means, the sign-flip test of the images'
    differences). Its null hypothesis is that the models are equal, so the answers about an image can be exchanged
    between them. p is the share of exchanges with a difference at least as large as observed. If at most `EXACT_IMAGES`
    images differ, all exchanges are tested; otherwise `EXCHANGES` random ones and the observed one (Phipson and Smyth
    2010). For one question an image and answers that are right or wrong, this is McNemar's exact test.

    Args:
      first: the scores of one model.
      second: the same scores of the other model, resampled with the same images and seed.
      seed: seed of the test.

    Returns:
      name -> `value` (first), `other` (second), `difference`, `low`, `high`, `p`. All are None if there are no items,
      and the interval is None if there are fewer than two images.
    """
    result = {}
    for one, other in zip(first, second, strict=True):
        values, other_values, support = one.values, other.values, np.minimum(one.support, other.support)
        p = _exchange_test(one.sums, other.sums, one.score.percent, seed)
        for column, name in enumerate(one.score.names):
            low, high = _edges(one.drawn[:, column] - other.drawn[:, column], support[column])
            result[name] = {
                "value": _number(values[column]),
                "other": _number(other_values[column]),
                "difference": _number(values[column] - other_values[column]),
                "low": low,
                "high": high,
                "p": _number(p[column]),
            }
    return result


def _by_image(parts: np.ndarray, images: Sequence[str]) -> np.ndarray:
    """Sums the items of each image: [N, C] -> [I, C]."""
    distinct, place = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    sums = np.zeros((len(distinct), parts.shape[1]))
    np.add.at(sums, place, parts)
    return sums


def _draw(scores: Sequence[Score], sums: Sequence[np.ndarray], seed: int) -> list[np.ndarray]:
    """Returns the metrics of each score, [R, M], for `RESAMPLES` draws of I images out of I. The seed fixes them."""
    num_images = len(sums[0]) if sums else 0
    if num_images < 2:
        return [np.full((0, len(score.names)), np.nan) for score in scores]
    import scipy.stats  # takes over half a second; a command that ends before it scores does without it

    def metrics(drawn: np.ndarray, axis: int) -> np.ndarray:
        """Computes the metrics of all scores, [M, R], from the indices of the drawn images, [R, I]."""
        row = num_images * np.arange(len(drawn))[:, None]
        counts = np.bincount((row + drawn.astype(int)).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(float)
        return np.concatenate([score.percent(counts @ total).T for score, total in zip(scores, sums, strict=True)])

    with warnings.catch_warnings():  # scipy warns of draws without an item; `_edges` leaves them out
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)
        found = scipy.stats.bootstrap((np.arange(num_images),), metrics, n_resamples=RESAMPLES,
                                      batch=max(1, _BLOCK // num_images), vectorized=True, method="percentile",
                                      rng=seed).bootstrap_distribution
    return np.split(found.T, np.cumsum([len(score.names) for score in scores])[:-1], axis=1)


def _edges(drawn: np.ndarray, num_images: int) -> tuple[float | None, float | None]:
    drawn = drawn[~np.isnan(drawn)]
    if num_images < 2 or not len(drawn):
        return None, None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _exchange_test(first: np.ndarray, second: np.ndarray, percent: Callable, seed: int) -> np.ndarray:
    """Returns the p of each metric, [M]; NaN if it has no items. Takes the sums of each image, [I, C]."""
    totals = first.sum(axis=0), second.sum(axis=0)
    observed = np.abs(percent(totals[0]) - percent(totals[1]))
    # [I', C]: the change of the first model's sums if one image is exchanged, for the I' images that differ.
    moved = (second - first)[np.any(first != second, axis=1)]
    if len(moved) < 2:  # exchanging the only image that differs gives the same absolute difference
        return np.where(np.isnan(observed), np.nan, 1.0)
    import scipy.stats

    def is_as_large(exchanged: np.ndarray, kept: np.ndarray, axis: int) -> np.ndarray:
        """Returns 1 for each metric that differs at least as much as observed, [R, M]; takes exchange flags [R, I']."""
        change = exchanged @ moved
        differences = np.abs(percent(totals[0] + change) - percent(totals[1] - change))
        return (differences >= observed - _EQUAL).astype(float)

    p = scipy.stats.permutation_test(
        (np.zeros(len(moved)), np.ones(len(moved))), is_as_large, permutation_type="samples", alternative="greater",
        vectorized=True, n_resamples=2**EXACT_IMAGES if len(moved) <= EXACT_IMAGES else EXCHANGES,
        batch=max(1, _BLOCK // len(moved)), rng=seed).pvalue
    return np.where(np.isnan(observed), np.nan, p)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
