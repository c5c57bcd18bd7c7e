"""What was run, for the end of `report.html`: who answered, configuration, versions of the code, hashes of the data."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from llavamed_jax.evaluation import questions
from llavamed_jax.evaluation.results import Outcome
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.openai_client.address import shown
from llavamed_jax.utils.code import code_sha256, version
from llavamed_jax.utils.files import to_jsonl, utf8
from llavamed_jax.utils.hashes import sha256
from llavamed_jax.utils.nested import flatten

if TYPE_CHECKING:
    from llavamed_jax.evaluation.judging.judge import Judge

_PACKAGES = ("llavamed_jax", "jax", "flax", "transformers", "numpy", "pillow", "nltk", "openai")


def tables(cfg: ConfigDict, judge: Judge | None, answers: AnswerSet, found: Outcome,
           run: Mapping[str, str]) -> dict[str, dict]:
    """Title of a table -> name -> value.

    Args:
      run: who answered, and what that says of the run.
    """
    said = found.metrics.get("asked", {})
    hashes = {"predictions": hash_of(answers), "questions": questions.questions_hash(answers.samples)}
    hashes |= {str(path): sha256(path.read_bytes()) for path in questions.source_files(cfg.data)}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {
        "Run": {**run, **found.facts, "date": date, "seed": str(cfg.seed)},
        "Asked": {name: value for name, value in said.items() if name != "files"},
        "Configuration": _configuration(cfg, judge),
        "Versions": {"python": platform.python_version(), "code": code_sha256()}
        | {name: version(name) or "not installed as a package" for name in _PACKAGES},
        "SHA-256": hashes | dict(said.get("files", {})) | dict(found.hashes),
        **found.tables,
    }


def hash_of(answers: AnswerSet) -> str:
    """SHA-256 of the predictions as they are written."""
    return sha256(utf8(to_jsonl(answers.predictions)))


def _configuration(cfg: ConfigDict, judge: Judge | None) -> dict[str, object]:
    """The configuration by dotted keys; of the judge's address what may be shown."""
    config = flatten(cfg.to_dict())
    if "judge.endpoint" in config:
        config["judge.endpoint"] = shown(str(config["judge.endpoint"])) if judge is None else judge.service.url
    return config
