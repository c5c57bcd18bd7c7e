"""Rows of a data file: each value is read by its key, and what is wrong with one is said with the row's place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from llavamed_jax.datasets import detect
from llavamed_jax.datasets.registry import OFFICIAL, SETS
from llavamed_jax.datasets.sample import _OPEN_OR_CLOSED, VqaSample, check_images
from llavamed_jax.errors import UserError, short
from llavamed_jax.utils.files import parse_json, parse_jsonl, read_bytes

_LARGEST = 2**63  # a pickle can hold a number of a million digits, which Python refuses to write down


def one_of(what: str, value, choices: Iterable) -> None:
    """Raises UserError where `value` is none of `choices`."""
    if value not in choices:
        raise UserError(f"{what} is {value!r}; one of {', '.join(map(str, choices))} was expected")


def read_rows(file: Path, layout: str) -> list[Row]:
    """The rows of a JSON list or of a JSONL file. Raises UserError for a file that is missing, not UTF-8 or no JSON.

    Args:
      layout: the set whose rows they are to be, a name of `registry.SETS`.
    """
    try:
        text = read_bytes(file, f"the data file {file}").decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"the data file {file} does not exist") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text; a JSON list or JSON lines were expected") from error
    if text.lstrip().startswith("["):
        return named_rows(parse_json(text, str(file)), file, layout)
    return named_rows([row for _, row in parse_jsonl(text, lambda number: f"line {number} of {file}")], file, layout)


def read_split(root: str | Path, split: str, layout: str, images: str | Path | None,
               sample: Callable[[Row, Path, int], VqaSample]) -> list[VqaSample]:
    """The samples of a file of one's own, or of the split's file in a folder; what `sample` makes of row, folder of images, place."""
    one_of("the split", split, detect.SPLITS)
    file = detect.split_file(Path(root), split, layout)
    folder = Path(images) if images else file.parent
    samples = [sample(row, folder, index) for index, row in enumerate(read_rows(file, layout))]
    check_images(sample.image for sample in samples)
    return samples


def named_rows(values: Iterable[Any], file: Path, layout: str) -> list[Row]:
    """Rows that know their place."""
    return [Row(value, f"row {index} of {file}", layout) for index, value in enumerate(values)]


class Row:
    """A row of a data file: its values, or a UserError that says what is wrong with which."""

    def __init__(self, value: Any, name: str, layout: str):
        self.value, self.name, self._layout = value, name, layout

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, Mapping) and self.value.get(key) is not None

    def __getitem__(self, key: str) -> Any:
        if not isinstance(self.value, Mapping) or key not in self.value:
            other = detect.layout_of_row(self.value)
            also = f", and it looks like a row of {SETS[other].title}" if other not in (None, self._layout) else ""
            expected = SETS[self._layout].row if self._layout in SETS else OFFICIAL
            raise self.error(f"has no {key!r}; {expected} was expected{also}")
        return self.value[key]

    def error(self, what: str) -> UserError:
        return UserError(f"{self.name} {what}")

    def text(self, key: str) -> str:
        """Text without blanks around it. Some published answers are numbers."""
        value = self[key]
        is_number = type(value) is int and abs(value) < _LARGEST or isinstance(value, float) and math.isfinite(value)
        if not isinstance(value, str) and not is_number:
            raise self.error(f"has the {key} {_shown(value)}; text was expected")
        try:
            value = str(value).strip()
            value.encode()
        except UnicodeEncodeError:  # JSON and pickles can say it, and no file and no tokenizer knows what it is
            raise self.error(f"has half a surrogate pair in its {key}") from None
        return value

    def words(self, key: str) -> str:
        """Text that says something."""
        if not (value := self.text(key)):
            raise self.error(f"has an empty {key}; text was expected")
        return value

    def optional(self, key: str) -> str | None:
        """Text, or None where the row has none."""
        return (self.text(key) or None) if key in self else None

    def fields(self) -> dict[str, str | None]:
        """What a row of one's own may say beside its question; reports are broken down by it."""
        return {key: self.optional(key) for key in ("question_type", "organ", "modality")}

    def identity(self, *keys: str) -> int | str:
        """The id under the first of `keys` that the row has."""
        key = next((key for key in keys if key in self), keys[0])
        value = self[key]
        return value if type(value) is int and abs(value) < _LARGEST else self.words(key)

    def image(self, key: str, folder: Path) -> Path:
        """The path of the one image that the question is about."""
        value = self[key]
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, list):
            raise self.error(f"has {len(value)} images; one was expected")
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.error(f"has the {key} {_shown(value)}; text was expected")
        return folder / value

    def answer_type(self, names: Mapping[str, str] = _OPEN_OR_CLOSED) -> str:
        """OPEN or CLOSED. Two rows of VQA-RAD have a trailing blank.

        Args:
          names: what a file may call them, in capitals.
        """
        value = self["answer_type"]
        kind = names.get(value.strip().upper()) if isinstance(value, str) else None
        if kind is None:
            raise self.error(f"has the answer_type {_shown(value)}; {' or '.join(names)} was expected")
        return kind


def _shown(value: Any) -> str:
    """A value for a sentence. A container is not written out: a pickle's may be nested deeper than Python can."""
    if isinstance(value, int) and abs(value) >= _LARGEST:
        return "a number of many digits"
    return f"a {type(value).__name__}" if isinstance(value, (list, dict, tuple)) else short(value)
