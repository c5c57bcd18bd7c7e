"""From questions and predictions to the numbers of `metrics.json`, all in percent.

Two families stand side by side. `paper` is what the original computes (`metrics.py`), so that published numbers can be
compared. `strict` is what the names promise: an answer is right or it is not. Axis letters here: N items, I images,
M metrics, R resamples.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints.files import parse_json
from llavamed_jax.data.questions import VqaSample
from llavamed_jax.errors import UserError, some
from llavamed_jax.evaluation import metrics

PAPER_OPEN = (
    "exact_match", "f1", "precision", "recall", "bleu", "bleu_1", "bleu_2", "bleu_3",
    "open_accuracy_candidates", "open_accuracy_substring",
)  # fmt: skip
PAPER_CLOSED = ("closed_accuracy_yes_no", "closed_accuracy_substring", "closed_recall")
PAPER = PAPER_OPEN + PAPER_CLOSED
STRICT = ("closed_accuracy", "open_exact", "open_f1")
GROUPS = ("question_type", "organ", "modality")
_COLUMNS = {name: column for column, name in enumerate(PAPER + STRICT)}
_RESAMPLES = 2000


def read_predictions(path: str | Path) -> list[dict]:
    """Reads `predictions.jsonl`: one object a line with at least `question_id` and the text `text`.

    Raises UserError that names the line which is no such object, or the file that cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")  # an answer may hold other line separators
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the predictions {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    predictions = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        prediction = parse_json(line, f"{path}, line {number}")
        is_prediction = isinstance(prediction, dict) and "question_id" in prediction
        if not is_prediction or not isinstance(prediction.get("text"), str):
            raise UserError(f'{path}, line {number}: an object with "question_id" and the text "text" was expected')
        predictions.append(prediction)
    return predictions


def join(samples: Sequence[VqaSample], predictions: Iterable[Mapping]) -> list[str]:
    """The predicted text of each sample, by question id (10 and "10" are the same).

    Raises UserError with every kind of misfit at once: questions without a prediction, predictions for a question that
    is not asked, ids that occur twice on either side.
    """
    predictions = list(predictions)
    texts = {str(prediction["question_id"]): prediction["text"] for prediction in predictions}
    asked = Counter(str(sample.question_id) for sample in samples)
    answered = Counter(str(prediction["question_id"]) for prediction in predictions)
    problems = {
        "without a prediction": [name for name in asked if name not in answered],
        "predicted more than once": [name for name, count in answered.items() if count > 1],
        "predicted but not asked": [name for name in answered if name not in asked],
        "asked more than once": [name for name, count in asked.items() if count > 1],
    }
    if any(problems.values()):
        found = "; ".join(f"{len(ids)} {what} ({some(ids)})" for what, ids in problems.items() if ids)
        raise UserError(f"the predictions do not fit the {len(samples)} questions: {found}")
    return [texts[str(sample.question_id)] for sample in samples]


def is_closed(sample: VqaSample) -> bool:
    """Whether a question is of the closed kind. Raises UserError for an answer type that is neither CLOSED nor OPEN."""
    kind = sample.answer_type.strip().upper()
    if kind not in ("CLOSED", "OPEN"):
        raise UserError(f"question {sample.question_id} has the answer type {sample.answer_type!r}; CLOSED or OPEN was expected")
    return kind == "CLOSED"


def answer_candidates(training: Iterable[VqaSample]) -> list[str]:
    """Open answers of the training rows, unique, in order of first appearance.

    The original's candidate file was never released; on VQA-RAD's own training rows this gives 430 entries.
    """
    return list(dict.fromkeys(str(sample.answer) for sample in training if not is_closed(sample)))


def is_strictly_right(prediction: str, answer: str) -> bool:
    """Whether the normalised prediction is the normalised answer, or its first word is the right one of yes and no."""
    predicted, gold = metrics.normalize_word(prediction.lower()), metrics.normalize_word(answer.lower())
    return predicted == gold or (gold in ("yes", "no") and predicted.split()[:1] == [gold])


def multiset_f1(prediction: str, answer: str) -> float:
    """F1 of the two multisets of normalised words; two empty ones are equal."""
    predicted = Counter(metrics.normalize_word(prediction.lower()).split())
    gold = Counter(metrics.normalize_word(answer.lower()).split())
    if not predicted and not gold:
        return 1.0
    return 2 * (predicted & gold).total() / (predicted.total() + gold.total())


def item_values(samples: Sequence[VqaSample], texts: Sequence[str], candidates: Sequence[str] = ()) -> np.ndarray:
    """Every metric of every item as a fraction, float64 [N, M]; NaN where a metric does not apply to the item.

    Args:
      samples, texts: questions with their gold answers, and the predicted texts.
      candidates: answers for `open_accuracy_candidates`; where there are none that metric is NaN.
    """
    candidate_list = metrics.CandidateList(candidates) if candidates else None
    values = np.full((len(samples), len(_COLUMNS)), np.nan)
    for row, (sample, text) in zip(values, zip(samples, texts, strict=True), strict=True):
        item = _closed_item(sample, text) if is_closed(sample) else _open_item(sample, text, candidate_list)
        for name, value in item.items():
            row[_COLUMNS[name]] = value
    return values


def _as_original(text: object) -> str:
    """The original's evaluators lower and normalise both sides before the metric functions normalise them again."""
    return metrics.normalize_word(str(text).lower())


def _open_item(sample: VqaSample, text: str, candidates: metrics.CandidateList | None) -> dict[str, float]:
    predicted, gold = _as_original(text), _as_original(sample.answer)
    f1, precision, recall = metrics.f1(predicted, gold)
    item = {"exact_match": metrics.exact_match(predicted, gold), "f1": f1, "precision": precision, "recall": recall}
    item |= dict(zip(("bleu", "bleu_1", "bleu_2", "bleu_3"), metrics.bleu(gold, predicted), strict=True))
    if candidates is not None:
        item["open_accuracy_candidates"] = metrics.candidate_accuracy(predicted, gold, candidates)
    item["open_accuracy_substring"] = metrics.is_substring_hit(predicted, gold)
    item["open_exact"] = metrics.normalize_word(text.lower()) == gold
    item["open_f1"] = multiset_f1(text, str(sample.answer))
    return item


def _closed_item(sample: VqaSample, text: str) -> dict[str, float]:
    predicted, gold = _as_original(text), _as_original(sample.answer)
    return {
        "closed_accuracy_yes_no": metrics.is_yes_no_hit(predicted, gold),
        "closed_accuracy_substring": metrics.is_substring_hit(predicted, gold),
        "closed_recall": metrics.f1(predicted, gold)[2],
        "closed_accuracy": is_strictly_right(text, str(sample.answer)),
    }


def means_with_intervals(values: np.ndarray, images: Sequence[str], names: Sequence[str], seed: int) -> dict:
    """Means in percent and their 95 % intervals by bootstrap over images.

    Questions about one image are not independent, so whole images are drawn. A mean over no item is None, and so is an
    interval from fewer than two images.

    Args:
      values: fractions, float64 [N, M'], NaN where a metric does not apply.
      images: the image of each of the N items.
      names: the M' metrics.
      seed: of the resampling.
    Returns:
      `NAME`, `NAME_low` and `NAME_high` for each name.
    """
    _, image_index = np.unique(np.asarray(images, dtype=str), return_inverse=True)
    num_images = image_index.max() + 1 if len(image_index) else 0
    sums, counts = np.zeros((num_images, len(names))), np.zeros((num_images, len(names)))
    applies = ~np.isnan(values)
    np.add.at(sums, image_index, np.where(applies, values, 0))
    np.add.at(counts, image_index, applies)
    result = {}
    if num_images:
        rng = np.random.default_rng(seed)
        draws = rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=_RESAMPLES)  # [R, I]
        drawn_sums, drawn_counts = draws @ sums, draws @ counts  # [R, M']
    for column, name in enumerate(names):
        total = counts[:, column].sum() if num_images else 0
        result[name] = float(100 * sums[:, column].sum() / total) if total else None
        low = high = None
        if num_images and np.count_nonzero(counts[:, column]) > 1:
            has_items = drawn_counts[:, column] > 0
            means = 100 * drawn_sums[has_items, column] / drawn_counts[has_items, column]
            low, high = (float(edge) for edge in np.percentile(means, [2.5, 97.5]))
        result[f"{name}_low"], result[f"{name}_high"] = low, high
    return result


