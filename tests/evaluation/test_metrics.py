"""The original's metrics to the digit. Known answers were computed by the original code under nltk 3.8.1."""

import random

import pytest

from llavamed_jax.evaluation import metrics

SMALLEST = 2.2250738585072626e-308


@pytest.mark.parametrize(
    "text, expected",
    [
        ("1,000 x-ray", "1000 xray"),
        ("x-ray", "x ray"),
        ("both / left", "both left"),
        ("left,right", "left right"),
        ("left, right", "left right"),
        ("none", "0"),
        ("ten one", "10 1"),
        ("3.5 cm", "3.5 cm"),
        ("a. b. c", "b c"),
        ("a . b", "b"),
        ("the", ""),
        ("dont know", "don't know"),
        ("ct (a)", "ct"),
        ("1,2 - pre-op/left", "12 preopleft"),
        ("", ""),
        (" \t\n ", ""),
        ("?!;,(){}[]", ""),
        ("The LEFT Lung.", "left lung"),
        ("Im sure", "im sure"),  # the key with a capital never matches
        ("somebody'd", "somebodyd"),
        ("a: b* 50% it's", "a: b* 50% it's"),  # marks that are not among the 21 stay; here "a:" is no article
        (".5 mg. 1.5", ".5 mg 1.5"),
        ("pre-op, post-op", "pre op post op"),  # the comma stands before a blank, the hyphens do not
        ("pre -op post-op", "pre op postop"),  # one hyphen after a blank makes all of them vanish
        ("١,٢ x-ray", "١٢ xray"),  # digits of every script count as digits
        ("œdème – névé", "œdème – névé"),
    ],
)
def test_normalize_word(text, expected):
    assert metrics.normalize_word(text) == expected


def test_at_most_32_periods_go_in_one_pass():
    once = metrics.normalize_word("x. " * 40)
    assert once.count(".") == 8 and once.split()[:32] == ["x"] * 32
    assert metrics.normalize_word(once).count(".") == 0


def test_contractions_are_the_120_of_the_public_list():
    assert len(metrics.CONTRACTIONS) == 120
    assert [key for key in metrics.CONTRACTIONS if key != key.lower()] == ["Id've", "I'dve", "Im", "Ive"]
    for key, value in metrics.CONTRACTIONS.items():
        assert key.replace("'", "") == value.replace("'", ""), "a contraction differs by its apostrophes only"


@pytest.mark.parametrize(
    "candidate, reference, expected",
    [
        ("yes it is", "yes", (1 / 3, 1 / 2, 1 / 3, 1)),
        ("left lung left", "left lower lobe", (1 / 3, 4 / 7, 2 / 3, 1 / 2)),
        ("left lung left", "left", (1 / 3, 0.8, 2 / 3, 1)),
        ("right right right", "right", (1 / 3, 1, 1, 1)),
        ("ct", "ct ct", (1, 1, 1, 1)),
        ("", "yes", (0, 0, 0, 0)),
        ("yes", "", (0, 0, 0, 0)),
        ("", "", (0, 0, 0, 0)),
        ("?!", "the", (0, 0, 0, 0)),
        ("the left lung", "left", (1 / 2, 2 / 3, 1 / 2, 1)),
        ("One", "1", (1, 1, 1, 1)),
    ],
)
def test_exact_match_and_f1(candidate, reference, expected):
    assert metrics.exact_match(candidate, reference) == pytest.approx(expected[0], rel=1e-12)
    assert metrics.f1(candidate, reference) == pytest.approx(expected[1:], rel=1e-12)


@pytest.mark.parametrize(
    "prediction, reference, expected",
    [
        ("left lung", "left lung", 0),  # "left" is found whole, and earlier
        ("left lung", "left", 1),
        ("zzz", "left", 1),  # no overlap at all: candidate 0
        ("five", "5", 1),
        ("", "left", 1),
        ("the", "left", 1),
        ("right lung", "Right lung.", 1),
    ],
)
def test_candidate_accuracy(prediction, reference, expected):
    candidates = ["left", "right lung", "left lung", 5, "the", "upper left lung"]
    result = metrics.candidate_accuracy(prediction, reference, candidates)
    assert result == expected and isinstance(result, int)
    assert metrics.candidate_accuracy(prediction, reference, metrics.CandidateList(candidates)) == expected


