"""Turns the marked-up text of an article into plain text, and plain text into sentences."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field

_BLOCKS = frozenset("p title sec list list-item disp-quote break td th tr def def-item disp-formula caption label "
                    "label-alternatives".split())
_LEFT_OUT = frozenset("tex-math object-id alt-text long-desc permissions attrib graphic media inline-graphic "
                      "table-wrap fig fig-group supplementary-material fn annotation".split())
_NOTES = frozenset("bibr fn table-fn aff corresp".split())  # what a mark beside a word refers to
_SPACE = re.compile(r"\s+")
_JOINT = re.compile(r"[\s,;\u2010-\u2015\-]+")
_PLAIN = re.compile(r"st|nd|rd|th|tm|[\W_]+", re.IGNORECASE)  # 1st, CD4+, Name®
_ABBREVIATIONS = frozenset(
    "fig figs tab tabs ref refs eq eqs no nos vol pp ed eds dr drs prof mr mrs ms st al e.g i.e vs cf ca approx resp "
    "incl viz sp spp var subsp etc suppl supp sect chap app mag max min temp inc ltd co corp jr sr ph.d m.d u.s u.k "
    "a.m p.m i.v i.m s.c p.o b.i.d t.i.d q.d v d.f s.d s.e s.e.m".split())
_END = re.compile(r"(?<![.!?])[.!?]++[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-zß-öø-ÿ])")
_TAIL_LENGTH, _OPEN_LENGTH = 40, 300  # characters in which a sentence's last word and an open parenthesis are found
_TAIL = re.compile(r"([^\s(\[\"“]+?)[.!?]+[\"'”’)\]]*\s*$")


def local(element) -> str:
    """Returns an element's name without its namespace; "" for what is not an element, such as an entity."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


@dataclass
class Text:
    """Plain text in the making: runs of white space become one blank.

    Attributes:
      links: (start, end, ids) of each cross-reference, in characters of the text.
    """

    parts: list[str] = field(default_factory=list)
    length: int = 0
    is_open: bool = False  # a blank is due before the next character
    links: list[tuple[int, int, tuple[str, ...]]] = field(default_factory=list)
    marked: int = -1  # length at which a raised citation was left out

    def add(self, text: str | None) -> None:
        """Appends text."""
        if not text:
            return
        plain = _SPACE.sub(" ", text)
        if plain == " ":
            self.is_open = self.length > 0
            return
        begin = " " if (self.is_open or plain[0] == " ") and self.length else ""
        self.is_open = plain[-1] == " "
        self.parts.append(begin + plain.strip(" "))
        self.length += len(self.parts[-1])

    def space(self) -> None:
        """Separates what comes from what was."""
        self.is_open = self.length > 0

    def add_element(self, element) -> None:
        """Appends the text of an element and of what it contains.

        TeX beside MathML, alternative texts, and figures and tables inside a paragraph are left out, and so are raised
        citations and marks of notes. A citation that would stick to the word before it is separated.
        """
        name = local(element)
        if not name:  # an entity that the parser left alone; HTML's names are known, and others mean nothing
            plain = html.unescape(element.text or "")
            self.add(plain if plain != element.text else "")
            return
        if name in _LEFT_OUT or self._is_mark(element, name):
            return
        if name in _MATH:  # white space between its parts means nothing
            for between, child in zip(("", *_MATH[name]), element, strict=False):
                self.add(between)
                self.add_element(child)
            return
        is_block = name in _BLOCKS
        if is_block or self._is_glued(element, name):
            self.space()
        start, first = self.length, len(self.parts)
        joint = self._joint(element, name) if name in ("sup", "sub") else ""
        self.add(joint)
        self.add(element.text)
        for child in element:
            self.add_child(child)
        self.add(")" if joint.endswith("(") else "")
        if name == "xref" and element.get("rid"):
            is_after_blank = "".join(self.parts[first:first + 1]).startswith(" ")
            self.links.append((start + is_after_blank, self.length, tuple(element.get("rid").split())))
        if is_block:
            self.space()

    @property
    def last(self) -> str:
        """The last character; "" at the beginning and after a blank."""
        return "" if self.is_open or not self.parts else self.parts[-1][-1:]

    def _is_glued(self, element, name: str) -> bool:
        """Returns whether an element is a citation that would stick to a word, a number or a stop."""
        before = self.last
        return (name == "xref" and element.get("ref-type") == "bibr" and (before.isalnum() or before in tuple(".,;:)%"))
                and _characters(element)[:1].isalnum())

    def _joint(self, element, name: str) -> str:
        """Returns what stands between a character and what is raised or lowered behind it.

        An exponent keeps its meaning (`10^3`, `cm^2`, `Ca^2+`); ordinals, signs and isotopes need nothing (`1st`,
        `CD4+`, `99mTc`). An index is written as in chemistry (`H2O`, `T2`), apart from a digit after a digit (`10_2`).

        Args:
          element: what is raised or lowered.
          name: `sup` or `sub`.
        """
        text, before = _characters(element), self.last
        if name == "sub":
            return "_" if before.isdigit() and text[:1].isdigit() else ""
        following = element.getnext()
        after = element.tail or (_characters(following) if following is not None and local(following) else "")
        is_isotope = (not before or before in "([{-/,;\u2010\u2011\u2012\u2013") and after[:1].isalpha()
        if not text or is_isotope or _PLAIN.fullmatch(text) or not before and len(text) == 1 and text.isalpha():
            return ""
        return "^(" if " " in text else "^"

    def _is_mark(self, element, name: str) -> bool:
        """Returns whether an element is a raised citation or the mark of a note, or joins two of them."""
        text = _characters(element) if name in ("sup", "xref") else ""
        is_between = name == "sup" and self.marked == self.length and _JOINT.fullmatch(text)
        is_mark = text and (is_between or _is_note(element))
        if is_mark:
            self.marked = self.length
        return bool(is_mark)

    def add_child(self, child) -> None:
        """Appends a child with the text after it. A letter in bold is a panel, and is separated from a next word."""
        self.add_element(child)
        if local(child) == "bold" and re.fullmatch(r"\s*[A-Za-z]\s*", child.text or "") and not len(child):
            after = child.getnext()
            if re.match(r"[^\W\d_]", child.tail or (after.text or "" if after is not None and local(after) else "")):
                self.space()
        self.add(child.tail)

    def __str__(self) -> str:
        return "".join(self.parts)


