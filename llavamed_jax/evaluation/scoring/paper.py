"""The original's metrics of one answer (`evaluation/metrics.py`), for comparison with published numbers."""

from llavamed_jax.datasets.sample import CLOSED, OPEN
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring.metric import Metric

OPEN_METRICS = Metric("paper", OPEN, (
    "exact_match", "f1", "precision", "recall", "bleu", "bleu_1", "bleu_2", "bleu_3",
    "open_accuracy_candidates", "open_accuracy_substring",
), lambda answered: metrics.open_values(answered.text, str(answered.sample.answer), answered.candidates),
    is_always_listed=True)  # fmt: skip
CLOSED_METRICS = Metric("paper", CLOSED, ("closed_accuracy_yes_no", "closed_accuracy_substring", "closed_recall"),
                        lambda answered: metrics.closed_values(answered.text, str(answered.sample.answer)),
                        is_always_listed=True)
