"""Intervals and the paired test against closed forms, scipy, and what they are said to be."""

import itertools
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from ml_collections import ConfigDict
from nltk.translate.bleu_score import corpus_bleu

from llavamed_jax.datasets.sample import VqaSample, clusters
from llavamed_jax.evaluation import toolkit
from llavamed_jax.evaluation.harness import Harness
from llavamed_jax.evaluation.judging import open_answers
from llavamed_jax.evaluation.scoring import captions, score, statistics
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.statistics import Score, mean, resample


def one_each(count):
    return [f"{i}.jpg" for i in range(count)]


def intervals(scores, images, seed):
    return statistics.intervals(resample(scores, images, seed))


def compare(first, second, images, seed):
    return statistics.compare(resample(first, images, seed), resample(second, images, seed), seed)


def fraction(values):
    return [mean("x", np.asarray(values, float))]


# --- intervals ---


def test_right_and_wrong_answers_have_the_quantiles_of_the_binomial():
    """One question an image: the bootstrap of a share p of n is Binomial(n, p) / n."""
    values = np.arange(200) < 60
    table = intervals(fraction(values), one_each(200), seed=0)
    assert table["x"] == 30
    low, high = scipy.stats.binom.ppf([0.025, 0.975], 200, 0.3) / 2  # in percent of 200
    assert abs(table["x_low"] - low) <= 0.5 and abs(table["x_high"] - high) <= 0.5, "to one answer, as 2,000 draws give it"


def test_images_are_drawn_and_not_questions():
    """40 images with 10 equal items each: the uncertainty is that of 40 draws, not of 400."""
    by_image = np.random.default_rng(3).random(40)
    images = [f"{i}.jpg" for i in range(40) for _ in range(10)]
    table = intervals(fraction(np.repeat(by_image, 10)), images, seed=1)
    assert table["x"] == pytest.approx(100 * by_image.mean())
    assert table["x_high"] - table["x_low"] == pytest.approx(2 * 1.96 * 100 * by_image.std() / np.sqrt(40), rel=0.1)
    assert table == intervals(fraction(np.repeat(by_image, 10)), images, seed=1)
    assert table != intervals(fraction(np.repeat(by_image, 10)), images, seed=2)


def unequal(seed=5, num_images=60):
    """Images with one to twelve questions; those about one image agree more than those about two."""
    rng = np.random.default_rng(seed)
    images = np.repeat(np.arange(num_images), rng.integers(1, 13, num_images))
    return (rng.random(num_images)[images] + 0.3 * rng.standard_normal(len(images))), [f"{i:03}.jpg" for i in images]


def test_images_of_different_size_make_a_ratio():
    """A drawn mean is sum / count of the drawn images; scipy's bootstrap of that ratio has the same quantiles."""
    values, images = unequal()
    place = np.unique(images, return_inverse=True)[1]
    sums, counts = np.bincount(place, values), np.bincount(place)
    found = scipy.stats.bootstrap((sums, counts), lambda s, n: s.sum(-1) / n.sum(-1), paired=True, vectorized=False, n_resamples=4000,
                                  method="percentile", rng=np.random.default_rng(1)).confidence_interval
    table = intervals(fraction(values), images, seed=0)
    width = 100 * (found.high - found.low)
    assert table["x"] == pytest.approx(100 * values.mean())
    assert abs(table["x_low"] - 100 * found.low) < 0.08 * width and abs(table["x_high"] - 100 * found.high) < 0.08 * width
    error = np.sqrt(np.sum((sums - values.mean() * counts) ** 2)) / len(values)  # of a ratio, linearised
    assert table["x_high"] - table["x_low"] == pytest.approx(2 * 1.96 * 100 * error, rel=0.1)


def test_nineteen_of_twenty_intervals_hold_the_truth():
    rng = np.random.default_rng(0)
    images = [f"{i}.jpg" for i in range(50) for _ in range(4)]
    hits = 0
    for seed in range(200):
        values = np.repeat(0.4 + 0.2 * rng.standard_normal(50), 4) + 0.1 * rng.standard_normal(200)
        table = intervals(fraction(values), images, seed)
        hits += table["x_low"] <= 40 <= table["x_high"]
    assert 180 <= hits <= 197, f"{hits} of 200; about 188 were expected of 50 images"


