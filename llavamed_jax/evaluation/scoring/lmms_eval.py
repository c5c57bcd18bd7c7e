"""Reads answers to SLAKE as lmms-eval's tasks `slake`, `slake_en` and `slake_zh` do.

Source: `tasks/slake/utils.py` and `tasks/slake/_default_template_yaml` of lmms-eval 0.7.3. The code is this
project's own.
"""

from __future__ import annotations

import re
import string

_CHINESE_PUNCTUATION = "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～、，。；：《》？【】（）"
_BLANKS = str.maketrans(dict.fromkeys(string.punctuation + _CHINESE_PUNCTUATION, " "))
_SAME = {
    "yes": "yes yeah yep true 是 是的 有 包含 可以 能 会 正常",
    "no": "no nope false 否 不是 没有 无 不包含 不能 不会 不可以 不正常 异常",
}
_SAME = {word: name for name, words in _SAME.items() for word in words.split()} | {"x ray": "xray"}
_PROMPTS = {"en": "Answer the question using a single word or phrase.", "zh": "请用一个词或短语回答问题。"}


def prompt(question: str, language: str = "en") -> str:
    """Returns the prompt of a question in English or Chinese."""
    return f"{question.strip()}\n{_PROMPTS['zh' if language == 'zh' else 'en']}"


def normalised(text: str) -> str:
    """Returns an answer in lower case without parentheses and punctuation; words for yes, no and X-ray are made one."""
    text = re.sub(r"（[^）]*）", " ", re.sub(r"\([^)]*\)", " ", text.strip().lower()))
    text = " ".join(text.translate(_BLANKS).split())
    return _SAME.get(text, text)


def is_right(text: str, gold: str) -> bool:
    """Returns whether an answer equals the gold answer, both normalised."""
    return normalised(text) == normalised(gold)
