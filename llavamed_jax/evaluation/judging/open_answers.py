"""Has open VQA answers judged right or wrong by a language model, as recent medical leaderboards do.

The judge reads the question, the gold answer and the answer, but no image. The verdicts do not change the string
metrics. Axis letters: N open questions.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llavamed_jax.datasets.sample import OPEN, VqaSample, kinds
from llavamed_jax.errors import count_of
from llavamed_jax.evaluation.judging.judge import Judge, Verdict, report_unscored
from llavamed_jax.evaluation.judging.prompts import OPEN_PROMPT, open_prompt, read_prompt, read_right
from llavamed_jax.evaluation.scoring import statistics
from llavamed_jax.evaluation.scoring.items import AnswerSet


def open_judge(cfg: ConfigDict, workdir: Path) -> Judge | None:
    """Returns the judge that a config names, or None if it names none. Raises what `Judge` raises."""
    group = cfg.get("judge")
    return (Judge(group, read_prompt(group.prompt, OPEN_PROMPT), read_right, workdir)
            if group is not None and group.model else None)


@dataclass(frozen=True)
class Judged:
    """The result of a protocol or of a judge.

    Attributes:
      metrics: its object of `metrics.json` (`judged`, or the protocol's name).
      lines: the lines of its file (`judged.jsonl`, or named after the protocol).
      verdicts: the verdicts of the judge; empty without one.
    """

    metrics: dict
    lines: list[dict]
    verdicts: list[Verdict]


def open_texts(judge: Judge, samples: Sequence[VqaSample],
               texts: Sequence[str]) -> tuple[list[VqaSample], list[str], list[str]]:
    """Returns the open questions among `samples`, the answers to them, and the judge's prompt for each."""
    pairs = [(sample, text) for sample, text, kind in zip(samples, texts, kinds(samples), strict=True) if kind == OPEN]
    prompts = [open_prompt(judge.prompt, sample.question, str(sample.answer), text) for sample, text in pairs]
    return [sample for sample, _ in pairs], [text for _, text in pairs], prompts


def plan(judge: Judge, samples: Sequence[VqaSample], texts: Sequence[str]) -> str:
    """Returns one line that says what judging these answers will cost."""
    prompts = open_texts(judge, samples, texts)[2]
    return f"judge {judge.service.where}, {count_of(len(prompts), 'open answer')}: {judge.estimate(prompts)}"


def judge_open(judge: Judge, answers: AnswerSet, seed: int) -> Judged:
    """Has the open answers judged.

    Args:
      judge: the judge.
      answers: the questions and the answers to them.
      seed: seed of the bootstrap.

    Returns:
      The verdicts. Their `metrics` has `open_accuracy`, in percent of the judged answers, with `_low` and `_high` (95 %
      interval, bootstrap over images), `n_open`, `n_unscored`, `unscored` (ids of questions) and `judge`.

    Raises:
      UserError: the judge cannot be reached at all.
    """
    print(plan(judge, answers.samples, answers.texts), file=sys.stderr, flush=True)
    asked, texts, prompts = open_texts(judge, answers.samples, answers.texts)
    verdicts = judge.verdicts(prompts, "open answers")
    ids = [sample.question_id for sample in asked]
    report_unscored(verdicts, ids, "open answers")
    values = np.array([np.nan if verdict.value is None else verdict.value for verdict in verdicts], np.float64)  # [N]
    unscored = [name for name, verdict in zip(ids, verdicts, strict=True) if verdict.value is None]
    drawn = [cluster for cluster, kind in zip(answers.clusters, answers.kinds, strict=True) if kind == OPEN]
    table = statistics.intervals(statistics.resample([statistics.mean("open_accuracy", values)], drawn, seed))
    metrics = table | {"n_open": len(asked), "n_unscored": len(unscored), "unscored": unscored,
                       "judge": judge.summary(verdicts)}
    lines = [
        {"question_id": sample.question_id, "question": sample.question, "answer": str(sample.answer), "text": text,
         "is_right": verdict.value, "judge_text": verdict.text, "finish_reason": verdict.finish_reason}
        | ({"first_judge_text": verdict.first_text} if verdict.is_asked_again else {})
        | ({"error": verdict.error} if verdict.error is not None else {})
        for sample, text, verdict in zip(asked, texts, verdicts, strict=True)
    ]  # fmt: skip
    return Judged(metrics, lines, verdicts)
