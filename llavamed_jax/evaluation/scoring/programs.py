"""Lists the programs by whose prompts and rules answers may be scored (`scoring=NAME`), and their numbers.

The key `scoring`, the block of `metrics.json` and the file of verdicts have the name of the program. To add a program
that compares an answer with the gold answer, write a file with its prompt and its rule and add a line here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavamed_jax.evaluation.scoring import lmms_eval, vlmevalkit

if TYPE_CHECKING:
    from llavamed_jax.datasets.sample import VqaSample

OURS, MEDEVALKIT = "ours", "medevalkit"
NUMBERS = (("accuracy", "all", "n"), ("closed_accuracy", "closed", "n_closed"), ("open_accuracy", "open", "n_open"),
           ("choice_accuracy", "multiple choice", "n_choice"))
"""Metric, title and count of the numbers that tables show; a program's block has those that apply to the set."""


@dataclass(frozen=True)
class Program:
    """How another program asks and scores.

    Attributes:
      title: its name in tables.
      version: the program and the version that was read.
      sets: the data sets for which it has a rule.
      prompt: returns the prompt of a question.
      is_right: returns whether an answer is right, from the answer and the gold answer. None if `toolkit.py` asks and
        scores, with a judge.
      fails_on: (set, split) pairs on which the program itself stops with an error, so that it has no numbers.
    """

    title: str
    version: str
    sets: tuple[str, ...]
    prompt: Callable[[VqaSample], str] | None = None
    is_right: Callable[[str, str], bool] | None = None
    fails_on: tuple[tuple[str, str], ...] = ()


PROGRAMS = {
    MEDEVALKIT: Program("MedEvalKit", "MedEvalKit 9b12e3b", (
        "vqa_rad", "slake", "pathvqa", "pmc_vqa", "omnimedvqa", "medxpertqa_mm", "mmmu_med", "medframeqa"),
        fails_on=(("mmmu_med", "test"),)),
    "lmms_eval": Program("lmms-eval", "lmms-eval 0.7.3", ("slake",),
                         lambda sample: lmms_eval.prompt(sample.question, sample.language), lmms_eval.is_right),
    "vlmevalkit": Program("VLMEvalKit", "VLMEvalKit (ms-vlmeval 0.0.20)", ("vqa_rad", "slake", "pathvqa"),
                          lambda sample: vlmevalkit.prompt(sample.question, str(sample.answer)), vlmevalkit.is_right),
}


def blocks(metrics: Mapping) -> Iterator[tuple[str, Program, Mapping, list[tuple[str, str, int]]]]:
    """Yields name, program, block, and (metric, title, number of questions) of each program in a `metrics.json`."""
    for name, program in PROGRAMS.items():
        if block := metrics.get(name):
            yield name, program, block, [(metric, title, block[count]) for metric, title, count in NUMBERS
                                         if metric in block]
