"""One evaluation from start to end: questions, predictions, control, metrics, report; and the files that they leave."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import math
import platform
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.config import MOST_BEAMS
from llavamed_jax.datasets import sample as data_questions
from llavamed_jax.datasets import training
from llavamed_jax.datasets.sample import CHOICE, VqaSample, kind
from llavamed_jax.errors import UsageError, UserError, short
from llavamed_jax.evaluation import published, questions
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.answering.answerer import Answerer, Generation
from llavamed_jax.evaluation.answering.ask import ask, predict
from llavamed_jax.evaluation.answering.resume import Partial, num_answers
from llavamed_jax.evaluation.judging import open_answers
from llavamed_jax.evaluation.judging.judge import check_answered
from llavamed_jax.evaluation.report import report, summary, tensorboard
from llavamed_jax.evaluation.results import Place, Results
from llavamed_jax.evaluation.scoring import controls, leakage, score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.predictions import read_predictions
from llavamed_jax.evaluation.scoring.strict import right_choice
from llavamed_jax.openai_client.address import shown
from llavamed_jax.parallel import agreement, distributed
from llavamed_jax.utils.code import code_sha256
from llavamed_jax.utils.files import read_json, to_jsonl, utf8
from llavamed_jax.utils.nested import flatten

# What only some evaluations leave: of an earlier one of something else it would stand beside the new metrics.
_OF_RESULTS = ("predictions_control_*.jsonl", "judged.jsonl", "reviews.jsonl", "reviews_control_*.jsonl")


def check_generation(cfg: ConfigDict) -> None:
    """Raises UsageError for values under `generation` that no evaluation could start with."""
    for key, value in cfg.generation.items():
        if value is None:
            raise UsageError(f"generation.{key} is none; a number was expected")
    for key, most in (("max_new_tokens", 131072), ("batch_size", 4096), ("num_beams", MOST_BEAMS)):
        if cfg.generation[key] < 1:
            raise UsageError(f"generation.{key} is {short(cfg.generation[key])}; at least 1 was expected")
        if cfg.generation[key] > most:
            raise UsageError(f"generation.{key} is {short(cfg.generation[key])}; at most {most} was expected")
    if not 0 <= cfg.generation.temperature < math.inf:  # nan too
        raise UsageError(f"generation.temperature is {cfg.generation.temperature}; a number of at least 0 was expected")
    if cfg.generation.num_beams > 1 and cfg.generation.temperature > 0:
        raise UsageError(f"generation.num_beams is {cfg.generation.num_beams} with a generation.temperature of "
                         f"{cfg.generation.temperature}; beam search does not sample, and 0 was expected")


class Evaluation:
    """The questions that a config names, and what is done with them. Bad settings raise before a model is loaded.

    Args:
      cfg: an eval config (`configs/eval/*.py`).
      workdir: where `predictions.jsonl`, `metrics.json`, `report.html` and `tensorboard/` go; created here.
      against: another model's predictions of the same questions, to be compared with.
    Raises:
      UsageError: a setting that is wrong. UserError: data that cannot be read or hold no question; predictions to compare
        with that do not fit; a workdir that cannot be written to.
    """

    def __init__(self, cfg: ConfigDict, workdir: str | Path, against: str | Path | None = None):
        if not str(workdir):
            raise UsageError("the workdir is empty; a directory was expected: --workdir DIR")
        self.cfg, self.workdir = cfg, Path(workdir)
        self._partials: list[Partial] = []
        self.place: Place | None = None
        self.results = Results(self.workdir, self.check_place)
        if cfg.protocol not in ("clean", "paper"):
            raise UsageError(f"protocol is {cfg.protocol!r}; clean or paper was expected")
        for key, value in flatten(cfg.to_dict()).items():
            if value is None and key.startswith(("judge.", "seed")):
                raise UsageError(f"{key} is none; a number was expected")
        check_generation(cfg)
        if not 0 <= cfg.seed < 2**31:
            raise UsageError(f"seed is {cfg.seed}; 0 to {2**31 - 1} was expected")
        self.generation = Generation(**cfg.generation.to_dict(), seed=cfg.seed)
        self.samples, self.training = self._load()
        if not self.samples:
            raise UserError(f"{cfg.data.root} holds no question of {cfg.data.name} {cfg.data.split}")
        self._against = None if against is None else AnswerSet.read(self.samples, against, self.training, f"--against {against}: ")
        self._trained_on = _training_data(cfg)
        if cfg.get("published") not in (None, "", *published.NAMES):
            raise UsageError(f"published is {cfg.published!r}; one of {', '.join(published.NAMES)} was expected, or nothing")
        _check_writable(self.workdir)  # now, and not when hours of answers are to be written

    @property
    def n_kept(self) -> int:
        """How many answers are on the disk, to be taken over when the same evaluation is run again."""
        return sum(map(len, self._partials)) + (self.judge.n_kept if self.judge is not None else 0)

    def run(self, answerer: Answerer, source: Mapping[str, str], controls_asked: Collection[str] = (),
            flags: Mapping[str, object] | None = None) -> dict:
        """Asks every question, and again for each control; scores; writes the files.

        Each answer is kept in a `.partial` file until all is done, and taken over by a run of the same `source`,
        configuration, questions and `flags`.

        Args:
          source: who answers, for the report: `checkpoint`, a path; or `endpoint` and `model`.
          controls_asked: `image` asks again with the images exchanged, and once more with pictures of noise.
          flags: what else the answers follow from, such as what `load` was given.
        """
        self.check(controls_asked)
        key = self._key(source, flags or {}, answerer)
        agreement.check_same(lambda: {**key, "--control": sorted(controls_asked), **agreement.installation()})
        machine = getattr(answerer, "machine", dict)()
        predictions = predict(answerer, self.samples, self.generation, partial=self._partial("predictions.jsonl", key, machine))
        control, extra = {}, {"asked": asked.record(answerer, self.generation)}
        if "image" in controls_asked:
            control = self._controls(answerer, key, machine)
        if self.cfg.get("organ_question"):
            partial = self._partial("organ.jsonl", key, machine)
            extra["organ"] = controls.organ_accuracy(lambda pairs: self._ask(answerer, pairs, partial), self.samples)
        run = {**source, **answerer.facts()}
        join = lambda lines: AnswerSet(self.samples, lines, self.training)
        controls_joined = lambda: {name: join(lines) for name, lines in control.items()}
        metrics = distributed.from_first(lambda: self._finish(join(predictions), controls_joined(), extra, run))
        for partial in self._partials:
            partial.remove()
        self._partials = []
        return metrics

    @property
    def has_written(self) -> bool:
        """Whether answers were written into the workdir. Without any the first of several processes removes it when it fails."""
        return any(partial.is_begun for partial in self._partials)

    def check_place(self) -> None:
        """Raises UserError where the workdir that the evaluation holds (`results.locked`) is no longer at its place."""
        if self.place is not None:
            self.place.check()

    def score_file(self, path: str | Path) -> dict:
        """Scores predictions that exist; no model is loaded."""
        answers = AnswerSet.read(self.samples, path, self.training)
        self._check_unused(Path(path), answers.predictions)
        answers.warn_of_not_stated()
        said = dict.fromkeys(asked.KEYS) | {"predictions": str(path), "predictions_sha256": _hash(answers.predictions)}
        return self._finish(answers, {}, {"asked": said}, {"predictions": str(path)})

    def check(self, controls_asked: Collection[str] = ()) -> None:
        """Raises UserError for what would be found only after everything was asked: ids that several questions have, an image
        that will be shown and is missing, a control that these questions cannot have."""
        data_questions.check_ids(self.samples, str(self.cfg.data.root))
        self.check_images()
        if self.cfg.get("organ_question"):
            controls.check_organs(self.samples)
        if controls_asked:
            controls.exchanged_images(self.samples, self.cfg.seed)
            controls.check_room(len({str(sample.image) for sample in self.samples}), self.workdir)
        for sample in self.samples:
            if kind(sample) == CHOICE:
                right_choice(sample)

    def _check_unused(self, path: Path, predictions: Sequence[Mapping]) -> None:
        """Refuses to lay the metrics of one file beside the answers of another evaluation."""
        own = self.workdir / "predictions.jsonl"
        if any(map(num_answers, self.workdir.glob("predictions*.partial"))):
            raise UsageError(f"the workdir {self.workdir} holds answers of an evaluation that was stopped; the metrics of {path} do not "
                             "belong beside them, and another --workdir was expected")
        if own.exists() and not own.samefile(path) and _answered(read_predictions(own)) != _answered(predictions):
            raise UsageError(f"the workdir {self.workdir} holds other answers, {own.name} of another evaluation; the metrics of {path} do "
                             "not belong beside them, and another --workdir was expected")

    def describe(self) -> str:
        """One line that says what is asked, and whether it is the whole of the published set."""
        return questions.describe(self.cfg, self.samples)

    def plan(self, predictions: str | Path | None = None, has_control: bool = False) -> str:
        """What a run would do, without doing it: what is asked, and what a judge would take.

        Args:
          predictions: answers that exist; else the gold answers stand for those of the model.
          has_control: whether everything is asked twice more, with other images.
        """
        if self.judge is None:
            times = ", each three times: with its image, with another one, with noise" if has_control else ""
            return f"{len(self.samples)} questions{times}; nothing is judged"
        texts = [str(sample.answer) for sample in self.samples]
        if predictions is not None:
            texts = AnswerSet.read(self.samples, predictions).texts
        return open_answers.plan(self.judge, self.samples, texts)

    def check_images(self) -> None:
        """Raises UserError where an image that will be shown is missing; the readers of VQA sets have looked already."""

    def summary(self, metrics: Mapping) -> str:
        """The result as plain text."""
        return summary.summary(metrics)

    def _load(self) -> tuple[list[VqaSample], list[VqaSample]]:
        """The questions to ask and the training rows beside them."""
        cfg = self.cfg
        self.judge = open_answers.open_judge(cfg, self.workdir)
        return questions.load_samples(cfg.data.name, cfg.data.root, cfg.data.split, cfg.protocol, cfg.data.held_out,
                                      **questions.further(cfg.data))

    def _controls(self, answerer: Answerer, key: Mapping, machine: Mapping) -> dict[str, list[dict]]:
        """The same questions about other pictures: kind of control -> predictions."""
        found = {}
        exchanged = contextlib.nullcontext(controls.exchanged_images(self.samples, self.cfg.seed))
        noise = controls.noise_images(self.samples, self.workdir / f"noise.{distributed.process_index()}", self.cfg.seed)
        for name, pictures, title in (("image", exchanged, "images exchanged"), ("noise", noise, "noise")):
            partial = self._partial(f"predictions_control_{name}.jsonl", key, machine)
            with pictures as shown:
                found[name] = predict(answerer, self.samples, self.generation, shown, title, partial, name)
        return found

    def _partial(self, name: str, key: Mapping, machine: Mapping) -> Partial:
        partial = Partial(self.workdir / name, key, distributed.process_index(), machine, distributed.process_count(),
                          self.check_place)
        self._partials.append(partial)
        return partial

    def _key(self, source: Mapping[str, str], flags: Mapping[str, object], answerer: Answerer | None = None) -> dict:
        """What the answers follow from. A checkpoint counts by its content (`Answerer.depends_on`), wherever it lies."""
        by_content = getattr(getattr(answerer, "model", None), "origin", None) is not None
        given = {f"--{name}": value for name, value in {**({} if by_content else source), **flags}.items()}
        paths = {f"--{name}": "given" for name in ("vision_tower", "tokenizer") if by_content and flags.get(name)}
        return asked.key(answerer, self.cfg, self.samples, given | paths)

    def _ask(self, answerer: Answerer, pairs: Sequence[tuple[str, str]], partial: Partial) -> list[str]:
        # The shifts of this control follow from one greedy answer an image, whatever the other questions are asked with.
        greedy = Generation(max_new_tokens=self.generation.max_new_tokens, batch_size=self.generation.batch_size)
        return [answer.text for answer in ask(answerer, pairs, greedy, "organ question", partial)]

    def _finish(self, answers: AnswerSet, others: Mapping[str, AnswerSet], extra: dict, run: Mapping[str, str]) -> dict:
        """Scores, judges, reports. `others`: kind of control -> its answers."""
        cfg = self.cfg
        split = "held_out" if cfg.data.held_out else cfg.data.split
        name = questions.set_name(cfg.data)
        metrics = score.score(answers, dataset=name, split=split, seed=cfg.seed) | extra
        metrics["questions_sha256"] = _questions_hash(self.samples)
        metrics["published"] = published.beside(
            name, split, cfg.protocol, metrics["n_open"], metrics["n_closed"], cfg.get("published") or ""
        )
        if others:
            tables = {kind: score.tables(other, cfg.seed) | {"difference": score.difference(answers, other, cfg.seed)}
                      for kind, other in others.items()}
            metrics["control"] = {"kind": "image", "seed": cfg.seed, **tables["image"]}
            metrics["control"]["noise"] = {"kind": "noise", "seed": cfg.seed, "size": controls.NOISE_SIZE, **tables["noise"]}
        if self._against is not None:
            metrics["against"] = score.against(answers, self._against, cfg.seed)
        if self._trained_on is not None:
            metrics["trained_on"] = {"data": str(cfg.data.trained_on)} | leakage.trained_on(self.samples, self._trained_on)
        found = open_answers.judge_open(self.judge, answers, cfg.seed) if self.judge is not None else None
        if found is not None:
            metrics["judged"] = found.metrics
            self.results.add("judged.jsonl", to_jsonl(found.lines))
        details = self._details(run, answers, metrics.get("asked", {}))
        self._write_results(metrics, report.render(metrics, answers, others, details), answers, others, run)
        if found is not None:
            check_answered(found.verdicts, "open answers")
        return metrics

    def _write_results(self, metrics: Mapping, page: str, answers: AnswerSet, others: Mapping[str, AnswerSet],
                       run: Mapping[str, str]) -> None:
        """All files at once, and none of an evaluation that came before beside them."""
        if "predictions" not in run:
            self.results.add("predictions.jsonl", to_jsonl(answers.predictions))
        for name, other in others.items():
            self.results.add(f"predictions_control_{name}.jsonl", to_jsonl(other.predictions))
        self.results.add("report.html", page)
        self.results.add("metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        step = tensorboard.step_of(run.get("checkpoint", ""))
        stale = [] if "predictions" in run else self._stale(metrics)
        self.results.write(lambda folder: tensorboard.write(folder, metrics, step))
        for path in stale:
            print(f"{path}: removed, it is of another evaluation", file=sys.stderr)
            path.unlink(missing_ok=True)

    def _stale(self, metrics: Mapping) -> list[Path]:
        """Files that an earlier evaluation of something else left and this one does not write."""
        try:
            earlier = read_json(self.workdir / "metrics.json")
        except UserError:
            earlier = {}
        if _identity(earlier) == _identity(metrics):
            return []
        paths = (path for pattern in _OF_RESULTS for path in self.workdir.glob(pattern))
        return [path for path in sorted(paths) if path.name not in self.results]

    def _shown_config(self) -> dict[str, object]:
        """The configuration by dotted keys; of the judge's address what may be shown."""
        config = flatten(self.cfg.to_dict())
        if "judge.endpoint" in config:
            config["judge.endpoint"] = shown(str(config["judge.endpoint"])) if self.judge is None else self.judge.service.url
        return config

    def _details(self, run: Mapping[str, str], answers: AnswerSet, said: Mapping[str, object]) -> dict[str, dict]:
        packages = ("llavamed_jax", "jax", "flax", "transformers", "numpy", "pillow", "nltk", "openai")
        hashes = {"predictions": _hash(answers.predictions), "questions": _questions_hash(self.samples)}
        hashes |= {str(path): _sha256(path.read_bytes()) for path in questions.source_files(self.cfg.data)} | dict(said.get("files", {}))
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {
            "Run": {**run, "date": date, "seed": str(self.cfg.seed)},
            "Asked": {name: value for name, value in said.items() if name != "files"},
            "Configuration": self._shown_config(),
            "Versions": {"python": platform.python_version(), "code": code_sha256()}
            | {name: asked.version(name) or "not installed as a package" for name in packages},
            "SHA-256": hashes,
        }


