"""The sections of `report.html`, each one idea of `metrics.json` as a heading, a note and a table.

Numbers come from the object of `scoring.score` and what `run.py` adds to it (percent, None where there is no item); nothing
is computed here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, OPEN
from llavamed_jax.evaluation.report import pieces
from llavamed_jax.evaluation.report.pieces import number
from llavamed_jax.evaluation.scoring import controls
from llavamed_jax.evaluation.scoring.items import STRICT, STRICT_CHOICE

TITLES = {
    "closed_accuracy": ("Closed accuracy", "the answer is the gold, or begins with the right one of yes and no and does not say the other"),
    "open_exact": ("Open, exact", "the normalised answer equals the gold, whatever form it is written in"),
    "open_f1": ("Open, F1", "overlap of the words of answer and gold, counted as multisets"),
    "choice_accuracy": ("Multiple choice", "letter or text of the right option, and nothing else"),
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
    "closed_accuracy_substring": ("Closed accuracy, substring", "the paper's “closed”: the gold is a substring, “no” of “normal” too"),
    "closed_recall": ("Closed recall", "gold words found, as for open questions"),
}
_CAPTION_TITLES = {
    "bleu_1": ("BLEU-1", "of the whole set: single words, brevity penalty"),
    "bleu_2": ("BLEU-2", "of the whole set: up to pairs"),
    "bleu_3": ("BLEU-3", "of the whole set: up to triples"),
    "bleu_4": ("BLEU-4", "of the whole set: up to four words in a row"),
    "rouge_l": ("ROUGE-L", "F1 of the longest common subsequence, mean over texts"),
    "sentence_bleu_1": ("BLEU-1, mean", "of each text by itself, then averaged"),
    "sentence_bleu_2": ("BLEU-2, mean", "the same, up to pairs"),
    "sentence_bleu_3": ("BLEU-3, mean", "the same, up to triples"),
    "sentence_bleu_4": ("BLEU-4, mean", "the same, up to four; a text without four right words in a row counts 0"),
}
_PAPER_ORDER = (
    "recall", "closed_accuracy_substring", "closed_accuracy_yes_no", "closed_recall", "f1", "precision", "exact_match",
    "open_accuracy_substring", "open_accuracy_candidates", "bleu", "bleu_1", "bleu_2", "bleu_3",
)  # fmt: skip
_GROUP_TITLES = {"question_type": "Question type", "organ": "Organ", "modality": "Modality"}
# What a metric is computed on: a row or column without such questions is left out.
_KIND_OF = {"closed": "n_closed", "open": "n_open", "choice": "n_choice", "rouge": "n_caption"}


def _applies(name: str, metrics: Mapping) -> bool:
    return bool(metrics.get(_KIND_OF.get(name.split("_")[0], "n_open")))


def cards(metrics: Mapping) -> str:
    """The headline numbers, each beside what an answer that looks at nothing gets."""
    strict, paper, baselines = metrics["strict"], metrics["paper"], metrics["baselines"]
    found = []
    if metrics["n_closed"]:
        answer = pieces.text(str(baselines["majority_closed_answer"]))
        beside = f"always “{answer}”: {number(baselines['majority_closed'])}"
        found.append(("Closed accuracy, strict", strict, "closed_accuracy", beside))
    if metrics["n_open"]:
        found.append(("Open F1, strict", strict, "open_f1", f"exactly right: {number(strict['open_exact'])}"))
        found.append(("Open recall, the paper's", paper, "recall", f"precision: {number(paper['precision'])}"))
    if metrics.get("n_choice"):
        found.append(("Multiple choice, strict", strict, "choice_accuracy", f"chance: {number(baselines['chance_choice'])}"))
    if metrics.get("n_caption"):
        found.append(("Captions, ROUGE-L", metrics["captions"], "rouge_l", f"BLEU-4: {number(metrics['captions']['bleu_4'])}"))
    parts = [pieces.card(title, number(table[name]), pieces.interval_of(table, name), beside) for title, table, name, beside in found]
    organ = metrics.get("organ")
    if organ:
        hits = f'<span class="ci">{organ["hits"]} of {organ["n"]} images</span>'
        beside = f"images exchanged: {number(organ['exchanged'])}"
        parts.append(pieces.card("Organ named, with the image", number(organ["accuracy"]), hits, beside))
    return f'<div class="cards">{"".join(parts)}</div>'


def strict(metrics: Mapping) -> str:
    """Right or not right, with what no look at the image gets."""
    names = [name for name in (*STRICT, STRICT_CHOICE) if name in metrics["strict"] and _applies(name, metrics)]
    if not names:
        return ""
    rows = [[TITLES[name][0], pieces.with_bar(metrics["strict"], name), TITLES[name][1]] for name in names]
    baselines, notes = metrics["baselines"], ["Percent; intervals by bootstrap over images."]
    if metrics["n_closed"]:
        answer = pieces.text(str(baselines["majority_closed_answer"]))
        notes.append(f"Without looking, always “{answer}” gets {number(baselines['majority_closed'])} of the closed questions.")
    if metrics.get("n_choice"):
        notes.append(
            f"Without looking, always {baselines['majority_choice_letter']} gets {number(baselines['majority_choice'])} of the multiple"
            f" choice, and chance {number(baselines['chance_choice'])}. {metrics['n_choice_unread']} of {metrics['n_choice']} answers name"
            " no option or several: unread, they count as wrong."
        )
    return pieces.section("Strict", " ".join(notes), pieces.table(["Strict metric", "%", "What it is"], rows))


def control(metrics: Mapping) -> str:
    """The same questions about other pictures, beside the score."""
    found = metrics.get("control")
    if not found:
        return ""
    noise = found.get("noise")
    kinds = [("images exchanged", found), *([("noise", noise)] if noise else [])]
    head = ["Metric", "own image"]
    for title, _ in kinds:
        head += [title, "difference", "p"]
    rows = []
    for name in [name for name in (*STRICT, STRICT_CHOICE, "rouge_l") if _applies(name, metrics)]:
        family = "captions" if name == "rouge_l" else "strict"
        row = [(TITLES | _CAPTION_TITLES)[name][0], pieces.with_interval(metrics[family], name)]
        for _, kind in kinds:
            row += [pieces.with_interval(kind[family], name), pieces.with_interval(kind["difference"], name),
                    pieces.probability(kind["difference"].get(f"{name}_p"))]
        rows.append(row)
    note = (
        "The same questions, each image replaced by another one of the set (one cycle through all,"
        f" seed {found['seed']})" + (f", and by a picture of noise, {noise['size']} pixels wide and high" if noise else "")
        + ". The difference is own image minus control, paired, its interval by bootstrap and its p by exchange over images."
    )
    says = [controls.reading(found["difference"], "another image")] + ([controls.reading(noise["difference"], "noise")] if noise else [])
    return pieces.section("Does the image matter?", note, *(f"<p>{escape(text)}</p>" for text in says if text), pieces.table(head, rows))


def organ(metrics: Mapping) -> str:
    """One question about every image, which only the image can answer."""
    found = metrics.get("organ")
    if not found:
        return ""
    rows = [
        ["With the image", f"<b>{number(found['accuracy'])}</b>", f"{found['hits']} of {found['n']} images"],
        ["Images exchanged", number(found["exchanged"]), f"mean over all {found['n'] - 1} cyclic shifts"],
        ["Always the most frequent", number(found["majority"]), "looks at nothing"],
    ]
    note = f"“{escape(found['question'])}” of each image; the gold is the data set's own field."
    return pieces.section("Does it look?", note, pieces.table(["Organ named", "%", ""], rows, [1]))


def captions(metrics: Mapping) -> str:
    """BLEU and ROUGE-L of generated texts, and what is not computed."""
    table = metrics.get("captions")
    if not table:
        return ""
    rows = [[title, pieces.with_bar(table, name), what] for name, (title, what) in _CAPTION_TITLES.items()]
    note = f"Not computed, as they need weights that are not part of this project: {', '.join(table['not_computed'])}."
    return pieces.section("Captions", note, pieces.table(["Metric", "%", "What it is"], rows))


def against(metrics: Mapping) -> str:
    """The paired comparison with another file of predictions."""
    found = metrics.get("against")
    if not found:
        return ""
    rows = []
    for family, title in (("strict", ""), ("captions", ", captions"), ("paper", ", paper")):
        names = [*_PAPER_ORDER] if family == "paper" else list(found.get(family, ()))
        for name in names:
            row = found[family][name]
            if row["value"] is None:
                continue
            shown = (_CAPTION_TITLES if family == "captions" else TITLES).get(name, (name,))[0]
            rows.append([shown + title, number(row["value"]), number(row["other"]), f"<b>{number(row['difference'])}</b>",
                         pieces.interval(row["low"], row["high"]), pieces.probability(row["p"])])
    note = (
        f"Ours minus the answers in {escape(found['file'])} ({escape(str(found['model_id'] or 'no model_id in it'))},"
        f" sha256 {found['sha256'][:12]}…) to the same questions, paired: intervals by bootstrap over images, p by exchanging the"
        " two models' answers image by image. p is of one metric; with many metrics some are small by chance."
    )
    return pieces.section("Against another model", note,
                        pieces.table(["Metric", "ours", "other", "difference", "95 %", "p"], rows, range(1, 6)))


def groups(metrics: Mapping) -> str:
    """Strict metrics and the paper's recall by question type, organ and modality."""
    columns = [("closed_accuracy", "closed", "accuracy, strict"), ("open_f1", "open", "F1, strict"), ("recall", "", "recall, paper"),
               ("choice_accuracy", "choice", "accuracy, strict"), ("rouge_l", "captions", "ROUGE-L")]
    columns = [column for column in columns if _applies(column[0], metrics)]
    parts = []
    for group, table in metrics["groups"].items():
        head, numeric = [_GROUP_TITLES[group], "images"], [1]
        for _, count, title in columns:
            if count:
                numeric.append(len(head))
            head += [count, title] if count else [title]
        rows = []
        for key, row in table.items():
            cells = [pieces.text(key), str(row["n_images"])]
            for name, count, _ in columns:
                cells += ([str(row[_KIND_OF[name.split("_")[0]]])] if count else []) + [pieces.with_bar(row, name)]
            rows.append(cells)
        note = "A question of several types counts in each." if group == "question_type" else ""
        parts.append(pieces.section(f"By {_GROUP_TITLES[group].lower()}", note, pieces.table(head, rows, numeric)))
    return "\n".join(parts)


