"""`curation figures`: records of figures in LLaVA-Med's format, from articles or from published sets."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from llavamed_jax.curation import names
from llavamed_jax.curation.bucket import licence_of, licences_of
from llavamed_jax.curation.domain_answers import read_domains
from llavamed_jax.curation.domains import domains_of
from llavamed_jax.curation.extra import needed
from llavamed_jax.curation.sources import SOURCES, Found, Refused, layout_of
from llavamed_jax.errors import UsageError, count_of, short
from llavamed_jax.utils import signals
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import to_jsonl

_SUFFIXES = ((b"\xff\xd8\xff", ".jpg"), (b"\x89PNG", ".png"), (b"GIF8", ".gif"), (b"II*\0", ".tif"), (b"MM\0*", ".tif"),
             (b"BM", ".bmp"))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of the command."""
    add = parser.add_argument
    add("--source", metavar="DIR", required=True, help="articles of `curation pmc`, or a published set")
    add("--out", metavar="DIR", required=True, help="a new directory: figures.jsonl, images/, dropped.jsonl")
    add("--layout", metavar="NAME", choices=tuple(SOURCES),
        help=f"{', '.join(SOURCES)}; default: what DIR looks like")
    add("--licence", metavar="GROUPS", default="none", help="commercial, non-commercial, or both with a comma; none "
        "(the default) takes every licence")
    add("--domains", metavar="FILE", help="JSON lines {pair_id, domain}, such as a model's answers, that replace the "
        "domains of the caption's words")
    add("--without_images", action="store_true", help="writes the records of figures without their images too, and "
        "copies no images")


def run(args: argparse.Namespace) -> None:
    """Writes the records and the images, and prints the counts."""
    source, licences = Path(args.source), licences_of(args.licence)
    if not source.is_dir():
        raise UsageError(f"--source is {short(args.source)}; a directory was expected")
    domains = read_domains(Path(args.domains)) if args.domains else {}
    layout = args.layout or layout_of(source)
    if layout is None:
        raise UsageError(f"--source {source} holds no figures; XML files of articles, or one of the layouts "
                         f"{', '.join(SOURCES)} was expected")
    if layout == "jats":
        needed("lxml.etree", "reads XML")
    signals.enter(signals.Phase(f"stopped by {{name}}; {args.out} was not written", raises=True, grace=20))
    with new_directory(args.out) as out:
        writer = _Writer(out, licences, args.without_images, domains)
        for item in SOURCES[layout](source):
            signals.check()
            writer.add(item)
        writer.close()
    print(f"{args.out}: {writer.kept:,} figures of {source} ({layout})")
    if args.domains:
        other = writer.kept - writer.stated
        others = count_of(other, "other figure has those of its", "other figures have those of their")
        print(f"  domains of {args.domains}: {writer.stated:,} of {len(domains):,} used; {others} caption's words")
    for line in writer.summary():
        print(f"  {line}")
    if not writer.kept:
        print(f"warning: {args.out} holds no figure", file=sys.stderr)


class _Writer:
    """Writes records, images and what is dropped.

    Args:
      out: the directory.
      licences: the licences to take; None takes all.
      is_text_only: whether images are not needed and not copied.
      domains: pair_id -> domains that replace those of the words.

    Attributes:
      kept: number of records.
      stated: number of records whose domains are those of `domains`.
    """

    def __init__(self, out: Path, licences: Collection[str] | None, is_text_only: bool,
                 domains: Mapping[str, dict[str, bool]]):
        self._out, self._licences, self._is_text_only, self._domains = out, licences, is_text_only, domains
        self._names: set[str] = set()
        self._counts = {name: Counter() for name in ("dropped", "domain", "licence")}
        self.kept = self.stated = self._mentioned = 0
        (out / "images").mkdir()
        self._figures = open(out / "figures.jsonl", "w", encoding="utf-8", errors="backslashreplace")
        self._dropped = open(out / "dropped.jsonl", "w", encoding="utf-8", errors="backslashreplace")

    def close(self) -> None:
        """Closes the files."""
        self._figures.close()
        self._dropped.close()

    def add(self, item: Found | Refused) -> None:
        """Writes a figure, or why it is dropped."""
        if isinstance(item, Refused):
            self._drop(item.name, item.reason)
            return
        record = item.record
        name = str(record["pair_id"])
        record["pair_id"] = pair_id = re.sub(r"[^\w.+=@-]+", "-", name).strip(".-")[:150]
        is_allowed = self._licences is None or licence_of(record["licence"]) in self._licences
        reason = ("licence excluded by --licence" if not is_allowed
                  else "no caption" if not record["fig_caption"]
                  else "no image file" if item.image is None and not self._is_text_only
                  else "pair_id repeated" if pair_id in self._names
                  else "pair_id not usable" if not pair_id or not names.is_safe(pair_id) else None)
        image, head = item.image, b""
        if reason is None and image is not None:
            try:
                head = image[:16] if isinstance(image, bytes) else _head(image)
            except OSError:
                image, reason = None, None if self._is_text_only else "image file that cannot be read"
        if reason is not None:
            self._drop(name, reason)
            return
        self._names.add(pair_id)
        stated = self._domains.get(pair_id, self._domains.get(name))
        self.stated += stated is not None
        record["domain"] = domains_of(record["fig_caption"]) if stated is None else stated
        record["image"] = self._image(image, head, pair_id)
        self._figures.write(to_jsonl([record]))
        self.kept += 1
        self._mentioned += bool(record["in_text_mention"])
        self._counts["licence"][record["licence"]] += 1
        self._counts["domain"].update([key for key, is_in in record["domain"].items() if is_in] or ["other"])

    def _drop(self, name: str, reason: str) -> None:
        self._counts["dropped"][reason] += 1
        self._dropped.write(json.dumps({"figure": name, "reason": reason}, ensure_ascii=False) + "\n")

    def _image(self, image: bytes | Path | None, head: bytes, pair_id: str) -> str:
        """Writes or links the image; returns its name, `PAIR_ID` with the suffix of its format."""
        if image is None:
            return f"{pair_id}.jpg"
        given = "" if isinstance(image, bytes) else image.suffix.lower()
        name = pair_id + next((suffix for magic, suffix in _SUFFIXES if head.startswith(magic)), given or ".jpg")
        if self._is_text_only:
            return name
        target = self._out / "images" / name
        if isinstance(image, bytes):
            target.write_bytes(image)
        else:
            with contextlib.suppress(OSError):
                os.link(image.resolve(), target)
                return name
            shutil.copyfile(image, target)
        return name

    def summary(self) -> list[str]:
        """Returns the lines that are printed: mentions, domains, licences, and what was dropped by reason."""
        lines = [f"mentioned in the text: {self._mentioned:,}"]
        for title in ("domain", "licence", "dropped"):
            found = ", ".join(f"{name} {count:,}" for name, count in self._counts[title].most_common())
            lines += [f"{title}: {found}"] if found else []
        return lines


def _head(path: Path) -> bytes:
    """Returns the first bytes of a file. Raises OSError if it cannot be read, or is no file."""
    if not path.is_file():  # a pipe would wait for a writer
        raise OSError
    with open(path, "rb") as file:
        return file.read(16)
