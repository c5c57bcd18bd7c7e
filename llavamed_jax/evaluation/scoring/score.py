"""From questions and predictions to the numbers of `metrics.json`, all in percent.

Families stand side by side. `paper` is what the original computes (`metrics.py`), so that published numbers can be
compared. `strict` is what the names promise (`strict.py`): an answer is right or it is not. `captions` (`captions.py`) is
there where the set has texts to generate. Axis letters here: N items, M metrics.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, LETTERS, OPEN, VqaSample, kind
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring import captions, statistics
from llavamed_jax.evaluation.scoring.leakage import leakage
from llavamed_jax.evaluation.scoring.predictions import check_asked, join, read_predictions
from llavamed_jax.evaluation.scoring.statistics import Score
from llavamed_jax.evaluation.scoring.strict import (
    comparable,
    is_exactly_right,
    is_strictly_right,
    multiset_f1,
    normalized,
    read_choice,
    right_choice,
)

__all__ = ["join", "read_predictions"]  # stand here too, for whoever scores a file

PAPER_OPEN = (
    "exact_match", "f1", "precision", "recall", "bleu", "bleu_1", "bleu_2", "bleu_3",
    "open_accuracy_candidates", "open_accuracy_substring",
)  # fmt: skip
PAPER_CLOSED = ("closed_accuracy_yes_no", "closed_accuracy_substring", "closed_recall")
PAPER = PAPER_OPEN + PAPER_CLOSED
STRICT = ("closed_accuracy", "open_exact", "open_f1")
STRICT_CHOICE = "choice_accuracy"  # stands among the strict ones of a set that has multiple choice
CAPTION_MEANS = ("rouge_l", *captions.SENTENCE_BLEU)
GROUPS = ("question_type", "organ", "modality")
_COLUMNS = {name: column for column, name in enumerate((*PAPER, *STRICT, STRICT_CHOICE, *CAPTION_MEANS))}


def answer_candidates(training: Iterable[VqaSample]) -> list[str]:
    """Open answers of the training rows, unique, in order of first appearance.

    The original's candidate file was never released; on VQA-RAD's own training rows this gives 430 entries.
    """
    return list(dict.fromkeys(str(sample.answer) for sample in training if kind(sample) == OPEN))


def item_values(samples: Sequence[VqaSample], texts: Sequence[str], candidates: Sequence[str] = ()) -> np.ndarray:
    """Every metric of every item that is a mean over items, as a fraction, float64 [N, M]; NaN where it does not apply.

    Args:
      samples, texts: questions with their gold answers, and the predicted texts.
      candidates: answers for `open_accuracy_candidates`; where there are none that metric is NaN.
    """
    candidate_list = metrics.CandidateList(candidates) if candidates else None
    values = np.full((len(samples), len(_COLUMNS)), np.nan)
    for row, (sample, text) in zip(values, zip(samples, texts, strict=True), strict=True):
        for name, value in _item(sample, text, candidate_list).items():
            row[_COLUMNS[name]] = value
    return values


def _item(sample: VqaSample, text: str, candidates: metrics.CandidateList | None) -> dict[str, float]:
    name = kind(sample)
    if name == CLOSED:
        return _closed_item(sample, text)
    if name == OPEN:
        return _open_item(sample, text, candidates)
    if name == CHOICE:
        return {STRICT_CHOICE: read_choice(text, sample.options) == right_choice(sample)}
    return captions.item_values(text, str(sample.answer))


def _open_item(sample: VqaSample, text: str, candidates: metrics.CandidateList | None) -> dict[str, float]:
    predicted, gold = normalized(text), normalized(sample.answer)
    f1, precision, recall = metrics.f1(predicted, gold)
    item = {"exact_match": metrics.exact_match(predicted, gold), "f1": f1, "precision": precision, "recall": recall}
    item |= dict(zip(("bleu", "bleu_1", "bleu_2", "bleu_3"), metrics.bleu(gold, predicted), strict=True))
    if candidates is not None:
        item["open_accuracy_candidates"] = metrics.candidate_accuracy(predicted, gold, candidates)
    item["open_accuracy_substring"] = metrics.is_substring_hit(predicted, gold)
    item["open_exact"] = is_exactly_right(text, str(sample.answer))
    item["open_f1"] = multiset_f1(text, str(sample.answer))
    return item


def _closed_item(sample: VqaSample, text: str) -> dict[str, float]:
    predicted, gold = normalized(text), normalized(sample.answer)
    return {
        "closed_accuracy_yes_no": metrics.is_yes_no_hit(predicted, gold),
        "closed_accuracy_substring": metrics.is_substring_hit(predicted, gold),
        "closed_recall": metrics.f1(predicted, gold)[2],
        "closed_accuracy": is_strictly_right(text, str(sample.answer)),
    }


def families(samples: Sequence[VqaSample], texts: Sequence[str], candidates: Sequence[str] = ()) -> dict[str, list[Score]]:
    """The scores of `paper`, `strict` and, where the samples have captions, `captions`."""
    values = item_values(samples, texts, candidates)
    kinds = {kind(sample) for sample in samples}
    names = {"paper": PAPER, "strict": (*STRICT, STRICT_CHOICE) if CHOICE in kinds else STRICT}
    result = {family: [_mean(values, name) for name in members] for family, members in names.items()}
    if CAPTION in kinds:
        nothing = [0] * (2 * captions.ORDERS + 3)
        parts = [captions.bleu_parts(text, str(sample.answer)) if kind(sample) == CAPTION else nothing
                 for sample, text in zip(samples, texts, strict=True)]
        bleu = Score(captions.BLEU, np.array(parts, dtype=float), captions.bleu_percent)
        result["captions"] = [bleu, *(_mean(values, name) for name in CAPTION_MEANS)]
    return result


def _mean(values: np.ndarray, name: str) -> Score:
    return statistics.mean(name, values[:, _COLUMNS[name]])


def group_keys(sample: VqaSample, group: str) -> list[str]:
    """The values of a field that a report is broken down by; "not stated" where the data set has none.

    VQA-RAD joins the types of a question that has several by commas: such a question counts in each.
    """
    value = getattr(sample, group, None)
    names = [name.strip() for name in str(value or "").split(",")]
    return [name for name in names if name] or ["not stated"]


def counts(samples: Iterable[VqaSample]) -> dict[str, int]:
    """`n_open`, `n_closed`, `n_choice`, `n_caption` and `n_images`."""
    samples = list(samples)
    found = Counter(map(kind, samples))
    sizes = {f"n_{name.lower()}": found[name] for name in (OPEN, CLOSED, CHOICE, CAPTION)}
    return sizes | {"n_images": len({str(sample.image) for sample in samples})}


def _groups(samples: Sequence[VqaSample], scores: Mapping[str, Sequence[Score]], seed: int) -> dict:
    """For each value of each field that varies: strict metrics, the paper's open recall, captions' ROUGE-L."""
    names = {*STRICT, STRICT_CHOICE, "recall", "rouge_l"}
    shown = [score for family in scores.values() for score in family if names & set(score.names)]
    result = {}
    for group in GROUPS:
        keys = [group_keys(sample, group) for sample in samples]
        found = Counter(key for several in keys for key in several)
        if len(found) < 2:
            continue
        result[group] = {}
        for key, _ in found.most_common():
            rows = [i for i, several in enumerate(keys) if key in several]
            images = [str(samples[i].image) for i in rows]
            part = [dataclasses.replace(score, parts=score.parts[rows]) for score in shown]
            result[group][key] = counts(samples[i] for i in rows) | statistics.intervals(part, images, seed)
    return result


def _baselines(samples: Sequence[VqaSample], training: Sequence[VqaSample]) -> dict:
    """What answers that look at nothing get, in percent; None where there is no question of their kind.

    `majority_closed`: the most frequent closed answer of the training rows (of the questions themselves where there
    are no training rows), judged strictly. `constant_yes_no`: the text "yes no", judged as the original's `run_eval`.
    Where there is multiple choice, `majority_choice`: always the letter that is most often right, and `chance_choice`.
    """
    gold = [str(sample.answer) for sample in samples if kind(sample) == CLOSED]
    result = {"majority_closed": None, "majority_closed_answer": None, "constant_yes_no": None}
    if gold:
        source = [str(sample.answer) for sample in training if kind(sample) == CLOSED] or gold
        majority = Counter(map(comparable, source)).most_common(1)[0][0]
        result = {
            "majority_closed": 100 * sum(is_strictly_right(majority, answer) for answer in gold) / len(gold),
            "majority_closed_answer": majority,
            "constant_yes_no": 100 * sum(metrics.is_yes_no_hit("yes no", answer) for answer in gold) / len(gold),
        }
    choices = [sample for sample in samples if kind(sample) == CHOICE]
    if choices:
        places = [right_choice(sample) for sample in choices]
        source = [right_choice(sample) for sample in training if kind(sample) == CHOICE] or places
        majority = Counter(source).most_common(1)[0][0]
        result |= {
            "majority_choice": 100 * places.count(majority) / len(places),
            "majority_choice_letter": LETTERS[majority],
            "chance_choice": 100 * float(np.mean([1 / len(sample.options) for sample in choices])),
        }
    return result


def score(
    samples: Sequence[VqaSample],
    predictions: Iterable[Mapping],
    training: Sequence[VqaSample] = (),
    *,
    dataset: str = "",
    split: str = "",
    seed: int = 0,
) -> dict:
    """Scores predictions; the object that `metrics.json` holds.

    Args:
      samples: the questions with gold answers.
      predictions: objects with `question_id` and `text`, in any order, one for each sample.
      training: rows that answer candidates, the majority answer and the leakage counts come from.
      dataset, split: names that are written down.
      seed: of the bootstrap.
    Returns:
      `dataset split unit n_open n_closed n_choice n_caption n_images seed paper strict baselines groups leakage`; with
      multiple choice `n_choice_unread`, with captions `captions`. Numbers are percent, None where no item or no
      candidate exists.
    Raises:
      UserError: ids that do not fit, answers to another prompt or about another image, an unknown answer type, options that do
        not hold the answer.
    """
    predictions = list(predictions)
    texts = join(samples, predictions)
    check_asked(samples, predictions, has_controls=True)
    scores = families(samples, texts, answer_candidates(training))
    images = [str(sample.image) for sample in samples]
    sizes = counts(samples)
    result = {"dataset": dataset, "split": split, "unit": "percent", **sizes, "seed": seed}
    if sizes["n_choice"]:
        choices = [(sample, text) for sample, text in zip(samples, texts, strict=True) if kind(sample) == CHOICE]
        result["n_choice_unread"] = sum(read_choice(text, sample.options) is None for sample, text in choices)
    return result | _tables(scores, images, seed) | {
        "baselines": _baselines(samples, training),
        "groups": _groups(samples, scores, seed),
        "leakage": leakage(samples, training) if training else None,
    }


def tables(samples: Sequence[VqaSample], predictions: Iterable[Mapping], training: Sequence[VqaSample], seed: int) -> dict[str, dict]:
    """The families of `score` alone: what a control run is scored by."""
    scores = families(samples, join(samples, predictions), answer_candidates(training))
    return _tables(scores, [str(sample.image) for sample in samples], seed)


def _tables(scores: Mapping[str, Sequence[Score]], images: Sequence[str], seed: int) -> dict[str, dict]:
    found = {family: statistics.intervals(members, images, seed) for family, members in scores.items()}
    if "captions" in found:
        found["captions"]["not_computed"] = list(captions.NOT_COMPUTED)
    return found


def compare(
    samples: Sequence[VqaSample], predictions: Iterable[Mapping], others: Iterable[Mapping],
    training: Sequence[VqaSample] = (), *, seed: int = 0,
) -> dict[str, dict]:  # fmt: skip
    """`predictions` minus `others` on the same questions: family -> metric -> `statistics.compare`'s numbers."""
    candidates = answer_candidates(training)
    first, second = (families(samples, join(samples, either), candidates) for either in (predictions, others))
    images = [str(sample.image) for sample in samples]
    return {family: statistics.compare(first[family], second[family], images, seed) for family in first}


def difference(samples: Sequence[VqaSample], predictions: Iterable[Mapping], others: Iterable[Mapping], seed: int) -> dict:
    """The same for the strict metrics and captions' ROUGE-L, flat: `NAME`, `NAME_low`, `NAME_high` and `NAME_p`."""
    found = [families(samples, join(samples, either)) for either in (predictions, others)]
    pairs = [each["strict"] + [score for score in each.get("captions", []) if score.names == ("rouge_l",)] for each in found]
    flat = {}
    for name, row in statistics.compare(*pairs, [str(sample.image) for sample in samples], seed).items():
        flat |= {name: row["difference"], f"{name}_low": row["low"], f"{name}_high": row["high"], f"{name}_p": row["p"]}
    return flat
