"""Where a row's file goes, and what the lines of the folder's files say about a row."""

from __future__ import annotations

import dataclasses

from llavamed_jax.curation.articles import Found, Missing
from llavamed_jax.curation.bucket import File, Version
from llavamed_jax.curation.wanted import Rejected, Wanted


def path_of(row: Wanted) -> str:
    """Returns where a row's file goes, below the folder."""
    return row.name if row.name.startswith("articles/") else f"images/{row.name}"


def part_of(row: Wanted, path: str) -> Wanted:
    """Returns the row for one file of a whole article."""
    return dataclasses.replace(row, file=path.split("/", 2)[2], name=path)


def path_in_article(found: Found) -> str:
    """Returns where a file of a whole article goes, below the folder."""
    return f"articles/{found.version.pmcid}.{found.version.number}/{found.file.name}"


def found_line(found: Found) -> dict:
    """Returns a file that stands for a name, as JSON."""
    version = found.version
    return {"file": dataclasses.astuple(found.file), "version": version.number, "licence": version.licence,
            "about": version.about}


def found_from(line: dict, pmcid: str) -> Found:
    """Returns the file that `found_line` wrote."""
    return Found(File(*line["file"]), Version(pmcid, line["version"], line["licence"], False, about=line["about"]))


def missing_line(row: Wanted | Rejected, why: Missing) -> dict:
    """Returns the line of `missing.jsonl` for a row."""
    if isinstance(row, Rejected):
        return {"row": row.number, "text": row.text, "reason": why.reason}
    return {"pmcid": row.pmcid, "asked_version": row.version, "asked": row.file, "name": row.name,
            **dataclasses.asdict(why)}


def missing_from(line: dict) -> Missing:
    """Returns why a row is missing, from its line."""
    return Missing(*(str(line.get(field.name, "")) for field in dataclasses.fields(Missing)))
