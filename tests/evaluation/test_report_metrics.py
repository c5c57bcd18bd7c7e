"""BLEU and ROUGE of reports, beside the packages that define them; what a missing package means."""

import random
from pathlib import Path

import numpy as np
import pytest

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.evaluation.scoring import sacre, score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.rouge_summary import rouge_l_summary

WORDS = ["The", "the", "heart", "is", "normal", "in", "size", "No", "no", "effusion", "or", "pneumothorax", ",", "lungs", "clear"]


def drawn(count, seed=0, longest=14):
    """Reports of up to four sentences, near each other half of the time; some are empty, without a dot, or dots alone."""
    rng = random.Random(seed)
    sentence = lambda: " ".join(rng.choices(WORDS, k=rng.randint(1, longest)))
    report = lambda: ". ".join(sentence() for _ in range(rng.randint(1, 4))) + rng.choice(["", ".", " .", "..", ".\n"])
    pairs = []
    for _ in range(count):
        reference = report()
        words = reference.split(" ")
        near = " ".join(word for word in words if rng.random() > 0.3) or "no"
        pairs.append((rng.choice([near, near, report(), report().lower(), reference]), reference))
    return pairs


# Printed by rouge 1.0.1: Rouge().get_scores(prediction, reference)[0]["rouge-l"]["f"]
PRINTED = [
    ("The heart is normal. No effusion.", "The heart is normal in size. There is no effusion.", 0.6666666618666668),
    ("normal heart. normal lungs.", "heart normal . lungs normal", 0.3333333283333334),
    ("no no no", "no", 0.999999995),
    ("clear", "The lungs are clear", 0.39999999680000003),
    ("Clear.", "clear.", 0.0),
]


def test_rouge_of_sentences_by_values_that_the_package_printed():
    for prediction, reference, printed in PRINTED:
        assert rouge_l_summary(prediction, reference) == pytest.approx(printed, rel=1e-12, abs=0), prediction
    assert [rouge_l_summary(*pair) for pair in (("", "a"), ("...", "a"), ("a", ""))] == [0, 0, 0], "the package raises"


def test_rouge_of_sentences_is_the_packages():
    rouge = pytest.importorskip("rouge", reason="the package rouge is not installed")
    for prediction, reference in drawn(300):
        assert rouge_l_summary(prediction, reference) == pytest.approx(
            rouge.Rouge().get_scores(prediction, reference)[0]["rouge-l"]["f"], rel=1e-12)


def scored(pairs):
    samples = [VqaSample(i, Path(f"{i % 7}.png"), "Q", reference, "CAPTION") for i, (_, reference) in enumerate(pairs)]
    lines = [{"question_id": i, "text": text} for i, (text, _) in enumerate(pairs)]
    return score.score(AnswerSet([*samples, VqaSample(-1, Path("0.png"), "Is it?", "yes", "CLOSED")], [*lines, {"question_id": -1, "text": "yes"}]))


def test_sacrebleu_is_the_packages_and_has_an_interval():
    sacrebleu = pytest.importorskip("sacrebleu", reason="sacrebleu, of the extra [reports], is not installed")
    for pairs in (drawn(60), drawn(9, 1, longest=2), [("", "a b")], [("a b c", "a b c")], [("x", "a b c d e")]):
        texts, references = zip(*pairs, strict=True)
        table = scored(pairs)["captions"]
        assert table["sacrebleu"] == pytest.approx(sacrebleu.corpus_bleu(list(texts), [list(references)]).score, rel=1e-12, abs=1e-12)
    table = scored(drawn(60))["captions"]
    assert table["sacrebleu_low"] < table["sacrebleu"] < table["sacrebleu_high"]
    assert table["sacrebleu"] != pytest.approx(table["bleu_4"], rel=1e-3), "other words, and smoothed"
    sums = np.array([sacre.parts(*pair) for pair in drawn(8)], dtype=float)
    assert sacre.percent(np.stack([sums, sums])).shape == (2, 8, 1) and np.isnan(sacre.percent(np.zeros((2, sacre.COLUMNS)))).all()


def test_without_the_package_it_is_null(monkeypatch):
    monkeypatch.setattr(sacre, "is_there", lambda: False)
    table = scored(drawn(5))["captions"]
    assert [table[f"sacrebleu{end}"] for end in ("", "_low", "_high")] == [None] * 3 and table["bleu_4"] is not None
