"""The original's metrics of one answer, including their quirks, for comparison with published numbers."""

from llavamed_jax.datasets.sample import CLOSED, OPEN
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring.metric import Answered, Metric
from llavamed_jax.evaluation.scoring.strict import normalized


def open_values(answered: Answered) -> dict[str, float]:
    """Returns the metrics of an open answer; without candidates there is no `open_accuracy_candidates`."""
    predicted, gold = normalized(answered.text), normalized(answered.sample.answer)
    f1, precision, recall = metrics.f1(predicted, gold)
    item = {"exact_match": metrics.exact_match(predicted, gold), "f1": f1, "precision": precision, "recall": recall}
    item |= dict(zip(("bleu", "bleu_1", "bleu_2", "bleu_3"), metrics.bleu(gold, predicted), strict=True))
    if answered.candidates is not None:
        item["open_accuracy_candidates"] = metrics.candidate_accuracy(predicted, gold, answered.candidates)
    return item | {"open_accuracy_substring": metrics.is_substring_hit(predicted, gold)}


def closed_values(answered: Answered) -> dict[str, float]:
    """Returns the metrics of a closed answer."""
    predicted, gold = normalized(answered.text), normalized(answered.sample.answer)
    return {
        "closed_accuracy_yes_no": metrics.is_yes_no_hit(predicted, gold),
        "closed_accuracy_substring": metrics.is_substring_hit(predicted, gold),
        "closed_recall": metrics.f1(predicted, gold)[2],
    }


OPEN_METRICS = Metric("paper", OPEN, (
    "exact_match", "f1", "precision", "recall", "bleu", "bleu_1", "bleu_2", "bleu_3",
    "open_accuracy_candidates", "open_accuracy_substring",
), open_values, is_always_listed=True)  # fmt: skip
CLOSED_METRICS = Metric("paper", CLOSED, ("closed_accuracy_yes_no", "closed_accuracy_substring", "closed_recall"),
                        closed_values, is_always_listed=True)
