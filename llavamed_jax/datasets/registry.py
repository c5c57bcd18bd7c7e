"""The data sets by name, for training and for evaluation: how each is read, recognised and counted.

A data set is one file, which makes a `DataSet`, and one line in `llavamed_jax/datasets/__init__.py`, which registers it. Python runs
that file before any other of the package, so the registry is filled wherever it is looked into. This file imports no reader:
readers look into it, because an error says which other set a folder looks like.
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
    """Which questions of a set are read.

    Attributes:
      root: the folder or file that the user names.
      split: one of the set's splits.
      protocol: `clean` or `paper`, VQA-RAD's training rows.
      images: the folder of the images, None where the layout says it.
      language, question: the config keys `data.language` and `data.question`; None leaves the set's own default.
    """

    root: str | Path
    split: str = "test"
    protocol: str = "clean"
    images: str | Path | None = None
    language: str | None = None
    question: str | None = None


@dataclass(frozen=True)
class ParquetSigns:
    """What tells a set's parquet files on the hub from those of another set.

    Attributes:
      rows: split -> the numbers of rows that it may have there.
      columns: columns that this set has and no other has.
      title: a regular expression for its title in a dataset card or in the name of the hub's cache.
    """

    rows: Mapping[str, tuple[int, ...]]
    columns: frozenset[str]
    title: str


@dataclass(frozen=True)
class DataSet:
    """A data set. The first four fields are all that a new one needs.

    Attributes:
      name: what `data.name` of an evaluation calls it.
      label, sign: its name in sentences, and what it is recognised by, for people: `SLAKE`, `train.json, imgs/`.
      read: reads a selection. Raises UserError for whatever is wrong with the files.
      row: what a row of its files holds, for errors.
      follows: which of `protocol`, `images`, `language` and `question` its reader obeys. A set that does not follow `images` has
        them where its layout says.
      splits: the splits that it has.
      is_at: whether a path, a folder or a file, is this set for certain.
      seems_at: whether a folder that nothing else is certain about may be this set.
      is_row: whether a row with these keys is of this set.
      name_at: what the questions in a folder are called, where that is not always `name`.
      variant: the name of a selection's variant in `published`.
      published: (split, variant) -> questions, images, open, closed of the whole set; None where no source says.
      has_training_rows: whether the set comes with training rows, so that their absence is an error.
      read_whole: reads all rows of all splits once, for `data.held_out`; None where splits have no image in common.
      files: the files that a split's questions are in, for their hashes; None: the folder's JSON files, else parquet files.
      is_conversations: whether training reads its rows as LLaVA records, of any number of turns, rather than as questions.
      parquet: what its parquet files on the hub are recognised by.
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
    is_conversations: bool = False
    parquet: ParquetSigns | None = None

    @property
    def title(self) -> str:
        """The set in a sentence: `SLAKE (train.json, imgs/)`."""
        return f"{self.label} ({self.sign})"

    def questions(self, selected: Selection) -> list[VqaSample]:
        """The questions of a selection.

        Raises:
          UserError: what `read` raises, another exception of it, or a result that is no list of `VqaSample`. An OSError, which
            names its file, passes.
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
            raise UserError(f"the reader of {self.label} returned {short(wrong)} for {selected.root}; a list of VqaSample was expected")
        return samples


SETS: dict[str, DataSet] = {}
"""Every registered set. Rows and places that could be of several sets are those of the first."""


def register(data_set: DataSet) -> DataSet:
    """Adds a set, which `data.train` and `data.name` can name from then on; returns it.

    A set of the user's own may be registered again, as when a notebook's cell or a recipe is run twice.

    Raises:
      UserError: the name is one of this project's sets.
    """
    taken = SETS.get(data_set.name)
    if taken is not None and taken.read.__module__.startswith("llavamed_jax."):
        raise UserError(f"the name {data_set.name!r} is that of {taken.label}; another name of the data set was expected")
    SETS[data_set.name] = data_set
    return data_set