def test_candidate_accuracy_keeps_the_callers_list_and_refuses_an_empty_one():
    candidates = ["The Left.", 5]
    assert metrics.candidate_accuracy("left", "left", candidates) == 1
    assert candidates == ["The Left.", 5]
    with pytest.raises(ValueError, match="candidates is empty"):
        metrics.candidate_accuracy("left", "left", [])


@pytest.mark.parametrize(
    "reference, candidate, expected",
    [
        ("left", "left", (1.821831989445342e-231, 1, SMALLEST, SMALLEST)),
        ("left lower lobe", "left lower lobe", (1.2213386697554703e-77, 1, 1, 1)),
        ("a b c d e", "a b c d x", (0.668740304976422, 0.8, 0.75, 2 / 3)),
        (
            "left lower lobe",
            "the left",
            (9.291879812217675e-232, 0.3032653298563167, 1.3495755153097447e-308, 1.3495755153097447e-308),
        ),
        ("Left", "LEFT", (1.821831989445342e-231, 1, SMALLEST, SMALLEST)),
        ("x", "y", (0, 0, 0, 0)),
        ("", "y", (0, 0, 0, 0)),
        ("x", "", (0, 0, 0, 0)),
        ("", "", (0, 0, 0, 0)),
    ],
)
def test_bleu(reference, candidate, expected):
    assert metrics.bleu(reference, candidate) == pytest.approx(expected, rel=1e-12, abs=0)


def test_bleu_does_not_normalise():
    assert metrics.bleu("left", "left.") == (0, 0, 0, 0)


@pytest.mark.parametrize(
    "prediction, reference, substring, yes_no",
    [
        ("normal", "no", True, True),
        ("eyes", "yes", True, True),
        ("left lung", "left", True, False),
        ("yes, left", "left", True, True),
        ("no", "yes", False, False),
        ("none", "no", False, False),  # "none" becomes 0 first
        ("", "no", False, False),
        ("anything", "", True, False),
    ],
)
def test_substring_accuracies(prediction, reference, substring, yes_no):
    assert metrics.is_substring_hit(prediction, reference) is substring
    assert metrics.is_yes_no_hit(prediction, reference) is yes_no


@pytest.mark.parametrize("prediction, reference", [
    ("The lungs are clear. " * 32 + "left. side", "left side"),
    ("Finding. " * 32 + "e.g. right. lower lobe", "right lower lobe"),
    ("ok. " * 33 + "n.o", "no"),
])
def test_substrings_are_looked_for_in_texts_that_were_normalised_once(prediction, reference):
    """A second pass would remove the 33rd period and find the reference."""
    assert metrics.open_values(prediction, reference, None)["open_accuracy_substring"] is False
    closed = metrics.closed_values(prediction, reference)
    assert closed["closed_accuracy_substring"] is closed["closed_accuracy_yes_no"] is False


def test_relations_that_hold_for_any_text():
    words = ["left", "the", "x-ray", "1,000", "none", "3.5", "dont", "(ct)", "lung.", "Ünïcode", "…", "-", "."]
    rng = random.Random(0)
    for _ in range(300):
        candidate = " ".join(rng.choices(words, k=rng.randrange(12)))
        reference = " ".join(rng.choices(words, k=rng.randrange(12)))
        f1, precision, recall = metrics.f1(candidate, reference)
        assert metrics.exact_match(candidate, reference) <= precision + 1e-12
        assert min(precision, recall) - 1e-12 <= f1 <= max(precision, recall) + 1e-12
        assert metrics.normalize_word(metrics.normalize_word(candidate)) == metrics.normalize_word(candidate)


def test_thousands_of_words():
    text = "left lung " * 5000
    assert metrics.f1(text, "left") == pytest.approx((2 / 3, 0.5, 1.0))
    assert metrics.bleu("left lung", text)[0] > 0
    assert metrics.normalize_word(text).count(" ") == 9999
