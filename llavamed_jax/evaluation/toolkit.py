"""Scores answers by MedEvalKit's protocol (`scoring=medevalkit`): its prompts, closed/open split, rules and judge.

The rules are in `scoring/medevalkit.py`. The numbers are a block of their own in `metrics.json`. Defects of the toolkit
that change a number are switches of the config group `medevalkit`, which are off by default (docs/metrics.md).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from llavamed_jax.datasets.sample import CHOICE, LETTERS, OPEN, VqaSample
from llavamed_jax.errors import UsageError, count_of
from llavamed_jax.evaluation import published
from llavamed_jax.evaluation.judging.judge import Judge, Verdict, report_unscored
from llavamed_jax.evaluation.judging.open_answers import Judged
from llavamed_jax.evaluation.scoring import medevalkit as rules
from llavamed_jax.evaluation.scoring import statistics
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.programs import MEDEVALKIT, PROGRAMS
from llavamed_jax.evaluation.scoring.strict import right_choice
from llavamed_jax.utils.hashes import sha256

PROGRAM = PROGRAMS[MEDEVALKIT]
CHOICE_SETS = ("pmc_vqa", "omnimedvqa", "medxpertqa_mm", "mmmu_med", "medframeqa")
_TAGGED = ("omnimedvqa", "medxpertqa_mm")  # sets whose scorer reads <answer> before anything else


@dataclass(frozen=True)
class Wording:
    """The judge's prompt of the toolkit: one message of the user. The reminder is this project's."""

    @property
    def wording(self) -> str:
        """SHA-256 of the prompt around question and answers."""
        return sha256(rules.judge_prompt("", "", "").encode())

    def messages(self, user: str, is_reminded: bool = False) -> list[dict]:
        """Returns the messages of a request."""
        return [{"role": "user", "content": user + rules.REMINDER * is_reminded}]


class MedEvalKit:
    """The protocol for the questions of one set.

    Args:
      cfg: an eval config.
      samples: the questions as the set's reader returns them.
      workdir: the folder where the judge keeps its replies.

    Attributes:
      name: the value of `scoring`, and the key in `metrics.json`.
      asked: the questions with the toolkit's prompts.
      judge: reads open answers; None if the config names no judge. Then an open answer is right if it equals the gold.

    Raises:
      UsageError: the toolkit has no protocol for the set or stops on the split, or a setting of the judge is invalid.
    """

    name = MEDEVALKIT

    def __init__(self, cfg: ConfigDict, samples: Sequence[VqaSample], workdir: Path):
        self._name, self._seed, self._samples = cfg.data.name, cfg.seed, list(samples)
        if self._name not in PROGRAM.sets:
            raise UsageError(f"scoring is medevalkit, which has no protocol for {self._name}; one of "
                             f"{', '.join(PROGRAM.sets)} was expected")
        if (self._name, cfg.data.split) in PROGRAM.fails_on:
            raise UsageError(f"data.split is {cfg.data.split!r}; another split of {self._name} was expected with "
                             "scoring=medevalkit, because the toolkit stops on this one with an error")
        self._switches = dict(cfg.get(MEDEVALKIT) or {})
        group = cfg.get("judge")
        has_judge = group is not None and group.model and self._name not in CHOICE_SETS
        self.judge = Judge(group, Wording(), rules.stated_verdict, workdir) if has_judge else None
        self.asked = [self._asked(sample) for sample in self._samples]

    def kind(self, sample: VqaSample) -> str:
        """Returns `choice`, `open`, `closed` or `yes_no`, as the toolkit divides the questions of the set."""
        if sample.answer_type == CHOICE:
            return "choice"
        if self._name in ("slake", "mmmu_med"):
            return "open" if sample.answer_type == OPEN else "closed"
        return "yes_no" if str(sample.answer).lower().strip() in ("yes", "no") else "open"

    def _asked(self, sample: VqaSample) -> VqaSample:
        if self._name == "mmmu_med":  # the toolkit shows only the first image
            markers = "<image>\n" * len(sample.more_images)
            return replace(sample, question=sample.question.removeprefix(markers), more_images=())
        if sample.answer_type == CHOICE:
            return sample
        return replace(sample, question=rules.prompt(sample.question, self.kind(sample), sample.language))

    def _texts(self, sample: VqaSample, text: str) -> tuple[str, str]:
        """Returns answer and gold answer as the set's scorer passes them to the rules and to the judge."""
        text, gold = rules.unwrapped(text), str(sample.answer)
        return (text, gold) if self._name == "slake" else (text.lower().strip(), gold.lower().strip())

    def _is_right(self, sample: VqaSample, kind: str, text: str) -> bool:
        if kind == "choice" and self._name == "mmmu_med":
            guess = random.Random(f"{self._seed} {sample.question_id}")
            return rules.mmmu_choice(text, sample.options, guess) == right_choice(sample)
        if kind == "choice":
            lines = sample.lines or [f"{letter}. {text}" for letter, text in zip(LETTERS, sample.options, strict=False)]
            return rules.is_choice_right(text, right_choice(sample), lines, self._name in _TAGGED)
        if self._name == "mmmu_med":
            return False  # the toolkit compares single characters of the answer, none of which is a gold answer
        text, gold = self._texts(sample, text)
        if kind == "open":
            return rules.open_numbers(text, gold)["em"] == 1
        words = ("yes", "no")
        is_yes_no = (gold if self._switches.get("slake_case") else gold.lower()) in words
        return rules.is_yes_no_right(text, gold) if is_yes_no else rules.is_closed_right(text, gold)

    def _to_judge(self, texts: Sequence[str]) -> dict[int, str]:
        """Returns the index of each question that is judged -> what the judge reads."""
        wanted = ("open", "closed") if self._switches.get("slake_twice") else ("open",)
        prompts = {}
        for i, (sample, text) in enumerate(zip(self._samples, texts, strict=True)):
            if self.kind(sample) in wanted:
                said, gold = self._texts(sample, text)
                prompts[i] = rules.judge_prompt(sample.question, gold, said)
        return prompts

    def plan(self, texts: Sequence[str]) -> str:
        """Returns one line that says what judging these answers would cost, if there is a judge."""
        prompts = self._to_judge(texts)
        return (f"judge {self.judge.service.where}, {count_of(len(prompts), 'answer')}: "
                f"{self.judge.estimate(list(prompts.values()))}")

    def score(self, answers: AnswerSet, split: str) -> Judged:
        """Scores the answers; the judge is asked here, if there is one.

        Returns:
          The block of `metrics.json`: `accuracy` over all questions, `open_accuracy`, `closed_accuracy` and
          `choice_accuracy`, and the means of `scoring.medevalkit.OPEN_NUMBERS`, all in percent with `_low` and `_high`;
          counts, the judge, the switches and the published number. These numbers count a reply of the judge without a
          verdict as wrong, as the toolkit does. `accuracy_read` and `open_accuracy_read` count what the judge said when
          it was asked again, and leave out the questions that have no verdict even then.
        """
        texts, samples = answers.texts, self._samples
        kinds = [self.kind(sample) for sample in samples]
        right = [self._is_right(*each) for each in zip(samples, kinds, texts, strict=True)]
        values = np.array(right, np.float64)  # [N]; 2 if a closed question is counted twice
        verdicts, of = [], {}
        if self.judge is not None:
            print(self.plan(texts), file=sys.stderr, flush=True)
            prompts = self._to_judge(texts)
            verdicts = self.judge.verdicts(list(prompts.values()), "answers")
            report_unscored(verdicts, [samples[i].question_id for i in prompts], "answers")
            of = dict(zip(prompts, verdicts, strict=True))
            read = self._with_verdicts(values, kinds, {i: _number(each.value) for i, each in of.items()})
            values = self._with_verdicts(values, kinds, {i: float(_as_toolkit(each)) for i, each in of.items()})
        metrics = {"toolkit": PROGRAM.version, "n": len(samples)}
        metrics |= {f"n_{name}": count for name, count in self._counts(kinds).items()}
        scores = self._scores(texts, kinds, values)
        if self.judge is not None:
            scores += [statistics.mean("accuracy_read", read)]
            scores += [statistics.mean("open_accuracy_read", np.where(np.array(kinds) == "open", read, np.nan))]
        metrics |= statistics.intervals(statistics.resample(scores, answers.clusters, self._seed))
        unscored = [samples[i].question_id for i, verdict in of.items() if verdict.value is None]
        unreadable = sum(rules.stated_verdict(verdict.first_reply) is None for verdict in verdicts
                         if verdict.first_reply or verdict.error is None)
        metrics |= {"judge": None if self.judge is None else self.judge.summary(verdicts), "n_unreadable": unreadable,
                    "n_unscored": len(unscored), "unscored": unscored, "switches": self._switches}
        metrics["published"] = published.medevalkit(
            self._name, split, len(samples), self._name in CHOICE_SETS or self.judge is not None,
            [name for name, is_on in self._switches.items() if is_on])
        lines = [{"question_id": sample.question_id, "kind": kind, "answer": str(sample.answer), "text": text,
                  "rule": is_right, "counts": float(value)}
                 | (_judged(of[i]) if i in of else {})
                 for i, (sample, kind, text, is_right, value)
                 in enumerate(zip(samples, kinds, texts, right, values, strict=True))]
        return Judged(metrics, lines, verdicts)

    def _with_verdicts(self, values: np.ndarray, kinds: Sequence[str], said: Mapping[int, float]) -> np.ndarray:
        """Returns what each question counts if a judge has said 1, 0, or NaN (nothing) about the open ones."""
        values = np.array(values)
        for i, kind in enumerate(kinds):
            if kind == "open":
                values[i] = said[i]
            elif self._switches.get("slake_twice"):
                values[i] += said[i]
            elif self._switches.get("pathvqa_drop"):
                values[i] = 0
        return values

    @staticmethod
    def _counts(kinds: Sequence[str]) -> dict[str, int]:
        closed = sum(kind in ("closed", "yes_no") for kind in kinds)
        return {"open": kinds.count("open"), "closed": closed, "choice": kinds.count("choice")}

    def _scores(self, texts: Sequence[str], kinds: Sequence[str], values: np.ndarray) -> list[statistics.Score]:
        of = np.array([{"yes_no": "closed"}.get(kind, kind) for kind in kinds])
        scores = [statistics.mean("accuracy", values)]
        scores += [statistics.mean(f"{kind}_accuracy", np.where(of == kind, values, np.nan))
                   for kind in ("open", "closed", "choice") if (of == kind).any()]
        if self._name not in CHOICE_SETS and (of == "open").any():
            is_permuted = bool(self._switches.get("permuted_f1"))
            table = np.full((len(kinds), len(rules.OPEN_NUMBERS)), np.nan)
            for i, sample in enumerate(self._samples):
                if of[i] == "open":
                    numbers = rules.open_numbers(*self._texts(sample, texts[i]), is_permuted)
                    table[i] = [numbers[name] for name in rules.OPEN_NUMBERS]
            scores += [statistics.mean(name, column) for name, column in zip(rules.OPEN_NUMBERS, table.T, strict=True)]
        return scores


def _as_toolkit(verdict: Verdict) -> bool:
    """Returns what the toolkit counts: its reading of the first reply, and "wrong" where there is none."""
    return rules.read_verdict(verdict.first_reply)


def _number(value: bool | None) -> float:
    return float("nan") if value is None else float(value)


def _judged(verdict: Verdict) -> dict:
    """Returns the judge's part of a line: `judged` as the toolkit counts, and `read`, null without a verdict."""
    return {"judge_text": verdict.text, "judged": _as_toolkit(verdict), "read": verdict.value,
            "finish_reason": verdict.finish_reason} | (
        {"first_judge_text": verdict.first_text} if verdict.is_asked_again else {}) | (
        {"error": verdict.error} if verdict.error is not None else {})
