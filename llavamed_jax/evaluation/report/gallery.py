"""The pictures of `report.html`: some images with all that was asked about them, and as many right as wrong answers.

Both are drawn by the run's seed, not picked: neither the best nor the worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, VqaSample, kind
from llavamed_jax.evaluation.report import pieces
from llavamed_jax.evaluation.scoring import controls, score
from llavamed_jax.evaluation.scoring.items import STRICT_CHOICE, AnswerSet

IMAGES = 24
QUESTIONS = 6  # of one image
EXAMPLES = 6  # of each verdict
_VERDICTS = {"right": "Right", "partly": "Partly right", "wrong": "Wrong"}


@dataclass(frozen=True)
class Item:
    """A question with its answer, its verdict, and the answers to it in the controls: name -> text.

    `verdict` is one of `right`, `partly`, `wrong`, and a word: of open answers and captions, how much they share with the gold.
    """

    sample: VqaSample
    text: str
    verdict: tuple[str, str]
    others: Mapping[str, str]


def items(answers: AnswerSet, controls: Mapping[str, AnswerSet]) -> list[Item]:
    """Questions and answers in one order; `controls`: name -> answers to the same questions."""
    pairs = enumerate(zip(answers.samples, answers.texts, strict=True))
    return [Item(sample, text, _verdict(answers, i), {name: other.texts[i] for name, other in controls.items()})
            for i, (sample, text) in pairs]


def _verdict(answers: AnswerSet, i: int) -> tuple[str, str]:
    name = kind(answers.samples[i])
    if name == CHOICE and answers.choices[i] is None:
        return "wrong", "unread"
    metric = {CLOSED: "closed_accuracy", CHOICE: STRICT_CHOICE, CAPTION: "rouge_l"}.get(name, "open_f1")
    share, title = answers.value(i, metric), "ROUGE-L" if name == CAPTION else "F1"
    return ("right", "right") if share == 1 else ("partly", f"{title} {100 * share:.0f}") if share else ("wrong", "wrong")


def images(metrics: Mapping, items: Sequence[Item]) -> str:
    """`IMAGES` images, each with the first `QUESTIONS` questions about it."""
    by_image: dict[str, list[Item]] = {}
    for item in items:
        by_image.setdefault(str(item.sample.image), []).append(item)
    drawn = np.random.default_rng(metrics["seed"]).permutation(len(by_image))[:IMAGES]
    shown = [list(by_image)[i] for i in sorted(drawn)]
    organs = {answer["image"]: answer for answer in (metrics.get("organ") or {}).get("answers", [])}
    figures = [_figure(by_image[image][:QUESTIONS], organs.get(image)) for image in shown]
    note = f"{len(shown)} of {len(by_image)} images, drawn by seed {metrics['seed']}; at most {QUESTIONS} questions each."
    return pieces.section("Pictures, questions, answers", note + _missing(figures), f'<div class="gallery">{"".join(figures)}</div>')


def examples(metrics: Mapping, items: Sequence[Item]) -> str:
    """As many right, partly right and wrong answers, drawn by the seed: at most `EXAMPLES` of each."""
    by_verdict: dict[str, list[Item]] = {name: [] for name in _VERDICTS}
    for item in items:
        by_verdict[item.verdict[0]].append(item)
    rng, parts, figures = np.random.default_rng(metrics["seed"]), [], []
    for name, title in _VERDICTS.items():
        found = by_verdict[name]
        drawn = [_figure([found[i]]) for i in sorted(rng.permutation(len(found))[:EXAMPLES])]
        figures += drawn
        if drawn:
            parts.append(f'<h3>{title} <span class="ci">{len(drawn)} of {len(found)}</span></h3>')
            parts.append(f'<div class="gallery">{"".join(drawn)}</div>')
    note = f"At most {EXAMPLES} of each, drawn by seed {metrics['seed']} from all {len(items)} answers."
    return pieces.section("Right, partly right and wrong answers", note + _missing(figures), *parts)


def _missing(figures: Sequence[str]) -> str:
    missing = sum("<img" not in figure for figure in figures)
    return f" {missing} image file{'s' * (missing > 1)} could not be read." if missing else ""


def _figure(items: Sequence[Item], organ: Mapping | None = None) -> str:
    sample = items[0].sample
    url, name = pieces.thumbnail(sample.image), escape(Path(sample.image).name)
    picture = f'<img alt="{name}" src="{url}">' if url else "image not readable"
    fields = [field for group in ("organ", "modality") for field in score.group_keys(sample, group)]
    label = " · ".join([name, *(escape(field) for field in fields if field != "not stated")])
    entries = []
    if organ:
        verdict = ("right", "right") if organ["named"] == organ["organ"] else ("wrong", "wrong")
        lines = {"answer": organ["answer"], "gold": controls.ORGAN_ANSWERS[organ["organ"]]}
        entries.append(_entry(verdict, controls.ORGAN_QUESTION, lines))
    for item in items:
        entries.append(_entry(item.verdict, item.sample.question, {"answer": item.text, "gold": str(item.sample.answer), **item.others}))
    caption = f'<figcaption><span class="name">{label}</span>{"".join(entries)}</figcaption>'
    return f'<figure><div class="picture">{picture}</div>{caption}</figure>'


def _entry(verdict: tuple[str, str], question: str, lines: Mapping[str, str]) -> str:
    rows = [f'<div class="line"><span class="k">{title}</span><span>{pieces.text(text)}</span></div>' for title, text in lines.items()]
    tag = f'<span class="tag {verdict[0]}">{verdict[1]}</span>'
    return f'<div class="qa">{tag}<div class="q">{pieces.text(question)}</div>{"".join(rows)}</div>'
