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
from llavamed_jax.evaluation.scoring import captions, controls, score, strict
from llavamed_jax.evaluation.scoring.predictions import join

IMAGES = 24
QUESTIONS = 6  # of one image
EXAMPLES = 6  # of each verdict
_VERDICTS = {"right": "Right", "partly": "Partly right", "wrong": "Wrong"}


@dataclass(frozen=True)
class Item:
    """A question with its answer, and the answers to it in the controls: name -> text."""

    sample: VqaSample
    text: str
    others: Mapping[str, str]

    @property
    def verdict(self) -> tuple[str, str]:
        """One of `right`, `partly`, `wrong`, and a word: of open answers and captions, how much they share with the gold."""
        name, gold = kind(self.sample), str(self.sample.answer)
        if name == CLOSED:
            return ("right", "right") if strict.is_strictly_right(self.text, gold) else ("wrong", "wrong")
        if name == CHOICE:
            choice = strict.read_choice(self.text, self.sample.options)
            if choice is None:
                return "wrong", "unread"
            return ("right", "right") if choice == strict.right_choice(self.sample) else ("wrong", "wrong")
        value, title = (captions.rouge_l, "ROUGE-L") if name == CAPTION else (strict.multiset_f1, "F1")
        share = value(self.text, gold)
        return ("right", "right") if share == 1 else ("partly", f"{title} {100 * share:.0f}") if share else ("wrong", "wrong")


def items(samples: Sequence[VqaSample], predictions: Sequence[Mapping], controls: Mapping[str, Sequence[Mapping]]) -> list[Item]:
    """Questions and answers joined by id; a control without predictions is left out."""
    others = {name: join(samples, answers) for name, answers in controls.items() if answers}
    texts = join(samples, predictions)
    return [Item(sample, texts[i], {name: found[i] for name, found in others.items()}) for i, sample in enumerate(samples)]


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
