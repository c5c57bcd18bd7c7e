"""Reads PubMed Central's bucket `pmc-oa-opendata`: versions of articles, their licences, and the keys of their files.

Layout since August 2026, as the bucket's README.txt says: one prefix `PMCn.v/` for each version of an article, with its
XML, text, PDF and media, and `metadata/PMCn.v.json`, whose `media_urls` are `s3://pmc-oa-opendata/KEY?md5=HEX`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import urllib.parse
from dataclasses import dataclass, field

from llavamed_jax.curation.downloads import (
    IN_A_ROW,
    AbsentError,
    Client,
    DamagedError,
    FailedError,
    ServerError,
    WebPageError,
    looks_like_html,
)
from llavamed_jax.curation.extra import needed
from llavamed_jax.curation.names import is_safe
from llavamed_jax.curation.xml_bounds import parse
from llavamed_jax.errors import UsageError, short

BASE_URL = "https://pmc-oa-opendata.s3.amazonaws.com/"
COMMERCIAL = frozenset({"CC0", "CC BY", "CC BY-SA", "CC BY-ND"})
NON_COMMERCIAL = frozenset({"CC BY-NC", "CC BY-NC-SA", "CC BY-NC-ND"})
GROUPS = {"commercial": COMMERCIAL, "non-commercial": NON_COMMERCIAL}
_MOST_METADATA = 2**25  # bytes; an article with 10,000 files has 1 MB
_MOST_PAGES = 100  # of a listing
_KEPT = ("pmid", "doi", "title", "citation")
_MD5 = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class File:
    """A file of an article version.

    Attributes:
      name: the name below the version's prefix.
      key: the object's key.
      md5: the hash of its bytes in hexadecimal; "" if the metadata gives none.
    """

    name: str
    key: str
    md5: str


@dataclass(frozen=True, eq=False)
class Version:
    """A version of an article.

    Attributes:
      pmcid: such as `PMC10009416`.
      number: from 1.
      licence: `license_code` as the metadata writes it, such as `CC BY`, or `TDM` (text mining only, no media).
      is_retracted: whether the article was retracted.
      media: images and supplements.
      xml: the article's JATS XML, if there is one.
      about: `pmid`, `doi`, `title` and `citation`, for the attribution that the licences ask for.
    """

    pmcid: str
    number: int
    licence: str
    is_retracted: bool
    media: tuple[File, ...] = ()
    xml: File | None = None
    about: dict = field(default_factory=dict)


def licence_of(code: str) -> str:
    """Returns a licence code without version and case: `cc by 4.0` -> `CC BY`."""
    code = re.sub(r"[\s_]+", " ", code.strip().upper())
    code = re.sub(r"^CC-(?=BY)", "CC ", re.sub(r" ?(\d+\.\d+|IGO|UNPORTED)$", "", code))
    return "CC0" if code in ("CC0", "CC 0", "CC-0") else code


def licences_of(text: str) -> frozenset[str] | None:
    """Returns the licences of groups in a text, `commercial,non-commercial`; None for `none`, which takes all.

    Raises:
      UsageError: the text names another group.
    """
    groups = text.split(",")
    if groups == ["none"]:
        return None
    if not all(group in GROUPS for group in groups):
        raise UsageError(f"--licence is {short(text)}; {', '.join(GROUPS)}, both with a comma, or none was expected")
    return frozenset().union(*(GROUPS[group] for group in groups))


class Bucket:
    """The bucket behind an HTTP address.

    Args:
      client: sends the requests.
      base: the address of the bucket's root.

    Attributes:
      client: the same.
    """

    def __init__(self, client: Client, base: str = BASE_URL):
        self.client, self._base = client, base.rstrip("/") + "/"
        self._lock, self._is_proven, self._num_absent = threading.Lock(), False, 0

    def url(self, key: str) -> str:
        """Returns the address of a key; blanks, `+`, `?`, `#` and letters beyond ASCII are quoted."""
        return self._base + urllib.parse.quote(key, safe="/")

    def version(self, pmcid: str, number: int) -> Version | None:
        """Reads the metadata of a version; returns None if there is no such version.

        Raises:
          DamagedError: the metadata is damaged, here and beside the version's files.
          FailedError: the server does not answer.
        """
        try:
            return self._metadata(f"metadata/{pmcid}.{number}.json", pmcid, number)
        except AbsentError:
            return None
        except DamagedError as error:
            found = self.within(pmcid, number)
            if found is None:
                raise error from None
            return found

    def within(self, pmcid: str, number: int) -> Version | None:
        """Reads the copy of the metadata beside a version's files; returns None if it is absent."""
        try:
            return self._metadata(f"{pmcid}.{number}/{pmcid}.{number}.json", pmcid, number)
        except AbsentError:
            return None

    def _metadata(self, key: str, pmcid: str, number: int) -> Version:
        found: list[Version] = []

        def check(body: bytes, _headers: dict) -> None:
            found.append(_read_metadata(body, pmcid, number))

        self.client.get(self.url(key), _MOST_METADATA, check)
        self._is_proven = True
        return found[-1]

    def numbers(self, pmcid: str) -> list[int]:
        """Lists the versions of an article, newest first; empty if the bucket has none."""
        prefixes = self.list(f"{pmcid}.", "CommonPrefixes/{*}Prefix")
        found = {int(match[1]) for each in prefixes
                 if (match := re.fullmatch(rf"{re.escape(pmcid)}\.([0-9]{{1,6}})/", each))}
        return sorted(found, reverse=True)

    def list(self, prefix: str, path: str) -> list[str]:
        """Lists keys below a prefix, up to the next `/`, over all pages of the listing.

        Args:
          prefix: the prefix.
          path: the texts to take from a page, such as `Contents/{*}Key` or `CommonPrefixes/{*}Prefix`.

        Raises:
          DamagedError, FailedError: the reply is no listing; a bucket answers with one that is empty, and not with 404.
          ServerError: many listings are absent, and none was ever had: the address is not that of a bucket.
        """
        needed("lxml.etree", "reads XML")
        found: list[str] = []
        token = None
        for _ in range(_MOST_PAGES):
            query = {"list-type": "2", "delimiter": "/", "prefix": prefix} | (
                {"continuation-token": token} if token else {})
            pages: list = []
            address = f"{self._base}?{urllib.parse.urlencode(query, quote_via=urllib.parse.quote)}"
            try:
                self.client.get(address, _MOST_METADATA, lambda body, _: pages.append(_read_listing(body)))  # noqa: B023
            except AbsentError as error:
                raise self._no_listing(address, error) from None
            self._is_proven = True
            found += [each.text or "" for each in pages[-1].iterfind("{*}" + path)]
            token = pages[-1].findtext("{*}NextContinuationToken")
            if not token:
                break
        return found

    def prove(self, pmcid: str) -> None:
        """Lists an article's versions if nothing was found before: at a wrong address every file is absent.

        Raises:
          DamagedError, FailedError, ServerError: as `list`.
        """
        if not self._is_proven:
            self.numbers(pmcid)

    def _no_listing(self, address: str, error: AbsentError) -> Exception:
        """Returns what to raise for a listing that is absent."""
        with self._lock:
            self._num_absent += 1
            is_over = self._num_absent >= IN_A_ROW and not self._is_proven
        if is_over:
            return ServerError(f"{self._base} answers each of {IN_A_ROW} listings with {error}; the address of a "
                               f"bucket, such as {BASE_URL}, was expected")
        return FailedError(f"{address}: {error}")

    def get(self, file: File, most: int) -> bytes:
        """Gets a file and verifies its md5; the `ETag` stands in where the metadata has none.

        A key that is not there is tried unquoted, in case the metadata quotes it.

        Raises:
          AbsentError, DamagedError, TooLargeError, FailedError: as `Client.get`.
        """
        def check(body: bytes, headers: dict) -> None:
            wanted = file.md5 or etag_md5(headers.get("etag", ""))
            if not wanted or hashlib.md5(body, usedforsecurity=False).hexdigest() == wanted:
                return
            if looks_like_html(body):
                raise WebPageError("the server answered HTML")
            raise DamagedError("the md5 is not that of the metadata")

        try:
            return self.client.get(self.url(file.key), most, check)
        except AbsentError:
            plain = urllib.parse.unquote(file.key)
            if plain == file.key:
                raise
            return self.client.get(self.url(plain), most, check)


