"""Multiple choice and captions: how an answer is read, what a text scores, and what `metrics.json` says of either."""

import json
import random
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from nltk.translate.bleu_score import corpus_bleu

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.scoring import captions, score
from llavamed_jax.evaluation.scoring.items import AnswerSet, answer_candidates
from llavamed_jax.evaluation.scoring.strict import read_choice, right_choice

OPTIONS = ("right lung", "left lung", "both lungs", "neither")


def choice(number, answer, options=OPTIONS, image="a.jpg", **fields):
    return VqaSample(number, Path(image), "Where?", answer, "CHOICE", options=options, **fields)


def caption(number, answer, image="a.jpg", **fields):
    return VqaSample(number, Path(image), "Describe it.", answer, "CAPTION", **fields)


def answers(*texts):
    return [{"question_id": number, "text": text} for number, text in enumerate(texts)]


# --- multiple choice ---


@pytest.mark.parametrize(
    "text",
    ["B", "b", "B.", " (B) ", "[b]", "B)", "B:", "(B).", "**B**", "Answer: B", "answer:B", "The answer is B.", "the correct answer is (b)",
     "Final answer: B", "Option B", "The answer is option B", "left lung", "Left lung.", "the LEFT lung", "Answer: left lung",
     "B. left lung", "B) Left lung.", "(B) the left lung", "B: left lung", "The answer is B. Left lung"],
)  # fmt: skip
def test_the_second_option_is_named(text):
    assert read_choice(text, OPTIONS) == 1


@pytest.mark.parametrize(
    "text",
    ["", "E", "e)", "A or B", "A, B", "AB", "A. left lung", "(C) right lung", "B, since it is dark", "I think B", "left", "lung",
     "right lung and left lung", "It is the left lung", "AnswerB", "Answer:", "B left lung", "B. because A is wrong", "é", "!?", "1"],
)  # fmt: skip
def test_what_names_none_or_two_is_unread(text):
    assert read_choice(text, OPTIONS) is None


def test_options_that_are_letters_or_alike():
    assert read_choice("A", ("A", "B", "AB", "O")) == 0 and read_choice("AB", ("A", "B", "AB", "O")) == 2
    assert read_choice("B", ("B", "A")) is None, "as a letter the second, as a text the first"
    assert read_choice("the", ("A", "B")) is None, "what normalises to nothing is not every option that does"
    assert read_choice("left", ("left", "Left.", "right")) is None and read_choice("B", ("left", "Left.", "right")) == 1
    assert read_choice("two", ("2", "3")) == 0, "numbers are normalised as everywhere"
    assert read_choice("Z", tuple(map(str, range(26)))) == 25
    assert read_choice("choice", ("choice", "chance")) == 0


def test_the_right_option_is_found_and_bad_options_are_named():
    assert right_choice(choice(1, "both lungs")) == 2
    assert right_choice(choice(1, "Both lungs.")) == 2
    assert right_choice(choice(1, "b", options=("B", "b"))) == 1, "to the letter, where that tells them apart"
    for sample, message in (
        (choice(7, "x"), "question 7 has the answer 'x', which equals 0 of its 4 options; exactly one"),
        (choice(7, "x", options=("x", "x")), "which equals 2 of its 2 options"),
        (choice(7, "x", options=("x",)), "question 7 has 1 options; 2 to 26 were expected"),
        (choice(7, "x", options=()), "question 7 has 0 options"),
    ):
        with pytest.raises(UserError, match=message):
            right_choice(sample)


def test_multiple_choice_by_hand():
    samples = [choice(0, "left lung"), choice(1, "left lung", image="b.jpg"), choice(2, "neither", image="b.jpg"),
               choice(3, "yes", options=("no", "yes"), image="c.jpg")]  # fmt: skip
    result = score.score(AnswerSet(samples, answers("B", "(A)", "It is neither of them", "Yes.")))
    assert (result["n_choice"], result["n_open"], result["n_closed"], result["n_choice_unread"]) == (4, 0, 0, 1)
    assert result["strict"]["choice_accuracy"] == 50 and result["strict"]["open_f1"] is None
    assert result["baselines"]["majority_choice"] == 75 and result["baselines"]["majority_choice_letter"] == "B"
    assert result["baselines"]["chance_choice"] == pytest.approx(100 * (3 / 4 + 1 / 2) / 4)
    assert result["paper"]["recall"] is None and result["paper"]["closed_recall"] is None
    training = [choice("t", "neither"), choice("u", "left lung"), choice("v", "neither")]
    baselines = score.score(AnswerSet(samples, answers("B", "A", "A", "A"), training))["baselines"]
    assert (baselines["majority_choice"], baselines["majority_choice_letter"]) == (25, "D"), "the letter of the training rows"
    json.dumps(result, allow_nan=False)


# --- captions ---


@pytest.mark.parametrize(
    "prediction, reference, f1",
    [
        ("the cat sat on the mat", "the cat is on the mat", 2 * 5 / 12),
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004, section 3.1
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # order matters
        ("No acute process.", "no acute process", 1.0),
        ("a b c d", "d c b a", 1 / 4),
        ("a a a", "a", 2 / 4),
        ("3.5-cm mass", "3 5 cm Mass!", 1.0),
        ("mass", "tumour", 0.0),
        ("", "mass", 0.0),
        ("mass", "", 0.0),
        ("", "", 0.0),
        ("größe", "gr e", 1.0),  # other letters part words, as in rouge-score
    ],
)
def test_rouge_l_by_hand(prediction, reference, f1):
    assert captions.rouge_l(prediction, reference) == pytest.approx(f1, rel=1e-12)


WORDS = "the left lung is clear . no effusion 3-cm Mass, heart größe ; Ünïcode".split()


