"""Finds verb and noun of a question by a rule that needs no language model.

The words of a question are its runs of letters. The verb is the first word from the left that is a form of one of the
verbs in `VERBS`; a form of "be", "have" or "do" counts only if there is no such word. The noun is the last word of a
run of content words; a run ends at a punctuation mark, a function word, a single letter, an adverb in -ly and a
participle in -ed. The run is the first one after the verb, or the last one before it if the verb is a participle after
a form of "be", or if no run follows. A plural loses its ending. This counts words: it does not parse, and it is wrong
for some questions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

VERBS = """
affect appear arrange assess cause characterize classify comment compare confirm contain correspond count define
demonstrate depict describe detect determine diagnose differ differentiate discuss display distinguish distribute
elaborate evaluate examine explain find form give happen help highlight identify illustrate imply indicate infer
interpret involve label list locate look make mark mean measure name note notice observe occur perform point provide
recognize relate report represent reveal say see show signify stain state suggest summarize surround take tell use
view visualize
""".split()
_IRREGULAR = {"find": "found", "give": "gave given", "make": "made", "mean": "meant", "say": "said", "see": "saw seen",
              "show": "shown", "take": "took taken", "tell": "told"}
_DOUBLED = {"label": "labelled labelling"}
_LIGHT = {form: verb for verb, forms in {
    "be": "is are was were be been being am", "have": "has have had having", "do": "do does did done doing"
}.items() for form in forms.split()}  # fmt: skip
_FUNCTION_WORDS = frozenset("""
a an the this that these those there it its they them their we us our you your i me my he she his her what which who
whom whose when where why how and or but nor if than as of in on at by for from to into onto with within without over
under between among across along around about above below behind beside near through during after before up down out
off can could will would shall should may might must not no any some all both each every either neither other another
more most much many few several such very too also just only still please so then here visible present seen evident
noticeable apparent clear likely possible able
""".split()) | set(_LIGHT)
_WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]")


def _forms(verb: str) -> set[str]:
    stem = verb[:-1] if verb.endswith("e") else verb
    past = verb[:-1] + "ied" if verb.endswith("y") and verb[-2] not in "aeou" else stem + "ed"
    third = (verb[:-1] + "ies" if verb.endswith("y") and verb[-2] not in "aeou"
             else verb + "es" if verb.endswith(("s", "sh", "ch", "x")) else verb + "s")
    regular = set() if verb in _IRREGULAR and verb != "show" else {past}
    return {verb, third, stem + "ing", *regular, *_IRREGULAR.get(verb, "").split(), *_DOUBLED.get(verb, "").split()}


_VERB_OF = {form: verb for verb in VERBS for form in _forms(verb)}


def verb_and_noun(question: str) -> tuple[str, str] | None:
    """Returns verb and noun of a question, in lower case; None if one of them is not found."""
    words = [word.lower() for word in _WORDS.findall(question)]
    place = next((i for i, word in enumerate(words) if word in _VERB_OF), None)
    if place is None:
        place = next((i for i, word in enumerate(words) if word in _LIGHT), None)
        if place is None:
            return None
    verb = _VERB_OF.get(words[place]) or _LIGHT[words[place]]
    is_passive = (words[place] != verb and words[place].endswith(("ed", "n", "found", "made", "told"))
                  and any(_LIGHT.get(word) == "be" for word in words[:place]))
    before, after = _last_run(words[:place]), _first_run(words[place + 1:])
    run = (before or after) if is_passive else (after or before)
    return (verb, _singular(run[-1])) if run else None


def _ends(word: str, has_run: bool) -> bool:
    is_adverb, is_participle = word.endswith("ly"), has_run and len(word) > 4 and word.endswith("ed")
    return not word[0].isalpha() or len(word) == 1 or word in _FUNCTION_WORDS or is_adverb or is_participle


def _first_run(words: Sequence[str]) -> list[str]:
    run: list[str] = []
    for word in words:
        if _ends(word, bool(run)):
            if run:
                break
            continue
        run.append(word)
    return run


def _last_run(words: Sequence[str]) -> list[str]:
    runs: list[list[str]] = [[]]
    for word in words:
        if _ends(word, bool(runs[-1])):
            runs.append([])
        else:
            runs[-1].append(word)
    return next((run for run in reversed(runs) if run), [])


def _singular(word: str) -> str:
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and len(word) > 3 and not word.endswith(("ss", "is", "us")) else word
