"""Reads figures with captions from articles and from published sets, one at a time.

- `jats`: folders with an article's XML and its images, such as those that `curation pmc` fetches;
- `biomedica`: BIOMEDICA's webdataset shards, tars of `KEY.jpg`, `KEY.txt` (caption) and `KEY.json`;
- `medicat`: MedICaT, `release/*.jsonl` and `figures/{pdf_hash}_{fig_uri}`;
- `rocov2`: ROCOv2, `{split}_captions.csv`, `{split}_images/ID.jpg` and `license_information.csv`.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavamed_jax.curation import names, tar_shard
from llavamed_jax.curation.jats import Article, Figure, read_articles
from llavamed_jax.curation.jats_licence import strictest
from llavamed_jax.curation.xml_bounds import MOST_XML
from llavamed_jax.errors import UserError
from llavamed_jax.utils import tables
from llavamed_jax.utils.files import open_file, read_bytes

UNREADABLE = "file that cannot be read"


@dataclass
class Found:
    """A figure: its record without `pair_id`'s spelling, and its image as bytes, as a path, or missing."""

    record: dict[str, Any]
    image: bytes | Path | None


@dataclass
class Refused:
    """Something that is no figure: what it is and the reason."""

    name: str
    reason: str


Item = Found | Refused


def layout_of(folder: Path) -> str | None:
    """Returns the layout that a folder looks like; None if it looks like none."""
    if any(folder.glob("*_captions.csv")):
        return "rocov2"
    if any(True for each in _walk(folder) if each.suffix == ".tar"):
        return "biomedica"
    if any(folder.glob("*.jsonl")) and _is_medicat(next(folder.glob("*.jsonl"))) or any(folder.glob("release/*.jsonl")):
        return "medicat"
    return "jats" if any(True for each in _walk(folder) if each.suffix in (".xml", ".nxml")) else None


def _is_medicat(file: Path) -> bool:
    try:
        with open_file(file) as opened:
            return b'"pdf_hash"' in opened.readline(2**20)
    except (OSError, UserError):
        return False


def _walk(folder: Path, refused: list[Refused] | None = None) -> Iterator[Path]:
    """Yields the files below a folder in a fixed order; appends the folders that cannot be read to `refused`."""
    note = None if refused is None else lambda error: refused.append(
        Refused(str(error.filename), "folder that cannot be read"))
    for place, folders, files in os.walk(folder, onerror=note):
        folders.sort()
        for name in sorted(files):
            yield Path(place) / name


def read_jats(folder: Path) -> Iterator[Item]:
    """Yields the figures of every XML file below a folder; images lie beside the XML."""
    licences, refused, place = _licences(folder), [], None
    for file in _walk(folder, refused):
        if file.suffix not in (".xml", ".nxml"):
            continue
        try:
            size = file.stat().st_size
            if not file.is_file():  # a pipe would wait for a writer
                raise OSError
            articles = read_articles(file.read_bytes()) if size <= MOST_XML else None
            if place != file.parent:
                place = file.parent
                there = {each.name: each for each in place.iterdir() if names.is_image(each.name)}
        except OSError:
            yield Refused(str(file), UNREADABLE)
            continue
        if not articles:
            yield Refused(str(file), "XML larger than 100 MB" if size > MOST_XML else
                          "damaged XML" if articles is None else "XML without an article")
            continue
        for article in articles:
            yield from _figures(file, article, there, licences)
    yield from refused


def _figures(file: Path, article: Article, there: dict[str, Path], licences: dict[str, str]) -> Iterator[Item]:
    folder = re.fullmatch(r"(PMC\d+)(?:\.\d+)?", file.parent.name)
    pmcid = article.pmcid or (folder[1] if folder else "") or file.stem
    licence = licences.get(file.parent.name) or _beside(file) or article.licence
    for figure in article.figures:
        if not figure.graphics:
            yield Refused(f"{file} {figure.id}", "figure without an image")
        for part, choices in enumerate(figure.graphics, start=1):
            found = next(filter(None, (names.match(each, there) for each in choices)), None)
            image = there[found[1]] if found is not None else None
            record = _record(figure, f"{article.pmid or pmcid}_{figure.id}" + (f"_{part}" if part > 1 else ""),
                             strictest([licence, figure.licence]) if figure.licence else licence)
            record |= {"pmid": article.pmid, "pmcid": pmcid, "doi": article.doi, "graphic_ref": choices[0]}
            yield Found(record, image)


