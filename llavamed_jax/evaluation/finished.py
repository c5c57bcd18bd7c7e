"""Recognises a finished evaluation in a workdir, so that a suite that is started again does not repeat it.

`metrics.json` has a hash, `evaluation`, of everything that the answers and the numbers depend on.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import questions
from llavamed_jax.utils.files import read_json
from llavamed_jax.utils.hashes import sha256, sha256_of
from llavamed_jax.utils.nested import flatten

KEY = "evaluation"  # in metrics.json
_FILES = ("predictions.jsonl", "report.html")
_PLACES = ("data.root", "data.images")  # the content of these places is compared instead


def identity(key: Mapping[str, object], cfg: ConfigDict, controls: Collection[str], samples: list[VqaSample],
             training: list[VqaSample], against: str | Path | None) -> str:
    """Returns a hash of everything that an evaluation's answers and numbers depend on.

    Args:
      key: what the answers depend on (`asked.key`).
      cfg: the eval config; its settings of scoring are not part of `key`.
      controls: the controls that are asked.
      samples: the questions with their gold answers.
      training: the training rows.
      against: the predictions to compare with.
    """
    config = {name: value for name, value in flatten(cfg.to_dict()).items() if name not in _PLACES}
    parts = [dict(key), config, sorted(controls), questions.questions_hash(samples),
             questions.questions_hash(training) if training else None,
             [_content(path) for path in (against, *_listed(cfg.data.get("trained_on"))) if path]]
    return sha256(json.dumps(parts, sort_keys=True, default=str))


def read(workdir: Path, digest: str) -> dict | None:
    """Returns the object of `metrics.json` if it belongs to the evaluation with this hash; None otherwise.

    Args:
      workdir: the evaluation's directory.
      digest: the hash, from `identity`.
    """
    try:
        metrics = read_json(workdir / "metrics.json")
    except (UserError, OSError):
        return None
    is_whole = all((workdir / name).is_file() for name in _FILES)
    return metrics if is_whole and metrics.get(KEY) == digest else None


def _listed(value: object) -> list[str]:
    """Returns the paths of `data.trained_on`: a file or folder, or a list of `{path, …}`."""
    if not isinstance(value, (list, tuple)):
        return [str(value)] if value else []
    return [str(each["path"] if isinstance(each, Mapping) and "path" in each else each) for each in value]


def _content(path: str | Path) -> object:
    """Returns what identifies the content of a file, or of a folder by its files' names, sizes and times."""
    path = Path(path)
    if path.is_file():
        return sha256_of(path)
    return sorted((str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns)
                  for file in path.rglob("*") if file.is_file())
