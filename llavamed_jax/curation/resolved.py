"""Finds the files of articles in the bucket, and keeps in `resolved.jsonl` what was found, for later runs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor

from llavamed_jax.curation import articles, store
from llavamed_jax.curation.articles import WHOLE, Found, Missing
from llavamed_jax.curation.bucket import Bucket
from llavamed_jax.curation.downloads import AbsentError, DamagedError, FailedError, TooLargeError
from llavamed_jax.curation.fetch_lines import found_from, found_line, path_in_article
from llavamed_jax.utils import signals

Article = tuple[str, "int | None"]  # PMCn, and the version that is asked for


class Resolver:
    """Finds the files that stand for names.

    Args:
      bucket: the bucket.
      folder: the folder of the run.
      licences: the licences to take; None takes all.
    """

    def __init__(self, bucket: Bucket, folder: store.Store, licences: Collection[str] | None):
        self._bucket, self._folder, self._licences = bucket, folder, licences

    def before(self, wanted: Collection[Article]) -> dict[Article, dict]:
        """Returns what earlier runs learned about articles: name -> lines of its files."""
        known: dict[Article, dict] = {}
        for line in self._folder.lines(store.RESOLVED):
            article = line.get("pmcid"), line.get("asked_version")
            if article in wanted and isinstance(line.get("asked"), dict):
                known[article] = {**known.get(article, {}), **line["asked"]}
        return known

    def find(self, article: Article, names: Collection[str], known: dict) -> dict[str, list[Found] | Missing]:
        """Finds files of an article.

        Args:
          article: the article.
          names: names of files, or `WHOLE`.
          known: what `before` returned for the article; it is used if it has all names, and the bucket is not asked.

        Returns:
          The files for each name, or why there are none.
        """
        if all(name in known for name in names):
            return {name: [found_from(each, article[0]) for each in known[name]] for name in names}
        try:
            found = articles.resolve(self._bucket, *article, list(names), self._licences)
        except DamagedError as error:
            return dict.fromkeys(names, articles.unread(error))
        except (FailedError, TooLargeError, AbsentError) as error:
            return dict.fromkeys(names, Missing(articles.NOT_REACHED, str(error)))
        there = {name: [found_line(each) for each in what] for name, what in found.items() if isinstance(what, list)}
        line = {"pmcid": article[0], "asked_version": article[1], "asked": there}
        if WHOLE in there:  # a part whose name is no file name is refused when it is written
            line["paths"] = [path_in_article(each) for each in found[WHOLE]]
        if there:
            self._folder.append(store.RESOLVED, line)
        return found

    def choose(self, pmcids: Sequence[str], most: int, concurrency: int) -> list[str]:
        """Returns the first articles whose XML and images can be had, in order.

        Those that the server fails for are among them, since a later run may get them.

        Args:
          pmcids: the articles.
          most: how many.
          concurrency: threads.

        Raises:
          UserError: the server cannot be used.
          signals.Stopped: a signal came.
        """
        known, chosen = self.before({(pmcid, None) for pmcid in pmcids}), []
        threads = ThreadPoolExecutor(concurrency, thread_name_prefix="choose")
        try:
            for begin in range(0, len(pmcids), 2 * concurrency):
                some = pmcids[begin:begin + 2 * concurrency]
                look = lambda pmcid: self.find((pmcid, None), [WHOLE], known.get((pmcid, None), {}))[WHOLE]
                for pmcid, what in zip(some, threads.map(look, some), strict=True):
                    signals.check()
                    if isinstance(what, list) or what.is_temporary:
                        chosen.append(pmcid)
                if len(chosen) >= most:
                    break
        except BaseException:
            self._bucket.client.cancel()
            raise
        finally:
            threads.shutdown(wait=True, cancel_futures=True)
        return chosen[:most]
