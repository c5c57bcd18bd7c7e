"""The original's numbers: on its own published predictions, where they lie at hand, and on answers that no model should give.

The predictions are `llava/eval/eval_metrics/answer-file*.jsonl` of microsoft/LLaVA-Med, release v1.0.0. They are not part of
this project: LLAVAMED_ORIGINAL_PREDICTIONS names one of them, or the folder.
"""

import math
import os
import random
import re
from pathlib import Path

import pytest

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring import score, strict
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.predictions import join, read_predictions

VARIABLE = "LLAVAMED_ORIGINAL_PREDICTIONS"
# Spec, appendix A1, x 100; `open accuracy` there is `run_eval_batch`'s.
COLUMN = {
    "exact_match": 2.60796, "f1": 4.53966, "precision": 2.79774, "recall": 17.5326, "bleu_1": 2.60796, "bleu_2": 0.205507,
    "closed_accuracy_yes_no": 47.0588, "closed_accuracy_substring": 48.5294, "open_accuracy_substring": 11.1732, "closed_recall": 39.3382,
}  # fmt: skip


@pytest.fixture(scope="module")
def original_predictions():
    path = os.environ.get(VARIABLE)
    if not path:
        pytest.skip(f"{VARIABLE} does not name LLaVA-Med v1.0.0's answer-file*.jsonl")
    files = sorted(Path(path).glob("answer-file*.jsonl")) if Path(path).is_dir() else [Path(path)]
    return {file.name: read_predictions(file) for file in files}


@pytest.fixture(scope="module")
def rad(shared):
    return read_vqa_rad(shared / "data" / "vqa_rad", "test"), read_vqa_rad(shared / "data" / "vqa_rad", "train")


def test_the_published_column_comes_out_of_the_published_predictions(original_predictions, rad):
    samples, training = rad
    tables = {name: score.score(AnswerSet(samples, predictions, training))["paper"] for name, predictions in original_predictions.items()}
    fits = {name: {key: table[key] == pytest.approx(value, rel=5e-6) for key, value in COLUMN.items()} for name, table in tables.items()}
    assert [name for name, each in fits.items() if all(each.values())], f"no file gives the column; what fits: {fits}"


def test_every_published_prediction_scores_as_the_reference_says(original_predictions, rad):
    samples, _ = rad
    for predictions in original_predictions.values():
        check(samples, join(samples, predictions))


# --- the original's `evaluate_metrics.py` and `run_eval.py`, written a second time without shared code ---

MARKS = list(";/[]\"{}()=+\\_-><@`,?!")
DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split(), strict=True))


def reference_normalize(text):
    out = ""
    squeezed = bool(re.search(r"[0-9٠-٩],[0-9٠-٩]", text))
    for character in text:
        if character not in MARKS:
            out += character
        elif not (squeezed or character + " " in text or " " + character in text):
            out += " "
    kept, removed = "", 0
    for place, character in enumerate(out):
        before_digit = out[place + 1: place + 2].isdigit()
        if character == "." and not before_digit and removed < 32:
            removed += 1
        else:
            kept += character
    words = []
    for word in kept.lower().split():
        word = DIGITS.get(word, word)
        if word not in ("a", "an", "the"):
            words.append(metrics.CONTRACTIONS.get(word, word))
    return " ".join(words).replace(",", "")


def reference_open(prediction, gold):
    """§7.2 after `run_eval`'s own lowering and normalising of both sides; every function normalises once more."""
    prediction, gold = reference_normalize(prediction.lower()), reference_normalize(gold.lower())
    c, r = (reference_normalize(text).split() for text in (prediction, gold))
    hits = [word for word in c if word in r]
    missed = [word for word in r if word not in c]
    precision, recall = len(hits) / len(c) if c else 0, len(hits) / (len(hits) + len(missed)) if hits else 0
    return {
        "exact_match": len({word for word in r if word in c}) / len(c) if c else 0,
        "precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall) if hits else 0,
        "open_accuracy_substring": reference_normalize(gold) in reference_normalize(prediction),
        **dict(zip(("bleu", "bleu_1", "bleu_2", "bleu_3"), reference_bleu(prediction.lower().split(), gold.lower().split()), strict=True)),
    }  # fmt: skip


