"""Recognises a finished evaluation in a workdir, so that a suite that is started again does not repeat it.

`metrics.json` has a hash, `evaluation`, of everything that the answers and the numbers depend on. It is left out if a
request to the judge failed, because such an evaluation is not finished.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.asked import versions
from llavamed_jax.utils.files import read_json
from llavamed_jax.utils.hashes import sha256
from llavamed_jax.utils.nested import flatten

KEY = "evaluation"  # in metrics.json
PACKAGES = ("nltk", "numpy", "pillow", "sacrebleu", "scipy")  # packages that compute numbers from the answers
_FILES = ("predictions.jsonl", "report.html")
# Keys that change no number by themselves: paths, since the content is compared, and how a judge is asked.
_BESIDE = ("data.root", "data.images", "data.train", "judge.prompt", "judge.cache", "judge.concurrency",
           "judge.timeout", "judge.retries")


def identity(key: Mapping[str, object], cfg: ConfigDict, controls: Collection[str],
             scored: Mapping[str, object]) -> str:
    """Returns a hash of everything that an evaluation's answers and numbers depend on.

    Args:
      key: what the answers depend on (`asked.key`).
      cfg: the eval config; its settings of scoring are not part of `key`.
      controls: the controls that are asked.
      scored: what else the numbers depend on (`depends_on` of a scorer).
    """
    config = {name: value for name, value in flatten(cfg.to_dict()).items() if name not in _BESIDE}
    parts = [dict(key), config, sorted(controls), dict(scored), versions(PACKAGES), sys.version_info[:2]]
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
