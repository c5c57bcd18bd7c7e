"""Reads answers to a table of one's own as VLMEvalKit does: `ImageYORNDataset` for yes or no, `ImageVQADataset` else.

Source: `dataset/image_yorn.py`, `dataset/image_vqa.py`, `dataset/utils/` and `smp/misc.py` of ms-vlmeval 0.0.20. The
code is this project's own. The rule of `ImageVQADataset` is the one for a set with GQA in its name: its usual rule
compares an answer with the other gold answers of the question, and gives 0 where there is only one gold answer.
"""

from __future__ import annotations

import re

_PROMPT = "Answer the question using a single word or phrase."
_PUNCTUATION = ";/[]\"{}()=+\\_->@`,?!<"
# pandas reads these words of a table as NaN, and so VLMEvalKit does; among the gold answers of SLAKE is "None".
_NAN = frozenset({"", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>",
                  "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"})


def is_yes_no(gold: str) -> bool:
    """Returns whether a question belongs into the table of `ImageYORNDataset`."""
    return gold.strip().lower() in ("yes", "no")


def prompt(question: str, gold: str) -> str:
    """Returns the prompt of a question; those about yes or no have no instruction."""
    return question if is_yes_no(gold) else f"{question}\n{_PROMPT}"


def is_right(text: str, gold: str) -> bool:
    """Returns whether an answer says the gold yes or no and not the other; else whether it equals the gold answer."""
    if is_yes_no(gold):
        words = _without_punctuation(_of_a_table(text).lower()).split()
        said = [word for word in ("yes", "no") if word in words]
        return said == [gold.strip().lower()]
    return _of_a_table(text).strip().lower() == _of_a_table(gold).strip().lower()


def _of_a_table(text: str) -> str:
    return "nan" if text in _NAN else text


def _without_punctuation(text: str) -> str:
    """Removes marks that touch a blank, and replaces the others by blanks; then removes full stops."""
    out, has_thousands = text, re.search(r"\d,\d", text) is not None
    for mark in _PUNCTUATION:
        touches = f"{mark} " in text or f" {mark}" in text or has_thousands
        out = out.replace(mark, "" if touches else " ")
    return re.sub(r"(?<!\d)\.(?!\d)", "", out, count=int(re.UNICODE))  # the toolkit passes the flag as the count
