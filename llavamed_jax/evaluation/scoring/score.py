"""Computes the numbers of `metrics.json`, in percent, from scored answers.

There are families of metrics. `paper` is what the original computes (`metrics.py`), for comparison with published
numbers. `strict` (`strict.py`) does what its names say: an answer is either right or wrong. `captions` (`captions.py`)
is there if the set has captioning questions.
"""

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, LETTERS, OPEN, VqaSample, all_images, kinds, of_kind
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring import captions, registry, statistics
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.leakage import leakage
from llavamed_jax.evaluation.scoring.predictions import prompt_counts
from llavamed_jax.evaluation.scoring.reader import plain
from llavamed_jax.evaluation.scoring.strict import is_strictly_right, is_unread, right_choice

GROUPS = ("question_type", "organ", "modality")


def group_keys(sample: VqaSample, group: str) -> list[str]:
    """Returns the values of a field by which a report is broken down; "not stated" if the data set has none.

    VQA-RAD gives some questions several types, joined by commas, and MMMU a list of kinds of image, whose names may
    have commas; such a question counts in each group.
    """
    value = getattr(sample, group, None)
    names = list(value) if isinstance(value, tuple) else [name.strip() for name in str(value or "").split(",")]
    return [name for name in names if name] or ["not stated"]


def counts(samples: Sequence[VqaSample]) -> dict[str, int]:
    """Returns `n_open`, `n_closed`, `n_choice`, `n_caption` and `n_images`."""
    found = Counter(kinds(samples))
    sizes = {f"n_{name.lower()}": found[name] for name in (OPEN, CLOSED, CHOICE, CAPTION)}
    return sizes | {"n_images": len({str(image) for image in all_images(samples)})}


def _groups(answers: AnswerSet, seed: int) -> dict:
    """Returns, for each value of each field that varies, strict metrics, the paper's open recall and ROUGE-L."""
    samples, scores = answers.samples, answers.families
    names = {*registry.names_of("strict"), "recall", "rouge_l"}
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
            drawn = [answers.clusters[i] for i in rows]
            part = [dataclasses.replace(score, parts=score.parts[rows]) for score in shown]
            result[group][key] = counts([samples[i] for i in rows]) | statistics.intervals(
                statistics.resample(part, drawn, seed))
    return result


def _baselines(samples: Sequence[VqaSample], training: Sequence[VqaSample]) -> dict:
    """Returns the accuracies of constant answers, in percent; None if there is no question of their kind.

    `majority_closed` always gives the most frequent closed answer of the training rows (of the questions themselves if
    there are no training rows), scored strictly. `constant_yes_no` always gives the text "yes no", scored as in the
    original's `run_eval`. With multiple-choice questions, `majority_choice` always gives the letter that is most often
    right, and `chance_choice` is the expected accuracy of random choices.
    """
    gold = Counter(str(sample.answer) for sample in of_kind(samples, CLOSED))
    result = {"majority_closed": None, "majority_closed_answer": None, "constant_yes_no": None}
    if gold:
        majority = _majority(Counter(str(sample.answer) for sample in of_kind(training, CLOSED)) or gold)
        share = lambda is_right: 100 * sum(n for answer, n in gold.items() if is_right(answer)) / gold.total()
        result = {
            "majority_closed": share(lambda answer: is_strictly_right(majority, answer)),
            "majority_closed_answer": majority,
            "constant_yes_no": share(lambda answer: metrics.is_yes_no_hit("yes no", answer)),
        }
    choices = of_kind(samples, CHOICE)
    if choices:
        places = [right_choice(sample) for sample in choices]
        source = [right_choice(sample) for sample in of_kind(training, CHOICE)] or places
        majority = Counter(source).most_common(1)[0][0]
        result |= {
            "majority_choice": 100 * places.count(majority) / len(places),
            "majority_choice_letter": LETTERS[majority],
            "chance_choice": 100 * float(np.mean([1 / len(sample.options) for sample in choices])),
        }
    return result