def _record(figure: Figure, pair_id: str, licence: str) -> dict[str, Any]:
    mentions = [{"tokens": each.sentence, "entities": []} | ({"panels": list(each.panels)} if each.panels else {})
                for each in figure.mentions]
    return {"pair_id": pair_id, "fig_id": figure.id, "fig_label": figure.label, "fig_caption": figure.caption,
            "in_text_mention": mentions or None, "panels": figure.panels, "licence": licence}


def _licences(folder: Path) -> dict[str, str]:
    """Returns PMCn.v -> licence from the manifest of `curation pmc`, in the folder or above it."""
    found: dict[str, str] = {}
    for place in (folder, folder.parent):
        file = place / "manifest.jsonl"
        if file.is_file():
            with contextlib.suppress(OSError), open(file, "rb") as lines:
                for line in lines:
                    try:
                        row = json.loads(line)
                        found[row["path"].split("/")[1]] = row["licence"]
                    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
                        continue
            break
    return found


def _beside(file: Path) -> str:
    """Returns the licence in the metadata that the bucket keeps beside an article's XML; "" without it."""
    try:
        found = json.loads(file.with_suffix(".json").read_text(encoding="utf-8"))
        return str(found.get("license_code") or "")
    except (OSError, ValueError, AttributeError, RecursionError):
        return ""


def read_biomedica(folder: Path) -> Iterator[Item]:
    """Yields the samples of every shard below a folder."""
    refused: list[Refused] = []
    for shard in _walk(folder, refused):
        if shard.suffix == ".tar":
            yield from _shard(shard)
    yield from refused


def _shard(shard: Path) -> Iterator[Item]:
    key, parts, is_empty = "", {}, True
    try:
        for name, data in tar_shard.files(shard):
            stem, _, suffix = name.rpartition(".")
            if stem != key and parts:
                yield _sample(shard, key, parts)
                parts = {}
            key, is_empty = stem, False
            if data is not None:
                parts[suffix.lower()] = data
    except (OSError, UserError):
        yield Refused(str(shard), UNREADABLE)
    except tar_shard.ShardError as error:
        if {"txt", "json"} <= parts.keys() and _image_of(parts) is not None:
            yield _sample(shard, key, parts)
        elif parts:  # without its JSON it would have no licence
            yield Refused(f"{shard} {key}", "sample cut off in a damaged shard")
        yield Refused(f"{shard} byte {error.place}", f"damaged shard: {error}")
    else:
        if parts:
            yield _sample(shard, key, parts)
        if is_empty:
            yield Refused(str(shard), "shard without a sample")


def _image_of(parts: dict[str, bytes]) -> bytes | None:
    return next((parts[suffix] for suffix in ("jpg", "jpeg", "png") if suffix in parts), None)


def _sample(shard: Path, key: str, parts: dict[str, bytes]) -> Item:
    try:
        about = json.loads(parts.get("json", b"{}"))
    except (ValueError, RecursionError):
        about = None
    if not isinstance(about, dict):
        return Refused(f"{shard} {key}", "damaged JSON")
    article = about.get("article_metadata") if isinstance(about.get("article_metadata"), dict) else about
    get = lambda *names: next((str(found) for name in names for found in (article.get(name, about.get(name)),)
                               if isinstance(found, (str, int)) and str(found)), "")
    try:
        caption = parts["txt"].decode("utf-8") if "txt" in parts else get("caption")
    except UnicodeDecodeError:
        return Refused(f"{shard} {key}", "caption that is not UTF-8 text")
    record = {"pair_id": key.rpartition("/")[2], "fig_id": get("image_id", "image_file_name"), "fig_label": "",
              "fig_caption": caption.strip(), "in_text_mention": None, "panels": [],
              "licence": get("article_license", "license", "licence") or "unknown",
              "pmid": get("pmid", "article_accession_pmid"), "pmcid": get("article_accession_id", "pmcid")}
    return Found(record, _image_of(parts))


