"""Runs one evaluation from start to end: questions -> answers -> scores -> report.

Example:
    evaluation = open_evaluation(cfg, workdir)    # bad settings raise here, before a model is loaded
    check(evaluation, ["image"])
    metrics = evaluate(evaluation, answerer, {"checkpoint": path}, ["image"])
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets.sample import CHOICE, VqaSample, all_images, check_ids, check_images, of_kind
from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation import finished
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.answering.answerer import Answerer, Generation
from llavamed_jax.evaluation.answering.ask import ask, predict
from llavamed_jax.evaluation.answering.resume import Partial
from llavamed_jax.evaluation.chat import KIND as CHAT
from llavamed_jax.evaluation.chat import ChatScorer
from llavamed_jax.evaluation.judging.judge import check_answered
from llavamed_jax.evaluation.report import details
from llavamed_jax.evaluation.results import Place, check_unused, check_writable, write_results
from llavamed_jax.evaluation.scoring import controls
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.strict import right_choice
from llavamed_jax.evaluation.settings import check_settings
from llavamed_jax.evaluation.vqa import VqaScorer
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.utils.files import to_jsonl

OWN = ""  # key of the answers about the questions' own images; the other keys are the controls


@dataclass
class Evaluation:
    """An evaluation that is ready to run.

    Attributes:
      cfg: an eval config (`configs/eval/*.py`).
      workdir: the directory for all files; it exists.
      generation: how answers are generated.
      scorer: holds the questions and scores answers to them.
      partials: files of answers that are kept until the evaluation is finished.
      place: the locked workdir (`results.locked`); None if it is not locked.
      checked: the controls that `check` has passed with; None if it has not run.
    """

    cfg: ConfigDict
    workdir: Path
    generation: Generation
    scorer: VqaScorer | ChatScorer
    partials: list[Partial] = field(default_factory=list)
    place: Place | None = None
    checked: frozenset[str] | None = None

    @property
    def samples(self) -> list[VqaSample]:
        """The questions."""
        return self.scorer.samples

    @property
    def n_kept(self) -> int:
        """Number of answers on the disk that a repeated run of the same evaluation will reuse."""
        judge = self.scorer.judge
        return sum(map(len, self.partials)) + (judge.n_kept if judge is not None else 0)

    @property
    def has_written(self) -> bool:
        """Whether answers were written into the workdir. If not, a process that fails removes the workdir."""
        return any(partial.is_begun for partial in self.partials)

    def check_place(self) -> None:
        """Raises UserError if the locked workdir was removed, moved or replaced."""
        if self.place is not None:
            self.place.check()


def open_evaluation(cfg: ConfigDict, workdir: str | Path, against: str | Path | None = None) -> Evaluation:
    """Checks the settings, reads the questions and creates the workdir.

    Args:
      cfg: an eval config; `data.name` selects the scorer.
      workdir: the directory for `predictions.jsonl`, `metrics.json`, `report.html` and `tensorboard/`.
      against: a file with another model's predictions for the same questions, to compare with.

    Raises:
      UsageError: a setting is invalid.
      UserError: the data cannot be read or hold no question, the predictions of `against` do not fit the questions, or
        the workdir cannot be written to.
    """
    if not str(workdir):
        raise UsageError("the workdir is empty; a directory was expected: --workdir DIR")
    check_settings(cfg)
    scorer = (ChatScorer if cfg.data.name == CHAT else VqaScorer)(cfg, Path(workdir), against)
    check_writable(Path(workdir))  # now, rather than after hours of answers
    return Evaluation(cfg, Path(workdir), Generation(**cfg.generation.to_dict(), seed=cfg.seed), scorer)


def check(evaluation: Evaluation, controls_asked: Collection[str] = ()) -> None:
    """Finds errors early that would otherwise show only after all questions were asked.

    Args:
      evaluation: the evaluation.
      controls_asked: the controls that will be asked.

    Raises:
      UserError: several questions have the same id, an image is missing, or a control is not possible with these
        questions.
    """
    cfg, samples = evaluation.cfg, evaluation.samples
    check_ids(samples, str(cfg.data.root))
    check_images(all_images(samples))
    if cfg.get("organ_question"):
        controls.check_organs(samples)
    if controls_asked:
        check_controls(evaluation, controls_asked)
    for sample in of_kind(samples, CHOICE):
        right_choice(sample)
    evaluation.checked = frozenset(controls_asked)


def check_controls(evaluation: Evaluation, controls_asked: Collection[str]) -> None:
    """Raises UserError if a control is not possible with the questions of an evaluation that `check` has passed."""
    samples = evaluation.samples
    controls.exchanged_images(samples, evaluation.cfg.seed)
    controls.check_room(len({str(image) for image in all_images(samples)}), evaluation.workdir)
    evaluation.checked = frozenset(controls_asked)


def plan(evaluation: Evaluation, predictions: str | Path | None = None, has_control: bool = False) -> str:
    """Returns one line that says what a run would ask, and what judging would cost.

    Args:
      evaluation: the evaluation.
      predictions: a file of existing answers, which is checked as `score_file` checks it. None estimates with the gold
        answers instead.
      has_control: whether everything is asked twice more, with other images.

    Raises:
      UserError: the predictions cannot be read, or do not fit the questions.
      UsageError: the workdir contains other answers than the predictions.
    """
    texts = None if predictions is None else _read(evaluation, predictions).texts
    return evaluation.scorer.plan(texts, has_control)


def evaluate(evaluation: Evaluation, answerer: Answerer, source: Mapping[str, str],
             controls_asked: Collection[str] = (), flags: Mapping[str, object] | None = None,
             is_repeated: bool = True) -> dict:
    """Asks every question, and asks again for each control; scores the answers and writes all files.

    Each answer is kept in a `.partial` file until the evaluation is finished. A run with the same `source`,
    configuration, questions and `flags` reuses these answers.

    Args:
      evaluation: the evaluation, from `open_evaluation`.
      answerer: answers the questions.
      source: who answers, for the report: `checkpoint`, a path; or `endpoint` and `model`.
      controls_asked: `image` asks again with exchanged images, and once more with pictures of noise.
      flags: everything else that the answers depend on, such as the arguments of `load`.
      is_repeated: whether everything is asked again if the workdir holds the results of this very evaluation.

    Returns:
      The object of `metrics.json`.
    """
    if evaluation.checked != frozenset(controls_asked):
        check(evaluation, controls_asked)
    key = asked.key(answerer, evaluation.cfg, evaluation.samples, source, flags or {})
    agreement.check_same(lambda: {**key, "--control": sorted(controls_asked), **agreement.installation()})
    digest = finished.identity(key, evaluation.cfg, controls_asked, evaluation.scorer.depends_on())
    if not is_repeated:
        earlier = distributed.from_first(lambda: finished.read(evaluation.workdir, digest))
        if earlier is not None:
            return earlier
    lines, extra = _ask(evaluation, answerer, key, controls_asked)
    extra[finished.KEY] = digest
    run = {**source, **answerer.facts()}
    metrics = distributed.from_first(lambda: _finish(evaluation, _joined(evaluation, lines), extra, run))
    for partial in evaluation.partials:
        partial.remove()
    evaluation.partials = []
    return metrics


def score_file(evaluation: Evaluation, path: str | Path) -> dict:
    """Scores a file of predictions without loading a model.

    Args:
      evaluation: the evaluation, from `open_evaluation`.
      path: the file of predictions.

    Returns:
      The object of `metrics.json`.
    """
    answers = _read(evaluation, path)
    said = dict.fromkeys(asked.KEYS) | {"predictions": str(path), "predictions_sha256": details.hash_of(answers)}
    return _finish(evaluation, {OWN: answers}, {"asked": said}, {"predictions": str(path)})


def _read(evaluation: Evaluation, path: str | Path) -> AnswerSet:
    """Reads a file of predictions and checks that it fits the questions and the workdir; warns of what it omits."""
    answers = AnswerSet.read(evaluation.samples, path, evaluation.scorer.training)
    check_unused(evaluation.workdir, Path(path), answers.predictions)
    answers.warn_of_not_stated()
    return answers


def _ask(evaluation: Evaluation, answerer: Answerer, key: Mapping,
         controls_asked: Collection[str]) -> tuple[dict[str, list[dict]], dict]:
    """Asks all questions.

    Returns:
      The predictions about the own images (`OWN`) and those of each control, and further objects for `metrics.json`.
    """
    cfg, samples, generation = evaluation.cfg, evaluation.samples, evaluation.generation
    machine = answerer.machine()
    index, count = distributed.process_index(), distributed.process_count()

    def partial(name: str) -> Partial:
        check_place = evaluation.check_place if evaluation.place is None else evaluation.place.check
        kept = Partial(evaluation.workdir / name, key, index, machine, count, check_place)
        evaluation.partials.append(kept)
        return kept

    lines = {OWN: predict(answerer, samples, generation, partial=partial("predictions.jsonl"))}
    extra: dict = {"asked": asked.record(answerer, generation)}
    if "image" in controls_asked:
        exchanged = contextlib.nullcontext(controls.exchanged_images(samples, cfg.seed))
        noise = controls.noise_images(samples, evaluation.workdir / f"noise.{index}", cfg.seed)
        for name, pictures, title in (("image", exchanged, "images exchanged"), ("noise", noise, "noise")):
            kept = partial(f"predictions_control_{name}.jsonl")
            with pictures as shown:
                lines[name] = predict(answerer, samples, generation, shown, title, kept, name)
    if cfg.get("organ_question"):
        # All shifts of this control are computed from one answer an image, so decoding is greedy, whatever the config.
        greedy = Generation(max_new_tokens=generation.max_new_tokens, batch_size=generation.batch_size)
        kept = partial("organ.jsonl")
        said = lambda pairs: [answer.text for answer in ask(answerer, pairs, greedy, "organ question", kept)]
        extra["organ"] = controls.organ_accuracy(said, samples)
    return lines, extra


def _joined(evaluation: Evaluation, lines: Mapping[str, Sequence[Mapping]]) -> dict[str, AnswerSet]:
    return {name: AnswerSet(evaluation.samples, each, evaluation.scorer.training) for name, each in lines.items()}


def _finish(evaluation: Evaluation, answers: Mapping[str, AnswerSet], extra: Mapping, run: Mapping[str, str]) -> dict:
    """Scores the answers, and writes scores, predictions and report.

    Args:
      evaluation: the evaluation.
      answers: `OWN` -> the answers about the own images; kind of control -> the answers of that control.
      extra: further objects for `metrics.json`.
      run: who answered, for the report.
    """
    own, others = answers[OWN], {name: each for name, each in answers.items() if name != OWN}
    found = evaluation.scorer.score(own, others, extra)
    if any(verdict.error is not None for verdict in found.verdicts):
        found.metrics.pop(finished.KEY, None)  # a repeated run judges the rest
    tables = details.tables(evaluation.cfg, evaluation.scorer.judge, own, found, run)
    files = dict(found.files)
    if "predictions" not in run:
        files["predictions.jsonl"] = to_jsonl(own.predictions)
    files |= {f"predictions_control_{name}.jsonl": to_jsonl(other.predictions) for name, other in others.items()}
    write_results(evaluation.workdir, files | {"report.html": found.render(tables)}, found.metrics, run,
                  evaluation.check_place)
    check_answered(found.verdicts, found.judged)
    return found.metrics