def _majority(answers: Counter[str]) -> str:
    """Returns the most frequent answer, as strict metrics compare it; of equally frequent ones, the first."""
    found = Counter()
    for answer, count in answers.items():
        found[plain(answer)] += count
    return found.most_common(1)[0][0]


def score(answers: AnswerSet, *, dataset: str = "", split: str = "", seed: int = 0) -> dict:
    """Scores a set of answers.

    Args:
      answers: the questions and their answers.
      dataset: the name of the data set, for the result.
      split: the name of the split, for the result.
      seed: seed of the bootstrap.

    Returns:
      The object of `metrics.json`: `dataset split unit n_open n_closed n_choice n_caption n_images n_prompts_cut
      n_without_question seed paper strict baselines groups leakage`; with closed questions `n_closed_unread` (answers
      to yes/no questions that say neither), with multiple choice `n_choice_unread`, with captions `captions`. Scores
      are in percent, and None if there is no item or no candidate.

    Raises:
      UserError: an answer type is unknown, or the options of a question do not contain its answer.
    """
    samples, training = answers.samples, answers.training
    families, sizes = tables(answers, seed), counts(samples)
    result = {"dataset": dataset, "split": split, "unit": "percent", **sizes,
              **prompt_counts(answers.predictions), "seed": seed}
    if sizes["n_closed"]:
        result["n_closed_unread"] = sum(is_unread(text, str(sample.answer)) for sample, text, kind
                                        in zip(samples, answers.texts, answers.kinds, strict=True) if kind == CLOSED)
    if sizes["n_choice"]:
        result["n_choice_unread"] = sum(place is None for place in answers.choices.values())
    return result | families | {
        "baselines": _baselines(samples, training),
        "groups": _groups(answers, seed),
        "leakage": leakage(samples, training) if training else None,
    }


def tables(answers: AnswerSet, seed: int) -> dict[str, dict]:
    """Returns only the families of `score`; a control is scored with it."""
    found = {family: statistics.intervals(scores) for family, scores in answers.resampled(seed).items()}
    if "captions" in found:
        found["captions"]["not_computed"] = list(captions.NOT_COMPUTED)
    return found


def compare(first: AnswerSet, second: AnswerSet, seed: int = 0) -> dict[str, dict]:
    """Compares two sets of answers to the same questions: family -> metric -> the numbers of `statistics.compare`.

    Args:
      first: the answers of one model.
      second: the answers of another; differences are `first` minus `second`.
      seed: seed of the bootstrap and the test.
    """
    others = second.resampled(seed)
    return {family: statistics.compare(scores, others[family], seed)
            for family, scores in first.resampled(seed).items()}


def difference(first: AnswerSet, second: AnswerSet, seed: int = 0) -> dict:
    """Compares two sets of answers, as `compare`, by the strict metrics and ROUGE-L.

    The result is flat: `NAME` (the difference), `NAME_low`, `NAME_high` and `NAME_p`.
    """
    pairs = [each["strict"] + [one for one in each.get("captions", []) if one.score.names == ("rouge_l",)]
             for each in (first.resampled(seed), second.resampled(seed))]
    flat = {}
    for name, row in statistics.compare(*pairs, seed).items():
        flat |= {name: row["difference"], f"{name}_low": row["low"], f"{name}_high": row["high"], f"{name}_p": row["p"]}
    return flat


def against(answers: AnswerSet, other: AnswerSet, seed: int) -> dict:
    """Compares answers with another model's predictions, and returns the object `against` of `metrics.json`.

    Returns:
      `file`, `model_id` (None if the file states none), `sha256`, and for each metric of each family `value`, `other`,
      `difference`, `low`, `high` and `p`.
    """
    other.warn_of_not_stated()
    file = {"file": str(other.file), "model_id": other.model or None, "sha256": other.sha256}
    return file | compare(answers, other, seed)
