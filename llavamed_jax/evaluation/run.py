"""One evaluation from start to end: questions, predictions, control, metrics, report; and the files that they leave."""

from __future__ import annotations

import datetime
import hashlib
import importlib.metadata
import json
import math
import platform
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from llavamed_jax.data import datasets
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation import controls, report, scoring, vqa
from llavamed_jax.evaluation.partial import Partial
from llavamed_jax.parallel import distributed

if TYPE_CHECKING:
    from llavamed_jax.assistant import LlavaMed


class Evaluation:
    """The questions that a config names, and what is done with them. Bad settings raise before a model is loaded.

    Args:
      cfg: an eval config (`configs/eval/*.py`).
      workdir: where `predictions.jsonl`, `metrics.json` and `report.html` go; created here.
    Raises:
      UsageError: a setting that is wrong. UserError: data that cannot be read or hold no question; a workdir that cannot
        be written to.
    """

    def __init__(self, cfg: ConfigDict, workdir: str | Path):
        if not str(workdir):
            raise UsageError("the workdir is empty; a directory was expected: --workdir DIR")
        self.cfg, self.workdir = cfg, Path(workdir)
        self._partials: list[Partial] = []
        if cfg.protocol not in ("clean", "paper"):
            raise UsageError(f"protocol is {cfg.protocol!r}; clean or paper was expected")
        for key in ("max_new_tokens", "batch_size", "num_beams"):
            if cfg.generation[key] < 1:
                raise UsageError(f"generation.{key} is {cfg.generation[key]}; at least 1 was expected")
        if not 0 <= cfg.generation.temperature < math.inf:  # nan too
            raise UsageError(f"generation.temperature is {cfg.generation.temperature}; a number of at least 0 was expected")
        if cfg.generation.num_beams > 1 and cfg.generation.temperature > 0:
            raise UsageError(f"generation.num_beams is {cfg.generation.num_beams} with a generation.temperature of "
                             f"{cfg.generation.temperature}; beam search does not sample, and 0 was expected")
        if not 0 <= cfg.seed < 2**31:
            raise UsageError(f"seed is {cfg.seed}; 0 to {2**31 - 1} was expected")
        self.generation = vqa.Generation(**cfg.generation.to_dict(), seed=cfg.seed)
        self.samples, self.training = vqa.load_samples(
            cfg.data.name, cfg.data.root, cfg.data.split, cfg.protocol, cfg.data.held_out
        )
        if not self.samples:
            raise UserError(f"{cfg.data.root} holds no question of {cfg.data.name} {cfg.data.split}")
        _check_writable(self.workdir)  # now, and not when hours of answers are to be written

    @property
    def n_kept(self) -> int:
        """How many answers are on the disk, to be taken over when the same evaluation is run again."""
        return sum(map(len, self._partials))

    def run(self, model: LlavaMed, checkpoint: str, with_control: bool = False, flags: Mapping[str, object] | None = None) -> dict:
        """Asks the model every question, and again with images exchanged where asked for; scores; writes the files.

        Each answer is kept in a `.partial` file until all is done, and taken over by a run with the same
        checkpoint, configuration, questions and `flags` (what else `load` was given).
        """
        key = self._key(checkpoint, flags or {})
        name = vqa.model_name(checkpoint)
        model.engine.batch_size = self.generation.batch_size
        model.processor = model.processor.for_evaluation()
        partial = self._partial("predictions.jsonl", key)
        predictions = vqa.predict(model, self.samples, self.generation, name, partial=partial)
        self._write("predictions.jsonl", vqa.to_jsonl(predictions))
        control, extra = [], {}
        if with_control:
            shown = controls.exchanged_images(self.samples, self.cfg.seed)
            partial = self._partial("predictions_control_image.jsonl", key)
            control = vqa.predict(model, self.samples, self.generation, name, shown, "images exchanged", partial)
            self._write("predictions_control_image.jsonl", vqa.to_jsonl(control))
        if self.cfg.organ_question:
            partial = self._partial("organ.jsonl", key)
            extra["organ"] = controls.organ_accuracy(lambda pairs: self._ask(model, pairs, partial), self.samples)
        run = {"checkpoint": checkpoint, "device": _device()}
        metrics = distributed.from_first(lambda: self._finish(predictions, control, extra, run))
        for partial in self._partials:
            partial.remove()
        self._partials = []
        return metrics

    def score_file(self, path: str | Path) -> dict:
        """Scores predictions that exist; no model is loaded."""
        return self._finish(scoring.read_predictions(path), [], {}, {"predictions": str(path)})

    def describe(self) -> str:
        """One line that says what is asked, and whether it is the whole of the published set."""
        data = self.cfg.data
        if data.held_out:
            images = len({sample.image for sample in self.samples})
            return f"{data.name}: {len(self.samples)} questions about {images} images held out by {data.held_out}"
        variant = self.cfg.protocol if data.name == "vqa_rad" else "en"
        return datasets.describe(self.samples, data.name, data.split, variant)

    def _partial(self, name: str, key: Mapping) -> Partial:
        partial = Partial(self.workdir / name, key, distributed.process_index())
        self._partials.append(partial)
        return partial

    def _key(self, checkpoint: str, flags: Mapping[str, object]) -> dict:
        """What the answers follow from. Tensors count by their files' sizes and dates; to read them would take minutes."""
        root = Path(checkpoint)
        weights = sorted(p for pattern in ("*.safetensors", "*.bin") for p in root.glob(pattern)) if root.is_dir() else []
        stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
        files = [(str(path), _sha256(path.read_bytes())) for path in _checkpoint_files(checkpoint)]
        questions = [(sample.question_id, sample.question, str(sample.image)) for sample in self.samples]
        return {
            "checkpoint": [checkpoint, files, stats],
            "flags": dict(flags),
            "config": self.cfg.to_dict(),
            "questions": questions,
            "version": _version("llavamed_jax"),
        }

    def _ask(self, model: LlavaMed, pairs: Sequence[tuple[str, str]], partial: Partial) -> list[str]:
        # The shifts of this control follow from one greedy answer an image, whatever the other questions are asked with.
        greedy = vqa.Generation(max_new_tokens=self.generation.max_new_tokens, batch_size=self.generation.batch_size)
        return [answer.text for answer in vqa.ask(model, pairs, greedy, "organ question", partial)]

    def _finish(self, predictions: list[dict], control: list[dict], extra: dict, run: Mapping[str, str]) -> dict:
        cfg = self.cfg
        split = "held_out" if cfg.data.held_out else cfg.data.split
        names = {"dataset": cfg.data.name, "split": split, "seed": cfg.seed}
        metrics = scoring.score(self.samples, predictions, self.training, **names) | extra
        if control:
            other = scoring.score(self.samples, control, self.training, **names)
            metrics["control"] = {
                "kind": "image",
                "seed": cfg.seed,
                "paper": other["paper"],
                "strict": other["strict"],
                "difference": scoring.difference(self.samples, predictions, control, cfg.seed),
            }
        details = self._details(run, predictions)
        page = report.render(metrics, self.samples, predictions, control, details)
        self._write("metrics.json", json.dumps(metrics, indent=2, ensure_ascii=False) + "\n")
        self._write("report.html", page)
        return metrics

    def _write(self, name: str, text: str) -> None:
        if distributed.process_index() == 0:  # the others know their share alone
            vqa.write_text(self.workdir / name, text)

    def _details(self, run: Mapping[str, str], predictions: Sequence[Mapping]) -> dict[str, dict]:
        packages = ("llavamed_jax", "jax", "flax", "transformers", "numpy", "pillow", "nltk")
        hashes = {"predictions": _sha256(vqa.utf8(vqa.to_jsonl(predictions)))}
        root = Path(self.cfg.data.root)
        data = [root] if root.is_file() else sorted(root.glob("*.json"))
        files = [*data, *_checkpoint_files(run.get("checkpoint", ""))]
        hashes |= {str(path): _sha256(path.read_bytes()) for path in files}
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return {
            "Run": {**run, "date": date, "seed": str(self.cfg.seed)},
            "Configuration": _flat(self.cfg.to_dict()),
            "Versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
            "SHA-256": hashes,
        }


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


