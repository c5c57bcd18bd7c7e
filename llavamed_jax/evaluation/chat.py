"""Chat evaluation by a judge: answers to questions about figures are scored beside GPT-4's answers.

The judge reads the caption, the sentences of the article that mention the figure, the question and both answers, and
gives each answer a score from 1 to 10. The relative score is 100 * mean(score of the answer / score of the reference).
Source: `llava/eval/eval_multimodal_chat_gpt_score.py` of LLaVA-Med v1.0 and v1.5.
Axis letters: N questions.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llavamed_jax.datasets.qa50 import DOMAINS, TYPES, ChatQuestion, read_chat_questions
from llavamed_jax.datasets.sample import VqaSample, first_names
from llavamed_jax.errors import UsageError, count_of
from llavamed_jax.evaluation import chat_published
from llavamed_jax.evaluation.answering.asked import words as asked_words
from llavamed_jax.evaluation.judging.judge import Judge, Verdict, report_unscored
from llavamed_jax.evaluation.judging.prompts import (
    CHAT_PROMPT,
    READINGS,
    chat_prompt,
    read_original_scores,
    read_prompt,
)
from llavamed_jax.evaluation.report import chat_report
from llavamed_jax.evaluation.report.summary import prompts as lost_prompts
from llavamed_jax.evaluation.results import Outcome
from llavamed_jax.evaluation.scoring import statistics
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.predictions import prompt_counts
from llavamed_jax.utils.files import to_jsonl

KIND = "chat"  # `data.name` of a chat config
_SCORES = ("pred_relative_score", "gpt4_score", "pred_score")


class ChatScorer:
    """Reads the questions of a chat config, and scores answers to them by a judge.

    Beside the files of every evaluation it writes `reviews.jsonl`: one line for each question, with both answers, their
    scores and the judge's text. Arguments and errors are those of `VqaScorer`; there are no training rows.
    """

    def __init__(self, cfg: ConfigDict, workdir: Path, against: str | Path | None = None):
        if against is not None:
            raise UsageError("--against compares the metrics of VQA sets and captions, not a judge's scores; it cannot "
                             "be used with chat questions")
        if not cfg.data.root:
            raise UsageError("data.root is empty; the file of chat questions or its folder was expected: "
                             "--config.data.root=PATH")
        self.cfg, self._reading = cfg, cfg.judge.get("reading", "strict")
        if self._reading not in READINGS:
            raise UsageError(f"judge.reading is {self._reading!r}; {' or '.join(READINGS)} was expected")
        self.judge = Judge(cfg.judge, read_prompt(cfg.judge.prompt, CHAT_PROMPT), READINGS[self._reading], workdir)
        self.chat_set = read_chat_questions(cfg.data.root, cfg.data.images)
        found = self.chat_set.questions
        names = first_names(question.image for question in found)
        self.questions = [dataclasses.replace(question, image=names[str(question.image)]) for question in found]
        self.samples: list[VqaSample] = [question.sample() for question in self.questions]
        self.training: list[VqaSample] = []

    def depends_on(self) -> dict[str, object]:
        """Returns what the scores depend on beside the answers and the config: a name -> a value of a JSON type."""
        return {"the chat questions": self.chat_set.sha256, **self.judge.depends_on()}

    def describe(self) -> str:
        """Returns one line that says what is asked, and whether it is the published set."""
        kinds = Counter(question.kind for question in self.questions)
        counts = ", ".join(f"{kinds[kind]} {kind}" for kind in TYPES)
        is_published = "as published" if self.chat_set.is_published else "not the published file"
        n_images = len({question.image for question in self.questions})
        return (f"{KIND}: {count_of(len(self.questions), 'question')} on {count_of(n_images, 'image')}, {counts}, "
                f"{is_published}")

    def plan(self, texts: Sequence[str] | None, has_control: bool) -> str:
        """Returns one line that says what judging will cost.

        Args:
          texts: the answers, one for each question; None if they do not exist yet. Then the estimate assumes that they
            are as long as the references.
          has_control: whether the answers of the controls are judged too.
        """
        source = "assuming answers as long as the references" if texts is None else "for the existing answers"
        prompts = self._prompts([question.reference for question in self.questions] if texts is None else texts)
        controls = "; each of the two controls (images exchanged, noise) costs up to the same again"
        return (f"judge {self.judge.service.where}, {source}: {self.judge.estimate(prompts)}"
                f"{controls if has_control else ''}")

    def score(self, answers: AnswerSet, others: Mapping[str, AnswerSet], extra: Mapping) -> Outcome:
        """Has all answers judged and returns the scores.

        Args:
          answers: the answers about the questions' own figures.
          others: kind of control -> the answers of that control.
          extra: further objects for `metrics.json`.

        Returns:
          The metrics, the report and the further files.
        """
        verdicts, reviews = self._judged(answers, "answers")
        metrics = self._metrics(verdicts) | prompt_counts(answers.predictions) | extra
        files = {"reviews.jsonl": to_jsonl(reviews)}
        other_reviews = {}
        for name, other in others.items():
            found, other_reviews[name] = self._judged(other, f"answers, control {name}")
            files[f"reviews_control_{name}.jsonl"] = to_jsonl(other_reviews[name])
            table = {"kind": name, "seed": self.cfg.seed, **chat_scores(self.questions, found, self.cfg.seed)}
            metrics["control"] = table if name == "image" else metrics["control"] | {name: table}
            verdicts = verdicts + found
        model, prompt = str(answers.predictions[0].get("model_id", "")), self.judge.prompt
        return Outcome(
            metrics, lambda tables: chat_report.render(metrics, self.questions, reviews, other_reviews, tables, model),
            files, "answers", verdicts, {"judge": self.judge.service.where},
            {str(self.chat_set.file): self.chat_set.sha256, "judge's wording": prompt.wording},
            {"Judge's prompt": {"system": prompt.system, "instruction": prompt.instruction,
                                "reminder": prompt.reminder}},
        )  # fmt: skip

    def _prompts(self, texts: Sequence[str]) -> list[str]:
        has_marker = self.cfg.judge.image_marker
        return [chat_prompt(self.judge.prompt, question, text, has_marker)
                for question, text in zip(self.questions, texts, strict=True)]

    def _judged(self, answers: AnswerSet, title: str) -> tuple[list[Verdict], list[dict]]:
        """Returns the verdicts, and the lines for a file of reviews."""
        prompts = self._prompts(answers.texts)
        print(f"judge {self.judge.service.where}, {title}: {self.judge.estimate(prompts)}", file=sys.stderr, flush=True)
        verdicts = self.judge.verdicts(prompts, title)
        report_unscored(verdicts, [question.question_id for question in self.questions], title)
        return verdicts, [review(*each) for each in zip(self.questions, answers.texts, verdicts, strict=True)]

    def _metrics(self, verdicts: Sequence[Verdict]) -> dict:
        """Returns the object of `metrics.json`, without the controls."""
        unscored = [question.question_id for question, verdict in zip(self.questions, verdicts, strict=True)
                    if verdict.value is None]
        reading = self._reading
        read_otherwise = sum(v.first_text is not None and read_original_scores(v.first_text) is not None
                             for v in verdicts)
        return {
            "dataset": KIND, "split": self.cfg.data.split,
            "unit": "percent; scores are points"
                    f"{' from 1 to 10' if reading == 'strict' else ', as the judge gave them'}",
            "n_questions": len(self.questions), "n_images": len({question.image for question in self.questions}),
            "n_unscored": len(unscored), "unscored": unscored, "seed": self.cfg.seed,
            "questions_sha256": self.chat_set.sha256,
            "judge": self.judge.summary(verdicts) | {"reading": reading},
            **chat_scores(self.questions, verdicts, self.cfg.seed),
            "differs_from_the_paper": chat_published.differences(
                self.chat_set, self.judge, self.cfg.judge.image_marker, len(unscored), read_otherwise),
        }  # fmt: skip

    @staticmethod
    def summary(metrics: Mapping) -> str:
        """Returns the result as a plain text table."""
        return summary(metrics)


def review(question: ChatQuestion, text: str, verdict: Verdict) -> dict:
    """Returns one line of `reviews.jsonl`; the scores are None if the question is unscored."""
    gpt4_score, pred_score = verdict.value or (None, None)
    line = {
        "question_id": question.question_id, "image": question.image.name, "type": question.kind,
        "domain": question.domain,
        "question": question.question, "gpt4_answer": question.reference, "text": text, "gpt4_score": gpt4_score,
        "pred_score": pred_score, "gpt_eval": verdict.text, "finish_reason": verdict.finish_reason,
    }  # fmt: skip
    again = {"first_gpt_eval": verdict.first_text} if verdict.is_asked_again else {}
    return line | again | ({"error": verdict.error} if verdict.error is not None else {})


def chat_scores(questions: Sequence[ChatQuestion], verdicts: Sequence[Verdict], seed: int) -> dict:
    """Computes the numbers of `metrics.json`.

    Args:
      questions: the N questions.
      verdicts: the judge's verdict on each question.
      seed: seed of the bootstrap.

    Returns:
      `overall`, and under `type` and `domain` one table for each that occurs. Each table has `pred_relative_score`
      (mean of the ratios, percent), `gpt4_score` and `pred_score` (mean points), all with 95 % intervals by bootstrap
      over images (`_low`, `_high`), `ratio_of_means` (percent; LLaVA's own summary prints it), `data_size` (number of
      scored questions) and `n_unscored`.
    """
    scores = np.array([verdict.value or (np.nan, np.nan) for verdict in verdicts], np.float64).reshape(-1, 2)  # [N, 2]
    images = [str(question.image) for question in questions]

    def table(rows: Sequence[int]) -> dict:
        mine = scores[rows]
        values = np.stack([mine[:, 1] / mine[:, 0], mine[:, 0], mine[:, 1]], axis=1)
        means = [statistics.mean(name, column) for name, column in zip(_SCORES, values.T, strict=True)]
        result = statistics.intervals(statistics.resample(means, [images[row] for row in rows], seed))
        for name in (f"{score}{end}" for score in _SCORES[1:] for end in ("", "_low", "_high")):  # points, not percent
            result[name] = None if result[name] is None else result[name] / 100
        scored = mine[~np.isnan(mine).any(axis=1)]
        result["ratio_of_means"] = float(100 * scored[:, 1].sum() / scored[:, 0].sum()) if len(scored) else None
        return result | {"data_size": len(scored), "n_unscored": len(rows) - len(scored)}

    def tables(names: Sequence[str], field: str) -> dict:
        rows = {name: [i for i, question in enumerate(questions) if getattr(question, field) == name] for name in names}
        return {name: table(found) for name, found in rows.items() if found}

    return {"overall": table(range(len(questions))), "type": tables(TYPES, "kind"), "domain": tables(DOMAINS, "domain")}


def summary(metrics: Mapping) -> str:
    """Returns the result as a plain text table, for a terminal or a log."""
    judge, control = metrics["judge"]["model"], metrics.get("control")
    others = [dict(chat_report.tables(table)) for table in ((control, control["noise"]) if control else ())]
    name, split, n, n_images = (metrics[key] for key in ("dataset", "split", "n_questions", "n_images"))
    lines = [f"{name} {split}: {n} questions about {n_images} images, judged by {judge}"]
    head = f"{'relative score, percent':<24}{'value':>7}   {'95 % interval':<16}{'ratio of means':>14}"
    lines.append(f"{head}{'answers':>9}{'references':>12}{'n':>6}"
                 + (f"{'exchanged':>11}{'noise':>7}" if control else ""))
    for title, table in chat_report.tables(metrics):
        value, low, high = (table[f"pred_relative_score{end}"] for end in ("", "_low", "_high"))
        interval = "" if low is None else f"[{low:.1f}, {high:.1f}]"
        cells = [_plain(table["ratio_of_means"], 14), _plain(table["pred_score"], 9, 2),
                 _plain(table["gpt4_score"], 12, 2)]
        line = f"{title:<24}{_plain(value, 7)}   {interval:<16}{''.join(cells)}{table['data_size']:>6}"
        lines.append(line + "".join(_plain(found[title]["pred_relative_score"], width)
                                    for found, width in zip(others, (11, 7))))
    if metrics["n_unscored"]:
        lines.append(f"unscored and left out of all means: {metrics['n_unscored']} of {n} questions: "
                     f"{', '.join(map(str, metrics['unscored']))}")
    lines += lost_prompts(metrics)
    if metrics["differs_from_the_paper"]:
        lines.append(f"not comparable with the paper's numbers: {'; '.join(metrics['differs_from_the_paper'])}")
    if said := asked_words(metrics.get("asked") or {}):
        lines.append(f"asked with {said}")
    return "\n".join(lines)


def _plain(value: float | None, width: int, digits: int = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:>{width}.{digits}f}"