def paper(metrics: Mapping) -> str:
    """The original's metrics; the published number beside ours where it is of the same model, protocol and split."""
    names = [name for name in _PAPER_ORDER if _applies(name, metrics)]
    if not names:
        return ""
    kinds = [(title, table["paper"]) for title, table in _control_tables(metrics)]
    published = metrics.get("published") or {}
    values = published.get("values", {})
    head = ["Metric", "%", "95 %", *([escape(published["model"])] if values else []), *(title for title, _ in kinds), "What it is"]
    rows = []
    for name in names:
        beside = [number(values.get(name))] if values else []
        rows.append([TITLES[name][0], f"<b>{number(metrics['paper'][name])}</b>", pieces.interval_of(metrics["paper"], name), *beside,
                     *(number(table[name]) for _, table in kinds), TITLES[name][1]])
    notes = ["Computed as the original LLaVA-Med does, quirks included, so that published numbers can be compared."]
    if metrics["n_closed"]:
        notes.append(f"The constant answer “yes no” gets {number(metrics['baselines']['constant_yes_no'])} by closed accuracy, yes/no:"
                     " the rule, not the model, earns that.")
    if values:
        notes.append(f"Beside ours: {escape(published['model'])} ({escape(published['source'])}), of the same questions and training rows.")
    elif published:
        notes.append(escape(published["reason"]))
    return pieces.section("As the paper computes them", " ".join(notes), pieces.table(head, rows, range(1, len(head) - 1)))


