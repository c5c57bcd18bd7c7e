"""The numbers that LLaVA-Med's authors published, and a check whether ours are comparable with them.

The sources are the paper's table of fine-tuned models (`images/llava_med_vqa.png` of release v1.0.0) and the raw output
in `llava/notebook/run_eval_metrics.ipynb`. Both come from `run_eval_batch.py`: "open" is the token recall of open
questions, "closed" is the share of answers that contain the gold as a substring. The VQA-RAD numbers were measured on
`data_RAD` (our protocol `paper`), whose training rows contain most of the open test answers; one row of the notebook
was measured on the clean rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TEST = {"vqa_rad": (179, 272), "slake": (645, 416), "pathvqa": (3370, 3391)}
"""Open and closed questions of the test splits that the paper asks (the notebook's cell 0)."""

METRICS = ("recall", "closed_accuracy_substring")
"""Our names of the published "open" and "closed"; no other metric was printed in the paper."""


@dataclass(frozen=True)
class Row:
    """A published model on the test split of a data set.

    Attributes:
      name: the value of the config key `published` that selects this model.
      model: the printed name of the model, with the number of epochs of fine-tuning.
      dataset: the name of the data set.
      protocol: the training rows, `clean` or `paper`; None if the data set has only one kind.
      source: where the numbers are printed.
      values: metric -> percent.
    """

    name: str
    model: str
    dataset: str
    protocol: str | None
    source: str
    values: Mapping[str, float]


_TABLE = "paper, table of fine-tuned models"
_MODELS = {  # epochs as stated in the notebook, which prints these numbers
    "llava": ("LLaVA, 3 epochs", (50.00, 65.07), (78.18, 63.22), (7.74, 63.20)),
    "from_llava": ("LLaVA-Med (From LLaVA), 15 epochs", (61.52, 84.19), (83.08, 85.34), (37.95, 91.21)),
    "from_vicuna": ("LLaVA-Med (From Vicuna), about 9 epochs", (64.39, 81.98), (84.71, 83.17), (38.87, 91.65)),
    "biomedclip": ("LLaVA-Med (BioMed CLIP), 9 epochs", (64.75, 83.09), (87.11, 86.78), (39.60, 91.09)),
}
ROWS = tuple(
    Row(name, model, dataset, "paper" if dataset == "vqa_rad" else None, _TABLE, dict(zip(METRICS, pair, strict=True)))
    for name, (model, *pairs) in _MODELS.items()
    for dataset, pair in zip(TEST, pairs, strict=True)
) + (
    Row("from_vicuna", "LLaVA-Med (From Vicuna), 9 epochs on vqa_rad's 1,797 rows", "vqa_rad", "clean",
        "authors' notebook",
        {"recall": 32.5791, "closed_accuracy_substring": 63.9706, "exact_match": 20.9612, "f1": 24.7495,
         "precision": 21.1164, "open_accuracy_substring": 24.0223}),
)  # fmt: skip
NAMES = tuple(dict.fromkeys(row.name for row in ROWS))

MEDEVALKIT = {"vqa_rad": (53.7, 451), "pathvqa": (38.8, 6719), "pmc_vqa": (30.5, 33430), "omnimedvqa": (44.3, 88996),
              "mmmu_med": (29.3, 150), "medxpertqa_mm": (20.3, 2000)}
"""LLaVA-Med v1.5 without fine-tuning in MedEvalKit's own table (`assets/mm_eval.png`): percent of all questions, and
their number. SLAKE's number there is left out, because the toolkit's code counts its closed questions twice."""

BAND = 3.0
"""Percent by which another run of the same protocol may differ: the judge's noise, and tower and precision."""


def medevalkit(dataset: str, split: str, n: int, has_judge: bool, switches: Sequence[str]) -> dict:
    """Returns v1.5's published number by MedEvalKit's protocol, or the reason why there is none to compare with.

    Args:
      dataset: the name of the data set.
      split: the split that was asked.
      n: the number of questions.
      has_judge: whether the open answers were judged, or there are none.
      switches: the defects of the toolkit that were switched on.

    Returns:
      `model`, `accuracy`, `low`, `high` (percent) and `source`, or `reason`, a sentence.
    """
    if dataset not in MEDEVALKIT:
        return _nothing(f"MedEvalKit's table has no number for {dataset} that its code can give")
    value, count = MEDEVALKIT[dataset]
    if n != count or split != ("validation" if dataset == "mmmu_med" else "test"):
        return _nothing(f"these are {n} questions of {split}, and MedEvalKit's table asks {count}")
    if not has_judge:
        return _nothing("MedEvalKit's table has its open answers judged, and judge.model is empty")
    if switches:
        return _nothing(f"defects of the toolkit are switched on ({', '.join(switches)})")
    return {"model": "LLaVA-Med v1.5, not fine-tuned", "accuracy": value, "low": value - BAND, "high": value + BAND,
            "source": "MedEvalKit, assets/mm_eval.png (Lingshu's table)"}


def beside(dataset: str, split: str, protocol: str, n_open: int, n_closed: int, name: str) -> dict:
    """Returns the published numbers of the model that the config names, or the reason why there are none.

    Args:
      dataset: the name of the data set.
      split: the split that was asked.
      protocol: the training rows, `clean` or `paper`.
      n_open: number of open questions that were asked. A part of a set is not comparable with the whole.
      n_closed: number of closed questions that were asked.
      name: which published model was evaluated (`published` of the config), or "".

    Returns:
      `row`, `model`, `protocol`, `source` and `values` (metric -> percent), or `reason`, a sentence.
    """
    rows = [row for row in ROWS if row.dataset == dataset]
    if not rows:
        return _nothing(f"the paper has no numbers for {dataset}")
    if split != "test":
        return _nothing(f"the paper's numbers are for the test split, and these questions are from {split}")
    if TEST[dataset] != (n_open, n_closed):
        asked, wanted = f"{n_open} open and {n_closed} closed questions", "{} and {}".format(*TEST[dataset])
        return _nothing(f"these are {asked}, and the paper's test split has {wanted}")
    same = [row for row in rows if row.protocol in (None, protocol)]
    if not name:
        models = "; ".join(f"{row.name}: {row.model}" for row in same)
        return _nothing("the config key published does not name the model, and the numbers are shown only for a "
                        f"published model ({models})")
    found = [row for row in same if row.name == name]
    if not found:
        trained = ", ".join(dict.fromkeys(str(row.protocol) for row in rows if row.name == name))
        return _nothing(f"the published {name} was trained on other rows of {dataset} (protocol {trained}) than this "
                        f"protocol, {protocol}")
    row = found[0]
    return {"row": row.name, "model": row.model, "protocol": row.protocol, "source": row.source,
            "values": dict(row.values)}


def _nothing(reason: str) -> dict:
    return {"reason": f"No published numbers are shown: {reason}."}
