"""Reads yes and no, in English and Chinese, at the beginning of an answer.

An answer that says both, or that refuses to answer ("No image was provided.", "Yes? I cannot tell."), is unread.
"""

from __future__ import annotations

import re

from llavamed_jax.evaluation.scoring import reader

YES, NO = "yes", "no"

# "no" is not an answer if it belongs to the next word ("no mass"); at the end or before a clause it is an answer.
_CLAUSE = r"(?:there|it|this|that|the|i|we|you|they|he|she|not|and|or|but|is|sorry|wait)"
_ANSWERS = {YES: re.compile(r"\byes\b", re.I), NO: re.compile(rf"\bno\b(?![^\S\n]+(?!{_CLAUSE}\b)[a-z])", re.I)}
_YES_NO = re.compile(r"\W*(yes|no)\b(?!'\w)", re.I)
# "Yes, not …" says both; "no, not …" says no, except "no, not no".
_TAKEN_BACK = {word: re.compile(rf"\s+(?:is|isn't|was|wasn't|would|cannot|can't)\b|\W*(?:and/or|or|{but})\b(?!\s+only)",
                                re.I)
               for word, but in ((YES, "not"), (NO, r"not\W+no"))}

_PICTURE = r"(?:images?|pictures?|photos?|files?|attachments?|figures?)"
_SCAN = rf"(?:{_PICTURE}|scans?|x-?rays?|radiographs?|cts?|mris?|slices?|videos?)"
_GIVEN = (r"(?:provided|available|attached|uploaded|given|supplied|included|accessible|received|loaded|displayed|sent|"
          r"shared)")
_SUCH = (r"(?:(?:clear|definite|definitive|certain|real|such|further|additional|valid|visible|actual|medical|attached|"
         r"uploaded|other|single|specific|relevant|more|enough|sufficient|direct|conclusive|reliable|reasonable)\s+)*")
# "No" in front of these words is no answer: "no idea", "no image", "no one can say", "no doubt about it".
_NO_ANSWER = re.compile(
    rf"(?:[^\S\n]+|-)(?:{_SUCH}(?:ideas?|answers?|information|info|details|data|doubts?|question|comments?|clues?|guess|opinion|"
    rf"conclusions?|context|certainty|judg[e]?ment|decision|way\s+(?:to|of|i|we|you|one|for)|"
    rf"{_PICTURE}(?!\s+(?:abnormalit|findings?|evidence|features?|artifacts?|signs?))"
    rf"|{_SCAN}[^.!?\n]{{0,40}}\b{_GIVEN})|one|body|wonder|matter|less|fewer|diagnosis\s+(?:can|could|is|was))\b", re.I)
_CANNOT = r"(?:can\s?not|can't|could\s?n(?:o|')t|could\s+not|unable\s+to|not\s+able\s+to|(?:im|not\s+)possible\s+to)"
_REFUSED = re.compile(
    rf"\b(?:{_CANNOT}|(?:hard|difficult|no\s+way)\s+to)\s+(?:be\s+)?(?:\w+ly\s+)?(?:tell|told|say|said|know|known|"
    rf"determined?|answer(?:ed)?|judged?|decided?|assess(?:ed)?|evaluated?|interpret(?:ed)?|diagnosed?|confirm(?:ed)?|"
    rf"verif(?:y|ied)|help|assist|provided?|access|view|process|open|analy[sz]ed?|sure|certain|comment|established?|"
    r"(?:make|draw|give)\s+(?:an?|any|the)|be\s+(?:sure|certain))\b"
    rf"|\b(?:{_CANNOT}|do\s+not|don't|did\s+not|didn't)\s+(?:\w+ly\s+)?(?:see|have|find|receive|get)\s+"
    rf"(?:access|enough|sufficient|(?:any|an?|the|this|your)?\s*(?:\w+\s+)?(?:{_SCAN}(?!\s+(?:abnormal|find|evidence|sign|feature))|"
    rf"information|data))\b"
    r"|\b(?:do\s+not|don't|did\s+not|didn't|would\s+not|wouldn't)\s+know\b"
    r"|\b(?:i\s+am|i'm|we\s+are|we're|it\s+is|it's)\s+(?:not\s+(?:really\s+|entirely\s+|quite\s+)?(?:sure|certain|known|"
    r"clear\s+(?:if|whether|from))|un(?:sure|certain|known)|unclear\s+(?:if|whether|from))\b"
    r"|\A\W*(?:(?:not|un)\s?(?:sure|certain|known)|unclear|indeterminate|inconclusive|undetermined)\b"
    rf"|\b(?:not\s+enough|insufficient|lack\s+of)\s+(?:information|data|context|detail)"
    rf"|\bno\s+{_SUCH}{_SCAN}\b[^.!?\n]{{0,40}}\b{_GIVEN}\b"
    rf"|\b{_SCAN}\s+(?:is|are|was|were|has|have)(?:\s+not|n't)\s+(?:been\s+)?{_GIVEN}\b"
    r"|\bas\s+an?\s+(?:ai|language|artificial|text)\b|\bi(?:\s+am|'m)\s+(?:just\s+|only\s+)?an?\s+(?:ai|language|text)\b"
    r"|\bit\s+depends\b|\bplease\s+(?:provide|upload|attach|share|send)\b", re.I)


