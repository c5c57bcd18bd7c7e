"""Reads VQA-RAD (Lau et al. 2018): the public file and its images, or a part of it in the same layout."""

from __future__ import annotations

import logging
import os
from dataclasses import replace
from pathlib import Path

from llavamed_jax.datasets.detect import hint, parquet_files
from llavamed_jax.datasets.hub_rows import read_hub
from llavamed_jax.datasets.registry import DataSet, ParquetSigns
from llavamed_jax.datasets.rows import Row, one_of, read_rows
from llavamed_jax.datasets.sample import VqaSample, check_images
from llavamed_jax.errors import UserError

log = logging.getLogger(__name__)

VQA_RAD_FILE = "VQA_RAD Dataset Public.json"
_IMAGES = ("images", "VQA_RAD Image Folder")  # the second is the name on osf.io
_TYPES = {"PRSE": "PRES", "ATRIB": "ATTRIB"}  # typos in the published file


def read_vqa_rad(root: str | Path, split: str = "test", protocol: str = "clean") -> list[VqaSample]:
    """Reads the questions of VQA-RAD.

    Test rows are those with a `phrase_type` that begins with `test_`. The protocol `paper` adds the rephrasing
    (`question_frame`) of every row, including test rows, to the training rows, as in the repackaged data that the paper
    trained on. So the training rows contain answers of test questions; a warning about this leak is logged.

    Args:
      root: the folder, or the file in it; or a folder of VQA-RAD's parquet files (`detect.named_by_parquet`).
      split: `train`, `test` or `all`.
      protocol: `clean` or `paper`; it does not affect test rows.

    Raises:
      UserError: a file or an image is missing, a row lacks a field, or the split or the protocol is unknown.
    """
    one_of("VQA-RAD's split", split, ("train", "test", "all"))
    one_of("VQA-RAD's protocol", protocol, ("clean", "paper"))
    root = Path(root)
    file = root / VQA_RAD_FILE if root.is_dir() else root
    if not os.path.exists(file) and parquet_files(root):
        return _from_parquet(root, split, protocol)
    if not os.path.exists(file):
        raise UserError(f"the data file {file} does not exist{hint(root, 'vqa_rad')}")
    rows = read_rows(file, "vqa_rad")
    images = next((file.parent / name for name in _IMAGES if (file.parent / name).is_dir()), None)
    if images is None:
        raise UserError(f"{file.parent} has no folder {_IMAGES[0]}/ with VQA-RAD's images")
    pairs = [(row, _sample(row, images)) for row in rows]
    samples = [s for _, s in pairs if split == "all" or (split == "test") == s.phrase_type.startswith("test_")]
    if protocol == "paper" and split != "test":
        frames = [_frame(row, s) for row, s in pairs if row.value.get("question_frame") not in (None, "NULL")]
        leaked = sum(s.phrase_type.startswith("test_") for s in frames)
        log.warning("VQA-RAD, protocol paper: %d rephrasings were added to the training rows, and %d of them rephrase "
                    "test questions: test answers leak into training, as in the paper", len(frames), leaked)
        samples += frames
    check_images([s.image for s in samples])
    return samples


def _from_parquet(root: Path, split: str, protocol: str) -> list[VqaSample]:
    if protocol == "paper" and split != "test":
        raise UserError(f"{root} holds parquet files, which lack the rephrasings; protocol=paper needs {VQA_RAD_FILE}")
    return [sample for each in (("train", "test") if split == "all" else (split,))
            for sample in read_hub(root, each, name="vqa_rad")]


def _sample(row: Row, images: Path) -> VqaSample:
    answer_type, image = row.answer_type(), row.image("image_name", images)
    types, qid, question, answer, organ, phrase_type = row.texts(
        "question_type", "qid", "question", "answer", "image_organ", "phrase_type")
    kinds = [_TYPES.get(kind.strip().upper(), kind.strip().upper()) for kind in types.split(",")]
    return VqaSample(int(qid) if qid.isdecimal() else qid, image, question, answer, answer_type,
                     question_type=", ".join(sorted(kinds)), organ=organ, phrase_type=phrase_type)


def _frame(row: Row, sample: VqaSample) -> VqaSample:
    return replace(sample, question_id=f"frame-{sample.question_id}", question=row.text("question_frame"))


DATA_SET = DataSet(
    name="vqa_rad",
    label="VQA-RAD",
    sign=VQA_RAD_FILE,
    read=lambda selected: read_vqa_rad(selected.root, selected.split, selected.protocol),
    follows=("protocol",),
    splits=("train", "test"),
    is_at=lambda path: path.name == VQA_RAD_FILE or (path / VQA_RAD_FILE).is_file(),
    is_row=lambda keys: "phrase_type" in keys,
    variant=lambda selected: selected.protocol,
    published={  # from a notebook of LLaVA-Med v1.0
        ("train", "clean"): (1797, 313, 770, 1027), ("train", "paper"): (3064, 314, 1241, 1823),
        ("test", "clean"): (451, 203, 179, 272), ("test", "paper"): (451, 203, 179, 272),
    },
    has_training_rows=True,
    read_whole=lambda root: read_vqa_rad(root, "all", "clean"),  # without rephrasings
    parquet=ParquetSigns(
        rows={"train": (1793, 1797, 3064), "test": (451,)},  # without repeated rows, clean, and paper
        columns=frozenset({"phrase_type", "image_organ", "qid_linked_id", "image_case_url", "question_frame",
                           "question_relation", "question_rephrase"}),
        title=r"vqa[\W_]*rad"),
)
