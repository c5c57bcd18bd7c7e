"""Renders `report.html` of a chat evaluation: scores by type and domain, then each figure with its questions.

All numbers come from the metrics of `chat.ChatScorer`; this file computes none. The template is `chat.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from llavamed_jax.datasets.qa50 import DOMAINS, TYPES, ChatQuestion
from llavamed_jax.evaluation import chat_published
from llavamed_jax.evaluation.answering.asked import words
from llavamed_jax.evaluation.report import page
from llavamed_jax.evaluation.report.summary import prompts
from llavamed_jax.images.thumbnail import thumbnail

_TITLES = {
    "overall": "All", "conversation": "Conversation", "detailed_description": "Detailed description",
    "chest_xray": "Chest X-ray", "mri": "MRI", "histology": "Histology", "gross": "Gross pathology", "ct_scan": "CT",
}  # fmt: skip
_CONTROLS = {"image": "image exchanged", "noise": "noise"}
_GOOD, _HALF = 90.0, 50.0  # percent of the reference's score; only for the colour of a tag


def render(
    metrics: Mapping,
    questions: Sequence[ChatQuestion],
    reviews: Sequence[Mapping],
    others: Mapping[str, Sequence[Mapping]] | None = None,
    details: Mapping[str, Mapping] | None = None,
    model: str = "",
) -> str:
    """Renders the report as one HTML text.

    Args:
      metrics: the object of `metrics.json`.
      questions: the questions.
      reviews: the lines of `reviews.jsonl`, in the order of `questions`.
      others: kind of control -> reviews of the answers of that control.
      details: tables of run details: title -> name -> value. A value other than a string is shown as JSON.
      model: the name of the evaluated model in the predictions.
    """
    said, control, rows = words(metrics.get("asked") or {}), metrics.get("control") or {}, tables(metrics)
    controls = {"Images exchanged": control, "Noise": control.get("noise")}
    ours = dict(rows)
    short = _TITLES | {"detailed_description": "Description", "gross": "Gross"}  # eight columns on a page
    columns = [(i, name) for i, name in enumerate(chat_published.COLUMNS) if name in ours]
    figures = _figures(questions, reviews, others or {})
    return page.render(
        "chat.html.j2",
        title="Chat evaluation by a judge",
        model=model,
        what=f"{metrics['n_questions']} questions about {metrics['n_images']} figures, judged by"
        + f" {metrics['judge']['model']}" + (f" · asked with {said}" if said else ""),
        details=details or {},
        metrics=metrics,
        lost=list(prompts(metrics)),
        titles=_TITLES,
        tables=rows,
        controls={title: dict(tables(table)) for title, table in controls.items() if table},
        most=max([110.0, *(table[f"pred_relative_score{end}"] or 0 for _, table in rows for end in ("", "_high"))]),
        paper_columns=[(short[name], ours[name]["data_size"], ours[name]["pred_relative_score"])
                       for _, name in columns],
        paper_rows={title: [values[i] for i, _ in columns] for title, values in chat_published.ROWS.items()},
        unscored=[review for review in reviews if review["pred_score"] is None],
        figures=figures,
        missing=sum(figure["url"] is None for figure in figures),
    )


def tables(metrics: Mapping) -> list[tuple[str, Mapping]]:
    """Returns pairs (name, table) for all questions, each type and each domain, in the order of the paper."""
    groups = {**metrics["type"], **metrics["domain"]}
    return [("overall", metrics["overall"]), *((name, groups[name]) for name in (*TYPES, *DOMAINS) if name in groups)]


def _figures(questions: Sequence[ChatQuestion], reviews: Sequence[Mapping],
             others: Mapping[str, Sequence[Mapping]]) -> list[dict]:
    """Returns each figure with its questions and answers, in the order of the questions."""
    figures: dict[Path, dict] = {}
    for i, (question, review) in enumerate(zip(questions, reviews, strict=True)):
        if question.image not in figures:
            figures[question.image] = {
                "url": thumbnail(question.image), "name": question.image.name, "domain": question.domain,
                "caption": f"{question.label}: {question.caption}", "turns": [],
            }  # fmt: skip
        answers = [("reference", review["gpt4_answer"], review["gpt4_score"]),
                   ("answer", review["text"], review["pred_score"])]
        answers += [(_CONTROLS.get(name, name), found[i]["text"], found[i]["pred_score"])
                    for name, found in others.items()]
        figures[question.image]["turns"].append({"review": review, "verdict": _tag(review), "answers": answers})
    return list(figures.values())


def _tag(review: Mapping) -> tuple[str, str]:
    """Returns a CSS class and a label: the ratio of the scores in percent, or "unscored"."""
    if review["pred_score"] is None:
        return "wrong", "unscored"
    ratio = 100 * review["pred_score"] / review["gpt4_score"]
    return "right" if ratio >= _GOOD else "partly" if ratio >= _HALF else "wrong", f"{ratio:.0f} %"
