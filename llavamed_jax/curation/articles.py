"""Decides which file of which version of an article stands for a name in a list, or why none does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from llavamed_jax.curation import names
from llavamed_jax.curation.bucket import COMMERCIAL, NON_COMMERCIAL, Bucket, File, Version, licence_of
from llavamed_jax.curation.downloads import DamagedError, WebPageError

NO_PREFIX = "no prefix in the bucket"
NO_MEDIA = "licence without media"
EXCLUDED = "licence excluded by --licence"
UNKNOWN_LICENCE = "licence unknown, with --licence"
RETRACTED = "retracted"
NAME_GONE = "name gone"
DAMAGED = "damaged"
UNREAD = "metadata damaged"
TOO_LARGE = "too large"
BAD_ROW = "malformed row of the list"
NAME_TAKEN = "name taken by another row"
# Another run may get these.
MIRROR_FAILED = "mirror failed"
NOT_REACHED = "server failed"
WEB_PAGE = "web page in its place"  # of a login, or an error that is sent with the status 200

_OF_METADATA = ("the metadata ", "the server answered something else than a listing")  # how such details begin

WHOLE = "*"  # in place of a file's name: the XML and every image of an article


@dataclass(frozen=True)
class Found:
    """A file that stands for a name: the file, and the version that holds it."""

    file: File
    version: Version


@dataclass(frozen=True)
class Missing:
    """A name that cannot be had.

    Attributes:
      reason: one of the constants above.
      detail: what was seen.
      licence: the article's licence, if it is known and one that is taken.
    """

    reason: str
    detail: str = ""
    licence: str = ""

    @property
    def is_temporary(self) -> bool:
        """Whether another run may have more luck."""
        return self.reason in (NOT_REACHED, MIRROR_FAILED, WEB_PAGE)

    @property
    def is_unread(self) -> bool:
        """Whether the bucket may have the article, and did not tell its licence and whether it was retracted."""
        return self.reason == UNREAD or not self.licence and self.reason in (NOT_REACHED, WEB_PAGE)


def unread(error: DamagedError) -> Missing:
    """Returns why nothing is known of an article whose metadata is not what was asked for."""
    return Missing(WEB_PAGE if isinstance(error, WebPageError) else UNREAD, str(error))


def as_now(why: Missing, licences: Collection[str] | None) -> Missing:
    """Returns what a reason that an earlier version wrote is called now.

    `licence without media` also stood for articles of a CC licence for which the bucket has no media, and `damaged`
    also for damaged metadata.

    Args:
      why: the reason of a line.
      licences: the licences to take; None takes all.
    """
    if why.reason == DAMAGED and not why.licence and why.detail.startswith(_OF_METADATA):
        return Missing(UNREAD, why.detail)
    licence = why.detail.partition(", ")[2]
    if why.reason != NO_MEDIA or licence_of(licence) not in COMMERCIAL | NON_COMMERCIAL:
        return why
    if licences is not None and licence_of(licence) not in licences:
        return Missing(EXCLUDED, why.detail)
    return Missing(NAME_GONE, why.detail, licence)


def joined(before: Missing, why: Missing) -> Missing:
    """Joins why the bucket, or one mirror, lacks a name with why the next place does.

    What is temporary stays the reason, since another run may have more luck there; a failure, which ends the command
    with a status, goes before a web page.

    Args:
      before: the reason of the first place.
      why: the reason of the next one.
    """
    rank = lambda each: each.is_temporary + (each.reason in (NOT_REACHED, MIRROR_FAILED))
    first, then = (before, why) if rank(before) > rank(why) else (why, before)
    return Missing(first.reason, f"{first.detail} (elsewhere: {then.reason}{then.detail and ', '}{then.detail})",
                   before.licence)


def resolve(bucket: Bucket, pmcid: str, number: int | None, wanted: Sequence[str],
            licences: Collection[str] | None) -> dict[str, list[Found] | Missing]:
    """Finds each wanted file of an article: lists its versions, and reads their metadata from the newest on.

    A version that holds the very name is preferred, then the newest. Retracted versions and those with another licence
    are passed over. Older versions are not read once each name has its file. A name that no version has may be in one
    whose metadata cannot be read.

    Args:
      bucket: the bucket.
      pmcid: the article.
      number: the only version to look at, which needs no listing; None looks at all.
      wanted: names of files; `WHOLE` stands for the XML and every image of the newest version that has media.
      licences: the licences to take; None takes all.

    Returns:
      The files for each name, or why it cannot be had.

    Raises:
      DamagedError, FailedError: as `Bucket.version`.
    """
    damaged: list[DamagedError] = []
    numbers = bucket.numbers(pmcid) if number is None else [number]
    versions: list[Version] = []
    for each in numbers:
        problems: list[DamagedError] = []
        version = _read(bucket.version, pmcid, each, problems) or _read(bucket.within, pmcid, each, problems)
        if version is None:
            damaged += problems
            continue
        versions.append(version)
        chosen = _choose(versions, wanted, licences)
        if all(isinstance(found, list) and _is_best(name, found) for name, found in chosen.items()):
            return chosen
    if damaged and not versions:
        raise damaged[0]
    if not versions:
        detail = f"version {number}" if number is not None else "the versions have no metadata" if numbers else ""
        if number is not None:
            bucket.prove(pmcid)
        return {name: Missing(NO_PREFIX, detail) for name in wanted}
    chosen = _choose(versions, wanted, licences)
    return {name: unread(damaged[0]) if damaged and isinstance(found, Missing) and found.reason == NAME_GONE else found
            for name, found in chosen.items()}


def _read(read: Callable[[str, int], Version | None], pmcid: str, number: int,
          problems: list[DamagedError]) -> Version | None:
    try:
        return read(pmcid, number)
    except DamagedError as error:
        problems.append(error)
        return None


def _is_best(name: str, found: list[Found]) -> bool:
    """Returns whether no older version can be preferred."""
    return name == WHOLE or found[0].file.name == name


def _choose(versions: Sequence[Version], wanted: Sequence[str],
            licences: Collection[str] | None) -> dict[str, list[Found] | Missing]:
    newest_first = sorted(versions, key=lambda each: -each.number)
    usable = [each for each in newest_first if _why_not(each, licences) is None]
    return {name: (_whole(usable) if name == WHOLE else _one(usable, name)) or _missing(newest_first, name, licences)
            for name in wanted}


def _why_not(version: Version, licences: Collection[str] | None) -> str | None:
    if version.is_retracted:
        return RETRACTED
    licence = licence_of(version.licence)
    if not version.media and licence not in COMMERCIAL | NON_COMMERCIAL:
        return NO_MEDIA
    return None if licences is None or licence in licences else EXCLUDED


def _one(usable: Sequence[Version], name: str) -> list[Found]:
    best = None
    for version in usable:
        files = {each.name: each for each in version.media}
        found = names.match(name, files)
        if found is not None and (best is None or found[0] < best[0]):
            best = found[0], Found(files[found[1]], version)
    return [best[1]] if best else []


def _whole(usable: Sequence[Version]) -> list[Found]:
    for version in usable:
        images = [each for each in version.media if names.is_image(each.name)]
        if images and version.xml is not None:
            return [Found(each, version) for each in (version.xml, *_without_thumbnails(images))]
    return []


def _without_thumbnails(images: Sequence[File]) -> list[File]:
    """Leaves out the `.gif` of a figure that has a better file too."""
    best: dict[str, File] = {}
    for each in images:
        kept = best.get(names.stem(each.name))
        if kept is None or _rank(each) < _rank(kept):
            best[names.stem(each.name)] = each
    return list(best.values())


def _rank(file: File) -> int:
    return next(n for n, suffix in enumerate(names.IMAGE_SUFFIXES) if file.name.lower().endswith(suffix))


def _missing(newest_first: Sequence[Version], name: str, licences: Collection[str] | None) -> Missing:
    """Says why a name cannot be had: the reason of the newest version that holds it, else that of the article."""
    reasons = {each: _why_not(each, licences) for each in newest_first}
    for version, reason in reasons.items() if name != WHOLE else ():
        if reason is not None and names.match(name, [each.name for each in version.media]) is not None:
            return Missing(reason, f"version {version.number}, {version.licence}")
    usable = next((each for each, reason in reasons.items() if reason is None), None)
    if usable is not None:
        return Missing(NAME_GONE, "no XML or no image" if name == WHOLE else "", usable.licence)
    reason = next((each for each in (EXCLUDED, RETRACTED, NO_MEDIA) if each in reasons.values()), NO_MEDIA)
    version = next((each for each, why in reasons.items() if why == reason), newest_first[0])
    return Missing(reason, f"version {version.number}, {version.licence}")
