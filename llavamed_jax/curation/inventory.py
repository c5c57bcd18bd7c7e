"""Picks articles by the date of their last change, from the inventory that the bucket publishes daily."""

from __future__ import annotations

import csv
import datetime
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator

from llavamed_jax.curation.bucket import Bucket, File
from llavamed_jax.curation.downloads import AbsentError, DamagedError, FailedError, TooLargeError
from llavamed_jax.errors import UserError
from llavamed_jax.utils import signals

_PREFIX = "inventory-reports/pmc-oa-opendata/metadata/"
_REPORT = re.compile(re.escape(_PREFIX) + r"([0-9]{4}-[0-9]{2}-[0-9]{2})T[0-9-]+Z/")
_KEY = re.compile(r"metadata/(PMC[0-9]{1,12})\.([0-9]{1,6})\.json")
_MOST_PART = 2**31  # bytes of a part of a report; parts are gzipped CSV
_MOST_MANIFEST = 2**25


def changed(bucket: Bucket, since: datetime.date | None, until: datetime.date | None) -> tuple[list[str], str]:
    """Lists the articles whose metadata changed within a span of days, the latest change first.

    A change of any file of an article changes its metadata, so a date is not that of publication. The report lags the
    bucket by a day or more.

    Args:
      bucket: the bucket.
      since: the first day; None for no bound.
      until: the last day; None for no bound.

    Returns:
      `PMCn` of each article, once, and the day of the report.

    Raises:
      UserError: the bucket has no report, or the newest one is damaged.
    """
    latest: dict[str, str] = {}
    first, last = since and since.isoformat(), until and until.isoformat()
    report = _newest(bucket)
    for pmcid, moment in _rows(bucket, report):
        day = moment[:10]
        if (first is None or day >= first) and (last is None or day <= last):
            latest[pmcid] = max(moment, latest.get(pmcid, ""))
    found = sorted(latest, key=lambda pmcid: (latest[pmcid], int(pmcid[3:])), reverse=True)
    return found, _REPORT.fullmatch(report)[1]


def _newest(bucket: Bucket) -> str:
    """Returns the prefix of the newest report."""
    try:
        reports = [each for each in bucket.list(_PREFIX, "CommonPrefixes/{*}Prefix") if _REPORT.fullmatch(each)]
    except (DamagedError, FailedError, TooLargeError) as error:
        raise UserError(f"the inventory {bucket.url(_PREFIX)} cannot be listed: {error}") from None
    if not reports:
        raise UserError(f"{bucket.url(_PREFIX)} holds no report of the inventory; the name of a day was expected below "
                        "it")
    return max(reports)


def _rows(bucket: Bucket, report: str) -> Iterator[tuple[str, str]]:
    """Yields article and time of change of each version in a report."""
    key = f"{report}manifest.json"
    try:
        manifest = json.loads(bucket.get(File(key, key, ""), _MOST_MANIFEST))
        for part in manifest["files"]:
            body = bucket.get(File(part["key"], part["key"], str(part.get("MD5checksum", "")).lower()), _MOST_PART)
            with gzip.open(io.BytesIO(body), "rt", encoding="utf-8", newline="") as lines:
                for row in csv.reader(lines):
                    match = _KEY.fullmatch(row[1])
                    if match:
                        yield match[1], row[2]
            signals.check()
    except (AbsentError, DamagedError, FailedError, TooLargeError) as error:
        raise UserError(f"the inventory {bucket.url(key)} cannot be read: {error}") from None
    except (KeyError, TypeError, ValueError, IndexError, EOFError, OSError, zlib.error, csv.Error) as error:
        raise UserError(f"the inventory {bucket.url(key)} is damaged: {type(error).__name__}: {error}") from None