def _table(values: np.ndarray, images: Sequence[str], names: Sequence[str], seed: int) -> dict:
    return means_with_intervals(values[:, [_COLUMNS[name] for name in names]], images, names, seed)


def group_keys(sample: VqaSample, group: str) -> list[str]:
    """The values of a field that a report is broken down by; "not stated" where the data set has none.

    VQA-RAD joins the types of a question that has several by commas: such a question counts in each.
    """
    value = getattr(sample, group, None)
    names = [name.strip() for name in str(value or "").split(",")]
    return [name for name in names if name] or ["not stated"]


def _groups(samples: Sequence[VqaSample], values: np.ndarray, seed: int) -> dict:
    """Strict metrics and the paper's open recall for each value of each field that varies."""
    result = {}
    for group in GROUPS:
        keys = [group_keys(sample, group) for sample in samples]
        counts = Counter(key for several in keys for key in several)
        if len(counts) < 2:
            continue
        result[group] = {}
        for key, _ in counts.most_common():
            rows = [i for i, several in enumerate(keys) if key in several]
            images = [str(samples[i].image) for i in rows]
            closed = sum(is_closed(samples[i]) for i in rows)
            sizes = {"n_open": len(rows) - closed, "n_closed": closed, "n_images": len(set(images))}
            result[group][key] = sizes | _table(values[rows], images, (*STRICT, "recall"), seed)
    return result


