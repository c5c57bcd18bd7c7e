"""Which data set lies at a place, by what lies there and by the keys of its first row.

It picks the reader of training data, and says in an error what a wrong folder looks like.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llavamed_jax.data.records import first_record
from llavamed_jax.errors import UserError

VQA_RAD_FILE = "VQA_RAD Dataset Public.json"
SPLITS = ("train", "validation", "test")
TITLES = {
    "vqa_rad": f"VQA-RAD ({VQA_RAD_FILE})", "slake": "SLAKE (train.json, imgs/)", "pathvqa": "PathVQA (qas/, images/, or parquet files)",
    "llava_med": "LLaVA-Med's format (rows with conversations)", "choices": "multiple choice (rows with options)",
    "captions": "captions (rows with a caption, report or reference)",
}
ROWS = {
    "llava_med": "{id, image, answer_type, conversations}", "choices": "{id, image, question, options, answer}",
    "captions": "{id, image, caption} or {id, image, conversations}",
}
REFERENCES = ("reference", "report", "caption")  # what a row of captions may call its text
_NAMES = {"train": ("train",), "validation": ("validation", "validate", "val"), "test": ("test",)}
_MOST_FOLDERS = 50  # that are looked into where the one that was named holds nothing


def split_files(root: Path, split: str) -> Iterable[Path]:
    """What the file of a split may be called, JSON or JSON lines; validation has three names in the field."""
    return (root / f"{name}.{suffix}" for name in _NAMES[split] for suffix in ("json", "jsonl"))


def split_file(root: Path, split: str, name: str) -> Path:
    """The file of a split: `root` itself where it is a file. Raises UserError that says what `root` looks like instead."""
    if root.is_file():
        return root
    file = next(filter(Path.is_file, split_files(root, split)), None)
    if file is None:
        raise UserError(f"the data file {root / f'{split}.json'} does not exist{hint(root, name) or _other_splits(root)}")
    return file


def _other_splits(root: Path) -> str:
    """The end of an error about a split that a set does not have: those that it has."""
    found = [split for split in SPLITS if any(map(Path.is_file, split_files(root, split)))]
    return f"; {root} has {' and '.join(found)}: data.split" if found else ""


def parquet_files(root: Path, split: str = "") -> list[Path]:
    """Parquet files in a folder or in its `data/`, as the hub names them: `test-00000-of-00003.parquet`."""
    names = _NAMES[split] if split else [name for names in _NAMES.values() for name in names]
    return sorted({file for folder in (root, root / "data") for name in names for pattern in (f"{name}.parquet", f"{name}-*.parquet")
                   for file in folder.glob(pattern)})


def layout_of(path: Path) -> str | None:
    """The name of the data set at a place, as `data.name` has it; None where there is none that is known."""
    if path.name == VQA_RAD_FILE or (path / VQA_RAD_FILE).is_file():
        return "vqa_rad"
    if path.is_file():
        return layout_of_row(first_record(path))
    if (path / "qas").is_dir() or parquet_files(path):
        return "pathvqa"
    files = filter(Path.is_file, (file for split in SPLITS for file in split_files(path, split)))
    found = next(filter(None, (layout_of_row(first_record(file)) for file in files)), None)
    return found or ("slake" if (path / "imgs").is_dir() else None)


def layout_of_row(row: Any) -> str | None:
    """The same by the keys of a row."""
    keys = row.keys() if isinstance(row, dict) else set()
    signs = {"llava_med": ("conversations", "conversatons"), "vqa_rad": ("phrase_type",), "slake": ("img_name",),
             "choices": ("options",), "captions": REFERENCES}
    return next((name for name, any_of in signs.items() if keys & set(any_of)), None)


def hint(path: Path, name: str) -> str:
    """The end of an error about a place that does not hold the set `name`: which other set it looks like, or where one lies."""
    with contextlib.suppress(OSError):  # a folder that may not be looked into
        found = layout_of(path)
        if found not in (None, name):
            return f"; {path} looks like {TITLES[found]}: data.name={found}"
        if found is None and path.is_dir():
            folders = sorted(child for child in path.iterdir() if child.is_dir())[:_MOST_FOLDERS]
            for child, inner in ((child, layout_of(child)) for child in folders):
                if inner is not None:
                    return f"; {child} looks like {TITLES[inner]}"
    return ""
