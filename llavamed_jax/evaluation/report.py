"""`report.html`: one file that opens offline, with tables, intervals, and pictures beside questions and answers.

Numbers come from the object of `scoring.score` (percent, None where there is no item); nothing is computed here but
which pictures are shown.
"""

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from llavamed_jax.data.datasets import VqaSample
from llavamed_jax.evaluation import controls, scoring
from llavamed_jax.evaluation.style import CSS

_NOTICE = "For research use only: never for clinical decisions."
_GALLERY_IMAGES = 24
_GALLERY_QUESTIONS = 6  # of one image
_THUMBNAIL = 256  # pixels of the longer side

_TITLES = {
    "closed_accuracy": ("Closed accuracy", "the answer is the gold, or its first word is the right one of yes and no"),
    "open_exact": ("Open, exact", "the normalised answer equals the gold"),
    "open_f1": ("Open, F1", "overlap of the words of answer and gold, counted as multisets"),
    "recall": ("Open, recall", "the paper's “open” number: gold words found; repeating a right word raises it"),
    "f1": ("Open, F1", "as the original counts it"),
    "precision": ("Open, precision", "answer words that are in the gold"),
    "exact_match": ("Open, “exact match”", "distinct gold words found / words of the answer: no equality of strings"),
    "bleu": ("BLEU", "1- to 4-grams, unsmoothed: near 0 wherever an answer is shorter than four words"),
    "bleu_1": ("BLEU-1", "single words, with brevity penalty"),
    "bleu_2": ("BLEU-2", "pairs of words alone"),
    "bleu_3": ("BLEU-3", "triples of words alone"),
    "open_accuracy_candidates": ("Open accuracy, candidates", "the training answer nearest to the answer is the gold"),
    "open_accuracy_substring": ("Open accuracy, substring", "the gold is a substring of the answer"),
    "closed_accuracy_yes_no": ("Closed accuracy, yes/no", "the gold is a substring, and “yes” or “no” is one too"),
    "closed_accuracy_substring": ("Closed accuracy, substring", "the gold is a substring: “no” is found in “normal”"),
    "closed_recall": ("Closed recall", "gold words found, as for open questions"),
}
_PAPER_ORDER = (
    "recall", "closed_accuracy_yes_no", "closed_accuracy_substring", "closed_recall", "f1", "precision", "exact_match",
    "open_accuracy_candidates", "open_accuracy_substring", "bleu", "bleu_1", "bleu_2", "bleu_3",
)  # fmt: skip
_SETS = {"vqa_rad": "VQA-RAD", "slake": "SLAKE"}
_SPLITS = {"held_out": "held-out images", "test": "test split", "validation": "validation split", "train": "training split"}
_GROUP_TITLES = {"question_type": "Question type", "organ": "Organ", "modality": "Modality"}


def render(
    metrics: Mapping,
    samples: Sequence[VqaSample],
    predictions: Sequence[Mapping],
    control: Sequence[Mapping] = (),
    details: Mapping[str, Mapping] | None = None,
) -> str:
    """The report as one HTML text.

    Args:
      metrics: the object of `metrics.json`.
      samples, predictions: the questions and their answers, joined by id.
      control: predictions of the same questions with images exchanged, shown beside the real ones.
      details: tables of what was run: title -> name -> value; a value that is no text is shown as JSON.
    """
    name = f"{_SETS.get(metrics['dataset'], metrics['dataset'])}, {_SPLITS.get(metrics['split'], metrics['split'])}"
    model = str(predictions[0].get("model_id", "")) if predictions else ""
    body = [
        f"<h1>Evaluation on {escape(name)}</h1>",
        f'<p class="soft">{escape(model)} · {metrics["n_closed"]} closed and {metrics["n_open"]} open questions'
        f" about {metrics['n_images']} images</p>",
        f'<div class="notice">{_NOTICE}</div>',
        _cards(metrics),
        _strict(metrics),
        _organ(metrics.get("organ")),
        _groups(metrics["groups"]),
        _judged(metrics.get("judged")),
        _paper(metrics),
        _leakage(metrics.get("leakage")),
        _gallery(metrics, samples, predictions, control),
        _details(details or {}),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(name)}: {escape(model)}</title><style>{CSS}</style></head>\n<body><main>"
        + "\n".join(part for part in body if part)
        + "</main></body></html>\n"
    )