def reference_bleu(c, r):
    """Modified n-gram precisions and brevity penalty by hand; an order without a match is the smallest normal float."""
    grams = lambda words, n: [tuple(words[i: i + n]) for i in range(len(words) - n + 1)]
    precisions = []
    for n in range(1, 5):
        left, matches = grams(r, n), 0
        for gram in grams(c, n):
            if gram in left:
                left.remove(gram)
                matches += 1
        precisions.append(matches / max(1, len(grams(c, n))))
    if not precisions[0]:
        return 0, 0, 0, 0
    penalty = 1 if len(c) > len(r) else math.exp(1 - len(r) / len(c))
    logs = [math.log(p or 2.2250738585072014e-308) for p in precisions]
    return penalty * math.exp(sum(logs) / 4), *(penalty * math.exp(log) for log in logs[:3])


def reference_closed(prediction, gold):
    recall = reference_open(prediction, gold)["recall"]
    prediction, gold = (reference_normalize(reference_normalize(text.lower())) for text in (prediction, gold))
    found = gold in prediction
    return {"closed_accuracy_substring": found, "closed_accuracy_yes_no": found and ("yes" in prediction or "no" in prediction),
            "closed_recall": recall}  # fmt: skip


def check(samples, texts):
    predictions = [{"question_id": s.question_id, "text": t} for s, t in zip(samples, texts, strict=True)]
    table = score.score(AnswerSet(samples, predictions))["paper"]
    for kind, reference in (("OPEN", reference_open), ("CLOSED", reference_closed)):
        rows = [reference(text, str(sample.answer)) for sample, text in zip(samples, texts, strict=True) if sample.answer_type == kind]
        for name in rows[0] if rows else ():
            mean = 100 * sum(row[name] for row in rows) / len(rows)
            assert table[name] == pytest.approx(mean, rel=1e-9, abs=1e-300), (kind, name)


ADVERSARIAL = {
    "empty": "",
    "blanks": " \t\n \u3000\u00a0 ",
    "punctuation": "?!.,;:/[](){}=+\\_-><@`\"'…—",
    "full stops": "." * 40,
    "spaced full stops": "yes. " * 40,
    "unicode": "Œdème ÜBER ﬁbrosis ½ 肺炎 肺 ‏ﺮﺋﺔ 🫁 İI ß e\u0301",
    "lone surrogate": "left \ud83e lung",
    "null": "left\0lung",
    "separators": "left\u2028lung\x85no\x1cyes",
    "a thousand words": "The left lung, no; " * 250,
    "one long word": "yes" * 1000,
    "digits and commas": "1,000 x-ray - pre-op/left, 3.5 cm. .5",
    "arabic digits": "١,٢ x-ray",
    "articles": "a an the A An THE",
    "numbers": "none zero one ten eleven 10",
    "contractions": "dont isnt Im Ive somebody'd let's she's",
    "role": "Human: yes\nAssistant: no",
    "html": "<script>alert('left lung')</script>",
    "format": "{0} %s %(x)s \\n $HOME",
    "yes no": "yes no",
    "normal": "normal eyes",
}
GOLDS = ["left lung", "No", "yes", "the", "", ".", "x-ray", "3.5 cm", "1,000", "肺炎", "none", "Œdème", "left, lower lobe", "dont",
         "yes. " * 40]  # fmt: skip


def adversarial():
    """Every text against every gold, as a closed and as an open question."""
    samples, texts = [], []
    for kind in ("OPEN", "CLOSED"):
        for gold in GOLDS:
            for text in ADVERSARIAL.values():
                samples.append(VqaSample(len(samples), Path(f"{len(samples) % 7}.jpg"), "?", gold, kind))
                texts.append(text)
    return samples, texts


@pytest.mark.parametrize("name", ADVERSARIAL)
def test_what_no_model_should_say_scores_as_the_specification_says(name):
    samples = [VqaSample(n, Path(f"{n}.jpg"), "?", gold, kind) for n, (gold, kind) in
               enumerate([(gold, kind) for gold in GOLDS for kind in ("OPEN", "CLOSED")])]  # fmt: skip
    check(samples, [ADVERSARIAL[name]] * len(samples))


