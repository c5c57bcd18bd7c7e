"""From scored answers to the numbers of `metrics.json`, all in percent.

Families stand side by side. `paper` is what the original computes (`metrics.py`), so that published numbers can be
compared. `strict` is what the names promise (`strict.py`): an answer is right or it is not. `captions` (`captions.py`) is
there where the set has texts to generate.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, LETTERS, OPEN, VqaSample, kind
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring import captions, registry, statistics
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.leakage import leakage
from llavamed_jax.evaluation.scoring.statistics import Score
from llavamed_jax.evaluation.scoring.strict import comparable, is_strictly_right, right_choice

GROUPS = ("question_type", "organ", "modality")


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


def score(answers: AnswerSet, *, dataset: str = "", split: str = "", seed: int = 0) -> dict:
    """The numbers of a set of answers; the object that `metrics.json` holds.

    Args:
      dataset, split: names that are written down.
      seed: of the bootstrap.
    Returns:
      `dataset split unit n_open n_closed n_choice n_caption n_images seed paper strict baselines groups leakage`; with
      multiple choice `n_choice_unread`, with captions `captions`. Numbers are percent, None where no item or no
      candidate exists.
    Raises:
      UserError: an unknown answer type, options that do not hold the answer.
    """
    samples, training = answers.samples, answers.training
    families, sizes = tables(answers, seed), counts(samples)
    result = {"dataset": dataset, "split": split, "unit": "percent", **sizes, "seed": seed}
    if sizes["n_choice"]:
        result["n_choice_unread"] = sum(place is None for place in answers.choices.values())
    return result | families | {
        "baselines": _baselines(samples, training),
        "groups": _groups(samples, answers.families, seed),
        "leakage": leakage(samples, training) if training else None,
    }


def tables(answers: AnswerSet, seed: int) -> dict[str, dict]:
    """The families of `score` alone: what a control run is scored by."""
    found = {family: statistics.intervals(scores, answers.images, seed) for family, scores in answers.families.items()}
    if "captions" in found:
        found["captions"]["not_computed"] = list(captions.NOT_COMPUTED)
    return found


def compare(first: AnswerSet, second: AnswerSet, seed: int = 0) -> dict[str, dict]:
    """`first` minus `second` on the same questions: family -> metric -> `statistics.compare`'s numbers."""
    return {family: statistics.compare(scores, second.families[family], first.images, seed)
            for family, scores in first.families.items()}


def difference(first: AnswerSet, second: AnswerSet, seed: int = 0) -> dict:
    """The same for the strict metrics and captions' ROUGE-L, flat: `NAME`, `NAME_low`, `NAME_high` and `NAME_p`."""
    pairs = [each["strict"] + [score for score in each.get("captions", []) if score.names == ("rouge_l",)]
             for each in (first.families, second.families)]
    flat = {}
    for name, row in statistics.compare(*pairs, first.images, seed).items():
        flat |= {name: row["difference"], f"{name}_low": row["low"], f"{name}_high": row["high"], f"{name}_p": row["p"]}
    return flat


def against(answers: AnswerSet, other: AnswerSet, seed: int) -> dict:
    """What `metrics.json` holds under `against`: `file`, `model_id` (None where the file states none), `sha256`, and
    each family's metrics with `value`, `other`, `difference`, `low`, `high` and `p`."""
    other.warn_of_not_stated()
    file = {"file": str(other.file), "model_id": other.model or None, "sha256": other.sha256}
    return file | compare(answers, other, seed)