def etag_md5(etag: str) -> str:
    """Returns the md5 in an `ETag`; "" for that of a file that was written in parts."""
    text = etag.strip().removeprefix("W/").strip('"').lower()
    return text if _MD5.fullmatch(text) else ""


def _read_listing(body: bytes):
    if looks_like_html(body):
        raise WebPageError("the server answered HTML in place of a listing")
    root = parse(body)
    if root is None or not root.tag.endswith("ListBucketResult"):
        raise DamagedError("the server answered something else than a listing")
    return root


def _read_metadata(body: bytes, pmcid: str, number: int) -> Version:
    """Reads a version's JSON. Raises DamagedError if it is not the metadata of this version."""
    if looks_like_html(body):
        raise WebPageError("the server answered HTML in place of metadata")
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise DamagedError("the metadata is not valid JSON") from None
    if not isinstance(found, dict) or str(found.get("pmcid")).upper() not in (pmcid, pmcid.removeprefix("PMC")):
        raise DamagedError(f"the metadata is not that of {pmcid}")
    if str(found.get("version", number)) != str(number):
        raise DamagedError(f"the metadata is that of version {cut_number(found.get('version'))}")
    prefix = f"{pmcid}.{number}/"
    urls = found.get("media_urls") or []
    media = [each for url in (urls if isinstance(urls, list) else []) if (each := _file(url, prefix)) is not None]
    return Version(pmcid, number, str(found.get("license_code") or "unknown"), _is_true(found.get("is_retracted")),
                   tuple(media), _file(found.get("xml_url"), prefix),
                   {key: found[key] for key in _KEPT if isinstance(found.get(key), (str, int))})


def cut_number(value: object) -> str:
    """Returns a value of unknown type as a short text."""
    return str(value)[:20]


def _is_true(value: object) -> bool:
    return value is True or str(value).strip().lower() in ("true", "yes", "1")


def _file(url: object, prefix: str) -> File | None:
    """Reads `s3://BUCKET/KEY?md5=HEX`, or the same over HTTPS; None if the key is not one of this version."""
    match = re.fullmatch(r"(?:s3|https?)://[^/]+/(.*?)(?:\?md5=([0-9A-Fa-f]{32}).*)?", str(url), re.DOTALL)
    if match is None:
        return None
    key, name = match[1], match[1].removeprefix(prefix)
    if name == key or not all(map(is_safe, name.split("/"))):
        return None
    return File(name, key, (match[2] or "").lower())
