"""Reads domains of figures that somebody else has decided, such as a model that was asked about each caption.

A line is `{"pair_id": "123_F1", "domain": "ct_scan"}`. `domain` may also be a list of names, or an object of booleans;
`other`, an empty list or an object of only false means none of the domains.
"""

from __future__ import annotations

import json
from pathlib import Path

from llavamed_jax.datasets.qa50 import DOMAINS
from llavamed_jax.errors import UserError, short
from llavamed_jax.utils.files import open_file

OTHER = "other"


def read_domains(path: Path) -> dict[str, dict[str, bool]]:
    """Returns the domains of each `pair_id`, all five of them; of a `pair_id` that is repeated, the last line counts.

    Raises:
      UserError: the file cannot be read, or a line has another form.
    """
    found: dict[str, dict[str, bool]] = {}
    try:
        with open_file(path, f"the file of domains {path}") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    pair_id, domains = _row(line, f"line {number} of {path}")
                    found[pair_id] = domains
    except FileNotFoundError:
        raise UserError(f"the file of domains {path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    return found


def _row(line: bytes, name: str) -> tuple[str, dict[str, bool]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise UserError(f"{name} is not valid JSON; an object with pair_id and domain was expected") from None
    pair_id = row.get("pair_id") if isinstance(row, dict) else None
    if isinstance(pair_id, bool) or not isinstance(pair_id, (str, int)) or pair_id == "":
        raise UserError(f"{name} is {short(row)}; an object with pair_id and domain was expected")
    domain = row.get("domain")
    names = [domain] if isinstance(domain, str) else domain
    if isinstance(domain, dict) and all(type(value) is bool for value in domain.values()):
        names = [key for key, is_in in domain.items() if is_in] if set(domain) <= {*DOMAINS, OTHER} else None
    if not isinstance(names, list) or any(each not in (*DOMAINS, OTHER) for each in names):
        raise UserError(f"{name} has the domain {short(domain)}; {', '.join(DOMAINS)} or {OTHER}, a list of them, or "
                        "an object of booleans was expected")
    return str(pair_id), {each: each in names for each in DOMAINS}
