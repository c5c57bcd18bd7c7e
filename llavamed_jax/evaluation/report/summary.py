"""Formats the result of an evaluation as plain text, for a terminal or a log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llavamed_jax.errors import count_of
from llavamed_jax.evaluation.answering.asked import words as asked_words
from llavamed_jax.evaluation.scoring import controls, programs

# Family, metric, title, and the count; a row with a count of 0 is left out.
ROWS = (
    ("strict", "closed_accuracy", "closed accuracy, strict", "n_closed"),
    ("strict", "open_exact", "open exact, strict", "n_open"),
    ("strict", "open_f1", "open F1, strict", "n_open"),
    ("strict", "choice_accuracy", "multiple choice, strict", "n_choice"),
    ("captions", "bleu_4", "captions, BLEU-4", "n_caption"),
    ("captions", "rouge_l", "captions, ROUGE-L", "n_caption"),
    ("paper", "recall", "open recall, as in the paper", "n_open"),
    ("paper", "closed_accuracy_substring", "closed accuracy, as in the paper", "n_closed"),
)
_KINDS = {"n_closed": "closed", "n_open": "open", "n_choice": "multiple-choice", "n_caption": "captioning"}


def asked(metrics: Mapping) -> str:
    """Returns a phrase with the number of questions of each kind and the number of images."""
    parts = [f"{metrics[key]} {name}" for key, name in _KINDS.items() if metrics.get(key)]
    return f"{' and '.join(parts) or 'no'} questions about {metrics['n_images']} images"


def summary(metrics: Mapping) -> str:
    """Returns the main numbers of `metrics.json` as a plain text table."""
    control, rows = metrics.get("control"), [row for row in ROWS if metrics.get(row[3])]
    lines = [f"{metrics['dataset']} {metrics['split']}: {asked(metrics)}"]
    head = f"{'percent':<41}{'value':>7}  {'95 % interval':<15}" + (f"{'exchanged':>9}{'noise':>7}" if control else "")
    lines.append(head.rstrip())
    for family, name, title, _ in rows:
        table = metrics[family]
        others = f"{plain(control[family][name]):>9}{plain(control['noise'][family][name]):>7}" if control else ""
        lines.append(f"{title:<41}{plain(table[name]):>7}  {_interval(table, name):<15}{others}".rstrip())
        if name == "closed_accuracy":
            always = f'  always "{metrics["baselines"]["majority_closed_answer"]}"'
            lines.append(f"{always:<41}{plain(metrics['baselines']['majority_closed']):>7}")
    more = (*_judged(metrics.get("judged")), *_programs(metrics), *_against(metrics.get("against"), rows),
            *_notes(metrics), *_asked_with(metrics))
    return "\n".join([*lines, *more])


def _asked_with(metrics: Mapping) -> Iterator[str]:
    if words := asked_words(metrics.get("asked") or {}):
        yield f"asked with {words}"


def _judged(judged: Mapping | None) -> Iterator[str]:
    if not judged:
        return
    yield (f"{'open accuracy, judged':<41}{plain(judged['open_accuracy']):>7}"
           f"  {_interval(judged, 'open_accuracy')}").rstrip()
    if judged["n_unscored"]:
        yield (f"  unscored and not counted: {judged['n_unscored']} of {judged['n_open']}: "
               f"{', '.join(map(str, judged['unscored']))}")


def _programs(metrics: Mapping) -> Iterator[str]:
    for _, program, block, numbers in programs.blocks(metrics):
        for name, title, _ in numbers:
            words = f"{title}, as {program.title} scores"
            yield f"{words:<41}{plain(block[name]):>7}  {_interval(block, name)}".rstrip()
        if "open_accuracy_read" in block and (block["n_unreadable"] or block["n_unscored"]):
            words = "open, answers with a verdict"
            yield (f"{words:<41}{plain(block['open_accuracy_read']):>7}  "
                   f"{_interval(block, 'open_accuracy_read')}").rstrip()
            again = (f"{block['n_unreadable']} first replies of the judge hold no verdict and count as wrong above; "
                     "it was asked again; " if block["n_unreadable"] else "")
            yield f"  {again}left out here, without a verdict: {block['n_unscored']}"
        if beside := block.get("published"):
            yield (f"  published: {beside['accuracy']} ({beside['model']}; {beside['low']:.1f} to {beside['high']:.1f} "
                   "agrees)" if "accuracy" in beside else f"  {beside['reason']}")


def _against(against: Mapping | None, rows) -> Iterator[str]:
    if not against:
        return
    yield f"against {against['file']}:"
    yield f"{'':<41}{'other':>7}  {'difference':<23}{'p':>6}"
    for family, name, title, _ in rows:
        row = against[family][name]
        interval = f"[{plain(row['low'])}, {plain(row['high'])}]" if row["low"] is not None else ""
        p = "" if row["p"] is None else f"{row['p']:.3f}" if row["p"] >= 0.001 else "<0.001"
        yield f"{title:<41}{plain(row['other']):>7}  {plain(row['difference']):<6} {interval:<16}{p:>6}"


def _notes(metrics: Mapping) -> Iterator[str]:
    control, organ, leakage = (metrics.get(key) for key in ("control", "organ", "leakage"))
    if control:
        yield controls.reading(control["difference"], "another image")
        yield controls.reading(control["noise"]["difference"], "noise")
    yield from prompts(metrics)
    if metrics.get("n_closed_unread"):
        yield (f"{metrics['n_closed_unread']} of {metrics['n_closed']} closed answers say neither yes nor no, or both, "
               "and count as wrong")
    if metrics.get("n_choice_unread"):
        yield (f"{metrics['n_choice_unread']} of {metrics['n_choice']} multiple-choice answers name no option or "
               "several options and count as wrong")
    if organ:
        yield (f"organ named on {organ['n']} images: {organ['accuracy']:.1f} with the image ({organ['hits']} of "
               f"{organ['n']}), {organ['exchanged']:.1f} with images exchanged (mean of {organ['n'] - 1} shifts), "
               f"majority {organ['majority']:.1f}")
    if leakage and leakage["images_in_training"]:
        yield (f"{leakage['images_in_training']} of {leakage['images']} images also occur in training rows, and "
               f"{leakage['open_answers_on_same_image_in_training']} of {leakage['open_questions']} open answers occur "
               "there with the same image")
    trained = metrics.get("trained_on")
    if trained:
        found = trained["images_same_file"] + trained["images_same_pixels"]
        seen = sum(row["image_and_answer_in_training"] for row in trained["by_kind"].values())
        yield (f"{found} of {trained['images']} images occur in {trained['data']}, and {seen} of "
               f"{sum(row['questions'] for row in trained['by_kind'].values())} questions with image and answer")
        unread = [(trained["records_not_readable"], trained["records"], "records"),
                  (trained["training_images_not_readable"], trained["training_images"], "images")]
        if any(count for count, _, _ in unread):
            yield (f"warning: {' and '.join(f'{n} of {total} {what}' for n, total, what in unread if n)} of "
                   f"{trained['data']} cannot be read")


def prompts(metrics: Mapping) -> Iterator[str]:
    """Yields what was lost of the prompts: those that were cut, and those without a word of the question."""
    if metrics.get("n_prompts_cut"):
        yield f"warning: {count_of(metrics['n_prompts_cut'], 'prompt')} were longer than the model accepts and were cut"
    if metrics.get("n_without_question"):
        yield (f"warning: the model saw no word of {count_of(metrics['n_without_question'], 'question')}, because the "
               "prompt was too long; the answers are scored")


def _interval(table: Mapping, name: str) -> str:
    return "" if table[f"{name}_low"] is None else f"[{table[f'{name}_low']:.1f}, {table[f'{name}_high']:.1f}]"


def plain(value: float | None) -> str:
    """Formats a percentage with one decimal; `-` for None."""
    return "-" if value is None else f"{value:z.1f}"
