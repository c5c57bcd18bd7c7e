"""Reads the licence of an article or of a figure from its JATS `permissions`: addresses, attributes and words.

The most restrictive reading wins. A licence that allows less in one place than in another is the lesser one; if one of
several `license` elements is none of Creative Commons, or a figure was reused with somebody's permission, the licence
is unknown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from llavamed_jax.curation.bucket import COMMERCIAL, NON_COMMERCIAL, licence_of
from llavamed_jax.curation.jats_owner import (
    is_by_permission,
    is_from_elsewhere,
    is_of,
    owner_in,
    owners_in,
    states_copyright,
)
from llavamed_jax.curation.prose import local, sentences, text_of

UNKNOWN = "unknown"
_TEXTS = ("caption", "p", "fn")  # of a figure
_OF_OWNERS = ("permissions", "attrib", "copyright-statement", "copyright-holder")
_NOT_OF_FIGURE = ("fig", "fig-group", "figgrp", "table-wrap", "supplementary-material", "alt-text", "long-desc",
                  "object-id", "tex-math", "math", "article", "sub-article", "response")
_HREF = "{http://www.w3.org/1999/xlink}href"
_ADDRESS = re.compile(r"creativecommons\.org/+(licen[cs]es|publicdomain)/+([a-z+-]+)", re.IGNORECASE)
_CODE = re.compile(r"\bCC[\s_-]*BY((?:[\s\-\u2010-\u2015]*(?:NC|ND|SA)\b)*)", re.IGNORECASE)
_NAME = re.compile(r"creative\s+commons[\s:,(\u201c\"']*attribution", re.IGNORECASE)
_ZERO = re.compile(r"\bCC\s?-?(?:0|zero)\b|creative\s+commons\s+(?:zero|(?:cc0\s+)?public\s+domain\s+dedication)",
                   re.IGNORECASE)
_FEW = r"\W+(?:\w+\W+){0,4}?"
_BOTH = re.compile(r"(?:non-?\s?)?commercial(?:ly)?\s*(?:and|or|/|as well as)\s*(?:non-?\s?)?commercial(?:ly)?",
                   re.IGNORECASE)
_NOT_COMMERCIAL = re.compile(
    r"non[\s\-\u2010-\u2015]?commercial|(?:except|excluding|excludes?|other\s+than|without|prohibit\w*|forbid\w*)"
    r"(?:\s+(?:for|any|all|the|its|of)){0,2}\s+commercial|\bno\s+(?:\w+\s+)?commercial"
    rf"|\bnot\b{_FEW}commercial"
    rf"|\bcommercial\b(?:\s+\w+){{0,3}}{_FEW}(?:not|prohibited|forbidden|excluded|requires?|only\s+with)\b",
    re.IGNORECASE)
_NO_CHANGE = re.compile(
    r"no[\s\-\u2010-\u2015]?deriv|(?:no|without)\s+(?:any\s+)?(?:modif|alter|adapt|change)|unmodified|unaltered"
    rf"|\bnot\b{_FEW}(?:altered|modified|transformed|adapted|changed|build\s+upon|built\s+upon|derivative)"
    rf"|\bnot\b{_FEW}share\s+adapted", re.IGNORECASE)
_ALIKE = re.compile(r"share[\s\-\u2010-\u2015]?alike|\b(?:same|identical)\s+licen[cs]", re.IGNORECASE)
_NEGATED = re.compile(rf"\bnot\b{_FEW}(?:licen[cs]ed|distributed|available|published|covered){_FEW}", re.IGNORECASE)


def strictest(codes: Iterable[str]) -> str:
    """Returns the licence that allows only what all of some licences allow; `unknown` if one of them is no CC licence.

    Args:
      codes: such as `CC BY`, `cc by-nc 4.0`; at least one. One alone is returned as it is written.
    """
    codes = list(dict.fromkeys(codes))
    if len(codes) == 1:
        return codes[0]
    found = [licence_of(code) for code in codes]
    if not all(code in COMMERCIAL | NON_COMMERCIAL for code in found):
        return UNKNOWN
    parts = {part for code in found if code != "CC0" for part in code.removeprefix("CC BY").split("-")}
    return _code(parts) if set(found) != {"CC0"} else "CC0"


def licence_of_article(permissions) -> str:
    """Returns the licence of an article's `permissions` as a code, `unknown` if they state none or are None."""
    if permissions is None:
        return UNKNOWN
    elements = [each for each in permissions.iter() if local(each) in ("license", "licence")]
    elements += [each for each in permissions if local(each) == "license_ref"]
    stated = [each for each in elements if text_of(each) or each.get(_HREF) or _licence(each) != UNKNOWN]
    return strictest([_licence(each) for each in stated or [permissions]])


