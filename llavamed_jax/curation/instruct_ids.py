"""The `custom_id`s of the requests to a batch service: the key of the question, and a hash.

The hash is of the run's settings and of how many requests had the question before, so each request has its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from llavamed_jax.curation.instruct_lines import lines_of
from llavamed_jax.utils.hashes import sha256

BATCH = "batch"  # the folder of the request files, in that of the run
_MARK = re.compile(r"(.*)-[0-9a-f]{8}")


def identity(key: str, settings: Mapping[str, object], number: int = 0) -> str:
    """Returns the `custom_id` of a request in a run of these settings; `number` requests had the question before."""
    content = json.dumps(dict(settings), sort_keys=True, default=str)
    return f"{key}-{sha256(f'{content} {number}' if number else content)[:8]}"


def key_of(name: str) -> str:
    """Returns the key of the question in a `custom_id`."""
    match = _MARK.fullmatch(name)
    return match[1] if match else name


def request_files(folder: Path) -> list[Path]:
    """Returns the request files of a run in order."""
    return sorted((folder / BATCH).glob("requests-*.jsonl"))


def ids_in(file: Path) -> Iterator[str | None]:
    """Yields the `custom_id` of each line of a request file; None for a damaged line."""
    for line in lines_of(file):
        name = line.get("custom_id") if isinstance(line, dict) else None
        yield name if isinstance(name, str) else None


def written_ids(folder: Path) -> dict[str, list[str]]:
    """Returns the `custom_id`s in the request files of a run, by the key of the question, each once."""
    found: dict[str, dict[str, None]] = {}
    for file in request_files(folder):
        for name in filter(None, ids_in(file)):
            found.setdefault(key_of(name), {})[name] = None
    return {key: list(names) for key, names in found.items()}
