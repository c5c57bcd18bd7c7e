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
from llavamed_jax.curation.articles import WHOLE, Found, Missing
from llavamed_jax.curation.bucket import Bucket, File
from llavamed_jax.curation.downloads import AbsentError, DamagedError, FailedError, TooLargeError, WebPageError
from llavamed_jax.curation.fetch_lines import missing_from, missing_line, part_of, path_in_article, path_of
from llavamed_jax.curation.mirror import Answer, Mirror
from llavamed_jax.curation.resolved import Article, Resolver
from llavamed_jax.curation.wanted import Rejected, Wanted
from llavamed_jax.errors import UserError
from llavamed_jax.images.load import load_image
from llavamed_jax.utils import progress, signals
from llavamed_jax.utils.hashes import sha256

MOST_FILE = 2**28  # bytes of an image or an XML file
_LARGE_IMAGE = 2**24  # pixels; one of these at a time is decoded
_WAIT_S = 0.2
_NOT_FILLED = (articles.NO_MEDIA, articles.EXCLUDED, articles.RETRACTED, articles.BAD_ROW,
               articles.NAME_TAKEN, articles.UNREAD)  # by a mirror


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
      resolver: finds files in the bucket.
      had: path below the folder -> bytes, of the list's files that are there.
      missing: row -> why it cannot be had.
      fetched: number of files that this run fetched.
      repeated: number of rows that repeat an earlier one.
    """

    def __init__(self, bucket: Bucket, folder: store.Store, mirrors: Sequence[Mirror] = (),
                 settings: Settings = Settings()):
        self._bucket, self._folder, self._mirrors, self._settings = bucket, folder, mirrors, settings
        self.resolver = Resolver(bucket, folder, settings.licences)
        self._lock, self._decoding = threading.Lock(), threading.Lock()
        self._there: dict[str, _There] = {}  # by path
        self._copies: dict[str, str] = {}  # md5 -> path, of articles that are not finished
        self._asked_mirrors: set[tuple] = set()  # place, article and name of what web mirrors lack
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
            self._folder.replace(store.MISSING, (missing_line(row, why) for row, why in self.missing.items()))

    def _plan(self, rows: Iterable[Wanted | Rejected]) -> dict[Article, list[Wanted]]:
        """Returns the rows of each article that are neither there nor known to be missing."""
        self._read_manifest()
        gone = {} if self._settings.retry_missing else {
            (line.get("pmcid"), line.get("asked"), line.get("name")): articles.as_now(missing_from(line),
                                                                                      self._settings.licences)
            for line in self._folder.lines(store.MISSING) if not missing_from(line).is_temporary}
        whole = {(line.get("pmcid"), line.get("asked_version")): line["paths"]
                 for line in self._folder.lines(store.RESOLVED) if isinstance(line.get("paths"), list)}
        self._asked_mirrors = set() if self._settings.retry_missing else {
            (line.get("mirror"), line.get("pmcid"), name) for line in self._folder.lines(store.MIRRORS)
            if isinstance(line.get("lacks"), list) for name in map(str, line["lacks"])}
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
                part_of(row, path) for path in whole.get((row.pmcid, row.version), ())]
            self.missing |= {part: why for part in (row, *parts)
                             if (why := gone.get((part.pmcid, part.file, part.name))) is not None}
            is_had = all(self._keep(path_of(part)) or part in self.missing for part in parts) and parts
            if is_had or row in self.missing:
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
        there = self._there.get(path_of(row)) if row.file != WHOLE else None
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
        known = {} if self._settings.retry_missing else self.resolver.before(todo)
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

    def _article(self, article: Article, rows: list[Wanted], known: dict) -> None:
        """Fetches the wanted files of one article; runs in a thread."""
        asked = [row for row in rows if row not in self.missing]
        copies: dict[str, str] = {}
        is_old = bool(asked) and all(row.file in known for row in asked)
        find = lambda rows, known: self.resolver.find(article, dict.fromkeys(row.file for row in rows), known)
        stale = self._fetch_all(asked, find(asked, known), copies, is_old)
        if stale:  # the article has changed since an earlier run read its metadata
            self._fetch_all(stale, find(stale, {}), copies, False)
        self._fill([row for row in rows if row in self.missing])

    def _fetch_all(self, rows: Sequence[Wanted], found: dict[str, list[Found] | Missing], copies: dict[str, str],
                   is_old: bool) -> list[Wanted]:
        """Fetches rows of an article; with `is_old`, returns those whose files are no longer as the metadata said."""
        stale = []
        for row in rows:
            what = found[row.file]
            for part, file in ([(row, None)] if isinstance(what, Missing)
                               else [(row, what[0])] if row.file != WHOLE
                               else [(part_of(row, path_in_article(each)), each) for each in what]):
                if file is None:
                    self._miss(row, what)
                elif part not in self.missing and path_of(part) not in self.had and not self._keep(path_of(part)):
                    if not self._fetch(part, file, copies, is_old):
                        stale.append(row)
                        break
        return stale

    def _fetch(self, row: Wanted, found: Found, copies: dict[str, str], is_old: bool) -> bool:
        """Fetches one file, and keeps it or says why it cannot be had.

        Args:
          row: the row, or the part of it.
          found: the file.
          copies: md5 -> path of the article's files that this run has written; this one is added.
          is_old: whether an earlier run read the metadata.

        Returns:
          False if the file is not as old metadata said; then nothing was kept or said.
        """
        why = ""
        try:
            try:
                data, is_there = self._data(path_of(row), found.file, copies)
            except (AbsentError, DamagedError) as error:
                if is_old and not isinstance(error, WebPageError):
                    return False
                raise
            self._accept(row, data, is_there, self._bucket.url(found.file.key), found)
            copies[found.file.md5] = path_of(row)
            return True
        except AbsentError as error:
            why = articles.NAME_GONE, error
        except DamagedError as error:
            why = articles.WEB_PAGE if isinstance(error, WebPageError) else articles.DAMAGED, error
        except TooLargeError as error:
            why = articles.TOO_LARGE, error
        except FailedError as error:
            why = articles.NOT_REACHED, error
        self._miss(row, Missing(why[0], f"{found.file.key}: {why[1]}", found.version.licence))
        return True

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
        path = path_of(row)
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
            self._folder.append(store.MISSING, missing_line(row, why))

    def _fill(self, rows: Sequence[Wanted]) -> None:
        """Asks the mirrors for what is missing, but not for what a licence or a retraction forbids, or may forbid."""
        rows = [row for row in rows if not self.missing[row].is_unread]
        failed: dict[Wanted, Missing] = {}
        for mirror in self._mirrors:
            left = [row for row in rows if row.file != WHOLE and row in self.missing
                    and self.missing[row].reason not in _NOT_FILLED
                    and (mirror.place, row.pmcid, row.file) not in self._asked_mirrors]
            answer = mirror.find(left, MOST_FILE) if left else Answer()
            failed |= {row: articles.joined(failed[row], why) if row in failed else why
                       for row, why in answer.failed.items()}
            for row, (data, source) in answer.found.items():
                self._fill_one(row, data, source)
            lacks = [row.file for row in left if row in self.missing
                     and not (row in answer.found and self.missing[row].is_temporary)
                     and (row not in answer.failed or not answer.failed[row].is_temporary)]
            if lacks and mirror.is_address:  # a folder may have been filled until the next run
                self._folder.append(store.MIRRORS, {"mirror": mirror.place, "pmcid": left[0].pmcid, "lacks": lacks})
        for row, why in failed.items():
            before = self.missing.get(row)
            if before is not None:
                self._miss(row, articles.joined(before, why))

    def _fill_one(self, row: Wanted, data: bytes, source: str) -> None:
        before = self.missing[row]
        licence = before.licence
        if self._settings.licences is not None and not licence:
            self._miss(row, Missing(articles.UNKNOWN_LICENCE, source))
            return
        try:
            self._accept(row, data, False, source, licence=licence)
        except DamagedError as error:
            why = Missing(articles.DAMAGED, f"{source}: {error}", licence)
            self._miss(row, articles.joined(before, why) if before.is_temporary else why)
        else:
            with self._lock:
                del self.missing[row]
