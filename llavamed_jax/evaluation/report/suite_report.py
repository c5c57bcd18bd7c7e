"""Renders `suite.html`, the page of an evaluation on several data sets. The template is `suite.html.j2`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import quote

from llavamed_jax.datasets.registry import SETS
from llavamed_jax.errors import count_of
from llavamed_jax.evaluation.answering.asked import words
from llavamed_jax.evaluation.report import page, summary

_KINDS = (("n_closed", "closed"), ("n_open", "open"), ("n_choice", "multiple choice"), ("n_caption", "reports"))


def render(said: Mapping, model: str) -> str:
    """Renders the page as one HTML text.

    Args:
      said: the object of `suite.json`.
      model: the name of the model in the predictions.
    """
    sets = [{**each, "name": name, "label": SETS[name].label,
             "link": f"{quote(each['workdir'])}/report.html", "kinds": _kinds(each), "notes": list(_notes(each))}
            for name, each in said["sets"].items()]
    rows = [row for each in sets for row in each["metrics"].values()]
    done = [each for each in sets if each["state"] == "done"]
    asked_with = words(said["asked"] or {})
    return page.render(
        "suite.html.j2",
        title=f"Evaluation on {count_of(len(done), 'data set')}",
        model=model,
        what=f"suite {said['suite']}, {len(done)} of {count_of(len(sets), 'set')} finished"
        + (f" · asked with {asked_with}" if asked_with else ""),
        details={},
        sets=sets,
        done=done,
        not_asked={SETS[name].label: sentence for name, sentence in said["not_asked"].items()},
        not_found={SETS[name].label: sign for name, sign in said["not_found"].items()},
        root=said["root"],
        folders=said["folders_searched"],
        not_searched=said["not_searched"],
        has_control=any("noise" in row for row in rows),
        has_other=any("other" in row for row in rows),
        has_beside=any("without_looking" in row for row in rows),
    )


def _notes(each: Mapping) -> Iterator[str]:
    """Yields what a reader of the set's numbers has to know."""
    yield from summary.prompts(each)
    unread = (each["n_closed_unread"] or 0) + (each["n_choice_unread"] or 0)
    if unread:
        yield f"{count_of(unread, 'answer')} could not be read and count as wrong"
    if each["judge"]:
        yield f"open answers judged by {each['judge']}, {each['n_unscored']} without a verdict"
    if each["not_compared"]:
        yield f"not compared: {each['not_compared']}"


def _kinds(each: Mapping) -> str:
    return ", ".join(f"{each[key]:,} {title}" for key, title in _KINDS if each[key])
