"""Finds in an article's text which figures it speaks of: `Fig. 2b`, `Figs 2-4 and 6`, `Supplementary Figure S1`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_LONGEST_RANGE = 60  # figures or panels; more is a year or a page

_WORDS = {"figure": "figure", "figures": "figure", "fig": "figure", "figs": "figure", "figure(s)": "figure",
          "fig(s)": "figure", "scheme": "scheme", "schemes": "scheme", "plate": "plate", "plates": "plate",
          "chart": "chart", "charts": "chart", "image": "image", "images": "image", "photo": "photo"}
_BEFORE = re.compile(r"(supplement(?:ary|al)?|suppl?|additional|extended[ -]data|online|appendix|web)\.?\s?$",
                     re.IGNORECASE)
_PREFIXES = {"suppl": "supplementary", "supp": "supplementary", "supplement": "supplementary",
             "supplemental": "supplementary", "supplementary": "supplementary", "extended data": "extended data",
             "extended-data": "extended data"}
_DASH = r"(?:[-\u2010-\u2015\u2212]|\bto\b|\bthrough\b)"
_PANELS = r"[A-Za-z](?![A-Za-z])"
_SEVERAL = rf"(?:\s?(?:,|{_DASH}|and|&)\s?{_PANELS})*"
# Panels stick to the number, stand in parentheses, or are capitals after a blank: `2b`, `2 (a, b)`, `2 A`.
_ROMAN = r"(?-i:(?=[IVX])X{0,3}(?:IX|IV|V?I{0,3}))"  # 1 to 39
_ITEM = (rf"(?P<number>(?:[A-Z]{{1,2}}[.-]?)?\d{{1,3}}(?:\.\d{{1,2}})?(?![\d%])|{_ROMAN}(?=[A-Ha-h]?(?![^\W_])))"
         rf"(?P<panels>\s?\({_PANELS}{_SEVERAL}\)|{_PANELS}{_SEVERAL}|\s(?-i:[A-H](?![A-Za-z])){_SEVERAL})?")
_HEAD = re.compile(r"\b(?P<word>fig(?:ure)?(?:\(s\)|s)?|schemes?|plates?|charts?|images?|photo)(?!\w)\.?\s?"
                   rf"(?=[(\[]?\s?(?:[A-Z]{{0,2}}[.-]?\d|{_ROMAN}(?-i:[A-Ha-h])?(?![^\W_])))", re.IGNORECASE)
_FIRST = re.compile(rf"[(\[]?\s?{_ITEM}")
_NEXT = re.compile(rf"\s?(?P<joint>,\s?(?:and|&|or)\s|,|;|\band\b|&|\bor\b|{_DASH})\s?(?:fig(?:ure)?s?\.?\s?)?{_ITEM}",
                   re.IGNORECASE)
_MORE_PANELS = re.compile(rf"\s?(?P<joint>,\s?(?:and|&)\s|,|\band\b|&|{_DASH})\s?\(?(?P<panel>{_PANELS})\)?"
                          r"(?=[\s).,;:\]]|$)")


_THINGS = re.compile(r"\s+(?:patients?|cases?|controls?|months?|years?|days?|weeks?|hours?|min|mm|cm|kg|mg|ml|"
                     r"women|men|children|of|other|more|different|samples?|subjects?|lesions?|mice|rats|times?)\b")


_ROMANS = [ten + one for ten in ("", "X", "XX", "XXX")
           for one in ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")][1:]


@dataclass(frozen=True)
class Mention:
    """A mention of one figure: (start, end) in the text, kind and number of the figure, and its panels in capitals."""

    start: int
    end: int
    kind: str
    number: str
    panels: tuple[str, ...] = ()


def label_key(label: str) -> tuple[str, str, str] | None:
    """Reads a figure's label: kind, number and panel (`Fig. 2b.` -> figure, 2, B); None if it has no number."""
    if re.search(r"(?<=\S)\W+figure supplement", label, re.IGNORECASE):
        return "figure supplement", label, ""  # eLife's `Figure 1—figure supplement 1`, which text calls by that name
    is_named = re.search(r"[A-Za-z]{3}", label) and not _is_roman(label.strip(" .:"))
    found = find(label if is_named else f"Figure {label}")
    if not found:
        return None
    first = found[0]
    return first.kind, first.number, first.panels[0] if len(first.panels) == 1 else ""