def read_medicat(folder: Path) -> Iterator[Item]:
    """Yields the figures of MedICaT."""
    images = next((each for each in (folder / "figures", folder / "release" / "figures", folder / "images")
                   if each.is_dir()), folder)
    for file in sorted({*folder.glob("*.jsonl"), *folder.glob("release/*.jsonl")}):
        try:
            with open_file(file) as lines:
                for number, line in enumerate(lines, start=1):
                    yield _medicat_row(line, f"{file} line {number}", images)
        except (OSError, UserError):
            yield Refused(str(file), UNREADABLE)


def _medicat_row(line: bytes, name: str, images: Path) -> Item:
    try:
        row = _object(line.decode("utf-8"))
    except UnicodeDecodeError:
        return Refused(name, "line that is not UTF-8 text")
    if row is None or not isinstance(row.get("pdf_hash"), str) or not isinstance(row.get("fig_uri"), str):
        return Refused(name, "damaged line")
    info = row.get("oa_info") if isinstance(row.get("oa_info"), dict) else {}
    oa = info.get("oa") if isinstance(info.get("oa"), dict) else info
    label = str(row.get("fig_key") or "")
    references = row.get("s2orc_references")
    references = references if isinstance(references, list) else []
    texts = [text for each in references if (text := _reference(each))]
    name = f"{row['pdf_hash']}_{row['fig_uri']}"
    record = {"pair_id": names.stem(name), "fig_id": row["fig_uri"], "fig_label": label,
              "fig_caption": str(row.get("s2_caption") or row.get("s2orc_caption") or "").strip(),
              "in_text_mention": [{"tokens": text, "entities": []} for text in texts] or None, "panels": [],
              "licence": str(oa.get("license") or "unknown")}
    image = images / name
    return Found(record, image if names.is_safe(name) and image.is_file() else None)


def _reference(found: object) -> str:
    text = found.get("text") if isinstance(found, dict) else found
    return text.strip() if isinstance(text, str) else ""


def _object(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def read_rocov2(folder: Path) -> Iterator[Item]:
    """Yields the figures of ROCOv2."""
    licences: dict[str, str] = {}
    for file in sorted(folder.glob("license_information*.csv")):
        for row in _table(file):
            if isinstance(row, Refused):
                yield row
            else:
                licences[row.cells[0]] = row.cells[-1]
    for file in sorted(folder.glob("*_captions.csv")):
        images, is_first = folder / f"{file.name.removesuffix('_captions.csv')}_images", True
        for row in _table(file):
            if isinstance(row, Refused):
                yield row
                continue
            name, caption = row.cells[:2]
            is_safe = names.is_safe(name)
            places = [images / f"{name}{suffix}" for suffix in (".jpg", ".png", ".jpeg")] if is_safe else []
            image = next((each for each in places if each.is_file()), None)
            is_header = is_first and image is None and not re.search(r"\d", name)  # every id has a number
            is_first = False
            if is_header:
                continue
            if not is_safe or row.is_doubtful and image is None:
                yield Refused(f"{file} line {row.number}", "row inside an unclosed quote" if is_safe else "damaged row")
                continue
            record = {"pair_id": name, "fig_id": name, "fig_label": "", "fig_caption": caption.strip(),
                      "in_text_mention": None, "panels": [], "licence": licences.get(name, "unknown")}
            yield Found(record, image)


def _table(file: Path) -> Iterator[tables.Line | Refused]:
    """Yields the rows of a CSV file that have two cells or more; what cannot be used is refused by its line."""
    try:
        text = read_bytes(file).decode("utf-8-sig", "surrogateescape")
    except (OSError, UserError):
        yield Refused(str(file), UNREADABLE)
        return
    for row in tables.read(text):
        if row.cells is None or len(row.cells) < 2:
            yield Refused(f"{file} line {row.number}", "damaged row")
        elif re.search(r"[\0\ud800-\udfff]", "".join(row.cells)):
            yield Refused(f"{file} line {row.number}", "row that is not UTF-8 text")
        else:
            yield row


SOURCES: dict[str, Callable[[Path], Iterator[Item]]] = {
    "jats": read_jats, "biomedica": read_biomedica, "medicat": read_medicat, "rocov2": read_rocov2}
