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
         r"uploaded|other|single|specific|relevant|more|enough|sufficient|direct|conclusive|reliable|reasonable|chest|"
         r"abdominal|brain|diagnostic|input)\s+)*")
_END = r"\s*(?:$|[,;:.!?\n)-])"
_BE = r"(?:(?:is|are|was|were|has|have|had|can|could)\s+(?:been\s+|be\s+)?)"
# Up to the word for "provided", but not over a finding: "no CT evidence of bleeding is displayed" is an answer.
_THEN_GIVEN = (rf"(?:\s+{_SCAN})*\s+(?:(?:is|are|was|were|has|have|had|of|from|for|to|in|that)\b"
               rf"(?:(?!evidence|finding|abnormal|sign|feature)[^.!?\n]){{0,40}}\b)?{_GIVEN}\b")
_FOR_ME = (r"(?:here|there|(?:to|for|with|in)\s+(?:me|us|your?|see|look|view|analy[sz]e|assess|evaluate|examine|"
           r"interpret|review|judge|work|(?:the|this|our)\s+(?:message|question|prompt|chat|conversation))\b)")
# "No" in front of these words is no answer: "no idea", "no image", "no one can say", "no doubt about it".
_NO_ANSWER = re.compile(
    rf"(?:[^\S\n]+|-)(?:{_SUCH}(?:(?:ideas?|answers?|information|info|doubts?|question|comments?|clues?|guess|opinion|"
    r"conclusions?|context|certainty|judg[e]?ment|decision|way\s+(?:to|of|i|we|you|one|for))\b"
    rf"|(?:{_PICTURE}|data|details?)(?:{_END}|{_THEN_GIVEN}|\s+{_BE}?(?:visible|shown|present|seen|found|{_FOR_ME}))"
    rf"|{_SCAN}{_THEN_GIVEN}"
    rf"|(?:access|response|content|reply|output|results?)(?:{_END}|\s+{_BE}?(?:found|returned|generated|produced|yet|"
    rf"{_GIVEN}|{_FOR_ME})|{_THEN_GIVEN})|access\s+to\b|problem{_END})"
    r"|(?:one|wonder|matter|less|fewer|diagnosis\s+(?:can|could|is|was))\b|body\s+(?:can|could|knows|would|will)\b)"
    r"|-body\b", re.I)
_CANNOT = r"(?:can\s?not|can't|could\s?n(?:o|')t|could\s+not|unable\s+to|not\s+able\s+to|(?:im|not\s+)possible\s+to)"
_REFUSED = re.compile(
    rf"\b(?:{_CANNOT}|(?:hard|difficult|no\s+way)\s+to)\s+(?:be\s+)?(?:\w+ly\s+)?(?:tell|told|say|said|know|known|"
    rf"determined?|answer(?:ed)?|judged?|decided?|assess(?:ed)?|evaluated?|interpret(?:ed)?|diagnosed?|confirm(?:ed)?|"
    rf"verif(?:y|ied)|help|assist|provided?|access|view|process|open|analy[sz]ed?|sure|certain|comment|established?|"
    r"(?:make|draw|give)\s+(?:an?|any|the)|be\s+(?:sure|certain))\b"
    rf"|\b(?:{_CANNOT}|do\s+not|don't|did\s+not|didn't)\s+(?:\w+ly\s+)?(?:see|have|find|receive|get)\s+"
    r"(?:access|enough|sufficient|(?:any|an?|the|this|your)?\s*(?:\w+\s+)?"
    rf"(?:{_SCAN}(?!\s+(?:abnormal|find|evidence|sign|feature))|information|data))\b"
    rf"|\b(?:i|we)\s+(?:would\s+|will\s+)?(?:need|require)\s+(?:to\s+see\s+)?(?:(?:an?|the|your|more|further)\s+)?"
    rf"(?:\w+\s+)?(?:{_SCAN}|information|data|context|details)\b"
    r"|\b(?:do\s+not|don't|did\s+not|didn't|would\s+not|wouldn't)\s+know\b"
    r"|\b(?:i\s+am|i'm|we\s+are|we're|it\s+is|it's)\s+(?:not\s+(?:really\s+|entirely\s+|quite\s+)?(?:sure|certain|"
    r"known|clear\s+(?:if|whether|from))|un(?:sure|certain|known)|unclear\s+(?:if|whether|from))\b"
    r"|\A\W*(?:(?:not|un)\s?(?:sure|certain|known)|unclear|indeterminate|inconclusive|undetermined|maybe|perhaps)\b"
    rf"|\b(?:not\s+enough|insufficient|lack\s+of)\s+(?:information|data|context|detail)"
    rf"|\bno\s+{_SUCH}(?:{_PICTURE}\Z|{_SCAN}{_THEN_GIVEN})"
    rf"|\b{_SCAN}\s+(?:is|are|was|were|has|have)(?:\s+not|n't)\s+(?:been\s+)?{_GIVEN}\b"
    rf"|\b{_PICTURE}\s+{_BE}(?:missing|unavailable|unreadable)\b"
    r"|\bas\s+an?\s+(?:ai|language|artificial|text)\b"
    r"|\bi(?:\s+am|'m)\s+(?:just\s+|only\s+)?an?\s+(?:ai|language|text)\b"
    r"|\bit\s+depends\b|\bplease\s+(?:provide|upload|attach|share|send)\b", re.I)