def find(text: str) -> list[Mention]:
    """Finds the mentions of figures in a text, ranges and lists included.

    A mention with `Supplementary` or `Extended Data` before it has a kind of its own, so that it is not taken for a
    figure of the article.
    """
    found: list[Mention] = []
    end = 0
    for head in _HEAD.finditer(text):
        match = _FIRST.match(text, head.end()) if head.start() >= end else None
        before = _BEFORE.search(text, max(0, head.start() - 20), head.start())
        kind = _WORDS.get(head["word"].lower(), "figure")
        kind = f"{_PREFIXES.get(before[1].lower(), before[1].lower())} {kind}" if before else kind
        previous = None
        while match:
            number = re.sub(r"(?<=[A-Z])[.-]", "", match["number"].upper())
            panels, end = _panels(match["panels"] or ""), match.end()
            while panels and (more := _MORE_PANELS.match(text, end)):
                panels, end = _joined(panels, more["panel"].upper(), more["joint"]), more.end()
            if previous is not None and _is_dash(match["joint"]):
                found += [Mention(head.start(), end, kind, each) for each in _between(previous, number)]
            found.append(Mention(head.start(), end, kind, number, tuple(panels)))
            previous = number
            match = _NEXT.match(text, end)
            if match and (_THINGS.match(text, match.end())  # it counts things: `Fig. 2 and 3 patients`
                          or _is_roman(match["number"]) and not _is_roman(number)):  # `Fig. 2 and I`
                match = None
    return found


def _is_roman(number: str) -> bool:
    return re.fullmatch(_ROMAN, number) is not None


def _is_dash(joint: str) -> bool:
    return re.fullmatch(_DASH, joint.strip()) is not None


def _between(first: str, last: str) -> list[str]:
    """Returns the numbers between two of the same form: 2, 5 -> 3, 4; S1, S3 -> S2; I, III -> II."""
    if _is_roman(first) and _is_roman(last):
        return _ROMANS[_ROMANS.index(first) + 1:_ROMANS.index(last)]
    one, other = re.fullmatch(r"(\D*)(\d+)", first), re.fullmatch(r"(\D*)(\d+)", last)
    if one is None or other is None or other[1] not in ("", one[1]):
        return []
    low, high = int(one[2]), int(other[2])
    return [f"{one[1]}{number}" for number in range(low + 1, high)] if high - low <= _LONGEST_RANGE else []


def _panels(text: str) -> list[str]:
    """Reads panels in capitals: `a, b` -> A, B; `A–C` -> A, B, C."""
    panels: list[str] = []
    joint = ","
    for part in re.findall(rf"{_PANELS}|,|&|\band\b|{_DASH}", text):
        if len(part) == 1 and part.isalpha():
            panels = _joined(panels, part.upper(), joint)
        else:
            joint = part
    return panels


def _joined(panels: list[str], panel: str, joint: str) -> list[str]:
    if panels and _is_dash(joint) and panels[-1] < panel:
        return panels + [chr(each) for each in range(ord(panels[-1]) + 1, ord(panel) + 1)]
    return panels if panel in panels else [*panels, panel]


_IN_CAPTION = re.compile(rf"(?:(?<=^)|(?<=[\s.;:,]))(?:\((?P<inner>{_PANELS}(?:\s?(?:,|{_DASH}|and|&)\s?{_PANELS})*)\)"
                         rf"|(?P<bare>[A-Ha-h])(?=[).:,]\s))")


def panels_of(caption: str) -> list[str]:
    """Returns the panels that a caption explains, in capitals: `(a) CT. (b–d) MRI.` -> A, B, C, D.

    Letters count only as far as they go through the alphabet from A without a gap, and only if there are two of them.
    """
    there: set[str] = set()
    for match in _IN_CAPTION.finditer(caption):
        there |= set(_panels(match["inner"] or match["bare"]))
    return in_order(there)


def only_panels(text: str) -> list[str]:
    """Returns the panels in a text that holds nothing else, in capitals: `(A–C)` -> A, B, C."""
    is_panels = re.fullmatch(rf"\s*\(?{_PANELS}(?:\s?(?:,|{_DASH}|and|&)\s?{_PANELS})*\)?[.,:]?\s*", text) is not None
    return _panels(text) if is_panels else []


def in_order(letters: Iterable[str]) -> list[str]:
    """Returns letters from A on, as far as they go without a gap; none if that is only A."""
    there, found = set(letters), []
    for letter in "ABCDEFGHIJKLMNOPQRSTUVWXYZ":
        if letter not in there:
            break
        found.append(letter)
    return found if len(found) > 1 else []
