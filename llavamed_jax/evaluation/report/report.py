"""Renders `report.html`: one file that opens offline, with tables, intervals, pictures, questions and answers.

All numbers come from the metrics of `score.score` and the additions of `vqa.py`; this file computes none. The template
is `report.html.j2`.
"""

from __future__ import annotations

from collections.abc import Mapping

from llavamed_jax.datasets.registry import SETS
from llavamed_jax.datasets.sample import CAPTION, CHOICE, CLOSED, OPEN
from llavamed_jax.evaluation.answering.asked import words
from llavamed_jax.evaluation.report import gallery, page
from llavamed_jax.evaluation.report.summary import asked, prompts
from llavamed_jax.evaluation.scoring import controls, programs, registry
from llavamed_jax.evaluation.scoring.items import AnswerSet

_CONTROLS = {"image": "exchanged", "noise": "noise"}
_SPLITS = {
    "held_out": "held-out images", "test": "test split", "validation": "validation split", "train": "training split",
}  # fmt: skip
TITLES = {
    "closed_accuracy": (
        "Closed accuracy", "the answer equals the gold, or begins with the right one of yes and no and does not "
                           "contain the other"),
    "open_exact": ("Open, exact", "the normalised answer equals the gold, whatever form it is written in"),
    "open_f1": ("Open, F1", "overlap of the words of answer and gold, counted as multisets"),
    "choice_accuracy": ("Multiple choice", "the answer is only the letter or the text of the right option"),
    "recall": ("Open, recall", "the paper's “open” number: gold words found; repeating a right word raises it"),
    "f1": ("Open, F1", "as the original counts it"),
    "precision": ("Open, precision", "answer words that are in the gold"),
    "exact_match": ("Open, “exact match”", "distinct gold words found / words of the answer; not equality of strings"),
    "bleu": ("BLEU", "1- to 4-grams, unsmoothed: near 0 if an answer is shorter than four words"),
    "bleu_1": ("BLEU-1", "single words, with brevity penalty"),
    "bleu_2": ("BLEU-2", "only pairs of words"),
    "bleu_3": ("BLEU-3", "only triples of words"),
    "open_accuracy_candidates": ("Open accuracy, candidates", "the training answer nearest to the answer is the gold"),
    "open_accuracy_substring": ("Open accuracy, substring", "the gold is a substring of the answer"),
    "closed_accuracy_yes_no": ("Closed accuracy, yes/no", "the gold is a substring, and so is “yes” or “no”"),
    "closed_accuracy_substring": (
        "Closed accuracy, substring", "the paper's “closed”: the gold is a substring; “normal” contains “no”"),
    "closed_recall": ("Closed recall", "gold words found, as for open questions"),
}
_CAPTION_TITLES = {
    "bleu_1": ("BLEU-1", "of the whole set: single words, brevity penalty"),
    "bleu_2": ("BLEU-2", "of the whole set: up to pairs"),
    "bleu_3": ("BLEU-3", "of the whole set: up to triples"),
    "bleu_4": ("BLEU-4", "of the whole set: up to four words in a row"),
    "sacrebleu": ("sacreBLEU", "of the whole set, tokenizer 13a, smoothed; needs the extra [reports]"),
    "rouge_l": ("ROUGE-L", "F1 of the longest common subsequence, mean over texts, as rouge-score computes it"),
    "rouge_l_summary": ("ROUGE-L, package rouge", "sentence by sentence over distinct words, mean over texts"),
    "sentence_bleu_1": ("BLEU-1, mean", "mean over the texts: single words"),
    "sentence_bleu_2": ("BLEU-2, mean", "mean over the texts: up to pairs"),
    "sentence_bleu_3": ("BLEU-3, mean", "mean over the texts: up to triples"),
    "sentence_bleu_4": (
        "BLEU-4, mean", "mean over the texts: up to four; a text without four right words in a row counts 0"),
}
_PAPER_ORDER = (
    "recall", "closed_accuracy_substring", "closed_accuracy_yes_no", "closed_recall", "f1", "precision", "exact_match",
    "open_accuracy_substring", "open_accuracy_candidates", "bleu", "bleu_1", "bleu_2", "bleu_3",
)  # fmt: skip
_GROUP_TITLES = {"question_type": "Question type", "organ": "Organ", "modality": "Modality"}
_GROUP_COLUMNS = (  # metric, title of the column of counts before it, title of the metric
    ("closed_accuracy", "closed", "accuracy, strict"), ("open_f1", "open", "F1, strict"),
    ("recall", "", "recall, paper"), ("choice_accuracy", "choice", "accuracy, strict"),
    ("rouge_l", "captions", "ROUGE-L"),
)  # fmt: skip
_KIND_TITLES = {CLOSED: "Closed", OPEN: "Open", CHOICE: "Multiple-choice", CAPTION: "Captioning"}


def render(
    metrics: Mapping,
    answers: AnswerSet,
    others: Mapping[str, AnswerSet] | None = None,
    details: Mapping[str, Mapping] | None = None,
) -> str:
    """Renders the report as one HTML text.

    Args:
      metrics: the object of `metrics.json`.
      answers: the questions and their answers.
      others: kind of control (`image`, `noise`) -> the answers to the same questions, shown beside the real ones.
      details: tables of run details: title -> name -> value. A value other than a string is shown as JSON.
    """
    said, has = words(metrics.get("asked") or {}), lambda name: bool(metrics.get(registry.count_of(name)))
    name, split, control = metrics["dataset"], metrics["split"], metrics.get("control") or {}
    pairs = ("images exchanged", control), ("noise", control.get("noise"))
    tables = [(title, table) for title, table in pairs if table]
    readings = [controls.reading(table["difference"], shown)
                for shown, (_, table) in zip(("another image", "noise"), tables)]
    columns = [column for column in _GROUP_COLUMNS if has(column[0])]
    group_head = ["images", *(cell for _, count, title in columns for cell in (count, title) if cell)]
    group_counts = {"images", *(count for _, count, _ in columns)}
    strict = [name for name in registry.names_of("strict") if has(name)]
    return page.render(
        "report.html.j2",
        title=f"Evaluation on {SETS[name].label if name in SETS else name}, {_SPLITS.get(split, split)}",
        model=str(answers.predictions[0].get("model_id", "")) if answers.predictions else "",
        what=asked(metrics) + (f" · asked with {said}" if said else ""),
        details=details or {},
        metrics=metrics,
        lost=list(prompts(metrics)),
        titles={name: (name, "") for name in registry.names_of()} | TITLES | registry.titles(),
        programs=list(programs.blocks(metrics)),
        further=registry.further(),
        further_against=tuple((family, f", {family}", names) for family, names in registry.further().items()
                              if family in (metrics.get("against") or {})),
        caption_titles=_CAPTION_TITLES,
        strict_names=[name for name in strict if name in metrics["strict"]],
        paper_order=_PAPER_ORDER,
        paper_names=[name for name in _PAPER_ORDER if has(name)],
        control_tables=tables,
        control_names=strict + ["rouge_l"] * has("rouge_l"),
        control_head=[cell for title, _ in tables for cell in (title, "difference", "p")],
        readings=[sentence for sentence in readings if sentence],
        group_titles=_GROUP_TITLES,
        group_columns=columns,
        group_head=group_head,
        group_numeric=[1 + i for i, cell in enumerate(group_head) if cell in group_counts],
        count_of=registry.count_of,
        kind_titles=_KIND_TITLES,
        pictures=gallery.pictures(metrics, answers, {_CONTROLS[kind]: other for kind, other in (others or {}).items()}),
    )
