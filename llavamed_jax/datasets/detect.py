"""Which data set lies at a place, by what lies there and by the keys of its first row.

It picks the reader of training data, and says in an error what a wrong folder looks like. What several sets have in common names
none of them: parquet files of images, questions and answers are `parquet`, until something says whose they are.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from llavamed_jax.datasets.parquet import footer
from llavamed_jax.datasets.records import first_record
from llavamed_jax.datasets.registry import SETS, SPLITS, DataSet
from llavamed_jax.errors import UserError

_NAMES = {"train": ("train",), "validation": ("validation", "validate", "val"), "test": ("test",)}
_MOST_FOLDERS = 50  # that are looked into where the one that was named holds nothing


def split_files(root: Path, split: str) -> Iterable[Path]:
    """What the file of a split may be called, JSON or JSON lines; validation has three names in the field."""
    return (root / f"{name}.{suffix}" for name in _NAMES[split] for suffix in ("json", "jsonl"))


def split_file(root: Path, split: str, name: str) -> Path:
    """The file of a split: `root` itself where it is a file. Raises UserError that says what `root` looks like instead."""
    if os.path.exists(root) and not root.is_dir():
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
    certain = next((each.name for each in SETS.values() if each.is_at(path)), None)
    if certain is not None:
        return certain
    if path.is_file():
        return layout_of_row(first_record(path))
    if parquet_files(path):
        return named_by_parquet(path) or "parquet"
    files = filter(Path.is_file, (file for split in SPLITS for file in split_files(path, split)))
    found = next(filter(None, (layout_of_row(first_record(file)) for file in files)), None)
    return found or next((each.name for each in SETS.values() if each.seems_at(path)), None)


def layout_of_row(row: Any) -> str | None:
    """The same by the keys of a row. A row with conversations is a LLaVA record, whatever else it has."""
    keys = row.keys() if isinstance(row, dict) else frozenset()
    in_order = sorted(SETS.values(), key=lambda each: not each.is_conversations)
    return next((each.name for each in in_order if each.is_row(keys)), None)


_ENOUGH_COLUMNS = 2


def named_by_parquet(root: Path) -> str | None:
    """The set whose parquet files lie in a folder; None where nothing says it, or two things say two.

    A sign is the title of a dataset card beside the files, the folder's name in the hub's cache, as many rows in each of its splits
    as the set has, or two columns that no other set has. Columns image, question and answer are none.
    """
    found = set(_titles(root))
    counts: dict[str, int] = {}
    columns: set[str] = set()
    for split in SPLITS:
        for file in parquet_files(root, split):
            names, rows = footer(file)
            columns |= set(names)
            counts[split] = counts.get(split, 0) + rows
    for each in _on_the_hub():
        own_rows = counts and all(counts[split] in each.parquet.rows.get(split, ()) for split in counts)
        if own_rows or len(columns & each.parquet.columns) >= _ENOUGH_COLUMNS:
            found.add(each.name)
    return found.pop() if len(found) == 1 else None


def set_at(root: Path, name: str) -> str:
    """What the questions at a place may be called: `name`, but `parquet` where nothing says whose parquet files they are."""
    name_at = SETS[name].name_at if name in SETS else None
    return name_at(root) if name_at else name


def _on_the_hub() -> list[DataSet]:
    return [each for each in SETS.values() if each.parquet]


def _titles(root: Path) -> Iterator[str]:
    """The sets that a dataset card (`README.md`: its `pretty_name` and headings) or the folder of the hub's cache names."""
    lines = [part for part in root.absolute().parts if part.startswith("datasets--")]
    for card in (root / "README.md", root.parent / "README.md" if root.name == "data" else root / "README.md"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = card.read_text(encoding="utf-8")
            lines += re.findall(r"^(?:pretty_name:|#\s)[^\n]*", text, re.M)
    for each in _on_the_hub():
        if any(re.search(each.parquet.title, line, re.I) for line in lines):
            yield each.name


def hint(path: Path, name: str) -> str:
    """The end of an error about a place that does not hold the set `name`: which other set it looks like, or where one lies."""
    with contextlib.suppress(OSError):  # a folder that may not be looked into
        found = layout_of(path)
        if found not in (None, name):
            return f"; {path} looks like {SETS[found].title}: data.name={found}"
        if found is None and path.is_dir():
            folders = sorted(child for child in path.iterdir() if child.is_dir())[:_MOST_FOLDERS]
            for child, inner in ((child, layout_of(child)) for child in folders):
                if inner is not None:
                    return f"; {child} looks like {SETS[inner].title}"
    return ""
