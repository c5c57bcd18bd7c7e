"""Turns the metrics of several sets into the rows of one table: set x metric x interval.

All numbers come from the sets' `metrics.json`; this file computes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llavamed_jax.evaluation.report import summary
from llavamed_jax.evaluation.report.summary import plain
from llavamed_jax.evaluation.scoring import programs


def rows(metrics: Mapping) -> dict[str, dict]:
    """Returns the main numbers of a set, in percent.

    Args:
      metrics: the object of the set's `metrics.json`.

    Returns:
      `FAMILY.METRIC` -> `title`, `n` (number of questions), `value`, `low`, `high`; and where they exist
      `without_looking` and its `without_looking_title` (the score of a constant answer or of chance), `exchanged` and
      `noise` (the controls), and `other`, `difference`, `difference_low`, `difference_high`, `p` (`--against`).
    """
    return {f"{family}.{name}": row for family, name, row in _rows(metrics)}


def problems(metrics: Mapping) -> dict[str, object]:
    """Returns what a reader of the numbers has to know of a set; null where it does not apply.

    Returns:
      `n_prompts_cut`, `n_without_question`, `n_closed_unread`, `n_choice_unread`; `judge`, the name of the model that
      judged the open answers; and `n_unscored`, the number of answers without a verdict.
    """
    judged = metrics.get("judged") or next((block for _, _, block, _ in programs.blocks(metrics) if block.get("judge")),
                                           {})
    counts = ("n_prompts_cut", "n_without_question", "n_closed_unread", "n_choice_unread")
    return {**{key: metrics.get(key) for key in counts}, "judge": (judged.get("judge") or {}).get("model"),
            "n_unscored": judged.get("n_unscored")}


def _rows(metrics: Mapping) -> Iterator[tuple[str, str, dict]]:
    control, against = metrics.get("control"), metrics.get("against")
    for family, name, title, count in summary.ROWS:
        if not metrics.get(count):
            continue
        row = _row(metrics[family], name, title, metrics[count]) | _without_looking(metrics, name)
        if control:
            row |= {"exchanged": control[family][name], "noise": control["noise"][family][name]}
        if against:
            pair = against[family][name]
            row |= {"other": pair["other"], "difference": pair["difference"], "difference_low": pair["low"],
                    "difference_high": pair["high"], "p": pair["p"]}
        yield family, name, row
    if judged := metrics.get("judged"):
        yield "judged", "open_accuracy", _row(judged, "open_accuracy", "open accuracy, judged",
                                              judged["n_open"] - judged["n_unscored"])
    for family, program, block, numbers in programs.blocks(metrics):
        for name, title, n in numbers:
            yield family, name, _row(block, name, f"{title}, as {program.title} scores", n)


def _row(table: Mapping, name: str, title: str, n: int) -> dict:
    return {"title": title, "n": n, "value": table[name], "low": table[f"{name}_low"], "high": table[f"{name}_high"]}


def _without_looking(metrics: Mapping, name: str) -> dict:
    baselines = metrics["baselines"]
    if name == "closed_accuracy":
        return {"without_looking": baselines["majority_closed"],
                "without_looking_title": f'always "{baselines["majority_closed_answer"]}"'}
    if name == "choice_accuracy":
        return {"without_looking": baselines["chance_choice"], "without_looking_title": "chance"}
    return {}


def table(sets: Mapping[str, Mapping]) -> str:
    """Formats the sets of `suite.json` as a plain text table, for a terminal.

    Args:
      sets: name -> the object of the set, with `split`, `state` and `metrics`.
    """
    found = [(name, each) for name, each in sets.items() if each["metrics"]]
    has_control = any("noise" in row for _, each in found for row in each["metrics"].values())
    has_other = any("other" in row for _, each in found for row in each["metrics"].values())
    head = (f"{'percent':<26}{'':<38}{'n':>6}{'value':>7}  {'95 % interval':<15}{'without looking':<24}"
            + (f"{'exchanged':>9}{'noise':>7}" if has_control else "") + (f"{'other':>7}{'p':>8}" if has_other else ""))
    lines = [head.rstrip()] if found else []
    for name, each in found:
        first = f"{name} {each['split']}"
        for row in each["metrics"].values():
            beside = (f"{plain(row['without_looking'])} ({row['without_looking_title']})"
                      if "without_looking" in row else "")
            interval = "" if row["low"] is None else f"[{row['low']:.1f}, {row['high']:.1f}]"
            line = f"{first:<26}{row['title']:<38}{row['n']:>6}{plain(row['value']):>7}  {interval:<15}{beside:<24}"
            line += f"{plain(row.get('exchanged')):>9}{plain(row.get('noise')):>7}" if has_control else ""
            line += f"{plain(row.get('other')):>7}{_probability(row.get('p')):>8}" if has_other else ""
            lines.append(line.rstrip())
            first = ""
    return "\n".join(lines)


def _probability(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}" if value >= 0.001 else "<0.001"
