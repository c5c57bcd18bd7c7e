"""Keeps the signs of an answer that carry meaning: `<5 cm`, `≥ 3`, `L > R`, `-5`, `T2+`, `HER2-`.

The normalisation of the VQA evaluation removes `<`, `>`, `+` and `-`. `kept` puts marks of their own in place of those
that carry meaning, which no rule for punctuation touches, and `written` turns the marks back. Other dashes part words
(`X-ray`, `L4-5`, `C5- C6`, `T2- FLAIR`), and a plus before a number says nothing.
"""

from __future__ import annotations

import re

_MINUS, _DASHES = "-\u2010\u2011\u2212\u207b\ufe63", "\u2012\u2013"  # the latter are minus signs before numbers only
_LESS, _MORE, _LEAST, _MOST, _PLUS, _NOT = "\ue000\ue001\ue002\ue003\ue004\ue005"
_WRITTEN = str.maketrans({_LESS: "<", _MORE: ">", _LEAST: "≥", _MOST: "≤", _PLUS: "+", _NOT: "-"})
_OF = {"<": _LESS, ">": _MORE, "≥": _LEAST, "≤": _MOST}

_LEAST_OR_MOST = re.compile(r"([<>])\s?=(?!=)|[⩽≦⩾≧]")
_NEGATIVE = re.compile(rf"(?<![^\s(\[{{<>=~≈≤≥:,;/$*_|\"'“‘])(?<!\d\s)[{_MINUS}{_DASHES}](?=\.?\d)")
_BEFORE_NUMBER = re.compile(rf"(?<![-=])(?P<glued>(?<=\w))?([<>≤≥])\s*(?=[{_NOT}+~]?\.?\d)")
_BETWEEN_WORDS = re.compile(r"(?<=[A-Za-z0-9)])\s*([<>≤≥])\s*(?=[A-Za-z(])")
_ENDS = r"(?=\s*(?:$|\n|[,;:.!?)\]}/|*_\"'”’。，、…—–]))"
_POSITIVE = re.compile(rf"(?<=[A-Za-z0-9])\s?([+\u207a]+)(?:(?=\s[A-Za-z])(?<!\s[+\u207a])|{_ENDS})", re.MULTILINE)
_MARKER = ("er|pr|ar|rh|hiv|hbv|hcv|hpv|ebv|cmv|alk|egfr|braf|idh|mgmt|ros|kras|nras|gram|afb|ana|anca|rf|"
           r"[a-z]+\d[a-z0-9]*|\d+[a-z]+\d*")
# Of vertebrae, and of MR sequences in front of a word: no markers.
_NAMES = rf"(?![cls]\d{{1,2}}[{_MINUS}]|t\d{{1,2}}[{_MINUS}]\s+\w)"
_MISSING = re.compile(
    rf"\b{_NAMES}({_MARKER})[{_MINUS}](?:(?=\s+(?!weighted|w\b|\W)\S)|{_ENDS})", re.IGNORECASE | re.MULTILINE)
_BLOOD_GROUP = re.compile(rf"[\s*_\"'“‘(\[]*(ab|a|b|o)[{_MINUS}][\s*_\"'”’)\].]*", re.IGNORECASE)


def kept(text: str) -> str:
    """Returns a text with marks in place of the signs that carry meaning, before dashes are made equal.

    - `<`, `>`, `≤`, `≥` (and `<=`, `>=`) before a number or between words, with or without blanks;
    - a minus before a number, unless it stands behind another number (`3 -5`);
    - a plus behind a word, and a minus behind a marker: a word of letters and digits (`HER2-`, `CD4-`), one of a list
      (`ER-`, `Gram-`), or a blood group that is the whole text (`A-`).
    """
    text = _LEAST_OR_MOST.sub(lambda match: "≤" if (match[1] or match[0]) in "<⩽≦" else "≥", text)
    text = _NEGATIVE.sub(_NOT, text)
    text = _BEFORE_NUMBER.sub(lambda match: ("" if match["glued"] is None else " ") + _OF[match[2]], text)
    text = _BETWEEN_WORDS.sub(lambda match: f" {_OF[match[1]]} ", text)
    text = _POSITIVE.sub(lambda match: _PLUS * len(match[1]), text)
    if group := _BLOOD_GROUP.fullmatch(text):
        return group[1] + _NOT
    return _MISSING.sub(lambda match: match[1] + _NOT, text)


def written(text: str) -> str:
    """Returns a text of `kept` with its signs as they are written."""
    return text.translate(_WRITTEN)
