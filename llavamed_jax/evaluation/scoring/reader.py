"""Reads closed, open and multiple-choice answers, in whatever form they are written.

People and served models write a right answer as "**Yes**", "“Yes”", "Yes…", "Answer: Yes", "Yes—clearly.", "是。".
`clean` removes formatting, `readings` also removes a lead such as "Answer:", and `without_remark` removes a remark
after the answer (`remarks`). The rest is compared as in the VQA evaluation (`metrics.normalize_word`), but with the
signs that carry meaning (`signs`), and with an "A" that is a name (`articles`). Nothing is guessed: any text in an
unknown form stays unchanged.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterator

from llavamed_jax.evaluation import metrics
from llavamed_jax.evaluation.scoring import articles, remarks, signs

_SPAN = 400  # characters between two marks of emphasis: keeps the search linear in the length of an answer
_MOST_TEXTS = 2**16  # kept forms: gold answers recur in every control, and short answers in many questions
_NESTED = 8  # nested brackets and marks that are removed
_QUOTES = "\"“”„‟″〝〞〟«»‹›「」『』《》〈〉"
_WIDTHS = str.maketrans(
    {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full-width letters, digits and punctuation
    | dict.fromkeys(map(ord, "\u200b\u200c\u200d\u2060\ufeff\u00ad"))  # characters without width are deleted
)
_SAME = str.maketrans(
    dict.fromkeys(map(ord, "‐‑‒–—―−⸺⸻─"), "-") | dict.fromkeys(map(ord, "‘’‚‛′`´"), "'")
    | dict.fromkeys(map(ord, "…⋯"), "...")
    | {ord("。"): ".", ord("｡"): ".", ord("、"): ",", ord("､"): ",", ord("【"): "[", ord("】"): "]", ord("〔"): "(",
       ord("〕"): ")"}
)
_EMPHASIS = re.compile(rf"(?<![A-Za-z0-9*_~])(\*{{1,3}}|_{{1,3}})(?=\S)([^\n]{{1,{_SPAN}}}?)"
                       rf"(?<=\S)\1(?![A-Za-z0-9*_~])")
# Text that is struck through, and the thoughts of a model before its answer; the prompt may have begun them.
_NOT_SAID = re.compile(rf"~~(?=\S)[^\n~]{{1,{_SPAN}}}(?<=\S)~~|<(del|strike)>[^<]{{0,{_SPAN}}}</\1>"
                       rf"|\A.*</think(?:ing)?>", re.I | re.S)
_TAG = re.compile(r"</?(?:answer|b|i|u|p|em|strong|code|mark|span|final_answer)\s*/?>|<br\s*/?>", re.I)
_MATH = re.compile(rf"\\\(([^\n]{{0,{_SPAN}}}?)\\\)|\\\[(.{{0,{_SPAN}}}?)\\\]|\$\$(.{{0,{_SPAN}}}?)\$\$", re.S)
_LATEX = re.compile(r"\\(?:boxed|fbox|text(?:bf|it|rm|sf|tt|up)?|math(?:rm|bf|it|sf|tt)|boldsymbol|bm)"
                    rf"\{{([^{{}}]{{0,{_SPAN}}})\}}")
_QUOTE_MARKS = re.compile(rf"[{_QUOTES}]|(?<![A-Za-z0-9])'|'(?![A-Za-z0-9])")
_PICTOGRAM = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]+")
_BULLET = re.compile(r"(?:[-*+•·>#]+\s+)+")
_BEFORE = re.compile(r"(?:[\s,;:!?*]|\.{2,}|\.(?!\d)|-(?!\d))+")
_AFTER = " \n,;:!?.-"
_PAIRS = {"(": ")", "[": "]", "{": "}", "$": "$"}

_CHARACTER = "[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"  # Chinese, and Japanese kana
_BESIDE_CHARACTERS = re.compile(rf"(?<={_CHARACTER})\s+|\s+(?={_CHARACTER})")
_WORDS = re.compile(rf"{_CHARACTER}|(?:(?!{_CHARACTER})\S)+")

_LEAD = re.compile(
    r"(?:(?:so|thus|therefore|hence|well|overall),?\s+)?(?:(?:the|my|our|your)\s+)?"
    r"(?:(?:final|correct|right|best|short)\s+)?(?:answer|ans|option|choice|response)"
    r"(?:\s+(?:to|for)\s+(?:the|this|your)\s+question)?(?:\s+(?:is|would be|should be))?"
    r"(?:\s*[:=]\s*|\s+-\s+|\.{2,}\s*|\s+)(?:(?:option|choice)\s+)?", re.I)  # fmt: skip
_LEAD_ZH = re.compile(r"(?:所以|因此|综上)?,?(?:最终|正确|我)?的?(?:答案|回答|答|选项|选择|选)"
                      r"(?:应该?|就)?(?:是|为)?\s*[:,\-]?\s*")
_LEAD_QA = re.compile(r"(?:a|assistant|model)\s*:\s*", re.I)

_BREAK = re.compile(r"\s*(?:[,;:!?\n(]|\.(?!\d)|-)[\s,;:!?.\-(]*")


def clean(text: object) -> str:
    """Removes formatting from a text, and text that is struck through or marked as a thought.

    Formatting is emphasis, quotation marks, tags, pictograms, and marks before and after the text. Punctuation of other
    scripts is replaced by ASCII punctuation. Signs that carry meaning become marks of their own (`signs.kept`).
    """
    text = unicodedata.normalize("NFC", str(text)).translate(_WIDTHS)
    text = signs.kept(_TAG.sub(" ", _NOT_SAID.sub(" ", text))).translate(_SAME)
    text = _PICTOGRAM.sub(" ", text) if _PICTOGRAM.sub("", text).strip() else text
    text = _MATH.sub(lambda match: f" {match[1] or match[2] or match[3] or ''} ", text)
    for pattern, group in ((_LATEX, 1), (_EMPHASIS, 2), (_LATEX, 1), (_EMPHASIS, 2)):  # twice: they may be nested
        text = pattern.sub(lambda match, group=group: match[group], text)
    lines = (" ".join(line.split()) for line in _QUOTE_MARKS.sub("", text).splitlines())
    return _unwrapped("\n".join(filter(None, lines)))


def _unwrapped(text: str) -> str:
    """Removes marks and brackets around a text, unless nothing would remain."""
    for _ in range(_NESTED):
        inner = _BULLET.sub("", text, count=1) if _BULLET.match(text) else text
        inner = _BEFORE.sub("", inner, count=1) if _BEFORE.match(inner) else inner
        inner = inner.rstrip(_AFTER)
        inner = inner[1:-1] if _is_bracketed(inner) else inner
        if not inner or inner == text:
            break
        text = inner
    return text


def _is_bracketed(text: str) -> bool:
    """Returns whether the first character opens a bracket that the last character closes."""
    opening, closing = text[:1], _PAIRS.get(text[:1])
    if len(text) < 2 or text[-1] != closing:
        return False
    if opening == closing:
        return opening not in text[1:-1]
    depth = 0
    for place, mark in enumerate(text):
        depth += (mark == opening) - (mark == closing)
        if not depth:
            return place == len(text) - 1
    return False


@functools.lru_cache(_MOST_TEXTS)
def comparable(text: str, keeps_a: bool = False) -> str:
    """Returns the form of a clean text that is compared: lower-cased and normalised as in the VQA evaluation.

    If nothing remains after normalisation ("+"), the result is the words of the text, or else the text itself. So such
    a text equals only itself. Signs that carry meaning stay ("<5 cm", "T2+"), and so do "a", "an" and "the" that are no
    articles ("hepatitis A"). Blanks beside Chinese characters are removed ("左 肺" is "左肺").

    Args:
      text: a clean text, with its capitals.
      keeps_a: whether no "a" counts as an article.
    """
    lowered = articles.marked(text, keeps_a).lower()
    found = metrics.normalize_word(lowered) or " ".join(re.findall(r"\w+", lowered)) or lowered.strip()
    return articles.written(signs.written(_BESIDE_CHARACTERS.sub("", found)))


def is_same(text: str, gold: str) -> bool:
    """Returns whether two clean texts are equal in a form that is compared, and not empty.

    A small "a" may be an article or a letter: "protein a deficiency" equals "Protein A deficiency".
    """
    ways = (False, True) if articles.has_a(text) or articles.has_a(gold) else (False,)
    return any(comparable(text, one) == comparable(gold, other) != "" for one in ways for other in ways)


def words(text: str) -> list[str]:
    """Returns the words of a comparable text; each Chinese character counts as a word, because no blanks part words."""
    return _WORDS.findall(text)


def plain(answer: object) -> str:
    """Returns the form of a gold answer or an option that is compared."""
    return comparable(clean(answer))


def readings(text: object, has_letters: bool = False) -> list[str]:
    """Returns the clean text, and the rest of it after each lead ("Answer:", "The answer is", "答案是").

    Args:
      text: an answer.
      has_letters: whether the answer may be a letter. Then "A:" in "A: left lung" is not a lead.
    """
    found = [clean(text)]
    patterns = (_LEAD, _LEAD_ZH) if has_letters else (_LEAD, _LEAD_ZH, _LEAD_QA)
    while len(found) < 4:
        lead = next((match for pattern in patterns if (match := pattern.match(found[-1]))), None)
        if lead is None or not (rest := _unwrapped(found[-1][lead.end():].strip())):
            break
        found.append(rest)
    return found


def says(text: object, answer: object) -> bool:
    """Returns whether a text gives an answer, in any form, followed by at most a remark.

    An empty text gives no answer, and no text gives an empty answer.
    """
    wanted = clean(answer)
    found = readings(text)
    return any(is_same(each, wanted) for each in found) or any(
        is_same(head, wanted) for head in without_remark(found[-1], 4 * len(str(answer)) + _SPAN))


def without_remark(text: str, longest: int) -> Iterator[str]:
    """Yields the part of a clean text before each break that is followed by a remark, such as "as the image shows".

    Args:
      text: a clean text.
      longest: longest answer, in characters.
    """
    for match in _BREAK.finditer(text, 0, longest):
        answer = text[:match.start()].strip()
        if remarks.is_remark(answer, text[match.end():].strip()):
            yield answer