def number(value: float | None) -> str:
    """A percentage with one decimal; a dash where there is none; `<0.05` where rounding would hide that it is not 0."""
    if value is None:
        return "–"
    # Adding 0.0 turns a rounded -0.0 into 0.0.
    return "&lt;0.05" if 0 < value < 0.05 else f"{round(value, 1) + 0.0:.1f}".replace("-", "−")


def _interval(table: Mapping, name: str) -> str:
    if table.get(f"{name}_low") is None:
        return ""
    return f'<span class="ci">[{number(table[f"{name}_low"])}, {number(table[f"{name}_high"])}]</span>'


def _bar(table: Mapping, name: str, width: int = 150) -> str:
    """The value as a bar from 0 to 100, its interval as a line across the end."""
    value, low, high = (table.get(key) for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    scale = width / 100
    line = ""
    if low is not None:
        line = f'<line x1="{low * scale:.1f}" x2="{high * scale:.1f}" y1="5" y2="5" stroke="#1c2733" stroke-width="1.5"/>'
    return (
        f'<svg class="bar" width="{width}" height="10" role="img" aria-label="{number(value)} percent">'
        f'<rect width="{width}" height="10" fill="#eef2f5"/>'
        f'<rect width="{max(value, 0) * scale:.1f}" height="10" fill="#7aa9d3"/>{line}</svg>'
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = ()) -> str:
    """A table of ready HTML cells; the first column is the row's heading, `numeric` columns are set to the right."""
    kinds = [' class="n"' if column in numeric else "" for column in range(len(head))]
    top = "".join(f"<th{kind}>{cell}</th>" for cell, kind in zip(head, kinds, strict=True))
    lines = [
        "<tr>"
        + "".join(
            f"<th>{cell}</th>" if column == 0 else f"<td{kind}>{cell}</td>"
            for column, (cell, kind) in enumerate(zip(row, kinds, strict=True))
        )
        + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cards(metrics: Mapping) -> str:
    strict, paper, baselines = metrics["strict"], metrics["paper"], metrics["baselines"]
    cards = []
    if metrics["n_closed"]:
        answer = escape(str(baselines["majority_closed_answer"]))
        beside = f"always “{answer}”: {number(baselines['majority_closed'])}"
        cards.append(("Closed accuracy, strict", strict, "closed_accuracy", beside))
    if metrics["n_open"]:
        cards.append(("Open F1, strict", strict, "open_f1", f"exactly right: {number(strict['open_exact'])}"))
        cards.append(("Open recall, the paper's", paper, "recall", f"precision: {number(paper['precision'])}"))
    html = [
        f'<div class="card"><span>{title}</span><b>{number(table[name])}</b>{_interval(table, name)}<span>{beside}</span></div>'
        for title, table, name, beside in cards
    ]
    organ = metrics.get("organ")
    if organ:
        html.append(
            f'<div class="card"><span>Organ named, with the image</span><b>{number(organ["accuracy"])}</b>'
            f'<span class="ci">{organ["hits"]} of {organ["n"]} images</span>'
            f"<span>images exchanged: {number(organ['exchanged'])}</span></div>"
        )
    return f'<div class="cards">{"".join(html)}</div>'


def _strict(metrics: Mapping) -> str:
    control = metrics.get("control")
    head = ["Strict metric", "%", *(["images exchanged", "difference"] if control else []), "What it is"]
    rows = []
    for name in scoring.STRICT:
        title, what = _TITLES[name]
        tables = [control["strict"], control["difference"]] if control else []
        beside = [f"{number(table[name])} {_interval(table, name)}" for table in tables]
        rows.append([title, _value(metrics["strict"], name), *beside, what])
    baselines = metrics["baselines"]
    notes = "Percent; intervals by bootstrap over images."
    if metrics["n_closed"]:
        notes += (
            f" Without looking: always answering “{escape(str(baselines['majority_closed_answer']))}” gets"
            f" {number(baselines['majority_closed'])} of the closed questions."
        )
    if control:
        notes += (
            " Images exchanged: the same questions, each image replaced by another one of the set"
            f" (one cycle through all, seed {control['seed']}); a difference near 0 says that the image is not looked at."
        )
    return f'<h2>Strict</h2><p class="note">{notes}</p>' + _table(head, rows)


def _paper(metrics: Mapping) -> str:
    paper, control = metrics["paper"], metrics.get("control")
    head = ["Metric", "%", "95 %", *(["images exchanged"] if control else []), "What it is"]
    rows = []
    for name in _PAPER_ORDER:
        exchanged = [number(control["paper"][name])] if control else []
        title, what = _TITLES[name]
        rows.append([title, f"<b>{number(paper[name])}</b>", _interval(paper, name), *exchanged, what])
    note = "Computed as the original LLaVA-Med does, quirks included, so that published numbers can be compared."
    if metrics["n_closed"]:
        note += (
            f" The constant answer “yes no” gets {number(metrics['baselines']['constant_yes_no'])} by closed accuracy, yes/no:"
            " the rule, not the model, earns that."
        )
    return f'<h2>As the paper computes them</h2><p class="note">{note}</p>' + _table(head, rows, range(1, len(head) - 1))


def _judged(judged: Mapping | None) -> str:
    if not judged:
        return ""
    judge = judged["judge"]
    n_scored = judged["n_open"] - judged["n_unscored"]
    rows = [
        ["Said to be right, %", _value(judged, "open_accuracy"), f"of {n_scored} answers that were judged"],
        ["Asked about again", str(judge["n_asked_again"]), "the first reply could not be read"],
        ["Unscored", str(judged["n_unscored"]), escape(", ".join(map(str, judged["unscored"]))) or "none"],
    ]
    note = (
        f"The judge {escape(judge['model'])} read question, gold answer and answer, without the image, and said right or wrong; the"
        f" wording is the project's own unless judge.prompt names another (SHA-256 {judge['wording'][:12]}…). No string metric depends"
        " on it."
    )
    return f'<h2>Open answers, judged</h2><p class="note">{note}</p>' + _table(["Open answers", "", ""], rows)


def _organ(organ: Mapping | None) -> str:
    if not organ:
        return ""
    rows = [
        ["With the image", f"<b>{number(organ['accuracy'])}</b>", f"{organ['hits']} of {organ['n']} images"],
        ["Images exchanged", number(organ["exchanged"]), f"mean over all {organ['n'] - 1} cyclic shifts"],
        ["Always the most frequent", number(organ["majority"]), "looks at nothing"],
    ]
    note = f"“{escape(organ['question'])}” of each image; the gold is the data set's own field."
    return f'<h2>Does it look?</h2><p class="note">{note}</p>' + _table(["Organ named", "%", ""], rows, [1])


def _groups(groups: Mapping) -> str:
    parts = []
    for group, table in groups.items():
        head = [_GROUP_TITLES[group], "images", "closed", "accuracy, strict", "open", "F1, strict", "recall, paper"]
        rows = [
            [
                escape(key), str(row["n_images"]), str(row["n_closed"]), _value(row, "closed_accuracy"),
                str(row["n_open"]), _value(row, "open_f1"), _value(row, "recall"),
            ]
            for key, row in table.items()
        ]  # fmt: skip
        note = '<p class="note">A question of several types counts in each.</p>' if group == "question_type" else ""
        parts.append(f"<h2>By {_GROUP_TITLES[group].lower()}</h2>{note}" + _table(head, rows, [1, 2, 4]))
    return "\n".join(parts)


def _value(table: Mapping, name: str) -> str:
    return f"{number(table[name])} {_interval(table, name)}{_bar(table, name)}"


def _leakage(leakage: Mapping | None) -> str:
    if not leakage:
        return ""
    pairs = [
        ("Images that training rows show", "images_in_training", "images"),
        ("Questions asked about the same image", "questions_in_training", "questions"),
        ("Open answers given for the same image", "open_answers_on_same_image_in_training", "open_questions"),
    ]
    rows = [[title, str(leakage[part]), f"of {leakage[whole]}"] for title, part, whole in pairs]
    note = f"What the {leakage['training_rows']} training rows give away of what is asked here."
    return f'<h2>Overlap with training</h2><p class="note">{note}</p>' + _table(["", "found", ""], rows, [1])


def thumbnail(path: str | Path) -> str | None:
    """A small JPEG as a data URL; None for a file that is not there or is no picture."""
    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
    except (OSError, UnidentifiedImageError):
        return None
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _verdict(sample: VqaSample, text: str) -> tuple[str, str]:
    """A CSS class and a word: right, wrong, or partly right (an open answer that shares words with the gold)."""
    gold = str(sample.answer)
    if scoring.is_closed(sample):
        return ("right", "right") if scoring.is_strictly_right(text, gold) else ("wrong", "wrong")
    f1 = scoring.multiset_f1(text, gold)
    return ("right", "right") if f1 == 1 else ("partly", f"F1 {100 * f1:.0f}") if f1 else ("wrong", "wrong")


def _gallery(metrics: Mapping, samples: Sequence[VqaSample], predictions: Sequence[Mapping], control: Sequence[Mapping]) -> str:
    texts = scoring.join(samples, predictions)
    others = scoring.join(samples, control) if control else [None] * len(samples)
    by_image: dict[str, list[int]] = {}
    for i, sample in enumerate(samples):
        by_image.setdefault(str(sample.image), []).append(i)
    # Drawn by the run's seed, not picked: neither the best nor the worst.
    drawn = np.random.default_rng(metrics["seed"]).permutation(len(by_image))[:_GALLERY_IMAGES]
    images = [list(by_image)[i] for i in sorted(drawn)]
    organs = {answer["image"]: answer for answer in (metrics.get("organ") or {}).get("answers", [])}
    figures = [
        _figure(image, [(samples[i], texts[i], others[i]) for i in by_image[image]], organs.get(image)) for image in images
    ]
    missing = sum("<img" not in figure for figure in figures)
    note = f"{len(images)} of {len(by_image)} images, drawn by seed {metrics['seed']}; at most {_GALLERY_QUESTIONS} questions each."
    if missing:
        note += f" {missing} image files could not be read."
    return f'<h2>Pictures, questions, answers</h2><p class="note">{note}</p><div class="gallery">{"".join(figures)}</div>'


def _figure(image: str, items: Sequence[tuple[VqaSample, str, str | None]], organ: Mapping | None) -> str:
    url = thumbnail(image)
    name = escape(Path(image).name)
    picture = f'<img alt="{name}" src="{url}">' if url else "image not found"
    fields = [field for group in ("organ", "modality") for field in scoring.group_keys(items[0][0], group)]
    label = " · ".join([name, *(escape(field) for field in fields if field != "not stated")])
    entries = []
    if organ:
        verdict = ("right", "right") if organ["named"] == organ["organ"] else ("wrong", "wrong")
        entries.append(_entry(verdict, controls.ORGAN_QUESTION, organ["answer"], controls.ORGAN_ANSWERS[organ["organ"]], None))
    for sample, text, other in items[:_GALLERY_QUESTIONS]:
        entries.append(_entry(_verdict(sample, text), sample.question, text, str(sample.answer), other))
    caption = f'<figcaption><span class="name">{label}</span>{"".join(entries)}</figcaption>'
    return f'<figure><div class="picture">{picture}</div>{caption}</figure>'


def _entry(verdict: tuple[str, str], question: str, answer: str, gold: str, exchanged: str | None) -> str:
    kind, word = verdict
    lines = [("answer", answer), ("gold", gold), *([("exchanged", exchanged)] if exchanged is not None else [])]
    rows = [
        f'<div class="line"><span class="k">{title}</span><span>{escape(text) or "(nothing)"}</span></div>'
        for title, text in lines
    ]
    return (
        f'<div class="qa"><span class="tag {kind}">{word}</span><div class="q">{escape(question)}</div>{"".join(rows)}</div>'
    )


def _details(details: Mapping[str, Mapping]) -> str:
    parts = []
    for title, table in details.items():
        rows = [
            f"<tr><th>{escape(str(name))}</th><td><code>"
            f"{escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}</code></td></tr>"
            for name, value in table.items()
        ]
        parts.append(f"<details open><summary>{escape(title)}</summary><table>{''.join(rows)}</table></details>")
    return "<h2>What was run</h2>" + "\n".join(parts) if parts else ""
