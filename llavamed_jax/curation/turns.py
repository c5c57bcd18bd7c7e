"""Reads a model's reply as pairs of a question and an answer, and drops the pairs that must not be trained on.

These are this project's rules. A role counts only at the beginning of a line, so that `User:` inside a sentence splits
nothing. A pair is dropped if it is incomplete, if the answer refuses, if question or answer names the text that the
model was given ("according to the caption"), or if the answer repeats twelve words of the caption in a row: nobody who
looks at the image could say that. Words are removed in one
case only, a lead-in about the image ("In the context of the image provided, …"), and no letter changes its case except
the first one of what follows. `original_rules` has the rules of LLaVA-Med's own code.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from llavamed_jax.text.conversation import IMAGE_MARKER

CUT = "cut off by the token limit"
EMPTY_ANSWER = "empty answer"
EMPTY_QUESTION = "empty question"
NO_ANSWER = "question without an answer"
NO_QUESTION = "answer without a question"
QUOTES = "names the caption or the text"
REFUSES = "refuses or says that no image is there"
REPEATED = "question asked before"
MOST_WORDS = 11  # of the caption in a row that an answer may repeat
COPIES = f"repeats more than {MOST_WORDS} words of the caption"

_ROLE = re.compile(
    r"^[ \t#>*_<\[(-]*+(?:\d{1,3}[.):][ \t]*[*_<\[(]*+)?(User|Human|Assistant)[ \t]*\d*[ \t]*[*_>\])]*[ \t]*"
    r"[:\uff1a][ \t]*[*_>\])]*", re.IGNORECASE | re.MULTILINE)
_FENCE = re.compile(r"^[ \t]*```\w*[ \t]*$", re.MULTILINE)
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_IMAGE = r"(?:image|figure|picture|photograph|photo|scan|slide|x-?ray|radiograph|micrograph|mri|ct)s?"
_THE = r"(?:the|this|that|these|any|an?|your|its)"
_TEXT = r"(?:context|text|passage|paragraph|excerpt|article|paper|manuscript|publication)"
_SAYS = (r"(?:mentions?|mentioned|states?|stated|says?|said|notes?|noted|suggests?|suggested|indicates?|indicated|"
         r"describes?|described|reports?|reported|specif(?:y|ies|ied)|explains?|explained|provides?|provided|given)")
_CANNOT = r"(?:cannot|can ?not|can['’]t|could not|couldn['’]t|unable to|not able to)"

_REFUSES = re.compile("|".join((
    r"\bsorry\b|\bapologi[sz]e\b|\bapologies\b",
    r"\bas an? (?:AI|artificial intelligence|(?:large )?language model|text[- ]based|virtual assistant)\b",
    rf"\b{_CANNOT}(?: \w+)? (?:see|view|access|look at|open|examine|inspect|display) "
    rf"(?:it\b|{_THE}(?: \w+)? {_IMAGE}\b)",
    rf"\bI(?:['’]m| am)? {_CANNOT}(?: \w+)? (?:provide|assist|help|answer|comply|discuss|view|access|interpret|diagnose"
    r"|analy[sz]e)\b",
    r"\bI (?:do not|don['’]t) (?:have|possess)\b",
    rf"\b(?:without|having|have|has|had|no|lack(?:ing)?)(?: \w+)? access to {_THE}(?: \w+)? {_IMAGE}\b",
    rf"\bwithout (?:seeing|viewing) {_THE}\b|\bwithout the (?:actual )?{_IMAGE}\b",
    rf"\b{_IMAGE}(?: itself)? (?:is|was|are|were)(?: not|n['’]t) (?:available|provided|attached|given|accessible)\b",
    rf"\bno {_IMAGE} (?:is|was|are|were|has been|have been)? ?(?:available|provided|attached|given)\b",
)), re.IGNORECASE)
_QUOTES = re.compile("|".join((
    rf"\bcaptions?\b|\b(?:{_IMAGE}|fig\.?) legends?\b",
    rf"\b(?:{_IMAGE}|provided|given|above|accompanying|textual|written|text)(?:['’]s)? descriptions?\b",
    rf"\bdescriptions? (?:\w+ )?{_SAYS}\b",
    r"\b(?:according to|based on|considering|per|given|from) (?:the|this|that|its|your) (?:\w+ ){0,2}descriptions?\b",
    rf"\b{_SAYS} (?:in|by) (?:the|this|that|your) (?:\w+ ){{0,2}}(?:descriptions?|information|{_TEXT}|authors?)\b",
    rf"\b(?:provided|given|additional|accompanying|supplied|above|{_IMAGE}|textual) {_TEXT}\b",
    r"\b(?:provided|given|supplied|accompanying|textual) information\b",
    r"\binformation (?:provided|given|supplied)\b(?! by\b)",  # a scan may give what no other scan gives
    rf"\b(?:the|this|that|your) (?:\w+ ){{0,2}}{_TEXT} (?:\w+ )?{_SAYS}\b",
    rf"\b(?:according to|based on) (?:the|this|that|your) (?:\w+ ){{0,2}}(?:{_TEXT}|authors?)\b",
    rf"\bthe (?:authors?|researchers?|investigators?) (?:\w+ )?{_SAYS}\b",
    r"\b(?:not|isn['’]t|wasn['’]t|never) (?:\w+ )?(?:mentioned|specified|stated)\b",
)), re.IGNORECASE)
_LEAD_IN = re.compile(
    rf"\A(?:in|within|given) the context of (?:the|this|these) (?:[\w-]+ ){{0,3}}?{_IMAGE}(?: {_IMAGE})?"
    r"(?: (?:provided|shown|given))?,\s+", re.IGNORECASE)


@dataclass(frozen=True)
class Turns:
    """The pairs of a reply.

    Attributes:
      pairs: question and answer of each pair that is kept.
      lost: question, answer and reason of each pair that is dropped.
    """

    pairs: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def dropped(self) -> Counter[str]:
        """Reason -> number of dropped pairs."""
        return Counter(reason for _, _, reason in self.lost)


def read_turns(text: str, is_cut: bool = False, caption: str = "") -> Turns:
    """Reads the pairs of a reply and drops those that must not be trained on.

    Args:
      text: the reply. Text before the first turn is ignored.
      is_cut: whether the reply ended at the token limit; then its last pair is dropped.
      caption: the caption that the model was given; an answer that repeats 12 of its words in a row is dropped.
    """
    found, asked, runs = Turns(), set(), _runs(caption)
    pairs = list(_pairs(_clean(text)))
    for number, (question, answer) in enumerate(pairs):
        reason = (CUT if is_cut and number == len(pairs) - 1 else _reason(question, answer)
                  or (COPIES if runs and not runs.isdisjoint(_runs(answer)) else None)
                  or (REPEATED if _folded(question) in asked else None))
        if reason is not None:
            found.lost.append((question or "", answer or "", reason))
            continue
        asked.add(_folded(question))
        found.pairs.append((without_lead_in(question), without_lead_in(answer)))
    return found


def _clean(text: str) -> str:
    text = _CONTROLS.sub("", text.replace("\r\n", "\n").replace("\r", "\n")).replace(IMAGE_MARKER, "")
    lines = _FENCE.sub("", text).rstrip().split("\n")
    return "\n".join(lines[:-1] if len(lines[-1].strip()) > 2 and not lines[-1].strip(" \t-*_") else lines)


def _pairs(text: str) -> Iterator[tuple[str | None, str | None]]:
    """Yields question and answer; None for the one that is missing."""
    places = list(_ROLE.finditer(text))
    ends = [*(place.start() for place in places[1:]), len(text)]
    question = None
    for place, end in zip(places, ends, strict=False):  # without places there is one end
        said = text[place.end():end].strip()
        if place[1].lower() == "assistant":
            yield question, said
            question = None
        else:
            if question is not None:
                yield question, None
            question = said
    if question is not None:
        yield question, None


def _reason(question: str | None, answer: str | None) -> str | None:
    """Returns why a pair is dropped; None if it is kept."""
    if question is None:
        return NO_QUESTION
    if answer is None:
        return NO_ANSWER
    if not _has_words(question):
        return EMPTY_QUESTION
    if not _has_words(answer):
        return EMPTY_ANSWER
    if _REFUSES.search(answer):
        return REFUSES
    return QUOTES if _QUOTES.search(question) or _QUOTES.search(answer) else None


def _runs(text: str) -> set[tuple[str, ...]]:
    """Returns each run of 12 words of a text, in lower case and without signs."""
    words = re.findall(r"\w+", text.casefold())
    return {tuple(words[place:place + MOST_WORDS + 1]) for place in range(len(words) - MOST_WORDS)}


def _has_words(text: str) -> bool:
    return any(char.isalnum() for char in text)


def _folded(text: str | None) -> str:
    return " ".join((text or "").casefold().split())


def without_lead_in(text: str) -> str:
    """Removes a lead-in such as "In the context of the image provided, "; a first word in lower case gets a capital.

    A word with capitals in it (`mRNA`, `pH`, `CT`) is left as it is.
    """
    rest = _LEAD_IN.sub("", text, count=1)
    if rest == text:
        return text
    first = re.match(r"[^\W\d_]+", rest)
    return rest[:1].upper() + rest[1:] if first and first[0].islower() else rest
