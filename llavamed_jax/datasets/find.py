"""Finds the data sets that lie in the subfolders of a folder."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.registry import SETS, SPLITS
from llavamed_jax.errors import UserError

DEPTH = 4  # levels of subfolders; a set in the hub's cache lies in `hub/datasets--OWNER--NAME/snapshots/COMMIT`
_MOST_SUBFOLDERS = 200  # a folder with more holds images
_MOST_FOLDERS = 2000


@dataclass
class Found:
    """The result of a search.

    Attributes:
      folders: name of a set -> the folder that it lies in, in the order in which they were asked for.
      repeated: (name, folder) of sets that were found before in another folder.
      others: (name, folder) of data sets that were not asked for.
      unread: what was not searched, and why: sentences.
      num_folders: number of folders that were looked at.
    """

    folders: dict[str, Path] = field(default_factory=dict)
    repeated: list[tuple[str, Path]] = field(default_factory=list)
    others: list[tuple[str, Path]] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    num_folders: int = 0


def find_sets(root: str | Path, names: Collection[str]) -> Found:
    """Looks for data sets in a folder and four levels of its subfolders.

    A folder in which one of these sets was found is not searched further. Folders whose names begin with a dot are left
    out.

    Args:
      root: the folder.
      names: the sets to look for, by their names in the registry.

    Raises:
      UserError: `root` does not exist, is not a folder or cannot be read.
    """
    root, found = Path(root), Found()
    if not root.is_dir():
        raise UserError(f"{root} {'is a file' if root.exists() else 'does not exist'}; a folder with data sets was "
                        "expected")
    left = deque([(root, 0)])
    while left:
        folder, depth = left.popleft()
        if found.num_folders == _MOST_FOLDERS:
            found.unread.append(f"{folder} and all folders after it were not searched, because {_MOST_FOLDERS} "
                                "folders were looked at before it")
            break
        found.num_folders += 1
        inner = _look_at(folder, names, found, is_first=depth == 0)
        left.extend((each, depth + 1) for each in inner if depth < DEPTH)
    found.folders = {name: found.folders[name] for name in names if name in found.folders}
    return found


def _look_at(folder: Path, names: Collection[str], found: Found, is_first: bool) -> list[Path]:
    """Enters what lies in a folder into `found`; returns the subfolders to look at next."""
    try:
        name = detect.layout_of(folder)
        if name in names:
            if name in found.folders:
                found.repeated.append((name, folder))
            else:
                found.folders[name] = folder
            return []
        if name is not None:
            found.others.append((name, folder))
        inner = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    except (OSError, UserError) as error:
        if is_first and isinstance(error, OSError):
            raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        found.unread.append(f"{folder} cannot be read: {reason}")
        return []
    if len(inner) > _MOST_SUBFOLDERS and not is_first:
        found.unread.append(f"the {len(inner)} subfolders of {folder} were not searched, because they are more than "
                            f"{_MOST_SUBFOLDERS}")
        return []
    return inner


def asked_split(name: str, folder: Path, split: str) -> str:
    """Returns the split to ask: `split`, or `validation` if the folder has questions of that split and none of `split`.

    Args:
      name: the name of the set.
      folder: its folder.
      split: the split that is preferred.
    """
    other = SPLITS[1]
    is_other = (split != other and other in SETS[name].splits and has_split(name, folder, other)
                and not has_split(name, folder, split))
    return other if is_other else split


def has_split(name: str, folder: Path, split: str) -> bool:
    """Returns whether a folder has questions of a split, in the layout of the set; False if its files are invalid."""
    try:
        if SETS[name].has_split:
            return SETS[name].has_split(folder, split)
        if SETS[name].files:
            return any(map(Path.exists, SETS[name].files(folder, split)))
    except (UserError, OSError):
        return False
    return any(map(Path.is_file, detect.split_files(folder, split))) or bool(detect.parquet_files(folder, split))
