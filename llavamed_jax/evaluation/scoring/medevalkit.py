"""Reads answers as MedEvalKit does, for comparison with published tables; each function is one of that toolkit's rules.

Source: `utils/utils.py`, `utils/*/` and `utils/MMMU/eval_utils.py` of alibaba-damo-academy/MedEvalKit at 9b12e3b. The
code is this project's own. Rules that are wrong as such ("no" occurs in "normal") are kept, because another rule gives
another number. Where the toolkit stops with an error (an empty answer), the numbers here are 0.
"""

from __future__ import annotations

import difflib
import random
import warnings
from collections.abc import Iterable, Sequence

from llavamed_jax.datasets.sample import LETTERS
from llavamed_jax.evaluation import metrics

_BOX = r"\boxed{"
_NO_BOX = "None"
_LEADS = ("**answer**:", "**answer**", "*answer*:", "**answer:**", "answer is", "answer:", "答案:", "final answer",
          "final answer is")
_SMALL = 1e-8  # added to a denominator by the package rouge


def boxed(text: str) -> str:
    r"""Returns the content of the last `\boxed{}`; "None" if there is none, or its bracket is not closed."""
    start = text.rfind(_BOX)
    depth = 0
    for place in range(start + len(_BOX), len(text)) if start >= 0 else ():
        depth += (text[place] == "{") - (text[place] == "}")
        if depth < 0:
            return text[start + len(_BOX):place].strip()
    return _NO_BOX


def tagged(text: str, tag: str) -> str:
    """Returns the contents of all `<tag>…</tag>`, joined by blanks; the text itself if they are empty or missing."""
    begin, end, parts, place = f"<{tag}>", f"</{tag}>", [], 0
    while (start := text.find(begin, place)) >= 0 and (stop := text.find(end, start + len(begin))) >= 0:
        parts.append(text[start + len(begin):stop])
        place = stop + len(end)
    return " ".join(parts).strip() or text


def unwrapped(text: str) -> str:
    r"""Returns the content of a `\boxed{}`, or else of `<answer>`, or else the text."""
    box = boxed(text)
    return box if box != _NO_BOX else tagged(text, "answer")


def parsed(text: str) -> str:
    """Returns the lower-cased answer, without what stands before "answer:" and its like."""
    text = text.lower()
    if "boxed" in text:
        text = boxed(text)
    elif "<answer>" in text:
        text = tagged(text, "answer")
    for lead in _LEADS:
        text = text.rpartition(lead)[2]
    return text


def _bare(text: str) -> str:
    return parsed(text).replace("\n", "").replace(".", "")


def is_closed_right(text: str, gold: str) -> bool:
    """Returns whether an answer equals the gold answer, apart from case, full stops and line ends."""
    return _bare(text) == gold.lower()


def is_yes_no_right(text: str, gold: str) -> bool:
    """Returns whether exactly one of the letters "yes" and "no" occurs in an answer, and it is the gold answer.

    They may be a part of a word, as in "normal", "not" or "unknown".
    """
    said = _bare(text)
    return ("yes" in said) != ("no" in said) and gold.lower() in said


OPEN_NUMBERS = ("em", "bleu1", "bleu2", "bleu3", "bleu4", "rouge1", "rouge2", "rougel", "precision", "recall", "f1")


def open_numbers(text: str, gold: str, is_permuted: bool = False) -> dict[str, float]:
    """Returns the numbers of an open answer, as fractions.

    Args:
      text: the answer.
      gold: the gold answer.
      is_permuted: prints, as the toolkit does, F1 as "precision", precision as "recall" and recall as "f1".
    """
    said, gold = parsed(text), gold.lower()
    values = [float(said == gold), *_bleu(said, gold), *_rouge(said, gold), *_f1(said, gold, is_permuted)]
    return dict(zip(OPEN_NUMBERS, values, strict=True))


def _bleu(said: str, gold: str) -> list[float]:
    cut = lambda text: text.lower().replace(".", " .").split(" ")
    score = metrics.bleu_score().sentence_bleu
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [float(score([cut(gold)], cut(said), weights=[1 / n] * n)) for n in (1, 2, 3, 4)]


def _f1(said: str, gold: str, is_permuted: bool) -> tuple[float, float, float]:
    words, wanted = set(said.split()), set(gold.split())
    common = len(words & wanted)
    if not common:
        return 0.0, 0.0, 0.0
    precision, recall = common / len(words), common / len(wanted)
    f1 = 2 * (precision * recall) / (precision + recall)
    return (f1, precision, recall) if is_permuted else (precision, recall, f1)


def _rouge(said: str, gold: str) -> tuple[float, float, float]:
    """Returns F1 of ROUGE-1, ROUGE-2 and ROUGE-L as the package rouge 1.0.1 counts them: over distinct words."""
    sentences = [[" ".join(part.split()).split(" ") for part in text.split(".") if part] for text in (said, gold)]
    if not all(sentences):
        return 0.0, 0.0, 0.0
    words = [[word for sentence in each for word in sentence] for each in sentences]
    grams = lambda n: [{tuple(each[i:i + n]) for i in range(len(each) - n + 1)} for each in words]
    f1 = []
    for said_grams, gold_grams in (grams(1), grams(2)):
        f1.append(_rouge_f1(len(said_grams & gold_grams), len(said_grams), len(gold_grams)))
    union = set()
    for of_gold in sentences[1]:
        union |= {word for of_said in sentences[0] for word in _common(of_gold, of_said)}
    return f1[0], f1[1], _rouge_f1(len(union), len(set(words[0])), len(set(words[1])))


