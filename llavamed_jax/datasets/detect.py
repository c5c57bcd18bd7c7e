"""Recognises the data set in a folder or file, by its files and by the keys of its first row.

This selects the reader of training data, and lets errors say what a wrong folder looks like. Parquet files of images,
questions and answers are called `parquet`, unless a sign shows which set they belong to.
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
_MOST_FOLDERS = 50  # subfolders that are searched if the named folder contains no data set


def split_files(root: Path, split: str) -> Iterable[Path]:
    """Returns the possible files of a split, JSON or JSON lines; three names for the validation split are in use."""
    return (root / f"{name}.{suffix}" for name in _NAMES[split] for suffix in ("json", "jsonl"))


def split_file(root: Path, split: str, name: str) -> Path:
    """Returns the file of a split; `root` itself if it is a file.

    Args:
      root: the folder or file.
      split: the split.
      name: the expected data set, for the error.

    Raises:
      UserError: there is no such file. The error says what `root` looks like instead.
    """
    if os.path.exists(root) and not root.is_dir():
        return root
    file = next(filter(Path.is_file, split_files(root, split)), None)
    if file is None:
        raise UserError(f"the data file {root / f'{split}.json'} does not exist"
                        f"{hint(root, name) or _other_splits(root)}")
    return file


def _other_splits(root: Path) -> str:
    """Returns the end of an error about a missing split: it lists the splits that exist."""
    found = [split for split in SPLITS if any(map(Path.is_file, split_files(root, split)))]
    return f"; {root} has the splits {' and '.join(found)} (data.split)" if found else ""


def parquet_files(root: Path, split: str = "") -> list[Path]:
    """Returns the parquet files in a folder and its `data/`, with the hub's names: `test-00000-of-00003.parquet`.

    Args:
      root: the folder.
      split: the split; "" returns the files of all splits.
    """
    names = _NAMES[split] if split else [name for names in _NAMES.values() for name in names]
    return sorted({file for folder in (root, root / "data") for name in names
                   for pattern in (f"{name}.parquet", f"{name}-*.parquet")
                   for file in folder.glob(pattern)})


def layout_of(path: Path) -> str | None:
    """Returns the name of the data set in a folder or file, as for `data.name`; None if no known set is there."""
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
    """Returns the name of the data set that a row with these keys belongs to; None for an unknown row.

    A row with conversations is a LLaVA record, whatever other keys it has.
    """
    keys = row.keys() if isinstance(row, dict) else frozenset()
    in_order = sorted(SETS.values(), key=lambda each: not each.is_conversations)
    return next((each.name for each in in_order if each.is_row(keys)), None)


_ENOUGH_COLUMNS = 2


def named_by_parquet(root: Path) -> str | None:
    """Returns the data set of the parquet files in a folder; None if there is no sign, or signs of two sets.

    Signs are the title of a dataset card beside the files, the name of the folder in the hub's cache, numbers of rows
    that all splits of the set may have, and two columns that only this set has. The columns image, question and answer
    are not signs.
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
    """Returns the name for the questions at `root`: `name`, or `parquet` for parquet files without a sign of it."""
    name_at = SETS[name].name_at if name in SETS else None
    return name_at(root) if name_at else name


def _on_the_hub() -> list[DataSet]:
    return [each for each in SETS.values() if each.parquet]


def _titles(root: Path) -> Iterator[str]:
    """Yields the sets that a dataset card or the folder of the hub's cache names.

    Of the card, `README.md`, only `pretty_name` and the headings count.
    """
    lines = [part for part in root.absolute().parts if part.startswith("datasets--")]
    for card in (root / "README.md", root.parent / "README.md" if root.name == "data" else root / "README.md"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = card.read_text(encoding="utf-8")
            lines += re.findall(r"^(?:pretty_name:|#\s)[^\n]*", text, re.M)
    for each in _on_the_hub():
        if any(re.search(each.parquet.title, line, re.I) for line in lines):
            yield each.name


def hint(path: Path, name: str) -> str:
    """Returns the end of an error about a path that does not contain the set `name`.

    It says which other set the path looks like, or which of its subfolders looks like a set; "" if there is none.
    """
    with contextlib.suppress(OSError):  # a folder without read permission
        found = layout_of(path)
        if found not in (None, name):
            return f"; {path} looks like {SETS[found].title}: data.name={found}"
        if found is None and path.is_dir():
            folders = sorted(child for child in path.iterdir() if child.is_dir())[:_MOST_FOLDERS]
            for child, inner in ((child, layout_of(child)) for child in folders):
                if inner is not None:
                    return f"; {child} looks like {SETS[inner].title}"
    return ""