def texts(rng, most=14):
    return " ".join(rng.choices(WORDS, k=rng.randrange(most)))


def test_rouge_l_is_rouge_scores():
    rouge_scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the package rouge-score is not installed")
    scorer, rng = rouge_scorer.RougeScorer(["rougeL"]), random.Random(0)
    for _ in range(300):
        prediction, reference = texts(rng), texts(rng)
        assert captions.rouge_l(prediction, reference) == pytest.approx(scorer.score(reference, prediction)["rougeL"].fmeasure, abs=1e-12)


def test_the_longest_common_subsequence_is_the_tables():
    rng = random.Random(1)
    for _ in range(200):
        first, second = ([rng.choice("abcd") for _ in range(rng.randrange(90))] for _ in range(2))
        table = np.zeros((len(first) + 1, len(second) + 1), int)
        for i, one in enumerate(first):
            for j, other in enumerate(second):
                table[i + 1, j + 1] = table[i, j] + 1 if one == other else max(table[i, j + 1], table[i + 1, j])
        assert captions.longest_common_subsequence(first, second) == table[-1, -1]


def test_a_text_of_thousands_of_words_takes_no_time():
    rng = random.Random(2)
    long = " ".join(rng.choices(WORDS, k=20_000))
    begun = time.process_time()
    assert 0 < captions.rouge_l(long, " ".join(rng.choices(WORDS, k=20_000))) < 1
    assert time.process_time() - begun < 10, "a table of 400 million cells takes minutes"


def test_bleu_is_nltks():
    rng = random.Random(3)
    weights = [(1 / n,) * n for n in range(1, 5)]
    for _ in range(100):
        pairs = [(texts(rng), texts(rng)) for _ in range(rng.randrange(1, 6))]
        sums = np.sum([captions.bleu_parts(*pair) for pair in pairs], axis=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wanted = corpus_bleu([[captions.words(r)] for _, r in pairs], [captions.words(p) for p, _ in pairs], weights=weights)
        assert captions.bleu_percent(sums.astype(float)) == pytest.approx(100 * np.array(wanted), rel=1e-11, abs=0)


def test_bleu_by_hand():
    """Predicted: a b c d / e; references: a b c / e f g. Words 4 of 5, pairs 2 of 3 + 1 (an empty order counts as one)."""
    sums = np.array(captions.bleu_parts("a b c d", "a b c")) + captions.bleu_parts("e", "e f g")
    found = captions.bleu_percent(sums.astype(float))
    brevity = np.exp(1 - 6 / 5)
    assert found[:2] == pytest.approx([100 * brevity * 4 / 5, 100 * brevity * np.sqrt(4 / 5 * 2 / 4)], rel=1e-12)


def test_captions_by_hand():
    samples = [caption(0, "the heart is enlarged", modality="X-Ray"), caption(1, "no mass", image="b.jpg", modality="CT"),
               VqaSample(2, Path("b.jpg"), "Is it?", "yes", "CLOSED", modality="CT")]  # fmt: skip
    result = score.score(AnswerSet(samples, answers("the heart is enlarged", "a small mass", "yes")))
    table = result["captions"]
    assert (result["n_caption"], result["n_closed"]) == (2, 1)
    assert table["rouge_l"] == pytest.approx(100 * (1 + 2 / 5) / 2)
    assert table["bleu_1"] == pytest.approx(100 * 5 / 7), "of the set: four and one of seven words; as long as the references or longer"
    assert table["sentence_bleu_1"] == pytest.approx(100 * (1 + 1 / 3) / 2)
    assert table["sentence_bleu_4"] == pytest.approx(50), "a text without four right words in a row counts 0"
    assert table["not_computed"] == ["CheXbert F1", "RadGraph F1", "RadCliQ", "GREEN", "BERTScore"]
    names = [f"bleu_{n}" for n in range(1, 5)] + ["sacrebleu", "rouge_l", "rouge_l_summary"] + [f"sentence_bleu_{n}" for n in range(1, 5)]
    assert list(table) == [f"{name}{end}" for name in names for end in ("", "_low", "_high")] + ["not_computed"]
    assert table["bleu_1_low"] <= table["bleu_1"] <= table["bleu_1_high"]
    groups = result["groups"]["modality"]
    assert groups["CT"]["rouge_l"] == pytest.approx(40) and groups["X-Ray"]["rouge_l"] == 100 and groups["CT"]["closed_accuracy"] == 100
    assert result["strict"]["closed_accuracy"] == 100 and "choice_accuracy" not in result["strict"]
    json.dumps(result, allow_nan=False)


def test_a_set_without_them_says_nothing_of_them():
    result = score.score(AnswerSet([VqaSample(0, Path("a.jpg"), "Is it?", "yes", "CLOSED")], answers("yes")))
    assert (result["n_choice"], result["n_caption"]) == (0, 0)
    assert not {"captions", "n_choice_unread"} & set(result) and "choice_accuracy" not in result["strict"]


def test_the_control_of_captions_and_choices_is_paired():
    samples = [caption(0, "left lung"), choice(1, "neither", image="b.jpg")]
    found = score.difference(AnswerSet(samples, answers("left lung", "D")), AnswerSet(samples, answers("right lung", "A")), 0)
    assert found["rouge_l"] == pytest.approx(50) and found["choice_accuracy"] == 100 and found["closed_accuracy"] is None


def test_questions_of_one_kind_are_no_other_kind():
    samples = [choice(0, "left lung"), caption(1, "left lung")]
    assert answer_candidates(samples) == []
    with pytest.raises(UserError, match="answer type 'NUMBER'; CLOSED, OPEN, CHOICE or CAPTION was expected"):
        score.score(AnswerSet([replace(samples[0], answer_type="NUMBER")], answers("x")))
