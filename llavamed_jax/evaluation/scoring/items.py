"""A set of predictions, joined to its questions once and scored once.

Scores, comparisons, controls, the judge and the report all take an `AnswerSet`. Axis letters: N items, M metrics.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llavamed_jax.datasets.sample import CAPTION, CHOICE, OPEN, VqaSample, clusters, kinds, of_kind
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring import captions, registry, sacre, statistics
from llavamed_jax.evaluation.scoring.metric import Answered
from llavamed_jax.evaluation.scoring.predictions import check_asked, join, read_predictions
from llavamed_jax.evaluation.scoring.statistics import Resampled, Score
from llavamed_jax.evaluation.scoring.strict import asks_letter, read_choice
from llavamed_jax.utils.files import read_bytes
from llavamed_jax.utils.hashes import sha256


def answer_candidates(training: Sequence[VqaSample]) -> list[str]:
    """Returns the distinct open answers of the training rows, in order of first appearance.

    The original's file of candidates was never released. VQA-RAD's own training rows give 430 candidates.
    """
    return list(dict.fromkeys(str(sample.answer) for sample in of_kind(training, OPEN)))


class AnswerSet:
    """The answers of one model to all questions, about their own images or about the images of a control.

    The constructor joins predictions and questions. Items are scored once, when the first score is read.

    Args:
      samples: the N questions with gold answers.
      predictions: objects with `question_id` and `text`, one for each sample, in any order.
      training: training rows, from which the answer candidates, the majority answer and the leakage counts are
        computed.
      is_control_allowed: whether predictions may state that they belong to a control.

    Attributes:
      texts: the predicted text of each sample.
      file: the file that `read` read; None for predictions from memory.
      sha256: the hash of that file.

    Raises:
      UserError: ids do not fit, or predictions answer another prompt, are about another image, or belong to a control.
    """

    def __init__(self, samples: Sequence[VqaSample], predictions: Iterable[Mapping], training: Sequence[VqaSample] = (),
                 is_control_allowed: bool = True):
        self.samples, self.predictions, self.training = samples, list(predictions), training
        self.texts = join(samples, self.predictions)
        self._not_stated = check_asked(samples, self.predictions, is_control_allowed)
        self._resampled: dict[int, dict[str, list[Resampled]]] = {}
        self.file: Path | None = None
        self.sha256 = ""

    @classmethod
    def read(cls, samples: Sequence[VqaSample], path: str | Path, training: Sequence[VqaSample] = (),
             what: str = "") -> AnswerSet:
        """Reads a file of predictions; they have to be about the questions' own images.

        Args:
          samples: the questions.
          path: the file of predictions.
          training: the training rows.
          what: prefix of an error about the predictions, such as the flag that names the file.

        Raises:
          UserError: the file cannot be read, or the predictions do not fit the questions.
        """
        predictions = read_predictions(path)
        try:
            answers = cls(samples, predictions, training, is_control_allowed=False)
        except UserError as error:
            raise type(error)(f"{what}{error}") from error
        answers.file = Path(path)
        answers.sha256 = sha256(read_bytes(path, f"the file of predictions {path}"))
        return answers

    def warn_of_not_stated(self) -> None:
        """Prints how many predictions do not state their prompt or image, so that only their ids are known to fit."""
        parts = [f"{count} of {len(self.samples)} lines {title}" for title, count in self._not_stated.items() if count]
        if parts:
            print(f"warning: {self.file}: {'; '.join(parts)}", file=sys.stderr)

    @property
    def model(self) -> str:
        """The names of the model in the predictions, each once, joined by commas; "" if no line has one."""
        return ", ".join(dict.fromkeys(str(each["model_id"]) for each in self.predictions if each.get("model_id")))

    @functools.cached_property
    def images(self) -> list[str]:
        """The path of each sample's image."""
        return [str(sample.image) for sample in self.samples]

    @functools.cached_property
    def clusters(self) -> list[str]:
        """The cluster of each sample, which the bootstrap draws as one (`sample.clusters`)."""
        return clusters(self.samples)

    @functools.cached_property
    def kinds(self) -> list[str]:
        """The kind of each question (`sample.KINDS`)."""
        return kinds(self.samples)

    @functools.cached_property
    def choices(self) -> dict[int, int | None]:
        """Index of each multiple-choice question -> index of the option that the answer names; None if unread."""
        return {i: read_choice(self.texts[i], self.samples[i].options, asks_letter(self.samples[i].question))
                for i, kind in enumerate(self.kinds) if kind == CHOICE}

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The metrics of every item that are averaged: fractions, float64 [N, M]; NaN if a metric does not apply.

        `open_accuracy_candidates` is NaN if the training rows have no open answer.
        """
        candidates = answer_candidates(self.training)
        candidate_list = metrics.CandidateList(candidates) if candidates else None
        values = np.full((len(self.samples), len(self._columns)), np.nan)
        for i, (sample, row) in enumerate(zip(self.samples, values, strict=True)):
            answered = Answered(sample, self.texts[i], candidate_list, self.choices.get(i))
            for metric in (metric for metric in registry.METRICS if metric.kind == self.kinds[i]):
                for key, value in metric.values(answered).items():
                    row[self._columns[key]] = value
        return values

    @functools.cached_property
    def _columns(self) -> dict[str, int]:
        """Name of a metric -> its column in `values`."""
        return {name: column for column, name in enumerate(registry.names_of())}

    def value(self, i: int, name: str) -> float:
        """Returns a metric of item `i`, as a fraction."""
        return float(self.values[i, self._columns[name]])

    @functools.cached_property
    def families(self) -> dict[str, list[Score]]:
        """The scores by family, in the order of the registry.

        Metrics of a kind of question that does not occur are left out, unless they are always listed.
        """
        result: dict[str, list[Score]] = {}
        for metric in registry.METRICS:
            if metric.is_always_listed or metric.kind in self.kinds:
                result.setdefault(metric.family, []).extend(self._mean(name) for name in metric.names)
        if CAPTION in self.kinds:
            nothing = [0] * (2 * captions.ORDERS + 3)
            parts = [captions.bleu_parts(text, str(sample.answer)) if kind == CAPTION else nothing
                     for sample, text, kind in zip(self.samples, self.texts, self.kinds, strict=True)]
            wanted = [str(sample.answer) if kind == CAPTION else None
                      for sample, kind in zip(self.samples, self.kinds, strict=True)]
            result["captions"][:0] = [Score(captions.BLEU, np.array(parts, dtype=float), captions.bleu_percent),
                                      sacre.score(self.texts, wanted)]
        return result

    def resampled(self, seed: int) -> dict[str, list[Resampled]]:
        """Returns the scores by family with their bootstrap, which is drawn once for each seed."""
        if seed not in self._resampled:
            self._resampled[seed] = {family: statistics.resample(scores, self.clusters, seed)
                                     for family, scores in self.families.items()}
        return self._resampled[seed]

    def _mean(self, name: str) -> Score:
        return statistics.mean(name, self.values[:, self._columns[name]])