def _flat(config: Mapping, prefix: str = "") -> dict:
    """A nested config with dotted names, as they are typed on the command line."""
    result = {}
    for key, value in config.items():
        result |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return result


def _checkpoint_files(checkpoint: str) -> list[Path]:
    """The small files that identify a checkpoint: its config, its index of shards, and the newest step's manifest."""
    root = Path(checkpoint)
    if not checkpoint or not root.is_dir():
        return []
    manifests = [path for path in root.glob("checkpoints/*/manifest.json") if path.parent.name.isdigit()]
    names = ("config.json", "model/config.json", "model.safetensors.index.json", "manifest.json")
    found = [root / name for name in names if (root / name).is_file()]
    return found + sorted(manifests, key=lambda path: int(path.parent.name))[-1:]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _device() -> str:
    """The device that a model ran on; nothing is imported for it, a model that ran has imported jax."""
    jax = sys.modules.get("jax")
    return "not known" if jax is None else f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def summary(metrics: Mapping) -> str:
    """The result as a plain text table, for a terminal or a log."""
    control = metrics.get("control")
    head = f"{metrics['dataset']} {metrics['split']}: {metrics['n_closed']} closed and {metrics['n_open']} open questions"
    lines = [f"{head} about {metrics['n_images']} images"]
    lines.append(f"{'percent':<38}{'value':>7}   {'95 % interval':<16}{'images exchanged' if control else ''}".rstrip())
    for family, name, title in _SUMMARY_ROWS:
        table = metrics[family]
        interval = ""
        if table[f"{name}_low"] is not None:
            interval = f"[{table[f'{name}_low']:.1f}, {table[f'{name}_high']:.1f}]"
        other = _plain(control[family][name]) if control else ""
        lines.append(f"{title:<38}{_plain(table[name]):>7}   {interval:<16}{other}".rstrip())
    baselines = metrics["baselines"]
    if metrics["n_closed"]:
        title = f'  always "{baselines["majority_closed_answer"]}"'
        lines.insert(3, f"{title:<38}{_plain(baselines['majority_closed']):>7}")
    organ = metrics.get("organ")
    if organ:
        lines.append(
            f"organ named on {organ['n']} images: {organ['accuracy']:.1f} with the image ({organ['hits']} of {organ['n']}),"
            f" {organ['exchanged']:.1f} with images exchanged (mean of {organ['n'] - 1} shifts), majority {organ['majority']:.1f}"
        )
    leakage = metrics.get("leakage")
    if leakage and leakage["images_in_training"]:
        lines.append(
            f"of the images {leakage['images_in_training']} of {leakage['images']} also occur in training rows, and"
            f" {leakage['open_answers_on_same_image_in_training']} of {leakage['open_questions']} open answers stand there"
            " for the same image"
        )
    return "\n".join(lines)


_SUMMARY_ROWS = (
    ("strict", "closed_accuracy", "closed accuracy, strict"),
    ("strict", "open_exact", "open exact, strict"),
    ("strict", "open_f1", "open F1, strict"),
    ("paper", "recall", "open recall, as in the paper"),
    ("paper", "closed_accuracy_yes_no", "closed accuracy yes/no, as in the paper"),
)


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