def _baselines(samples: Sequence[VqaSample], training: Sequence[VqaSample]) -> dict:
    """What answers that look at nothing get on the closed questions, in percent.

    `majority_closed`: the most frequent closed answer of the training rows (of the questions themselves where there
    are no training rows), judged strictly. `constant_yes_no`: the text "yes no", judged as the original's `run_eval`.
    """
    gold = [str(sample.answer) for sample in samples if is_closed(sample)]
    if not gold:
        return {"majority_closed": None, "majority_closed_answer": None, "constant_yes_no": None}
    source = [str(sample.answer) for sample in training if is_closed(sample)] or gold
    majority = Counter(_as_original(answer) for answer in source).most_common(1)[0][0]
    return {
        "majority_closed": 100 * sum(is_strictly_right(majority, answer) for answer in gold) / len(gold),
        "majority_closed_answer": majority,
        "constant_yes_no": 100 * sum(metrics.is_yes_no_hit("yes no", answer) for answer in gold) / len(gold),
    }


def leakage(samples: Sequence[VqaSample], training: Sequence[VqaSample]) -> dict:
    """How much of the questions the training rows give away; counts, with the totals they are out of."""
    images = {str(sample.image) for sample in training}
    asked = {(str(s.image), _as_original(s.question)) for s in training}
    answered = {(str(s.image), _as_original(s.answer)) for s in training}
    open_samples = [sample for sample in samples if not is_closed(sample)]
    tested_images = {str(sample.image) for sample in samples}
    return {
        "training_rows": len(training),
        "images": len(tested_images),
        "images_in_training": len(tested_images & images),
        "questions": len(samples),
        "questions_in_training": sum((str(s.image), _as_original(s.question)) in asked for s in samples),
        "open_questions": len(open_samples),
        "open_answers_on_same_image_in_training": sum(
            (str(s.image), _as_original(s.answer)) in answered for s in open_samples
        ),
    }


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
      `dataset split unit n_open n_closed n_images seed paper strict baselines groups leakage`; numbers are percent,
      None where no item or no candidate exists.
    Raises:
      UserError: ids that do not fit, an answer type other than CLOSED and OPEN.
    """
    texts = join(samples, predictions)
    values = item_values(samples, texts, answer_candidates(training))
    images = [str(sample.image) for sample in samples]
    n_closed = sum(is_closed(sample) for sample in samples)
    return {
        "dataset": dataset,
        "split": split,
        "unit": "percent",
        "n_open": len(samples) - n_closed,
        "n_closed": n_closed,
        "n_images": len(set(images)),
        "seed": seed,
        "paper": _table(values, images, PAPER, seed),
        "strict": _table(values, images, STRICT, seed),
        "baselines": _baselines(samples, training),
        "groups": _groups(samples, values, seed),
        "leakage": leakage(samples, training) if training else None,
    }


def difference(samples: Sequence[VqaSample], predictions: Iterable[Mapping], others: Iterable[Mapping], seed: int) -> dict:
    """Strict metrics of `predictions` minus those of `others` on the same questions, paired, with 95 % intervals."""
    first, second = (item_values(samples, join(samples, either)) for either in (predictions, others))
    return _table(first - second, [str(sample.image) for sample in samples], STRICT, seed)