def _control_tables(metrics: Mapping) -> list[tuple[str, Mapping]]:
    found = metrics.get("control") or {}
    return ([("images exchanged", found)] if found else []) + ([("noise", found["noise"])] if found.get("noise") else [])


def leakage(metrics: Mapping) -> str:
    """What training rows give away of the questions, by name, and by what the model was really trained on."""
    parts = []
    found = metrics.get("leakage")
    if found:
        pairs = [
            ("Images that training rows show", "images_in_training", "images"),
            ("Questions asked about the same image", "questions_in_training", "questions"),
            ("Open answers given for the same image", "open_answers_on_same_image_in_training", "open_questions"),
        ]
        rows = [[title, str(found[part]), f"of {found[whole]}"] for title, part, whole in pairs]
        note = f"What the {found['training_rows']} training rows of the set give away of what is asked here, by the names of its files."
        parts.append(pieces.section("Overlap with training", note, pieces.table(["", "found", ""], rows, [1])))
    if metrics.get("trained_on"):
        parts.append(_trained_on(metrics["trained_on"]))
    return "\n".join(parts)


def _trained_on(found: Mapping) -> str:
    rows = [["Images, the same file", str(found["images_same_file"]), f"of {found['images']}"],
            ["Images, the same pixels in another file", str(found["images_same_pixels"]), f"of {found['images']}"]]
    for kind, row in found["by_kind"].items():
        name = {CLOSED: "Closed", OPEN: "Open", CHOICE: "Multiple-choice", CAPTION: "Captioning"}[kind]
        rows.append([f"{name} questions whose image occurs", str(row["image_in_training"]), f"of {row['questions']}"])
        rows.append([f"{name} questions whose image and answer occur", str(row["image_and_answer_in_training"]), f"of {row['questions']}"])
    note = (
        f"{escape(found['data'])}: {found['records']} records, {found['records_not_readable']} of them not readable, about"
        f" {found['training_images']} images, {found['training_images_not_readable']} of them not readable. Images are compared by their"
        " files' bytes and by their pixels; an answer counts where a record has it as a whole turn."
    )
    return pieces.section("Overlap with what the model was trained on", note, pieces.table(["", "found", ""], rows, [1]))


