"""`report.html`: one file that opens offline, with tables, intervals, and pictures beside questions and answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from llavamed_jax.evaluation.answering.asked import words as asked_words
from llavamed_jax.evaluation.report import gallery, pieces, sections
from llavamed_jax.evaluation.report.style import CSS
from llavamed_jax.evaluation.report.summary import asked
from llavamed_jax.evaluation.scoring.items import AnswerSet

NOTICE = "For research use only: never for clinical decisions."
_CONTROLS = {"image": "exchanged", "noise": "noise"}
_SETS = {"vqa_rad": "VQA-RAD", "slake": "SLAKE", "pathvqa": "PathVQA"}
_SPLITS = {"held_out": "held-out images", "test": "test split", "validation": "validation split", "train": "training split"}


def render(
    metrics: Mapping,
    answers: AnswerSet,
    controls: Mapping[str, AnswerSet] | None = None,
    details: Mapping[str, Mapping] | None = None,
) -> str:
    """The report as one HTML text.

    Args:
      metrics: the object of `metrics.json`.
      answers: the questions and their answers.
      controls: kind of control (`image`, `noise`) -> the answers to the same questions, shown beside the real ones.
      details: tables of what was run: title -> name -> value; a value that is no text is shown as JSON.
    """
    name = f"{_SETS.get(metrics['dataset'], metrics['dataset'])}, {_SPLITS.get(metrics['split'], metrics['split'])}"
    model = str(answers.predictions[0].get("model_id", "")) if answers.predictions else ""
    items = gallery.items(answers, {_CONTROLS[kind]: other for kind, other in (controls or {}).items()})
    words = asked_words(metrics.get("asked") or {})
    return page(f"Evaluation on {name}", model, asked(metrics) + (f" · asked with {words}" if words else ""), [
        sections.cards(metrics),
        sections.strict(metrics),
        sections.control(metrics),
        sections.organ(metrics),
        sections.captions(metrics),
        sections.against(metrics),
        sections.groups(metrics),
        sections.judged(metrics),
        sections.paper(metrics),
        sections.leakage(metrics),
        gallery.examples(metrics, items),
        gallery.images(metrics, items),
        sections.details(details or {}),
    ])  # fmt: skip


def page(title: str, model: str, what: str, parts: Sequence[str], more_css: str = "") -> str:
    """A whole page of ready sections under a title, a line that says who answered what, and the notice; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{pieces.text(title)}: {pieces.text(model)}</title><style>{CSS}{more_css}</style></head>\n<body><main>"
        f'<h1>{pieces.text(title)}</h1><p class="soft">{pieces.text(model)} · {escape(what)}</p><div class="notice">{NOTICE}</div>'
        + "\n".join(part for part in parts if part)
        + "</main></body></html>\n"
    )