def licence_of_figure(fig) -> str:
    """Returns the licence that a figure states for itself; "" if it states none and has that of its article.

    A figure that was reused with permission is `unknown`: the permission is its publisher's, and not the reader's. So
    is one that was taken from elsewhere or belongs to somebody else, unless it states a licence. All that stands in the
    figure is read: captions, notes, credits, permissions, also those of one graphic or of one of its alternatives.
    """
    own = list(_said_of(fig))
    for each in own:
        if any(is_by_permission(part, is_of_figure=local(each) != "permissions") for part in _parts(text_of(each))):
            return UNKNOWN
    codes = [licence_of_article(each) for each in own
             if local(each) == "permissions" and any(local(one) in ("license", "license_ref") for one in each.iter())]
    codes += [code for each in own if local(each) != "permissions" and (code := _licence(each)) != UNKNOWN]
    if codes:
        return strictest(codes)
    return UNKNOWN if any(_is_of_others(each) for each in own) else ""


def _said_of(element, is_in_text: bool = False) -> Iterator:
    """Yields what says of whom a figure is, anywhere in it, but not in figures and tables of its own.

    Args:
      element: a figure, a group of figures, or what is in one.
      is_in_text: whether it is a text that was yielded, so that its paragraphs are not.
    """
    for child in element:
        name = local(child)
        if name in _OF_OWNERS:
            yield child
        elif name in _TEXTS:
            if not is_in_text or name == "fn":  # `text_of` leaves out notes
                yield child
            yield from _said_of(child, True)
        elif name and name not in _NOT_OF_FIGURE:
            yield from _said_of(child, is_in_text)


def _is_of_others(element) -> bool:
    """Returns whether what a figure says names a source or an owner that is not the article's."""
    text = text_of(element)
    if is_from_elsewhere(text):
        return True
    article = next((each for each in element.iterancestors() if local(each) == "article"), None)
    stated = article.iterfind("{*}front/{*}article-meta/{*}permissions/*") if article is not None else ()
    known = {owner_in(text_of(each)) for each in stated if local(each) in ("copyright-statement", "copyright-holder")}
    if local(element) in (*_TEXTS, "attrib"):
        owners = set(owners_in(_parts(text), has_panels=local(element) != "attrib"))
    else:
        stated = [element] if local(element) != "permissions" else [
            each for each in element if local(each) in ("copyright-statement", "copyright-holder")]
        owners = {owner_in(text_of(each)) for each in stated
                  if local(each) == "copyright-holder" or states_copyright(text_of(each))}
    return any(owner and not is_of(owner, known) for owner in owners)


def _licence(element) -> str:
    """Returns the licence of one element: all that its addresses and its words forbid together."""
    addresses, said = _addresses(element), _parts(text_of(element))
    granting = [part for part in said if not (is_by_permission(part) or _NEGATED.search(part))]
    found: list[set[str] | None] = []
    for address in _ADDRESS.finditer(" ".join([*addresses, *said])):
        parts = set(address[2].lower().strip("-").split("-"))
        if address[1].lower() == "publicdomain":
            found.append({"zero"} if address[2].lower() == "zero" else None)
        else:
            found.append(parts if "by" in parts and parts <= {"by", "nc", "nd", "sa"} else None)
    for text in (*addresses, *granting):
        found += [{"by", *re.findall("nc|nd|sa", code[1].lower())} for code in _CODE.finditer(text)]
        found += [{"by"}] * bool(_NAME.search(text)) + [{"zero"}] * bool(_ZERO.search(text))
    if not found or None in found:
        return UNKNOWN
    parts = set().union(*found)
    if "by" not in parts:
        return "CC0"
    said = [_BOTH.sub("", part) for part in said]
    parts |= {name for name, what in (("nc", _NOT_COMMERCIAL), ("nd", _NO_CHANGE), ("sa", _ALIKE))
              if any(map(what.search, said))}
    return _code({part.upper() for part in parts})


def _addresses(element) -> list[str]:
    """Returns what stands in the attributes and in the addresses of an element and of what it contains."""
    found: list[str | None] = []
    for each in filter(local, element.iter()):
        found += [each.get(_HREF), each.get("license-type"), each.text if local(each) == "license_ref" else None]
    return list(filter(None, found))


def _parts(text: str) -> list[str]:
    return [text[start:end] for start, end in sentences(text)]


def _code(parts: set[str]) -> str:
    """Returns the code of what is forbidden; a work that may not be changed cannot be shared alike."""
    nd = "ND" in parts
    return "CC BY" + "-NC" * ("NC" in parts) + "-ND" * nd + "-SA" * ("SA" in parts and not nd)