# "Yes, that is incorrect." and "No, that is right." say nothing; "No, I don't think so." says no.
_IT_IS = r"(?:(?:that|this|it)(?:\s+is|'s|\s+was)|that\s+would\s+be)"
_DOUBTED = {
    YES: re.compile(rf"{_IT_IS}\s+(?:incorrect|wrong|false|untrue|not\s+(?:correct|right|true))\W*\Z"
                    r"|(?:i|we)\s+(?:doubt|(?:do\s+not|don't)\s+(?:think|believe))\b", re.I),
    NO: re.compile(rf"{_IT_IS}\s+(?:correct|right|true)\W*\Z", re.I),
}
# Only the first clause behind yes or no can refuse, and not one about something further: "Yes, but its nature cannot
# be determined". These words may stand before it.
_BEFORE_CLAUSE = re.compile(
    r"\W*(?:(?:but|however|although|though|and|well|so|hm+|honestly|unfortunately|sadly|regrettably|"
    r"(?:(?:i\s+am|i'm|we\s+are|we're)\s+)?(?:(?:so|very|really)\s+)?sorry|(?:my\s+)?apologies|"
    r"(?:i|we)\s+apologi[sz]e)\b"
    rf"|(?:based\s+on|from|with|without|given|according\s+to)\b[^,.;!?\n]{{1,40}}\b(?:{_SCAN}|information|data|context)"
    r"(?:\s+\w+)?,(?!\s*(?:but|however|although|though)\b))\W*", re.I)
_CLAUSE_END = re.compile(r"[.,;!?\n]|\b(?:but|however|although|though)\b", re.I)
_ASIDE = re.compile(
    r"(?:(?:the|its|their|an?|any)\s+)?(?:(?:exact|precise|specific|underlying)\s+\w+|(?:cause|nature|type|a?etiology|"
    r"extent|size|age|origin|stage|severity|malignancy|source|location|significance|degree|grade|number)\b)", re.I)


def _refuses(rest: str, word: str) -> bool:
    """Returns whether the first clause behind yes or no takes the answer back: "I cannot tell", "that is incorrect"."""
    while (before := _BEFORE_CLAUSE.match(rest)) and before.end():
        rest = rest[before.end():]
    clause = _CLAUSE_END.split(rest.lstrip(" \n.,:;!?-()"), maxsplit=1)[0].strip()
    return bool(_REFUSED.search(clause) and not _ASIDE.match(clause) or _DOUBTED[word].match(clause))