_MATH = {"msup": ("^",), "msubsup": ("", "^"), "mfrac": ("/",), "msub": ("",)}  # between the parts of MathML's elements


def _is_note(element) -> bool:
    """Returns whether an element is raised and holds citations or marks of notes only."""
    if local(element) == "xref":
        return element.get("ref-type") in _NOTES and len(element) > 0 and not (element.text or "").strip() and all(
            local(each) == "sup" and not (each.tail or "").strip() for each in element)
    links = [each for each in element.iter() if local(each) == "xref"]
    outside = (element.text or "") + "".join(each.tail or "" for each in element)
    return (bool(links) and all(each.get("ref-type") in _NOTES for each in links)
            and not re.search(r"[^\W\d_]", outside))


def _characters(element) -> str:
    """Returns the characters of an element without the marks that `Text` adds.

    `text_of` would read each level of what is raised twice, so that 40 levels would never end.
    """
    parts: list[str] = []

    def walk(one) -> None:
        parts.append(one.text or "")
        for child in one:
            if local(child) and local(child) not in _LEFT_OUT:
                walk(child)
            parts.append(child.tail or "")

    walk(element)
    return " ".join("".join(parts).split())


def text_of(element) -> str:
    """Returns the plain text of an element; "" for None."""
    if element is None:
        return ""
    text = Text()
    text.add(element.text)
    for child in element:
        text.add_child(child)
    return str(text)


def sentences(text: str) -> list[tuple[int, int]]:
    """Finds sentences: (start, end) of each in characters.

    A sentence ends at a full stop, question or exclamation mark that is followed by a blank and no small letter. It
    does not end after an abbreviation (`Fig.`, `e.g.`, `et al.`), initials (`E. coli`, `C.I.`), or inside parentheses
    that opened less than 300 characters before.
    """
    found, start = [], 0
    for match in _END.finditer(text):
        before = lambda length: text[max(start, match.end() - length):match.end()]  # noqa: B023
        if _is_abbreviation(before(_TAIL_LENGTH)) or _depth(before(_OPEN_LENGTH)) > 0:
            continue
        found.append((start, match.start() + len(match[0].rstrip())))
        start = match.end()
    if text[start:].strip():
        found.append((start, len(text)))
    return found


def _is_abbreviation(head: str) -> bool:
    match = _TAIL.search(head)
    if match is None:
        return False
    word = match[1]
    is_initials = re.fullmatch(r"(?:[A-Za-z]\.)*[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]", word) is not None
    return word.lower() in _ABBREVIATIONS or is_initials and head.rstrip().endswith(".")


def _depth(text: str) -> int:
    return max(text.count("(") - text.count(")"), text.count("[") - text.count("]"))
