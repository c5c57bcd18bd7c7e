"""Reads files of figures: caption, sentences of the article that mention the figure, domain, image and licence.

A record is an object in LLaVA-Med's format: `pair_id`, `fig_label`, `fig_caption`, `in_text_mention` (texts, objects
with the text under `tokens`, or null) and `domain` (an object of booleans, or a name). `image` names the image file;
without it the file is `PAIR_ID.jpg`. `licence` (or `license`) is optional. A file is JSON lines, a JSON list, or an
object that maps each domain to a list, as LLaVA-Med's own `llava_med_instruct_fig_captions.json` does.
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from llavamed_jax.datasets.qa50 import DOMAINS
from llavamed_jax.datasets.records import find_records
from llavamed_jax.errors import UserError, some
from llavamed_jax.utils.files import open_file, parse_json, read_bytes

OTHER = "other"  # the domain of a record that states none
_LONGEST_LINE = 2**28  # bytes of the first line that are read to recognise the layout


@dataclass(frozen=True)
class Figure:
    """A figure of an article.

    Attributes:
      pair_id: the id of figure and caption.
      label: the label in the article, such as `Figure 2`; may be empty.
      caption: the caption.
      mentions: sentences of the article that mention the figure.
      domain: the name of the domain.
      domains: the record's `domain`, unchanged.
      image: the name of the image file.
      licence: the licence, if the record states it.
      result: the reply under `result`, which LLaVA-Med's generator adds to a record; else None.
    """

    pair_id: str
    label: str
    caption: str
    mentions: tuple[str, ...] = ()
    domain: str = OTHER
    domains: Any = None
    image: str = ""
    licence: str | None = None
    result: str | None = None


class FigureFile:
    """The figures of a file, of which only the places are in memory. A layout of domains is kept as a whole.

    Args:
      path: the file.

    Attributes:
      path: the file.
      skipped: reason -> number of records that cannot be used; complete after the first pass of `places`.

    Raises:
      UserError: the file does not exist, cannot be read, or is not JSON.
    """

    def __init__(self, path: Path):
        self.path, self.skipped = path, Counter()
        self._rows: list[tuple[str | None, Any]] | None = None
        self._places: dict[str, array] | None = None
        try:
            with open_file(path, f"the file of figures {path}") as file:
                domains = _by_domain(file.readline(_LONGEST_LINE), path)
                if domains is not None:
                    self._rows = [(name, row) for name, rows in domains.items() for row in rows]
                else:
                    self._offsets = find_records(file, str(path))
            self._file = None if domains is not None else open_file(path)
        except FileNotFoundError:
            raise UserError(f"the file of figures {path} does not exist") from None
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
        if not len(self):
            raise UserError(f"{path} holds no figures; records with pair_id and fig_caption were expected")

    def __len__(self) -> int:
        return len(self._offsets if self._rows is None else self._rows)

    def __getitem__(self, number: int) -> Figure:
        """Reads figure `number`. Raises ValueError, with a reason of a few words, if it cannot be used."""
        domain, row = self._row(number)
        return _figure(row, domain)

    def _row(self, number: int) -> tuple[str | None, Any]:
        if self._rows is not None:
            return self._rows[number]
        begin, end = map(int, self._offsets[number])
        self._file.seek(begin)
        try:
            return None, json.loads(self._file.read(end - begin))
        except (ValueError, RecursionError):
            raise ValueError("not JSON") from None

    def figures(self) -> Iterator[tuple[int, Figure]]:
        """Yields number and figure of each usable record; counts the others in `skipped`."""
        self.skipped, seen = Counter(), set()
        for number in range(len(self)):
            try:
                figure = self[number]
            except ValueError as error:
                self.skipped[str(error)] += 1
                continue
            if figure.pair_id in seen:
                self.skipped["a pair_id that occurred before"] += 1
                continue
            seen.add(figure.pair_id)
            yield number, figure

    def places(self) -> Mapping[str, Sequence[int]]:
        """Returns domain -> numbers of its usable figures, in the order of the file."""
        if self._places is None:
            self._places = {}
            for number, figure in self.figures():
                self._places.setdefault(figure.domain, array("q")).append(number)
        return self._places

    def round_robin(self, most: int | None = None) -> Iterator[Figure]:
        """Yields figures of one domain after the other, as LLaVA-Med's generator does; at most `most` of them.

        The original counts before it compares with its limit, so it yields one less than its limit (quirk Q25).
        """
        numbers = (number for turn in zip_longest(*self.places().values()) for number in turn if number is not None)
        for count, number in enumerate(numbers):
            if most is not None and count == most:
                return
            yield self[number]

    def describe(self) -> str:
        """Returns one line with the numbers of figures by domain, and of records that cannot be used by reason."""
        places = self.places()
        total = sum(map(len, places.values()))
        domains = ", ".join(f"{len(numbers):,} {name}" for name, numbers in places.items())
        line = f"{self.path}: {total:,} figures ({domains})" if total else f"{self.path}: no usable figures"
        if self.skipped:
            line += "; not used: " + ", ".join(f"{count:,} {reason}" for reason, count in self.skipped.most_common())
        return line


def _by_domain(line: bytes, path: Path) -> dict[str, list] | None:
    """Returns the lists of a file that maps domains to lists; None for a file with another layout."""
    text = line.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text and not text.startswith(b"{"):
        return None
    if text:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict) and not (value and all(isinstance(each, list) for each in value.values())):
            return None  # JSON lines
    try:
        value = parse_json(read_bytes(path).decode("utf-8-sig"), str(path))
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except UserError:
        return None  # JSON lines with a damaged first line, or blank lines first
    if isinstance(value, list):
        return None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a JSON {type(value).__name__}; records of figures were expected")
    if "pair_id" in value:
        return None
    wrong = [name for name, rows in value.items() if not isinstance(rows, list)]
    if wrong:
        raise UserError(f"{path} is an object with the keys {some(list(map(repr, value)))}; records of figures, or an "
                        "object that maps domains to lists of them, were expected")
    return value


def _figure(row: Any, domain: str | None) -> Figure:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    identity = row.get("pair_id")
    if isinstance(identity, bool) or not isinstance(identity, (str, int)) or not str(identity).strip():
        raise ValueError("without pair_id")
    caption = row.get("fig_caption")
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("without caption")
    mentions = row.get("in_text_mention") or ()
    mentions = [mentions] if isinstance(mentions, (str, dict)) else mentions
    if not isinstance(mentions, (list, tuple)):
        raise ValueError("with mentions that are not a list")
    texts = [each.get("tokens") if isinstance(each, dict) else each for each in mentions]
    label, image = row.get("fig_label"), row.get("image") or f"{identity}.jpg"
    licence = row.get("licence", row.get("license"))
    if not isinstance(image, str):
        raise ValueError("with an image that is not a name")
    found = Figure(
        str(identity), label if isinstance(label, str) else "", caption,
        tuple(text for text in texts if isinstance(text, str) and text.strip()),
        domain if domain is not None else domain_of(row.get("domain")), row.get("domain"), image,
        licence if isinstance(licence, str) else None,
        row["result"] if isinstance(row.get("result"), str) else None,
    )  # fmt: skip
    try:
        "".join([found.pair_id, found.label, found.caption, *found.mentions, found.image]).encode()
    except UnicodeEncodeError:
        raise ValueError("with half a surrogate pair in a text") from None
    return found


def domain_of(value: Any) -> str:
    """Returns the name of a domain: a name, or the first true key of an object, in LLaVA-Med's order and then others'.

    Args:
      value: the `domain` of a record.
    """
    if isinstance(value, str) and value.strip():
        return value.strip()
    if isinstance(value, dict):
        names = [*(name for name in DOMAINS if name in value), *(name for name in value if name not in DOMAINS)]
        return next((name for name in names if value[name] is True), OTHER)
    return OTHER
