"""Selects the pictures of `report.html`: some images with their questions, and examples of right and wrong answers.

Both selections are random, drawn with the seed of the run. The template is `gallery.html.j2`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, VqaSample
from llavamed_jax.evaluation.scoring import controls
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.score import group_keys
from llavamed_jax.images.thumbnail import thumbnail

IMAGES = 24
QUESTIONS = 6  # per image
EXAMPLES = 6  # per verdict
_VERDICTS = {"right": "Right", "partly": "Partly right", "wrong": "Wrong"}


def pictures(metrics: Mapping, answers: AnswerSet, others: Mapping[str, AnswerSet]) -> dict[str, object]:
    """Returns the values for the template `gallery.html.j2`.

    Args:
      metrics: the object of `metrics.json`.
      answers: the questions and their answers.
      others: title of a control -> the answers of that control.

    Returns:
      `examples`: for each verdict its title, at most `EXAMPLES` figures drawn with the seed, and the number of answers
      with this verdict. `images`: at most `IMAGES` figures, each with the first `QUESTIONS` questions about it. And the
      counts that the notes on the page state.
    """
    verdicts = [_verdict(answers, i) for i in range(len(answers.samples))]
    by_image: dict[str, list[int]] = {}
    by_verdict: dict[str, list[int]] = {name: [] for name in _VERDICTS}
    for i, (image, (name, _)) in enumerate(zip(answers.images, verdicts, strict=True)):
        by_image.setdefault(image, []).append(i)
        by_verdict[name].append(i)
    entry = lambda i: _entry(verdicts[i], answers.samples[i].question, answers.texts[i],
                             str(answers.samples[i].answer), {title: other.texts[i] for title, other in others.items()})
    rng, examples = np.random.default_rng(metrics["seed"]), []
    for name, title in _VERDICTS.items():
        found = by_verdict[name]
        drawn = [found[i] for i in sorted(rng.permutation(len(found))[:EXAMPLES])]
        if drawn:
            examples.append((title, [_figure(answers.samples[i], [entry(i)]) for i in drawn], len(found)))
    places = np.random.default_rng(metrics["seed"]).permutation(len(by_image))[:IMAGES]
    organs = {answer["image"]: _organ_entry(answer) for answer in (metrics.get("organ") or {}).get("answers", [])}
    shown = []
    for image in [list(by_image)[place] for place in sorted(places)]:
        asked = by_image[image]
        entries = [*([organs[image]] if image in organs else []), *map(entry, asked[:QUESTIONS])]
        shown.append(_figure(answers.samples[asked[0]], entries))
    return {
        "examples": examples, "most_examples": EXAMPLES, "num_answers": len(answers.samples),
        "num_examples_missing": _num_missing(figure for _, figures, _ in examples for figure in figures),
        "images": shown, "num_images": len(by_image), "most_questions": QUESTIONS,
        "num_images_missing": _num_missing(shown),
    }  # fmt: skip


def _verdict(answers: AnswerSet, i: int) -> tuple[str, str]:
    name = answers.kinds[i]
    if name == CHOICE and answers.choices[i] is None:
        return "wrong", "unread"
    metric = {CLOSED: "closed_accuracy", CHOICE: "choice_accuracy", CAPTION: "rouge_l"}.get(name, "open_f1")
    share, title = answers.value(i, metric), "ROUGE-L" if name == CAPTION else "F1"
    if share == 1:
        return "right", "right"
    return ("partly", f"{title} {100 * share:.0f}") if share else ("wrong", "wrong")


def _organ_entry(organ: Mapping) -> dict:
    verdict = ("right", "right") if organ["named"] == organ["organ"] else ("wrong", "wrong")
    return _entry(verdict, controls.ORGAN_QUESTION, organ["answer"], controls.ORGAN_ANSWERS[organ["organ"]], {})


def _entry(verdict: tuple[str, str], question: str, answer: str, gold: str, others: Mapping[str, str]) -> dict:
    return {"verdict": verdict, "question": question, "lines": {"answer": answer, "gold": gold, **others}}


def _figure(sample: VqaSample, entries: Sequence[Mapping]) -> dict:
    name = Path(sample.image).name
    fields = [field for group in ("organ", "modality") for field in group_keys(sample, group)]
    labels = [name, *(field for field in fields if field != "not stated")]
    return {"url": thumbnail(sample.image), "name": name, "labels": labels, "entries": entries}


def _num_missing(figures: Iterable[Mapping]) -> int:
    return sum(figure["url"] is None for figure in figures)
