"""Turns the marked-up text of an article into plain text, and plain text into sentences."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, field

_BLOCKS = frozenset("p title sec list list-item disp-quote break td th tr def def-item disp-formula caption label "
                    "label-alternatives".split())
_LEFT_OUT = frozenset("tex-math object-id alt-text long-desc permissions attrib graphic media inline-graphic "
                      "table-wrap fig fig-group supplementary-material fn annotation".split())
_SPACE = re.compile(r"\s+")
_ABBREVIATIONS = frozenset(
    "fig figs tab tabs ref refs eq eqs no nos vol pp ed eds dr drs prof mr mrs ms st al e.g i.e vs cf ca approx resp "
    "incl viz sp spp var subsp etc suppl supp sect chap app mag max min temp inc ltd co corp jr sr ph.d m.d u.s u.k "
    "a.m p.m i.v i.m s.c p.o b.i.d t.i.d q.d v d.f s.d s.e s.e.m".split())
_END = re.compile(r"[.!?]+[\"'”’)\]]*\s+(?=[\"'“‘(\[]*[^\W_a-zß-öø-ÿ])")
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

        TeX beside MathML, alternative texts, and figures and tables inside a paragraph are left out, and so are
        citations that are superscripts: they would stick to the word before them.
        """
        name = local(element)
        if not name:  # an entity that the parser left alone; HTML's names are known, and others mean nothing
            plain = html.unescape(element.text or "")
            self.add(plain if plain != element.text else "")
            return
        if name in _LEFT_OUT or name == "sup" and _is_citation(element):
            return
        is_block = name in _BLOCKS
        if is_block:
            self.space()
        start, first = self.length, len(self.parts)
        self.add(element.text)
        for child in element:
            self.add_child(child)
        if name == "xref" and element.get("rid"):
            is_after_blank = "".join(self.parts[first:first + 1]).startswith(" ")
            self.links.append((start + is_after_blank, self.length, tuple(element.get("rid").split())))
        if is_block:
            self.space()

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


def _is_citation(sup) -> bool:
    return any(local(each) == "xref" and each.get("ref-type") == "bibr" for each in sup) and not re.search(
        r"[^\W\d_]", (sup.text or "") + "".join(each.tail or "" for each in sup))


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
        if _is_abbreviation(text[start:match.end()]) or _depth(text[max(start, match.end() - 300):match.end()]) > 0:
            continue
        found.append((start, match.start() + len(match[0].rstrip())))
        start = match.end()
    if text[start:].strip():
        found.append((start, len(text)))
    return found


def _is_abbreviation(head: str) -> bool:
    match = _TAIL.search(head[-40:])
    if match is None:
        return False
    word = match[1]
    is_initials = re.fullmatch(r"(?:[A-Za-z]\.)*[A-Z]|(?:[A-Za-z]\.)+[A-Za-z]", word) is not None
    return word.lower() in _ABBREVIATIONS or is_initials and head.rstrip().endswith(".")


def _depth(text: str) -> int:
    return max(text.count("(") - text.count(")"), text.count("[") - text.count("]"))
