"""Scores answers by the rule of another evaluation program (`scoring/programs.py`).

The questions get that program's prompts, so that a model that is asked here is asked as it is there, and its logged
answers can be scored here with `--predictions`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from ml_collections import ConfigDict

from llavamed_jax.datasets.sample import CLOSED, OPEN, VqaSample
from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation.judging.open_answers import Judged
from llavamed_jax.evaluation.scoring import statistics
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.programs import PROGRAMS


class Harness:
    """The protocol for the questions of one set.

    Args:
      cfg: an eval config.
      samples: the questions as the set's reader returns them.

    Attributes:
      name: the value of `scoring`, and the key in `metrics.json`.
      asked: the questions with the program's prompts.
      judge: None; these rules have no judge.

    Raises:
      UsageError: the program has no rule for the set.
    """

    judge = None

    def __init__(self, cfg: ConfigDict, samples: Sequence[VqaSample]):
        self.name, self._seed, self._samples = cfg.scoring, cfg.seed, list(samples)
        self._program = PROGRAMS[self.name]
        if cfg.data.name not in self._program.sets:
            raise UsageError(f"scoring is {self.name}, which has no rule for {cfg.data.name}; "
                             f"{' or '.join(self._program.sets)} was expected")
        self.asked = [replace(sample, question=self._program.prompt(sample)) for sample in self._samples]

    def score(self, answers: AnswerSet, split: str) -> Judged:
        """Scores the answers.

        Returns:
          The block of `metrics.json`: `accuracy` over all questions, `open_accuracy` and `closed_accuracy`, in percent
          with `_low` and `_high`, and counts; and a line for each question.
        """
        texts, samples = answers.texts, self._samples
        right = [self._program.is_right(text, str(sample.answer)) for text, sample in zip(texts, samples, strict=True)]
        values, kinds = np.array(right, np.float64), np.array([sample.answer_type for sample in samples])
        scores = [statistics.mean("accuracy", values)]
        scores += [statistics.mean(f"{kind.lower()}_accuracy", np.where(kinds == kind, values, np.nan))
                   for kind in (CLOSED, OPEN) if (kinds == kind).any()]
        metrics = {"program": self._program.version, "n": len(samples),
                   **{f"n_{kind.lower()}": int((kinds == kind).sum()) for kind in (CLOSED, OPEN)}}
        metrics |= statistics.intervals(statistics.resample(scores, answers.clusters, self._seed))
        lines = [{"question_id": sample.question_id, "answer": str(sample.answer), "text": text, "is_right": value}
                 for sample, text, value in zip(samples, texts, right, strict=True)]
        return Judged(metrics, lines, [])