def test_a_metric_that_few_images_have():
    values = np.array([[1.0, np.nan, np.nan], [0.0, np.nan, np.nan], [1.0, 1.0, np.nan], [1.0, 0.0, 1.0]])
    table = intervals([mean(name, values[:, i]) for i, name in enumerate("xyz")], ["a", "b", "c", "d"], seed=0)
    assert table["x"] == 75 and table["y"] == 50
    assert (table["y_low"], table["y_high"]) == (0, 100)
    assert table["z"] == 100 and table["z_low"] is None is table["z_high"], "one image gives no interval"
    nothing = intervals(fraction([np.nan, np.nan]), ["a", "b"], seed=0)
    assert nothing == {"x": None, "x_low": None, "x_high": None} == intervals(fraction([]), [], seed=0)


def test_many_images_are_drawn_in_parts_that_make_the_same_whole(monkeypatch):
    values, images = unequal()
    whole = intervals(fraction(values), images, seed=4), compare(fraction(values), fraction(values[::-1]), images, seed=4)
    few = [fraction(values[:20]), fraction(values[20:40]), one_each(10) * 2]
    exact = compare(*few, seed=0)
    monkeypatch.setattr(statistics, "_BLOCK", 700)  # eleven draws of 60 images at a time, seventy exchanges of ten
    assert compare(*few, seed=0)["x"]["p"] == exact["x"]["p"] < 1
    assert whole[0] == pytest.approx(intervals(fraction(values), images, seed=4), rel=1e-12)
    assert whole[1]["x"] == pytest.approx(compare(fraction(values), fraction(values[::-1]), images, seed=4)["x"], rel=1e-12)


# --- two models ---


@pytest.mark.parametrize("better, worse", [(1, 0), (5, 0), (9, 2), (8, 8), (3, 13), (16, 0)])
def test_right_and_wrong_answers_are_mcnemars_exact_test(better, worse):
    first = np.array([1] * better + [0] * worse + [1] * 20 + [0] * 10)
    second = np.array([0] * better + [1] * worse + [1] * 20 + [0] * 10)
    row = compare(fraction(first), fraction(second), one_each(len(first)), seed=0)["x"]
    assert row["p"] == pytest.approx(scipy.stats.binomtest(better, better + worse).pvalue, rel=1e-12)
    assert row["difference"] == pytest.approx(100 * (better - worse) / len(first)) == pytest.approx(row["value"] - row["other"])


@pytest.mark.parametrize("count", [1, 2, 4, 9, 12])
def test_any_values_are_every_exchange_counted(count):
    """Images that do not differ stand among them, and the number of exchanges stays that of those that do."""
    rng = np.random.default_rng(count)
    difference = rng.integers(-3, 5, count) + 0.25
    signs = np.array(list(itertools.product((1, -1), repeat=count)))
    wanted = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-9)
    shared = rng.random(30)
    first, second = np.concatenate([difference, shared]), np.concatenate([np.zeros(count), shared])
    assert compare(fraction(first), fraction(second), one_each(len(first)), seed=0)["x"]["p"] == pytest.approx(wanted, rel=1e-12)


def test_ranks_are_wilcoxons_signed_rank_test():
    rng = np.random.default_rng(7)
    for _ in range(5):
        difference = rng.standard_normal(11) + 0.4
        ranks = np.sign(difference) * scipy.stats.rankdata(np.abs(difference))
        p = compare(fraction(ranks), fraction(np.zeros(11)), one_each(11), seed=0)["x"]["p"]
        assert p == pytest.approx(scipy.stats.wilcoxon(difference, method="exact").pvalue, rel=1e-12)


def test_whole_images_change_places():
    """Five images on which ten questions each favour one model: 2 of the 32 exchanges are as extreme, not 2 of 2^50."""
    images = [f"{i}.jpg" for i in range(5) for _ in range(10)]
    assert compare(fraction(np.ones(50)), fraction(np.zeros(50)), images, seed=0)["x"]["p"] == 2 / 32
    assert compare(fraction(np.ones(50)), fraction(np.zeros(50)), one_each(50), seed=0)["x"]["p"] == 1 / 10_000


