"""`report.html` of a chat evaluation: scores by type and domain, then every figure with its questions, answers and reviews.

Numbers come from the object of `chat.ChatScorer`; nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from llavamed_jax.datasets.qa50 import DOMAINS, TYPES, ChatQuestion
from llavamed_jax.evaluation import chat_published
from llavamed_jax.evaluation.answering.asked import words as asked_words
from llavamed_jax.evaluation.report import pieces, sections
from llavamed_jax.evaluation.report.pieces import interval_of, number
from llavamed_jax.evaluation.report.report import page

_TITLES = {
    "overall": "All", "conversation": "Conversation", "detailed_description": "Detailed description", "chest_xray": "Chest X-ray",
    "mri": "MRI", "histology": "Histology", "gross": "Gross pathology", "ct_scan": "CT",
}  # fmt: skip
_CONTROLS = {"image": "image exchanged", "noise": "noise"}
_GOOD, _HALF = 90.0, 50.0  # percent of the reference's score, for the colour of a tag alone
_CSS = """
.figure{display:grid;grid-template-columns:260px minmax(0,1fr);background:var(--paper);border:1px solid var(--line);border-radius:8px;
overflow:hidden;margin:16px 0}
.figure .side{border-right:1px solid var(--line);color:var(--soft);font-size:12.5px;overflow-wrap:anywhere}
.figure .picture{background:#0c1014;color:#aab4be;min-height:60px;padding:2px;display:flex;align-items:center;justify-content:center}
.figure .picture img{display:block;max-width:100%}
.figure .side p{margin:8px 12px}
.figure .main{padding:4px 16px 12px}
.turn{border-top:1px solid var(--line);padding:10px 0}
.turn:first-child{border-top:0}
.turn .q{font-weight:600;margin-bottom:6px}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:16px;font-size:13.5px}
.pair div,.said{overflow-wrap:anywhere;white-space:pre-line}
.pair .k{display:block;font-size:12.5px}
.said{margin-top:8px;padding:6px 10px;border-left:3px solid var(--line);font-size:13px;color:var(--soft)}
@media(max-width:760px){.figure,.pair{grid-template-columns:1fr}}
"""


def render(
    metrics: Mapping,
    questions: Sequence[ChatQuestion],
    reviews: Sequence[Mapping],
    others: Mapping[str, Sequence[Mapping]] | None = None,
    details: Mapping[str, Mapping] | None = None,
    model: str = "",
) -> str:
    """The report as one HTML text.

    Args:
      metrics: the object of `metrics.json`.
      questions, reviews: in one order; `reviews` are the lines of `reviews.jsonl`.
      others: reviews of the answers that were given to controls, by their kind.
      details: tables of what was run: title -> name -> value; a value that is no text is shown as JSON.
      model: what predictions call the model under test.
    """
    what = f'{metrics["n_questions"]} questions about {metrics["n_images"]} figures, judged by {metrics["judge"]["model"]}'
    what += f" · asked with {said}" if (said := asked_words(metrics.get("asked") or {})) else ""
    return page("Chat evaluation by a judge", model, what, [
        _cards(metrics),
        _scores(metrics),
        _paper(metrics),
        _unscored(metrics, reviews),
        _figures(questions, reviews, others or {}),
        sections.details(details or {}),
    ], _CSS)  # fmt: skip


def _points(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _cards(metrics: Mapping) -> str:
    table, judge = metrics["overall"], metrics["judge"]
    cards = [
        ("Relative score, percent", number(table["pred_relative_score"]), interval_of(table, "pred_relative_score"),
         f"ratio of the means: {number(table['ratio_of_means'])}"),
        ("Answers, points of 10", _points(table["pred_score"]), interval_of(table, "pred_score", _points), "the model under test"),
        ("References, points of 10", _points(table["gpt4_score"]), interval_of(table, "gpt4_score", _points), "GPT-4, from the captions"),
        ("Scored", str(table["data_size"]), f'<span class="ci">of {metrics["n_questions"]} questions</span>',
         f"asked again {judge['n_asked_again']}, unscored {metrics['n_unscored']}"),
    ]  # fmt: skip
    return f'<div class="cards">{"".join(pieces.card(*each) for each in cards)}</div>'


def tables(metrics: Mapping) -> list[tuple[str, Mapping]]:
    """(name, table) of all, each type and each domain, in the paper's order."""
    groups = {**metrics["type"], **metrics["domain"]}
    return [("overall", metrics["overall"]), *((name, groups[name]) for name in (*TYPES, *DOMAINS) if name in groups)]


