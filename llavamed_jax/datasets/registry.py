"""The registry of data sets, for training and evaluation: how each set is read, recognised and counted.

A data set is one file, which makes a `DataSet`, and one line in `llavamed_jax/datasets/__init__.py`, which registers
it. Python runs that file before any other file of the package, so the registry is always complete. This file imports no
reader, because the readers import it: their errors say which other set a folder looks like.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UserError, short

SPLITS = ("train", "validation", "test")
OFFICIAL = "the official layout"


@dataclass(frozen=True)
class Selection:
    """Selects which questions of a set are read.

    Attributes:
      root: the folder or file that the user names.
      split: one of the set's splits.
      protocol: `clean` or `paper`, which selects VQA-RAD's training rows.
      images: the folder of the images; None uses the folder of the layout.
      language: the config key `data.language`; None uses the set's default.
      question: the config key `data.question`; None uses the set's default.
    """

    root: str | Path
    split: str = "test"
    protocol: str = "clean"
    images: str | Path | None = None
    language: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class ParquetSigns:
    """Signs by which a set's parquet files on the hub are recognised.

    Attributes:
      rows: split -> possible numbers of rows.
      columns: columns that only this set has.
      title: a regular expression for the set's title in a dataset card or in a folder name of the hub's cache.
    """

    rows: Mapping[str, tuple[int, ...]]
    columns: frozenset[str]
    title: str


@dataclass(frozen=True)
class DataSet:
    """A data set.

    `data.name` of an evaluation needs only the first four fields. `data.train` names no set, so it recognises one by
    `is_at`, `is_row`, `seems_at` or `parquet`.

    Attributes:
      name: the value of `data.name` in an eval config.
      label: the name in sentences, such as `SLAKE`.
      sign: what people recognise the set by, such as `train.json, imgs/`.
      read: reads a selection. Raises UserError if the files are invalid.
      row: the form of a row, for errors.
      follows: which of `protocol`, `images`, `language` and `question` the reader obeys. A set that does not follow
        `images` has them in a fixed place of its layout.
      splits: the splits of the set.
      is_at: returns whether a path, a folder or a file, certainly is this set.
      seems_at: returns whether a folder may be this set. It is asked only if no set is certain.
      is_row: returns whether a row with these keys belongs to this set.
      name_at: returns the name for the questions in a folder; None always uses `name`.
      variant: returns the name of a selection's variant in `published`.
      published: (split, variant) -> number of questions, images, open and closed questions of the whole set; a number
        that no source states is None.
      has_training_rows: whether the set comes with training rows, so that their absence is an error.
      read_whole: reads all rows of all splits once, for `data.held_out`; None if no two splits share images.
      files: returns the files with a split's questions, to be hashed; a folder stands for all files in it. None means
        the JSON files of the folder, or else its parquet files.
      has_split: returns whether a folder has questions of a split; None means that one of the split's files exists.
      use_training_rows: whether an evaluation reads the training rows if their files are there.
      is_conversations: whether training reads the rows as LLaVA records with any number of turns, and not as questions.
      parquet: the signs of the parquet files on the hub.
    """

    name: str
    label: str
    sign: str
    read: Callable[[Selection], list[VqaSample]]
    row: str = OFFICIAL
    follows: tuple[str, ...] = ()
    splits: tuple[str, ...] = SPLITS
    is_at: Callable[[Path], bool] = lambda path: False
    seems_at: Callable[[Path], bool] = lambda path: False
    is_row: Callable[[Set[str]], bool] = lambda keys: False
    name_at: Callable[[Path], str] | None = None
    variant: Callable[[Selection], str] = lambda selection: ""
    published: Mapping[tuple[str, str], tuple[int | None, ...]] = field(default_factory=dict)
    has_training_rows: bool = False
    read_whole: Callable[[str | Path], list[VqaSample]] | None = None
    files: Callable[[Path, str], list[Path]] | None = None
    has_split: Callable[[Path, str], bool] | None = None
    use_training_rows: bool = False
    is_conversations: bool = False
    parquet: ParquetSigns | None = None

    @property
    def title(self) -> str:
        """The name and the sign of the set, for sentences: `SLAKE (train.json, imgs/)`."""
        return f"{self.label} ({self.sign})"

    def questions(self, selected: Selection) -> list[VqaSample]:
        """Reads the questions of a selection.

        Raises:
          UserError: `read` raises any exception, or does not return a list of `VqaSample`. An OSError is not converted,
            because it names its file.
        """
        try:
            samples = list(self.read(selected))
        except (UserError, OSError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}".splitlines()[0]
            raise UserError(f"the reader of {self.label} failed on {selected.root}: {what}") from error
        wrong = next((sample for sample in samples if not isinstance(sample, VqaSample)), None)
        if wrong is not None:
            raise UserError(f"the reader of {self.label} returned {short(wrong)} for {selected.root}; a list of "
                            "VqaSample was expected")
        return samples


SETS: dict[str, DataSet] = {}
"""Every registered set, by name. If several sets match a path or a row, the first registered one wins."""

_BUILT_IN: set[str] = set()  # the names of the package's own sets


def register(data_set: DataSet) -> DataSet:
    """Adds a data set to the registry and returns it; afterwards `data.train` and `data.name` may name it.

    A user's set may be registered again, which happens if a notebook cell or a recipe runs twice.

    Raises:
      UserError: a set of this package has the same name.
    """
    taken = SETS.get(data_set.name)
    if taken is not None and taken is not data_set and data_set.name in _BUILT_IN:
        raise UserError(f"the name {data_set.name!r} already belongs to {taken.label}; another name was expected for "
                        "the data set")
    SETS[data_set.name] = data_set
    return data_set


def keep_names() -> None:
    """Reserves the names of all sets that are registered so far; the package calls it after its own sets."""
    _BUILT_IN.update(SETS)