def judged(metrics: Mapping) -> str:
    """What a judge said of the open answers, apart from the string metrics."""
    found = metrics.get("judged")
    if not found:
        return ""
    judge = found["judge"]
    rows = [
        ["Said to be right, %", pieces.with_bar(found, "open_accuracy"), f"of {found['n_open'] - found['n_unscored']} judged answers"],
        ["Asked about again", str(judge["n_asked_again"]), "the first reply could not be read"],
        ["Unscored", str(found["n_unscored"]), escape(", ".join(map(str, found["unscored"]))) or "none"],
    ]
    note = (
        f"The judge {escape(judge['model'])} read question, gold answer and answer, without the image, and said right or wrong; the"
        f" wording is the project's own unless judge.prompt names another (SHA-256 {judge['wording'][:12]}…). No string metric depends"
        " on it."
    )
    return pieces.section("Open answers, judged", note, pieces.table(["Open answers", "", ""], rows))


def details(tables: Mapping[str, Mapping]) -> str:
    """What was run: title -> name -> value; a value that is no text is shown as JSON."""
    parts = []
    for title, table in tables.items():
        rows = [
            f"<tr><th>{escape(str(name))}</th><td><code>"
            f"{escape(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))}</code></td></tr>"
            for name, value in table.items()
        ]
        parts.append(f"<details open><summary>{escape(title)}</summary><table>{''.join(rows)}</table></details>")
    return "<h2>What was run</h2>" + "\n".join(parts) if parts else ""
