"""Reads SLAKE (Liu et al. 2021) in its official layout: `train.json`, `validate.json`, `test.json`, `imgs/`."""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.hub_rows import read_hub
from llavamed_jax.datasets.registry import DataSet, ParquetSigns
from llavamed_jax.datasets.rows import Row, one_of, read_rows
from llavamed_jax.datasets.sample import VqaSample, check_images

LANGUAGES = ("en", "zh", "all")


def read_slake(root: str | Path, split: str = "test", language: str = "en") -> list[VqaSample]:
    """Reads the questions of SLAKE.

    Args:
      root: the folder, or a file in it, or a folder of SLAKE's parquet files (`detect.named_by_parquet`). The file of
        the validation split may be called `validate.json` or, as on the hub, `validation.json`.
      split: `train`, `validation` or `test`.
      language: `en` (as in the paper), `zh`, or `all`.

    Raises:
      UserError: a file or an image is missing, a row lacks a field, or the split or the language is unknown.
    """
    one_of("SLAKE's split", split, detect.SPLITS)
    one_of("SLAKE's language", language, LANGUAGES)
    root = Path(root)
    if detect.parquet_files(root) and not any(map(Path.is_file, detect.split_files(root, split))):
        return read_hub(root, split, language=language, name="slake")
    file = detect.split_file(root, split, "slake")
    samples = [_sample(row, file.parent / "imgs") for row in read_rows(file, "slake")]
    samples = [sample for sample in samples if language in ("all", sample.language)]
    check_images([sample.image for sample in samples])
    return samples


def _sample(row: Row, images: Path) -> VqaSample:
    question, answer, question_type, organ, modality, language = row.texts(
        "question", "answer", "content_type", "location", "modality", "q_lang")
    return VqaSample(row.identity("qid"), row.image("img_name", images), question, answer, row.answer_type(),
                     question_type=question_type, organ=organ, modality=modality, language=language)


def _has_images(path: Path) -> bool:
    """Returns whether `imgs/` has folders `xmlabN`, as SLAKE has, or is empty because images are not there yet."""
    folder = path / "imgs"
    return folder.is_dir() and (any(folder.glob("xmlab*")) or not any(folder.iterdir()))


DATA_SET = DataSet(
    name="slake",
    label="SLAKE",
    sign="train.json, imgs/",
    read=lambda selected: read_slake(selected.root, selected.split, selected.language or "en"),
    follows=("language",),
    seems_at=_has_images,
    is_row=lambda keys: "img_name" in keys,
    variant=lambda selected: selected.language or "en",
    # English: from a notebook of LLaVA-Med v1.0; all languages: from the set's paper, and Chinese is the difference.
    published={
        ("train", "en"): (4919, 450, 2976, 1943), ("validation", "en"): (1053, 96, 631, 422),
        ("test", "en"): (1061, 96, 645, 416),
        ("train", "zh"): (4916, None, None, None), ("validation", "zh"): (1046, None, None, None),
        ("test", "zh"): (1033, None, None, None),
        ("train", "all"): (9835, 450, None, None), ("validation", "all"): (2099, 96, None, None),
        ("test", "all"): (2094, 96, None, None),
    },
    has_training_rows=True,
    parquet=ParquetSigns(
        rows={"train": (4919, 9835), "validation": (1053, 2099), "test": (1061, 2094)},  # English; all languages
        columns=frozenset({"img_name", "img_id", "q_lang", "location", "base_type", "content_type", "triple"}),
        title=r"slake"),
)