@pytest.mark.parametrize("better, worse", [(20, 12), (30, 12), (17, 0), (25, 25)])
def test_of_many_images_exchanges_are_drawn(better, worse):
    """The drawn p is within what 9,999 draws give of the exact one, is never 0, and follows from the seed."""
    first, second = np.array([1] * better + [0] * worse), np.array([0] * better + [1] * worse)
    images = one_each(better + worse)
    row = compare(fraction(first), fraction(second), images, seed=0)["x"]
    exact = scipy.stats.binomtest(better, better + worse).pvalue
    assert row["p"] >= 1 / (statistics.EXCHANGES + 1)
    assert abs(row["p"] - exact) <= 4 * np.sqrt(exact * (1 - exact) / statistics.EXCHANGES) + 1 / statistics.EXCHANGES
    assert row == compare(fraction(first), fraction(second), images, seed=0)["x"]
    assert (row["p"] * (statistics.EXCHANGES + 1)) % 1 == pytest.approx(0, abs=1e-6), "the observed exchange is counted among them"


def test_equal_models_are_called_different_one_time_in_twenty():
    rng = np.random.default_rng(1)
    images = [f"{i}.jpg" for i in range(10) for _ in range(3)]
    ps = []
    for _ in range(400):
        shared = np.repeat(rng.standard_normal(10), 3)  # questions about one image agree: were they exchanged singly, p would be too small
        effect = np.repeat(rng.standard_normal(10), 3)
        ps.append(compare(fraction(shared + effect), fraction(shared), images, seed=0)["x"]["p"])
    assert 8 <= np.count_nonzero(np.array(ps) <= 0.05) <= 34
    assert 0.4 < np.mean(ps) < 0.6


def test_the_interval_is_of_the_paired_difference():
    values, images = unequal(seed=8)
    second = values - 0.05
    row = compare(fraction(values), fraction(second), images, seed=0)["x"]
    assert row["difference"] == pytest.approx(5) and row["low"] == pytest.approx(5) and row["high"] == pytest.approx(5)
    assert row["p"] == 1 / 10_000, "a constant gain on 60 images"
    noise = np.random.default_rng(0).standard_normal(len(values)) * 0.1
    row = compare(fraction(values), fraction(values - noise), images, seed=0)["x"]
    alone = intervals(fraction(noise), images, seed=0)
    assert (row["low"], row["high"]) == (pytest.approx(alone["x_low"]), pytest.approx(alone["x_high"]))


def test_equal_answers_and_no_items():
    values, images = unequal()
    row = compare(fraction(values), fraction(values), images, seed=0)["x"]
    assert (row["difference"], row["low"], row["high"], row["p"]) == (0, 0, 0, 1)
    nothing = compare(fraction([np.nan] * 3), fraction([np.nan] * 3), one_each(3), seed=0)["x"]
    assert set(nothing.values()) == {None}


def test_sums_in_another_order_are_no_other_difference():
    """Thirds that are added up in another order differ in their last digit; they still count as equally extreme."""
    first, second = np.array([1 / 3, 2 / 3, 0.1, 0.7, 1 / 7, 0.0]), np.array([0.0, 1 / 3, 0.7, 0.1, 0.0, 1 / 7])
    p = compare(fraction(first), fraction(second), one_each(6), seed=0)["x"]["p"]
    signs = itertools.product((1, -1), repeat=6)
    moved = [1 / 3, 1 / 3, -0.6, 0.6, 1 / 7, -1 / 7]
    assert p == sum(abs(sum(s * d for s, d in zip(each, moved, strict=True))) >= abs(sum(moved)) - 1e-12 for each in signs) / 64


def test_bleu_of_a_set_is_exchanged_image_by_image():
    """BLEU is no mean: every exchange is scored anew. Against nltk over all of them."""
    pairs = [("the heart is enlarged", "the heart is large"), ("no effusion is seen", "effusion"),
             ("left lung clear", "the left lung is clear"), ("mass", "a mass in the right lobe of the liver is seen")]  # fmt: skip
    references = ["the heart is enlarged today", "no pleural effusion is seen", "the left lung is clear", "mass in the liver is seen"]
    score = lambda texts: [Score(captions.BLEU, np.array([captions.bleu_parts(t, r) for t, r in zip(texts, references)], float),
                                 captions.bleu_percent)]
    row = compare(score([a for a, _ in pairs]), score([b for _, b in pairs]), one_each(4), seed=0)["bleu_2"]

    def bleu(texts):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return 100 * corpus_bleu([[r.split()] for r in references], [t.split() for t in texts], weights=(0.5, 0.5))

    differences = [bleu([pair[s] for pair, s in zip(pairs, swaps)]) - bleu([pair[1 - s] for pair, s in zip(pairs, swaps)])
                   for swaps in itertools.product((0, 1), repeat=4)]  # fmt: skip
    assert row["difference"] == pytest.approx(differences[0], rel=1e-9)
    assert row["p"] == np.count_nonzero(np.abs(differences) >= abs(differences[0]) - 1e-9) / 16