def _scores(metrics: Mapping) -> str:
    control = metrics.get("control") or {}
    kinds = {"Images exchanged": control, "Noise": control.get("noise")}
    controls = {title: dict(tables(table)) for title, table in kinds.items() if table}
    most = max([110.0, *(table[f"pred_relative_score{end}"] or 0 for _, table in tables(metrics) for end in ("", "_high"))])
    head = ["Questions", "n", "Relative score, %", *controls, "Ratio of means, %", "Answers", "References"]
    rows = []
    for name, table in tables(metrics):
        others = [found[name] for found in controls.values()]
        beside = [pieces.with_interval(other, "pred_relative_score") for other in others]
        score = pieces.with_bar(table, "pred_relative_score", most)
        points = [f"{_points(table[key])} {interval_of(table, key, _points)}" for key in ("pred_score", "gpt4_score")]
        rows.append([_TITLES[name], str(table["data_size"]), score, *beside, number(table["ratio_of_means"]), *points])
    note = (
        "The relative score is the mean of the ratios: of each question, the answer's points by the reference's, as in the paper; 100 is"
        " the red mark. The ratio of the means is another quantity, which LLaVA's own summary prints. A question counts in the first of"
        " its domains (chest X-ray, MRI, histology, gross, CT). 95 % intervals by bootstrap over figures; the judge's own noise is not"
        " in them."
    )
    if control:
        note += (
            " Images exchanged: the same questions asked with each figure replaced by another one"
            f" (one cycle through all, seed {control['seed']}), noise: by a picture of noise; both judged in the same way."
        )
    return pieces.section("Scores", note, pieces.table(head, rows, [1, len(head) - 3]))


def _paper(metrics: Mapping) -> str:
    """The paper's numbers where this run is like its own; else why they are not shown."""
    if metrics["differs_from_the_paper"]:
        reasons = escape("; ".join(metrics["differs_from_the_paper"]))
        return pieces.section("Beside the paper", f"The paper's numbers are not shown, since they would not compare: {reasons}.")
    ours = dict(tables(metrics))
    columns = [name for name in chat_published.COLUMNS if name in ours]
    titles = _TITLES | {"detailed_description": "Description", "gross": "Gross"}  # eight columns on a page
    head = ["Relative score, %", *(f'{titles[name]}<br><span class="ci">{ours[name]["data_size"]}</span>' for name in columns)]
    rows = [["<b>this run</b>", *(f"<b>{number(ours[name]['pred_relative_score'])}</b>" for name in columns)]]
    for title, values in chat_published.ROWS.items():
        printed = dict(zip(chat_published.COLUMNS, values, strict=True))
        rows.append([title, *(number(printed[name]) for name in columns)])
    note = "The same questions, judge, wording and temperature. The paper prints no intervals."
    return pieces.section("Beside the paper", note, pieces.table(head, rows, range(1, len(head))))


def _unscored(metrics: Mapping, reviews: Sequence[Mapping]) -> str:
    rows = [
        [escape(str(each["question_id"])), escape(each["question"]), escape(each.get("error") or each["gpt_eval"] or "(nothing)"),
         escape(each["finish_reason"])]
        for each in reviews if each["pred_score"] is None
    ]  # fmt: skip
    if not rows:
        return ""
    note = f"In no mean, {len(rows)} of {metrics['n_questions']} questions: twice the judge's reply could not be read, or there is none."
    return pieces.section("Unscored", note, pieces.table(["Id", "Question", "The judge's last reply", "Ended by"], rows))


def _figures(questions: Sequence[ChatQuestion], reviews: Sequence[Mapping], others: Mapping[str, Sequence[Mapping]]) -> str:
    by_image: dict[Path, list[tuple]] = {}
    for i, (question, review) in enumerate(zip(questions, reviews, strict=True)):
        by_image.setdefault(question.image, []).append((question, review, {name: found[i] for name, found in others.items()}))
    figures = [_figure(image, items) for image, items in by_image.items()]
    missing = sum("<img" not in figure for figure in figures)
    note = "Every figure with its questions; the tag is the ratio of the two scores."
    if missing:
        note += f" {missing} of {len(figures)} image files could not be read."
    return pieces.section("Figures, questions, reviews", note, *figures)


def _figure(image: Path, items: Sequence[tuple[ChatQuestion, Mapping, Mapping[str, Mapping]]]) -> str:
    url, first = pieces.thumbnail(image), items[0][0]
    picture = f'<img alt="{escape(image.name)}" src="{url}">' if url else "image not readable"
    side = f'<div class="picture">{picture}</div>'
    side += f"<p>{escape(image.name)} · {_TITLES[first.domain]}</p><p>{escape(f'{first.label}: {first.caption}')}</p>"
    turns = "".join(_turn(review, others) for _, review, others in items)
    return f'<div class="figure"><div class="side">{side}</div><div class="main">{turns}</div></div>'


def _turn(review: Mapping, others: Mapping[str, Mapping]) -> str:
    answers = [("reference", review["gpt4_answer"], review["gpt4_score"]), ("answer", review["text"], review["pred_score"])]
    answers += [(_CONTROLS.get(name, name), other["text"], other["pred_score"]) for name, other in others.items()]
    kind, word = _tag(review)
    pair = "".join(
        f'<div><span class="k">{escape(title)}{"" if score is None else f": {score:g}"}</span>{escape(text) or "(nothing)"}</div>'
        for title, text, score in answers
    )
    said = escape(review.get("error") or review["gpt_eval"] or "(nothing)")
    return (
        f'<div class="turn"><span class="tag {kind}">{word}</span><div class="q">{escape(review["question"])}</div>'
        f'<div class="pair">{pair}</div><div class="said">{said}</div></div>'
    )


def _tag(review: Mapping) -> tuple[str, str]:
    """A CSS class and a word: the ratio of the scores in percent, or that there is none."""
    if review["pred_score"] is None:
        return "wrong", "unscored"
    ratio = 100 * review["pred_score"] / review["gpt4_score"]
    return "right" if ratio >= _GOOD else "partly" if ratio >= _HALF else "wrong", f"{ratio:.0f} %"
