"""Evaluates one model on several data sets: one loaded model, one table, one page.

Each set has its own workdir below the suite's, `DIR/SET`, with the files of a single evaluation. Beside them lie
`suite.json` and `suite.html`, which are written again after every set. A set that fails does not end the others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets.find import Found
from llavamed_jax.datasets.registry import SETS
from llavamed_jax.errors import UsageError, UserError, count_of, warn
from llavamed_jax.evaluation import results, run
from llavamed_jax.evaluation.report import suite_report, suite_rows
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.utils.files import write_text

SUITES = {
    "medical": ("vqa_rad", "slake", "pathvqa", "pmc_vqa", "omnimedvqa", "medxpertqa_mm", "mmmu_med", "medframeqa",
                "iu_xray"),
}
DONE, FAILED, LEFT = "done", "failed", "left"


@dataclass
class Member:
    """A data set of a suite.

    Attributes:
      name: the name of the set.
      cfg: its eval config, with `data.root` and `data.split`.
      workdir: the directory of its evaluation.
      against: predictions of another model on this set, to compare with.
      evaluation: the evaluation; None if it could not be opened.
      what: one line that says what is asked.
      controls: the controls that are possible with this set.
      metrics: the object of `metrics.json`; None until the set is finished.
      error: why the set failed; "" otherwise.
      not_compared: why the set is asked without `against`; "" otherwise.
    """

    name: str
    cfg: ConfigDict
    workdir: Path
    against: Path | None = None
    evaluation: run.Evaluation | None = None
    what: str = ""
    controls: list[str] = field(default_factory=list)
    metrics: dict | None = None
    error: str = ""
    not_compared: str = ""

    @property
    def state(self) -> str:
        """`done`, `failed`, or `left` if the set was not finished yet."""
        return FAILED if self.error else LEFT if self.metrics is None else DONE


def open_members(members: Sequence[Member], controls: Collection[str] = ()) -> None:
    """Reads the questions of all sets and checks them; a set that cannot be evaluated gets an `error`.

    A set whose predictions of another model do not fit is asked without the comparison, with a warning.

    Args:
      members: the sets.
      controls: the controls to ask. A control that is not possible with a set is left out there, with a warning.

    Raises:
      UsageError: a setting is invalid.
    """
    agreement.check_same(lambda: {f"the data set {member.name}": member.cfg.data.split for member in members}
                         | {"the number of data sets": len(members)})
    for member in members:
        member.error = _open(member)
        if member.error and member.against is not None:
            failed, against, member.against = member.error, member.against, None
            member.error = _open(member)
            if member.error:
                member.against = against
            else:
                member.not_compared = failed
                warn(f"{member.name} is asked without the comparison with {against}: {failed}")
        if not member.error and controls:
            member.controls = _possible(member, list(controls))


def _open(member: Member) -> str:
    """Opens and checks the evaluation of a set; returns the error of any process, or ""."""
    is_new, found = not member.workdir.exists(), ""
    try:
        member.evaluation = run.open_evaluation(member.cfg, member.workdir, member.against)
        member.what = member.evaluation.scorer.describe()
        run.check(member.evaluation)
    except UsageError:
        raise
    except (UserError, OSError) as error:
        found = str(error)
    finally:
        if is_new:
            results.remove_empty(member.workdir)
    return _of_any_process(found)


def _possible(member: Member, controls: list[str]) -> list[str]:
    error = ""
    try:
        run.check_controls(member.evaluation, controls)
    except UserError as found:
        error = str(found)
    error = _of_any_process(error)
    if error:
        warn(f"{member.name} is asked without --control {' '.join(controls)}: {error}")
    return [] if error else controls


def _of_any_process(error: str) -> str:
    """Returns the first error of the processes, on all of them; "" if no process has one."""
    everyone = distributed.gather(json.dumps(error).encode())
    return distributed.from_first(lambda: next(filter(None, map(json.loads, everyone)), ""))


def record(name: str, root: str | Path, found: Found, members: Sequence[Member],
           not_asked: Mapping[str, str]) -> dict:
    """Returns the object of `suite.json`.

    Args:
      name: the name of the suite.
      root: the folder with the sets.
      found: what was found there.
      members: the sets that are asked.
      not_asked: name of a set that was found and is not asked -> a sentence that says why.
    """
    first = next((member.metrics for member in members if member.metrics), {})
    return {
        "suite": name,
        "root": str(root),
        "asked": first.get("asked"),
        "unit": "percent",
        "sets": {member.name: _set(member) for member in members},
        "not_asked": dict(not_asked),
        "not_found": {each: SETS[each].sign for each in SUITES[name] if each not in found.folders},
        "folders_searched": found.num_folders,
        "not_searched": list(found.unread),
    }


def _set(member: Member) -> dict:
    metrics: Mapping = member.metrics or {}
    counts = {key: metrics.get(key) for key in ("n_open", "n_closed", "n_choice", "n_caption", "n_images")}
    return {
        "state": member.state,
        "error": member.error or None,
        "dataset": metrics.get("dataset", member.name),
        "split": member.cfg.data.split,
        "root": str(member.cfg.data.root),
        "workdir": member.workdir.name,
        "what": member.what or None,
        **counts,
        **suite_rows.problems(metrics),
        "not_compared": member.not_compared or None,
        "questions_sha256": metrics.get("questions_sha256"),
        "evaluation": metrics.get("evaluation"),
        "metrics": suite_rows.rows(metrics) if metrics else {},
    }


def write(workdir: Path, said: Mapping, model: str) -> None:
    """Writes `suite.json` and `suite.html`; only the first process does.

    Args:
      workdir: the suite's directory.
      said: the object of `suite.json`.
      model: the name of the model.
    """
    if distributed.process_index():
        return
    write_text(workdir / "suite.html", suite_report.render(said, model))
    write_text(workdir / "suite.json", json.dumps(said, indent=2, ensure_ascii=False) + "\n")


def failures(members: Sequence[Member]) -> str:
    """Returns a sentence that names the failed sets, with the error of each; "" if no set failed."""
    failed = [member for member in members if member.error]
    if not failed:
        return ""
    parts = "; ".join(f"{member.name}: {member.error}" for member in failed)
    return f"{len(failed)} of {count_of(len(members), 'set')} failed: {parts}"