def test_random_texts_score_as_the_specification_says():
    rng = random.Random(0)
    pieces = [*"left the x-ray 1,000 none 3.5 dont (ct) lung. ÜBER … - . ? , yes no Two a".split()]
    samples = [VqaSample(n, Path(f"{n % 9}.jpg"), "?", " ".join(rng.choices(pieces, k=rng.randrange(6))), rng.choice(["OPEN", "CLOSED"]))
               for n in range(400)]  # fmt: skip
    check(samples, [rng.choice(["", " "]).join(rng.choices(pieces, k=rng.randrange(12))) for _ in samples])


@pytest.mark.parametrize("text, gold, kind, values", [
    # By hand. Forty full stops: 32 vanish in the evaluator, the other 8 in the metric.
    ("." * 40, "left", "OPEN", {"exact_match": 0, "f1": 0, "recall": 0, "open_accuracy_substring": 0, "bleu_1": 0}),
    ("." * 40, "", "OPEN", {"exact_match": 0, "recall": 0, "open_accuracy_substring": 100, "open_exact": 0, "open_f1": 0}),
    ("." * 40, ".", "CLOSED", {"closed_accuracy_substring": 100, "closed_accuracy_yes_no": 0, "closed_recall": 0, "closed_accuracy": 0}),
    # "yes." forty times: eight of the words keep their full stop for BLEU, which does not normalise; none for the others.
    ("yes. " * 40, "yes", "OPEN", {"recall": 100, "precision": 100, "f1": 100, "exact_match": 100 / 40, "bleu_1": 100 / 40,
                                   "open_exact": 0, "open_f1": 100 * 2 / 41}),
    ("yes. " * 40, "yes", "CLOSED", {"closed_accuracy": 100, "closed_accuracy_yes_no": 100, "closed_recall": 100}),
    # Three thousand times three words of gold and one other: repetition raises recall to 1, precision stays 2 of 3.
    ("The left lung, no; " * 3000, "left lower lung", "OPEN", {"recall": 100 * 6000 / 6001, "precision": 100 * 2 / 3,
                                                             "exact_match": 100 * 2 / 9000, "open_f1": 100 * 4 / 9003}),
    ("The left lung, no; " * 3000, "no", "CLOSED", {"closed_accuracy": 0, "closed_accuracy_yes_no": 100, "closed_recall": 100}),
    ("", "no", "CLOSED", {"closed_accuracy": 0, "closed_accuracy_yes_no": 0, "closed_accuracy_substring": 0, "closed_recall": 0}),
    ("", "", "OPEN", {"open_exact": 0, "open_f1": 0, "exact_match": 0, "f1": 0, "open_accuracy_substring": 100, "bleu": 0}),
    ("?!;,", "left", "OPEN", {"exact_match": 0, "recall": 0, "open_exact": 0, "open_f1": 0, "open_accuracy_substring": 0}),
    ("ÜBER\u0301", "über\u0301", "OPEN", {"open_exact": 100, "recall": 100, "bleu_1": 100}),
    ("肺炎", "肺", "OPEN", {"open_accuracy_substring": 100, "recall": 0, "open_exact": 0}),
])  # fmt: skip
def test_by_hand(text, gold, kind, values):
    result = score.score(AnswerSet([VqaSample(1, Path("a.jpg"), "?", gold, kind)], [{"question_id": 1, "text": text}]))
    found = result["paper"] | result["strict"]
    assert {name: found[name] for name in values} == {name: pytest.approx(value, rel=1e-12) for name, value in values.items()}


def test_the_whole_of_it_is_finite_and_within_its_bounds():
    samples, texts = adversarial()
    result = score.score(AnswerSet(samples, [{"question_id": s.question_id, "text": t} for s, t in zip(samples, texts, strict=True)]))
    for family in ("paper", "strict"):
        for name, value in result[family].items():
            assert value is None or 0 <= value <= 100, (family, name)
    for text in texts:
        assert strict.read_choice(text, ("left lung", "right lung")) is None or text in ("left lung",)
