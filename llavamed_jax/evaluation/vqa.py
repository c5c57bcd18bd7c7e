"""Scores answers to the questions of a VQA or caption set: metrics, comparisons and the verdicts of a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets import training
from llavamed_jax.errors import UsageError, UserError, count_of
from llavamed_jax.evaluation import published, questions
from llavamed_jax.evaluation.harness import Harness
from llavamed_jax.evaluation.judging import open_answers
from llavamed_jax.evaluation.report import report, summary
from llavamed_jax.evaluation.results import Outcome
from llavamed_jax.evaluation.scoring import controls, leakage, score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.programs import MEDEVALKIT, PROGRAMS
from llavamed_jax.evaluation.toolkit import MedEvalKit
from llavamed_jax.utils.files import to_jsonl


class VqaScorer:
    """Reads the open, closed, multiple-choice and captioning questions of one set, and scores answers to them.

    Args:
      cfg: an eval config.
      workdir: the folder where a judge keeps its replies.
      against: a file with another model's predictions for the same questions.

    Attributes:
      samples: the questions.
      training: the training rows of the same data set.
      judge: reads the open answers; None if the config names no judge.

    Raises:
      UsageError: a setting is invalid.
      UserError: the data cannot be read or hold no question, or the predictions do not fit the questions.
    """

    summary = staticmethod(summary.summary)

    def __init__(self, cfg: ConfigDict, workdir: Path, against: str | Path | None = None):
        self._cfg = cfg
        data = cfg.data
        self.samples, self.training = questions.load_samples(
            data.name, data.root, data.split, cfg.protocol, data.held_out, **questions.further(data))
        if not self.samples:
            raise UserError(f"{cfg.data.root} holds no questions of {cfg.data.name} {cfg.data.split}")
        self._toolkit = None
        if cfg.get("scoring") == MEDEVALKIT:
            self._toolkit = MedEvalKit(cfg, self.samples, workdir)
        elif cfg.get("scoring") in PROGRAMS:
            self._toolkit = Harness(cfg, self.samples)
        if self._toolkit is not None:
            self.samples, self.judge = self._toolkit.asked, self._toolkit.judge
        else:
            self.judge = open_answers.open_judge(cfg, workdir)
        read = lambda path: AnswerSet.read(self.samples, path, self.training, f"--against {path}: ")
        self._against = None if against is None else read(against)
        self._trained_on = _training_data(cfg)
        if cfg.get("published") not in (None, "", *published.NAMES):
            names = ", ".join(published.NAMES)
            raise UsageError(f"published is {cfg.published!r}; empty or one of {names} was expected")

    def depends_on(self) -> dict[str, object]:
        """Returns what the numbers depend on beside the answers and the config: a name -> a value of a JSON type."""
        return {
            "the questions and the training rows": questions.content_hash(self.samples, self.training),
            "the answers of --against": None if self._against is None else self._against.sha256,
            "data.trained_on": None if self._trained_on is None else leakage.identity(self._trained_on),
            **({} if self.judge is None else self.judge.depends_on()),
        }

    def describe(self) -> str:
        """Returns one line that says what is asked, and whether it is the complete published set."""
        return questions.describe(self._cfg, self.samples)

    def plan(self, texts: Sequence[str] | None, has_control: bool) -> str:
        """Returns one line that says what a run would ask, and what judging would cost.

        Args:
          texts: the answers, in the order of `samples`; None if a model has yet to give them.
          has_control: whether the controls are asked too.
        """
        times = ", each three times: with its image, with another one, with noise" if has_control else ""
        asked = f"{count_of(len(self.samples), 'question')}{times}"
        if self.judge is None:
            return f"{asked}; nothing is judged"
        texts = [str(sample.answer) for sample in self.samples] if texts is None else texts
        judged = (open_answers.plan(self.judge, self.samples, texts) if self._toolkit is None
                  else self._toolkit.plan(texts))
        return f"{asked}; {judged}"

    def score(self, answers: AnswerSet, others: Mapping[str, AnswerSet], extra: Mapping) -> Outcome:
        """Scores all answers.

        Args:
          answers: the answers about the questions' own images.
          others: kind of control -> the answers of that control.
          extra: further objects for `metrics.json`.

        Returns:
          The metrics, the report and the further files. If there is a judge, it is asked here.
        """
        cfg = self._cfg
        split, name = "held_out" if cfg.data.held_out else cfg.data.split, questions.set_name(cfg.data)
        metrics = score.score(answers, dataset=name, split=split, seed=cfg.seed) | extra
        metrics["questions_sha256"] = questions.questions_hash(self.samples)
        metrics["published"] = published.beside(
            name, split, cfg.protocol, metrics["n_open"], metrics["n_closed"], cfg.get("published") or "")
        if others:
            tables = {kind: score.tables(other, cfg.seed) | {"difference": score.difference(answers, other, cfg.seed)}
                      for kind, other in others.items()}
            noise = {"kind": "noise", "seed": cfg.seed, "size": controls.NOISE_SIZE, **tables["noise"]}
            metrics["control"] = {"kind": "image", "seed": cfg.seed, **tables["image"], "noise": noise}
        if self._against is not None:
            metrics["against"] = score.against(answers, self._against, cfg.seed)
        if self._trained_on is not None:
            found = leakage.trained_on(self.samples, self._trained_on)
            metrics["trained_on"] = {"data": str(cfg.data.trained_on)} | found
        render = lambda tables: report.render(metrics, answers, others, tables)
        if self._toolkit is not None:
            scored = self._toolkit.score(answers, split)
            name = self._toolkit.name
            metrics[name] = scored.metrics
            return Outcome(metrics, render, {f"{name}.jsonl": to_jsonl(scored.lines)}, "answers", scored.verdicts)
        if self.judge is None:
            return Outcome(metrics, render)
        judged = open_answers.judge_open(self.judge, answers, cfg.seed)
        metrics["judged"] = judged.metrics
        return Outcome(metrics, render, {"judged.jsonl": to_jsonl(judged.lines)}, "open answers", judged.verdicts)


def _training_data(cfg: ConfigDict) -> training.TrainingData | None:
    """Returns the data that the model was trained on; None if the config does not name them."""
    if not cfg.data.get("trained_on"):
        return None
    source = cfg.data.trained_on if isinstance(cfg.data.trained_on, str) else list(cfg.data.trained_on)
    found = training.read_training(source, cfg.data.get("trained_on_images") or None, cfg.protocol)
    if next(found.readable(), None) is None:  # without records, a leakage count of 0 would be wrong
        try:
            found.record(0)
        except UserError as error:
            raise UserError(f"data.trained_on has no usable training data: none of its {found.num_records} records can "
                            f"be read: {error}") from None
    return found