def yes_or_no(text: object) -> str | None:
    """Returns `yes` or `no` if a text begins with it, does not say the other one too, and is no refusal; else None."""
    text = reader.readings(text)[-1]
    first = _YES_NO.match(text)
    if first is None:
        return None
    word, rest = first[1].lower(), text[first.end():]
    if word == NO and _NO_ANSWER.match(rest) or _refuses(rest, word):
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
# "有肿块" and "没有肿块" are answers; "有没有", "没有图像" and "有可能" are none.
_NOUN = re.compile(rf"(没有|不存在|存在|有|无)(?![有无没不未是非否存包能会可对正属或吗点些时待限的法关需从人所]|"
                   rf"办法|把握|答案|结论|提供|足够|(?:任何)?(?:信息|数据|资料|图|影像|片)|意见|想法|回答|疑问|疑义)(?=[{_HAN}])")
_WORD_END = rf"{_ENDING}(?![{_HAN}A-Za-z0-9])"
# The other word counts only if a mark or the end follows it: "是的，没有异常" says yes, "不是，是MRI" says no.
_OTHER_ZH = {YES: re.compile(rf"(?:{_words(NO)}){_WORD_END}|否则|而是"),
             NO: re.compile(rf"(?<![{_HAN}])(?:{_words(YES)}){_WORD_END}")}
_TO_TELL = r"(?:确定|确认|判断|判定|回答|作答|识别|辨|诊断|得知|知道|提供|访问|查看|评估|分析|得出|说|明确|肯定)"
_SHOWN_ZH = r"(?:\Z|这|该|此|您|你|任何图|图|影像|片)"
_REFUSED_ZH = re.compile(
    rf"(?:无法|不能|难以|很难|没法){_TO_TELL}|(?:无法|不能|没法)(?:看到|看清|看见){_SHOWN_ZH}|看不[到清见]{_SHOWN_ZH}|"
    rf"无法\Z|不确定|不知道|我[^,]{{0,4}}不清楚|\A但?不清楚\Z|没有(?:提供)?(?:图|影像|足够)|未提供|"
    r"\A但?(?:也许|或许|(?:也|有)?可能)(?:\Z|[不没无])|\A或|\A还是|吗\Z")
_ASIDE_ZH = re.compile(
    rf"但?[{_HAN}]{{0,6}}?(?:边界|边缘|性质|原因|病因|类型|大小|范围|程度|良恶性|来源|具体|数量|形态|轮廓)")
_BEFORE_CLAUSE_ZH = re.compile(r"\W*(?:很|非常)?(?:抱歉|对不起|不好意思|遗憾)(?=\W)")
_BLANKS = re.compile(rf"(?<=[{_HAN}])[^\S\n]+|[^\S\n]+(?=[{_HAN}])")


def of_gold(answer: object) -> str | None:
    """Returns `yes` or `no` if a closed gold answer is one word for it, in English or Chinese; else None."""
    gold = reader.plain(answer)
    return gold if gold in (YES, NO) else _OF_WORD.get(gold) or _OF_WORD.get(gold.removesuffix("的"))


def chinese(text: object) -> str | None:
    """Returns `yes` or `no` if a text begins with a Chinese word for it, and does not say the other one; else None.

    Characters directly behind the word are another word ("是右肺", "是不是"): the word has to end the text, or a mark
    has to follow; only a thing may follow "有" and "没有" and their like.
    """
    text = _BLANKS.sub("", reader.readings(text)[-1])
    first = _FIRST.match(text) or _NOUN.match(text)
    if first is None:
        return None
    word, rest = _OF_WORD[first[1]], text[first.end():]
    return None if _refuses_zh(rest) or _refuses(rest, word) or _OTHER_ZH[word].search(rest) else word


def _refuses_zh(rest: str) -> bool:
    """Returns whether the first clause behind a Chinese word for yes or no takes the answer back."""
    rest = rest[before.end():] if (before := _BEFORE_CLAUSE_ZH.match(rest)) else rest
    clause = re.split(r"[,.;:!?()\n-]", rest.lstrip(" \n.,:;!?-()"), maxsplit=1)[0].strip()
    return bool(_REFUSED_ZH.search(clause) and not _ASIDE_ZH.match(clause))


def said(text: object, answer: object) -> str | None:
    """Returns what a text says to a question whose gold answer is yes or no: `yes`, `no`, or None if it is unread."""
    return yes_or_no(text) if reader.plain(answer) in (YES, NO) else chinese(text)
