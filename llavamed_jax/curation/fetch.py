"""Fetches a list of figures from PubMed Central's bucket, article by article, in several threads."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import threading
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from PIL import Image

from llavamed_jax.curation import articles, store
from llavamed_jax.curation.articles import WHOLE, Found, Missing, resolve
from llavamed_jax.curation.bucket import Bucket, File, Version
from llavamed_jax.curation.downloads import AbsentError, DamagedError, FailedError, TooLargeError, WebPageError
from llavamed_jax.curation.mirror import Mirror
from llavamed_jax.curation.wanted import Rejected, Wanted
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image
from llavamed_jax.utils import progress, signals
from llavamed_jax.utils.hashes import sha256

MOST_FILE = 2**28  # bytes of an image or an XML file
_LARGE_IMAGE = 2**24  # pixels; one of these at a time is decoded
_WAIT_S = 0.2
_NOT_FILLED = (articles.NO_MEDIA, articles.EXCLUDED, articles.RETRACTED, articles.BAD_ROW,
               articles.NAME_TAKEN)  # by a mirror

Article = tuple[str, "int | None"]  # PMCn, and the version that is asked for


@dataclass(frozen=True)
class Settings:
    """How a list is fetched.

    Attributes:
      licences: the licences to take; None takes all.
      concurrency: threads.
      retry_missing: whether files that an earlier run could not get are tried again.
    """

    licences: Collection[str] | None = None
    concurrency: int = 16
    retry_missing: bool = False


@dataclass(frozen=True, slots=True)
class _There:
    """What the manifest says of a file: its article, the name that was asked for, its md5 and its size."""

    pmcid: str
    asked: str
    md5: str
    bytes: int


class Fetch:
    """The fetching of one list into one folder.

    Args:
      bucket: the bucket.
      folder: the folder.
      mirrors: where gaps are filled from, in this order.
      settings: how the list is fetched.

    Attributes:
      had: path below the folder -> bytes, of the list's files that are there.
      missing: row -> why it cannot be had.
      fetched: number of files that this run fetched.
      repeated: number of rows that repeat an earlier one.
    """

    def __init__(self, bucket: Bucket, folder: store.Store, mirrors: Sequence[Mirror] = (),
                 settings: Settings = Settings()):
        self._bucket, self._folder, self._mirrors, self._settings = bucket, folder, mirrors, settings
        self._lock, self._decoding = threading.Lock(), threading.Lock()
        self._there: dict[str, _There] = {}  # by path
        self._copies: dict[str, str] = {}  # md5 -> path, of articles that are not finished
        self.had: dict[str, int] = {}
        self.missing: dict[Wanted | Rejected, Missing] = {}
        self.fetched = self.repeated = 0

    def run(self, rows: Iterable[Wanted | Rejected]) -> None:
        """Fetches what is not there yet; afterwards `missing.jsonl` is whole.

        Args:
          rows: the list.

        Raises:
          UserError: the server cannot be used, or the disk refuses files.
          signals.Stopped: a signal came; everything that was fetched is kept.
        """
        todo = self._plan(rows)
        try:
            self._all(todo)
        finally:
            self._folder.replace(store.MISSING, (_missing_line(row, why) for row, why in self.missing.items()))

    def _plan(self, rows: Iterable[Wanted | Rejected]) -> dict[Article, list[Wanted]]:
        """Returns the rows of each article that are neither there nor known to be missing."""
        self._read_manifest()
        gone = {} if self._settings.retry_missing else {
            (line.get("pmcid"), line.get("asked"), line.get("name")): _missing_from(line)
            for line in self._folder.lines(store.MISSING) if not _missing_from(line).is_temporary}
        whole = {(line.get("pmcid"), line.get("asked_version")): line for line in self._folder.lines(store.RESOLVED)
                 if isinstance(line.get("paths"), list)}
        todo: dict[Article, list[Wanted]] = defaultdict(list)
        taken: dict[str, Wanted] = {}
        for row in rows:
            if isinstance(row, Rejected):
                self.missing[row] = Missing(articles.BAD_ROW)
                continue
            first = taken.setdefault(row.name or f"{row.pmcid}.{row.version}", row)
            owner = first if first is not row else self._owner(row)
            if owner is not row:
                if (owner.pmcid, owner.file) == (row.pmcid, row.file):
                    self.repeated += 1
                else:
                    self.missing[row] = Missing(articles.NAME_TAKEN, f"{owner.pmcid}/{owner.file}")
                continue
            parts = [row] if row.file != WHOLE else [
                _part(row, path) for path in whole.get((row.pmcid, row.version), {}).get("paths", ())]
            self.missing |= {part: why for part in (row, *parts)
                             if (why := gone.get((part.pmcid, part.file, part.name))) is not None}
            if all(self._keep(_path(part)) or part in self.missing for part in parts) and parts or row in self.missing:
                if not (self._mirrors and row in self.missing and self.missing[row].reason not in _NOT_FILLED):
                    continue
            todo[row.pmcid, row.version].append(row)
        unfinished = {pmcid for pmcid, _ in todo}
        self._copies = {each.md5: path for path, each in self._there.items() if each.pmcid in unfinished}
        return todo

    def _read_manifest(self) -> None:
        last: dict[str, int] = {}
        number = -1
        for number, line in enumerate(self._folder.lines(store.MANIFEST)):
            path, size = line.get("path"), line.get("bytes")
            if isinstance(path, str) and isinstance(size, int):
                self._there[path] = _There(*(str(line.get(key)) for key in ("pmcid", "asked", "md5")), size)
                last[path] = number
        if number >= len(last):  # a file was lost and fetched again
            lines = enumerate(list(self._folder.lines(store.MANIFEST)))
            self._folder.replace(store.MANIFEST, (line for n, line in lines if last.get(line.get("path")) == n))

    def _owner(self, row: Wanted) -> Wanted:
        """Returns the row of an earlier list that has the same name for another file; otherwise `row`."""
        there = self._there.get(_path(row)) if row.file != WHOLE else None
        if there is None or (there.pmcid, there.asked) == (row.pmcid, row.file):
            return row
        return dataclasses.replace(row, pmcid=there.pmcid, file=there.asked)

    def _keep(self, path: str) -> bool:
        """Counts a file that is there already; returns whether it is."""
        there = self._there.get(path)
        if there is None or self._folder.size(path) != there.bytes:
            return False
        with self._lock:
            self.had[path] = there.bytes
        return True

    def _all(self, todo: dict[Article, list[Wanted]]) -> None:
        """Runs the articles through the threads; at most twice as many as there are threads wait."""
        known = self._resolved_before(todo)
        client = self._bucket.client
        shown = progress.Amounts("articles", len(todo), lambda: client.bytes)
        waiting: set[Future] = set()
        pending = iter(todo.items())
        threads = ThreadPoolExecutor(self._settings.concurrency, thread_name_prefix="fetch")
        try:
            while True:
                for article, rows in itertools.islice(pending, 2 * self._settings.concurrency - len(waiting)):
                    waiting.add(threads.submit(self._article, article, rows, known.get(article, {})))
                if not waiting:
                    break
                done, waiting = wait(waiting, timeout=_WAIT_S, return_when=FIRST_COMPLETED)
                for each in done:
                    each.result()
                    shown.add()
                signals.check()
        except BaseException:
            client.cancel()
            raise
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
            shown.close()

    def _resolved_before(self, todo: dict[Article, list[Wanted]]) -> dict[Article, dict]:
        """Returns what earlier runs learned about the articles that are not finished."""
        known: dict[Article, dict] = {}
        for line in self._folder.lines(store.RESOLVED):
            article = line.get("pmcid"), line.get("asked_version")
            if article in todo and isinstance(line.get("asked"), dict):
                known[article] = {**known.get(article, {}), **line["asked"]}
        return known

    def _article(self, article: Article, rows: list[Wanted], known: dict) -> None:
        """Fetches the wanted files of one article; runs in a thread."""
        asked = [row for row in rows if row not in self.missing]
        copies: dict[str, str] = {}
        found = self._resolve(article, asked, known) if asked else {}
        for row in asked:
            what = found[row.file]
            for part, file in ([(row, None)] if isinstance(what, Missing)
                               else [(row, what[0])] if row.file != WHOLE
                               else [(_part(row, _path_in_article(each)), each) for each in what]):
                if file is None:
                    self._miss(row, what)
                elif part not in self.missing and not self._keep(_path(part)):
                    self._fetch(part, file, copies)
        self._fill([row for row in rows if row in self.missing])

    def _resolve(self, article: Article, rows: Sequence[Wanted], known: dict) -> dict[str, list[Found] | Missing]:
        wanted = list(dict.fromkeys(row.file for row in rows))
        if all(name in known for name in wanted):
            return {name: [_found_from(each, article[0]) for each in known[name]] for name in wanted}
        try:
            found = resolve(self._bucket, *article, wanted, self._settings.licences)
        except DamagedError as error:
            return dict.fromkeys(wanted, Missing(_reason(error), str(error)))
        except (FailedError, TooLargeError, AbsentError) as error:
            return dict.fromkeys(wanted, Missing(articles.NOT_REACHED, str(error)))
        there = {name: [_found_line(each) for each in what] for name, what in found.items() if isinstance(what, list)}
        line = {"pmcid": article[0], "asked_version": article[1], "asked": there}
        if WHOLE in there:  # a part whose name is no file name is refused when it is written
            line["paths"] = [_path_in_article(each) for each in found[WHOLE]]
        if there:
            self._folder.append(store.RESOLVED, line)
        return found

    def _fetch(self, row: Wanted, found: Found, copies: dict[str, str]) -> None:
        """Fetches one file, and keeps it or says why it cannot be had.

        Args:
          row: the row, or the part of it.
          found: the file.
          copies: md5 -> path of the article's files that this run has written; this one is added.
        """
        why = ""
        try:
            data, is_there = self._data(_path(row), found.file, copies)
            self._accept(row, data, is_there, self._bucket.url(found.file.key), found)
            copies[found.file.md5] = _path(row)
            return
        except AbsentError as error:
            why = articles.NAME_GONE, error
        except DamagedError as error:
            why = _reason(error), error
        except TooLargeError as error:
            why = articles.TOO_LARGE, error
        except FailedError as error:
            why = articles.NOT_REACHED, error
        self._miss(row, Missing(why[0], f"{found.file.key}: {why[1]}", found.version.licence))

    def _data(self, path: str, file: File, copies: dict[str, str]) -> tuple[bytes, bool]:
        """Returns the bytes of a file, and whether they lie at the path already.

        Bytes of the same md5 that are on the disk are used: a killed run leaves a file without a line, and two rows may
        name one file.
        """
        for place in (path, copies.get(file.md5), self._copies.get(file.md5)) if file.md5 else ():
            if place is not None and self._folder.size(place) is not None:
                data = (self._folder.out / place).read_bytes()
                if hashlib.md5(data, usedforsecurity=False).hexdigest() == file.md5:
                    return data, place == path
        return self._bucket.get(file, MOST_FILE), False

    def _accept(self, row: Wanted, data: bytes, is_there: bool, source: str, found: Found | None = None,
                licence: str = "") -> None:
        """Decodes a file, writes it, and then its line. Raises DamagedError if it is no image."""
        path = _path(row)
        width, height = (None, None) if path.endswith(".xml") else self._decoded(data)
        if not is_there:
            self._folder.put(path, data)
        line = {"path": path, "pmcid": row.pmcid, "asked": row.file,
                "version": found and found.version.number, "file": found.file.name if found else row.file,
                "licence": found.version.licence if found else licence or "unknown",
                "md5": hashlib.md5(data, usedforsecurity=False).hexdigest(), "sha256": sha256(data),
                "bytes": len(data), "width": width, "height": height, "source": source,
                **(found.version.about if found else {})}
        self._folder.append(store.MANIFEST, line)
        with self._lock:
            self.had[path] = len(data)
            self.fetched += 1

    def _decoded(self, data: bytes) -> tuple[int, int]:
        try:
            with Image.open(io.BytesIO(data)) as opened:
                is_large = opened.width * opened.height > _LARGE_IMAGE
        except Exception:  # whatever Pillow's readers raise; `load_image` says what is wrong
            is_large = False
        try:
            if not is_large:
                return load_image(data).size
            with self._decoding:
                return load_image(data).size
        except UserError as error:
            raise DamagedError(str(error)) from None

    def _miss(self, row: Wanted, why: Missing) -> None:
        with self._lock:
            self.missing[row] = why
        if not why.is_temporary:
            self._folder.append(store.MISSING, _missing_line(row, why))

    def _fill(self, rows: Sequence[Wanted]) -> None:
        """Asks the mirrors for what is missing, but not for what a licence or a retraction forbids."""
        for mirror in self._mirrors:
            left = [row for row in rows if row.file != WHOLE and row in self.missing
                    and self.missing[row].reason not in _NOT_FILLED]
            for row, (data, source) in mirror.find(left, MOST_FILE).items() if left else ():
                licence = self.missing[row].licence
                if self._settings.licences is not None and not licence:
                    self._miss(row, Missing(articles.UNKNOWN_LICENCE, source))
                    continue
                try:
                    self._accept(row, data, False, source, licence=licence)
                except DamagedError as error:
                    self._miss(row, Missing(articles.DAMAGED, f"{source}: {error}", licence))
                else:
                    with self._lock:
                        del self.missing[row]


def _reason(error: DamagedError) -> str:
    return articles.WEB_PAGE if isinstance(error, WebPageError) else articles.DAMAGED


def _path(row: Wanted) -> str:
    """Returns where a row's file goes, below the folder."""
    return row.name if row.name.startswith("articles/") else f"images/{row.name}"


def _part(row: Wanted, path: str) -> Wanted:
    """Returns the row for one file of a whole article."""
    return dataclasses.replace(row, file=path.split("/", 2)[2], name=path)


def _path_in_article(found: Found) -> str:
    return f"articles/{found.version.pmcid}.{found.version.number}/{found.file.name}"


def _found_line(found: Found) -> dict:
    version = found.version
    return {"file": dataclasses.astuple(found.file), "version": version.number, "licence": version.licence,
            "about": version.about}


def _found_from(line: dict, pmcid: str) -> Found:
    return Found(File(*line["file"]), Version(pmcid, line["version"], line["licence"], False, about=line["about"]))


def _missing_line(row: Wanted | Rejected, why: Missing) -> dict:
    if isinstance(row, Rejected):
        return {"row": row.number, "text": row.text, "reason": why.reason}
    return {"pmcid": row.pmcid, "asked_version": row.version, "asked": row.file, "name": row.name,
            **dataclasses.asdict(why)}


def _missing_from(line: dict) -> Missing:
    return Missing(*(str(line.get(field.name, "")) for field in dataclasses.fields(Missing)))
