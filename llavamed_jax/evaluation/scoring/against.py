"""`--against`: another model's predictions of the same questions, compared with ours in pairs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.evaluation.scoring import score
from llavamed_jax.evaluation.scoring.predictions import predictions_for, warn_of_open
from llavamed_jax.utils.files import read_bytes


class Against:
    """The predictions to compare with, read and joined at once: a file that does not fit is found before anything is asked.

    Raises:
      UserError: a file that cannot be read, or whose ids do not fit the questions; the sentence lists them.
    """

    def __init__(self, path: str | Path, samples: Sequence[VqaSample]):
        self.path, self._samples = Path(path), samples
        self.predictions = predictions_for(samples, path, f"--against {path}: ")
        self.sha256 = hashlib.sha256(read_bytes(path, f"--against {path}")).hexdigest()

    def compare(self, predictions: Sequence[Mapping], training: Sequence[VqaSample], seed: int) -> dict:
        """What `metrics.json` holds under `against`: `file`, `model_id` (None where the file states none), `sha256`, and each
        family's metrics with `value`, `other`, `difference`, `low`, `high` and `p`."""
        warn_of_open(self._samples, self.predictions, self.path)
        names = dict.fromkeys(str(each["model_id"]) for each in self.predictions if each.get("model_id"))
        table = score.compare(self._samples, predictions, self.predictions, training, seed=seed)
        return {"file": str(self.path), "model_id": ", ".join(names) or None, "sha256": self.sha256} | table