def yes_or_no(text: object) -> str | None:
    """Returns `yes` or `no` if a text begins with it, does not say the other one too, and is no refusal; else None."""
    text = reader.readings(text)[-1]
    first = _YES_NO.match(text)
    if first is None:
        return None
    word, rest = first[1].lower(), text[first.end():]
    if word == NO and _NO_ANSWER.match(rest) or _REFUSED.search(rest):
        return None
    other = NO if word == YES else YES
    return None if _ANSWERS[other].search(rest) or _TAKEN_BACK[word].match(rest) else word


# ---- Chinese ---------------------------------------------------------------------------------------------------------

# Verbs that answer a question about whether something is so, each with its negations.
_VERBS = {"是": "不是 非", "存在": "不存在", "包含": "不包含", "包括": "不包括", "有": "没有 没 无", "能": "不能",
          "会": "不会", "可以": "不可以", "对": "不对", "可见": "不可见", "正确": "不正确", "属于": "不属于"}
_OF_WORD = {verb: YES for verb in _VERBS} | {word: NO for words in _VERBS.values() for word in words.split()} | {
    "否": NO, "不": NO}
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_ENDING = "[的啊呀哦]?"


def _words(polarity: str) -> str:
    return "|".join(sorted((word for word, of in _OF_WORD.items() if of == polarity), key=len, reverse=True))


_FIRST = re.compile(rf"({'|'.join(sorted(_OF_WORD, key=len, reverse=True))}){_ENDING}(?=$|[,;:.!\n(-])")
_OTHER_ZH = {
    YES: re.compile(rf"(?:{_words(NO)}){_ENDING}(?![{_HAN}])|(?<![{_HAN}])(?:{_words(NO)})|否则|而是"),
    NO: re.compile(rf"(?<![{_HAN}])(?:{_words(YES)}){_ENDING}(?![{_HAN}])|(?<![{_HAN}])(?:是的|存在|包含|包括)"),
}
_REFUSED_ZH = re.compile(r"无法|不能确定|不确定|不知道|不清楚|难以|看不[到清]|没有(?:提供)?(?:图|影像|足够)|"
                         r"未提供|可能|也许|或许|或|还是|吗")
_BLANKS = re.compile(rf"(?<=[{_HAN}])[^\S\n]+|[^\S\n]+(?=[{_HAN}])")


def of_gold(answer: object) -> str | None:
    """Returns `yes` or `no` if a closed gold answer is one word for it, in English or Chinese; else None."""
    gold = reader.plain(answer)
    return gold if gold in (YES, NO) else _OF_WORD.get(gold) or _OF_WORD.get(gold.removesuffix("的"))


def chinese(text: object) -> str | None:
    """Returns `yes` or `no` if a text begins with a Chinese word for it, and does not say the other one; else None.

    Characters directly behind the word are another word ("是右肺", "是不是"): the word has to end the text, or a mark
    has to follow.
    """
    text = _BLANKS.sub("", reader.readings(text)[-1])
    first = _FIRST.match(text)
    if first is None:
        return None
    word, rest = _OF_WORD[first[1]], text[first.end():]
    return None if _REFUSED_ZH.search(rest) or _REFUSED.search(rest) or _OTHER_ZH[word].search(rest) else word


def said(text: object, answer: object) -> str | None:
    """Returns what a text says to a question whose gold answer is yes or no: `yes`, `no`, or None if it is unread."""
    return yes_or_no(text) if reader.plain(answer) in (YES, NO) else chinese(text)