def _rouge_f1(common: int, said: int, gold: int) -> float:
    precision, recall = common / said if said else 0.0, common / gold if gold else 0.0
    return 2.0 * ((precision * recall) / (precision + recall + _SMALL))


def _common(first: Sequence[str], second: Sequence[str]) -> Iterable[str]:
    """Yields the words of a longest common subsequence, from its end."""
    lengths = [[0] * (len(second) + 1)]
    for word in first:
        row = [0]
        for j, other in enumerate(second):
            row.append(lengths[-1][j] + 1 if word == other else max(lengths[-1][j + 1], row[-1]))
        lengths.append(row)
    i, j = len(first), len(second)
    while i and j:
        if first[i - 1] == second[j - 1]:
            yield first[i - 1]
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1


def is_choice_right(text: str, right: int, lines: Sequence[str], has_tags: bool = False) -> bool:
    """Returns whether an answer is the right option: by its letter, by its text, or by its similarity to the options.

    Args:
      text: the answer.
      right: the index of the right option.
      lines: the options as the prompt lists them.
      has_tags: reads `<answer>` first, as for OmniMedVQA and MedXpertQA.
    """
    letters = [letter.lower() for letter in LETTERS[:len(lines)]]
    text = (tagged(text, "answer") if has_tags and text else text).lower()
    parts = text.split("\n\n")
    last = parts[-1].split(".")[0]
    text = parsed(parts[0] if parts[0] in letters else last if last in letters else text)
    text = text.strip().lower().replace("\n", "")
    head, options = text.split(".")[0].split(":")[-1], [line.lower() for line in lines]
    gold = letters[right]
    if head == gold:
        return True
    if head in letters:
        return options[letters.index(head)] == gold
    if head in options:
        return head == options[right]
    alike = [difflib.SequenceMatcher(None, option, text).ratio() for option in options]
    place = alike.index(max(alike))
    return place == right or options[place] == gold


_ENDS = (",", ".", "!", "?", ";", ":", "'")
_WORDS_OF_A_TEXT = 5  # an answer with more words is searched for the texts of options


def mmmu_choice(text: str, options: Sequence[str], guess: random.Random) -> int:
    """Returns the index of the option that MMMU's own evaluation reads; a guess if it reads none.

    Args:
      text: the answer.
      options: the texts of the options.
      guess: draws the option if none is read.
    """
    text = tagged(text, "answer")
    text = boxed(text) if boxed(text) != _NO_BOX else text
    if "<answer>" in text:  # the toolkit unwraps twice
        text = tagged(text, "answer")
    elif "\\boxed" in text:
        text = boxed(text)
    text = text.strip()
    for mark in _ENDS:
        text = text.strip(mark)
    text, letters = f" {text} ", LETTERS[:len(options)]
    for form in ("({})", " {} "):
        found = {text.rfind(form.format(letter)): place for place, letter in enumerate(letters)
                 if form.format(letter) in text}
        if found:
            return found[max(found)]
    if len(text.split()) > _WORDS_OF_A_TEXT:
        places = [(text.lower().rfind(option.lower()), -place) for place, option in enumerate(options)
                  if option.lower() in text.lower()]
        if places:
            return -max(places)[1]
    return guess.choice(range(len(options)))


# ---- the prompts, which are data ----

_PROMPTS = {
    ("yes_no", "en"): "Please output 'yes' or 'no'(no extra output).",
    ("yes_no", "zh"): "请输出'是'或'否'(不要有任何其它输出)。",
    ("closed", "en"): "Answer the question using a single word or phrase.",
    ("closed", "zh"): "请用一个单词或者短语回答该问题。",
    ("open", "en"): "Please answer the question concisely.",
    ("open", "zh"): "请简要回答该问题。",
}

_JUDGE = """
Your task is to determine whether the user's answer is correct based on the provided questions and standard answers (for example, if the user expresses a similar meaning to the standard answer, or another interpretation of the standard answer, it is considered correct.)

The question is: {question}

The standard answer: {answer}

The user's answer: {response}

Please strictly follow the following format for output(0 represents correct, 1 represents incorrect):
<think>{{your concise think step}}</think>
<judge>{{0/1}}</judge>

for example:
<think>The standard answer is right, and the user's answer is right frontal lobe, they express the same meaning, so it is correct.</think>
<judge>0</judge>
    """  # noqa: E501


def prompt(question: str, kind: str, language: str = "en") -> str:
    """Returns the prompt of a question of the kind `yes_no`, `closed` or `open`, in English or Chinese."""
    return f"{question}\n{_PROMPTS[kind, 'zh' if language == 'zh' else 'en']}"


def judge_prompt(question: str, answer: str, response: str) -> str:
    """Returns what the judge reads about an answer."""
    return _JUDGE.format(question=question, answer=answer, response=response)


REMINDER = ("\nYour last reply had no verdict that could be read. Think in one short sentence, and end the reply with "
            "<judge>0</judge> or <judge>1</judge>.\n")
"""What this project adds when it asks again; the toolkit does not ask again."""


def read_verdict(reply: str) -> bool:
    """Returns whether the toolkit takes a judge's reply for "right": 0 in `<judge>`, or as the whole reply."""
    return tagged(reply, "judge") == "0"


def stated_verdict(reply: str) -> bool | None:
    """Returns the verdict of a judge's reply; None if it states none, as a reply that was cut off, or an empty one."""
    return {"0": True, "1": False}.get(tagged(reply, "judge").strip())