# --- scores ---


def test_whatever_is_reported_is_over_images():
    # Ten questions about an image that is read right, ten about one that is not. Of two images a draw has both, or one twice: the
    # interval has no end but 0 and 100. Questions, drawn singly, would give about 30 to 70, and a p of 1 / 512.
    samples = [VqaSample(i, Path("ab"[i % 2]), "Is it?", "yes", "CLOSED", question_type=("x", "y")[i // 2 % 2]) for i in range(20)]
    right = [{"question_id": s.question_id, "text": "yes" if s.image == Path("a") else "no"} for s in samples]
    wrong = [{"question_id": s.question_id, "text": "no"} for s in samples]
    metrics = score.score(AnswerSet(samples, right))
    tables = [metrics["strict"], *metrics["groups"]["question_type"].values(), score.tables(AnswerSet(samples, right, ()), 0)["strict"],
              score.difference(AnswerSet(samples, right), AnswerSet(samples, wrong), 0)]
    assert [(t["closed_accuracy"], t["closed_accuracy_low"], t["closed_accuracy_high"]) for t in tables] == [(50, 0, 100)] * 5
    row = score.compare(AnswerSet(samples, right), AnswerSet(samples, wrong))["strict"]["closed_accuracy"]
    assert (row["difference"], row["low"], row["high"], row["p"]) == (50, 0, 100, 1)
    assert tables[-1]["closed_accuracy_p"] == 1


# --- clusters ---


def several(number, *images, **fields):
    first, *more = (Path(image) for image in images)
    return VqaSample(number, first, "Q", "left", "OPEN", more_images=tuple(more), **fields)


@pytest.mark.parametrize("shown, wanted", [
    ([("a",), ("b",), ("a",)], "aba"), ([("a", "b"), ("c",), ("d", "b")], "aca"), ([("a",), ("b",), ("c",), ("c", "b"), ("a", "c")], "aaaaa"),
    ([("a", "x"), ("b", "y"), ("c", "y"), ("d", "x")], "abba"), ([("b", "a"), ("a",), ("c", "a")], "bbb")])
def test_questions_that_share_any_image_are_one_cluster(shown, wanted):
    assert clusters([several(i, *images) for i, images in enumerate(shown)]) == list(wanted)


def test_questions_of_one_source_are_one_cluster():
    samples = [several(0, "a", source="v"), several(1, "b"), several(2, "c", source="v"), several(3, "d", source="w"), several(4, "v", source="b")]
    assert clusters(samples) == ["a", "b", "a", "d", "v"], "a source is not an image of the same name"


def test_every_interval_draws_clusters(monkeypatch):
    """The whole set, its groups, the comparison, the toolkits and the judge: the second image connects questions everywhere."""
    samples = [several(i, f"{i}.png", f"{i % 3}_.png", organ="ab"[i % 2]) for i in range(12)]
    named = lambda questions: AnswerSet(questions, [{"question_id": s.question_id, "text": "left" if s.question_id < 5 else "no"} for s in questions])
    drawn, real = [], statistics.resample

    def noted(scores, images, seed):
        drawn.append(set(images))
        return real(scores, images, seed)

    monkeypatch.setattr(statistics, "resample", noted)
    score.score(named(samples))
    score.compare(named(samples), named(samples))
    cfg = ConfigDict({"data": {"name": "slake", "split": "test"}, "seed": 0, "scoring": "lmms_eval", "medevalkit": {}})
    for kit in (Harness(cfg, samples), toolkit.MedEvalKit(cfg, samples, None)):
        kit.score(named(kit.asked), "test")
    verdict = SimpleNamespace(value=True, text="right", finish_reason="stop", is_asked_again=False, error=None)
    judge = SimpleNamespace(verdicts=lambda prompts, title: [verdict] * len(prompts), summary=lambda verdicts: {}, estimate=lambda prompts: "",
                            prompt=SimpleNamespace(instruction=""), service=SimpleNamespace(where=""))
    open_answers.judge_open(judge, named(samples), 0)
    assert len(drawn) >= 8 and all(each <= {"0.png", "1.png", "2.png"} for each in drawn), drawn
