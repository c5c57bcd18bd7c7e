"""Makes the tables of run details at the end of `report.html`: the model, configuration, versions and hashes."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from llavamed_jax.evaluation import finished, questions
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.results import Outcome
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.openai_client.address import shown
from llavamed_jax.utils.code import code_sha256, version
from llavamed_jax.utils.files import to_jsonl, utf8
from llavamed_jax.utils.hashes import sha256, sha256_of, sha256_of_folder
from llavamed_jax.utils.nested import flatten

if TYPE_CHECKING:
    from llavamed_jax.evaluation.judging.judge import Judge

_PACKAGES = ("llavamed_jax", "openai", *dict.fromkeys((*asked.PACKAGES, *asked.OF_MODEL, *finished.PACKAGES)))


def tables(cfg: ConfigDict, judge: Judge | None, answers: AnswerSet, found: Outcome,
           run: Mapping[str, str]) -> dict[str, dict]:
    """Makes the tables of run details.

    Args:
      cfg: the eval config.
      judge: the judge, if there is one.
      answers: the questions and their answers.
      found: the result of scoring them.
      run: who answered, and what the answerer states about the run.

    Returns:
      Title of a table -> name -> value.
    """
    said = found.metrics.get("asked", {})
    hashes = {"predictions": hash_of(answers), "questions": questions.questions_hash(answers.samples)}
    hashes |= {str(path): sha256_of_folder(path) if path.is_dir() else sha256_of(path)
               for path in questions.source_files(cfg.data)}
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
    """Returns the SHA-256 of the predictions as they are written to the file."""
    return sha256(utf8(to_jsonl(answers.predictions)))


def _configuration(cfg: ConfigDict, judge: Judge | None) -> dict[str, object]:
    """Returns the configuration by dotted keys, with the secret parts of the judge's address left out."""
    config = flatten(cfg.to_dict())
    if "judge.endpoint" in config:
        config["judge.endpoint"] = shown(str(config["judge.endpoint"])) if judge is None else judge.service.url
    return config
