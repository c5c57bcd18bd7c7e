"""Tells the article "a" from a name: "a mass", but "hepatitis A", "group A streptococcus", "A-fibers", "A:B".

The normalisation of the VQA evaluation removes "a", "an" and "the" anywhere, which makes "hepatitis" of "Hepatitis A".
Here an article is removed only in front of another word. The text has to have its capitals.
"""

from __future__ import annotations

import re

_KEPT = {"a": "\ue010", "an": "\ue011", "the": "\ue012"}  # no rule for articles knows these
_WRITTEN = str.maketrans({mark: word for word, mark in _KEPT.items()})
_ARTICLE = re.compile(r"(?<![\w'])(?:a|an|the)(?![\w'])", re.I)
_JOINED = re.compile(r"\w\S*[-/:.,+&]\Z")  # "Hepatitis-", "B/"
_BEFORE_WORD = re.compile(r"\s+[\s(\[{]*\w")
_BEFORE_ARTICLE = re.compile(r"\s+(?:a|an|the)(?!\w)", re.I)
_NAMED = re.compile(  # a small "a" behind these words is a letter
    r"\b(?:groups?|types?|subtypes?|vitamins?|hepatitis|ha?emophilia|influenza|grades?|class|stages?|figures?|images?|"
    r"panels?|labels?|labell?ed|letters?|points?|arrows?|structures?|regions?|zones?|parts?|protein|factor|option)\s+\Z",
    re.I)
_SMALL_WORD = re.compile(r"(?:\A|[.!?;:\n]|\b(?:of|in|with|on|at|by|for|to|from|as|is|are|was|has|have|shows|and|or|"
                         r"not|no|near|behind|into|over|under|through|without))[\s(\[{]*\Z", re.I)
_BEHIND = 24  # characters before an article that are looked at


def marked(text: str, keeps_all: bool = False) -> str:
    """Returns a text with marks in place of those "a", "an" and "the" that are no articles.

    Args:
      text: a text with its capitals.
      keeps_all: whether each "a" is a letter, so that a text in small letters ("protein a deficiency") can be compared
        with a name.
    """
    has_small = any(each.islower() for each in _ARTICLE.sub("", text))

    def mark(match: re.Match[str]) -> str:
        return _KEPT[match[0].lower()] if is_letter(match) else match[0]

    def is_letter(match: re.Match[str]) -> bool:
        word, before = match[0], text[max(0, match.start() - _BEHIND):match.start()]
        if not _BEFORE_WORD.match(text, match.end()) or _JOINED.search(before):
            return True
        if word not in "aA":
            return False
        if keeps_all or _BEFORE_ARTICLE.match(text, match.end()) or _NAMED.search(before):
            return True
        return word == "A" and has_small and not _SMALL_WORD.search(before)

    return _ARTICLE.sub(mark, text)


def has_a(text: str) -> bool:
    """Returns whether a text has an "a" that may be an article or a letter."""
    return re.search(r"\ba\b", text, re.I) is not None


def written(text: str) -> str:
    """Returns a text of `marked` with its marks as words."""
    return text.translate(_WRITTEN)
