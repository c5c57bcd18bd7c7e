"""Lists every metric that is averaged over questions. To add one, write a file with a `Metric` and add a line here."""

from llavamed_jax.evaluation.scoring import captions, paper, strict
from llavamed_jax.evaluation.scoring.metric import Metric

METRICS: list[Metric] = [
    paper.OPEN_METRICS,
    paper.CLOSED_METRICS,
    strict.CLOSED_METRICS,
    strict.OPEN_METRICS,
    strict.CHOICE_METRICS,
    captions.CAPTION_METRICS,
]
_OWN_TABLES = ("paper", "strict", "captions")  # families with a table of their own in the report


def names_of(*families: str) -> tuple[str, ...]:
    """Returns the names of the metrics of some families; without an argument, of all families.

    Raises:
      ValueError: two metrics have the same name.
    """
    names = [name for metric in METRICS if not families or metric.family in families for name in metric.names]
    shared = {name for name in names if names.count(name) > 1}
    if shared:
        raise ValueError(f"several metrics are called {', '.join(sorted(shared))}; each name once was expected")
    return tuple(names)


def count_of(name: str) -> str:
    """Returns the key of `metrics.json` that counts the questions of a metric, such as `n_open`."""
    return next(f"n_{metric.kind.lower()}" for metric in METRICS if name in metric.names)


def further() -> dict[str, tuple[str, ...]]:
    """Returns the families without a table of their own in the report, and the names of their metrics."""
    families = dict.fromkeys(metric.family for metric in METRICS if metric.family not in _OWN_TABLES)
    return {family: names_of(family) for family in families}


def titles() -> dict[str, tuple[str, str]]:
    """Returns title and explanation of each metric that states them."""
    return {name: title for metric in METRICS for name, title in metric.titles.items()}