def _training_data(cfg: ConfigDict) -> training.TrainingData | None:
    """What the model was trained on, where the config names it."""
    if not cfg.data.get("trained_on"):
        return None
    source = cfg.data.trained_on if isinstance(cfg.data.trained_on, str) else list(cfg.data.trained_on)
    found = training.read_training(source, cfg.data.get("trained_on_images") or None, cfg.protocol)
    if next(found.readable(), None) is None:  # "none of the images occurs" would be no finding
        try:
            found.record(0)
        except UserError as error:
            raise UserError(f"data.trained_on names no training data, none of {found.num_records} records can be read: {error}") from None
    return found


def _questions_hash(samples: Sequence[VqaSample]) -> str:
    """A hash of the questions as they are scored, whatever files they came in: which split was asked, to the letter.

    Of an image's path as many parts count as tell most images apart: SLAKE's are all called source.jpg.
    """
    paths = {str(s.image): Path(s.image).parts for s in samples}
    length = next((n for n in range(1, 9) if 2 * len({parts[-n:] for parts in paths.values()}) > len(paths)), 9)
    names = {image: "/".join(parts[-length:]) for image, parts in paths.items()}
    rows = [[str(s.question_id), names[str(s.image)], s.question, str(s.answer), s.answer_type, list(s.options)] for s in samples]
    return _sha256(json.dumps(rows, ensure_ascii=True).encode())


def _check_writable(workdir: Path) -> None:
    """Creates the directory and a file in it, which is gone again; UserError where that cannot be done."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except FileExistsError as error:
        raise UserError(f"the workdir {workdir} is a file; a directory was expected") from error
    except OSError as error:
        raise UserError(f"the workdir {workdir} cannot be written to: {error.strerror or error}") from error


def _identity(metrics: Mapping) -> tuple:
    """What an evaluation's answers follow from, as far as `metrics.json` says it."""
    said = metrics.get("asked")
    return (said, metrics.get("questions_sha256")) if isinstance(said, dict) else ()


def _answered(predictions: Sequence[Mapping]) -> dict[str, str]:
    return {str(each["question_id"]): each["text"] for each in predictions}


def _hash(predictions: Sequence[Mapping]) -> str:
    return _sha256(utf8(to_jsonl(predictions)))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
