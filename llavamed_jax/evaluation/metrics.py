"""Text metrics of the original LLaVA-Med evaluation, including its quirks. All values are fractions.

The published LLaVA-Med numbers were computed with these functions (`llava/eval/run_eval*.py` of release v1.0.0), so a
comparison with the paper needs exactly these. Several differ from what their names say: "exact match" is a precision
with partial credit, recall counts repetitions in the candidate, and normalisation removes at most 32 full stops. The
quirks are kept because a corrected metric would be a different metric; `scoring/strict.py` has the strict metrics.
"""

import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from types import ModuleType

_PUNCTUATION = (
    ";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
# The original passes `re.UNICODE` (the integer 32) to `re.sub` as `count`.
_MOST_PERIODS_REMOVED = 32

_NUMBERS = {
    "none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4",
    "five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10",
}  # fmt: skip
_ARTICLES = frozenset({"a", "an", "the"})

# The contraction list of the public VQA evaluation, with its oddities: "somebody'd" loses its apostrophe, "let's" and
# "she's" stay as they are, and the four keys with capitals never match, because words are lower-cased before.
CONTRACTIONS = {
    "aint": "ain't", "arent": "aren't", "cant": "can't", "couldve": "could've", "couldnt": "couldn't",
    "couldn'tve": "couldn't've", "couldnt've": "couldn't've", "didnt": "didn't", "doesnt": "doesn't", "dont": "don't",
    "hadnt": "hadn't", "hadnt've": "hadn't've", "hadn'tve": "hadn't've", "hasnt": "hasn't", "havent": "haven't",
    "hed": "he'd", "hed've": "he'd've", "he'dve": "he'd've", "hes": "he's", "howd": "how'd", "howll": "how'll",
    "hows": "how's", "Id've": "I'd've", "I'dve": "I'd've", "Im": "I'm", "Ive": "I've", "isnt": "isn't", "itd": "it'd",
    "itd've": "it'd've", "it'dve": "it'd've", "itll": "it'll", "let's": "let's", "maam": "ma'am",
    "mightnt": "mightn't", "mightnt've": "mightn't've", "mightn'tve": "mightn't've", "mightve": "might've",
    "mustnt": "mustn't", "mustve": "must've", "neednt": "needn't", "notve": "not've", "oclock": "o'clock",
    "oughtnt": "oughtn't", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at", "shant": "shan't",
    "shed've": "she'd've", "she'dve": "she'd've", "she's": "she's", "shouldve": "should've", "shouldnt": "shouldn't",
    "shouldnt've": "shouldn't've", "shouldn'tve": "shouldn't've", "somebody'd": "somebodyd",
    "somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've", "somebodyll": "somebody'll",
    "somebodys": "somebody's", "someoned": "someone'd", "someoned've": "someone'd've", "someone'dve": "someone'd've",
    "someonell": "someone'll", "someones": "someone's", "somethingd": "something'd",
    "somethingd've": "something'd've", "something'dve": "something'd've", "somethingll": "something'll",
    "thats": "that's", "thered": "there'd", "thered've": "there'd've", "there'dve": "there'd've",
    "therere": "there're", "theres": "there's", "theyd": "they'd", "theyd've": "they'd've", "they'dve": "they'd've",
    "theyll": "they'll", "theyre": "they're", "theyve": "they've", "twas": "'twas", "wasnt": "wasn't",
    "wed've": "we'd've", "we'dve": "we'd've", "weve": "we've", "werent": "weren't", "whatll": "what'll",
    "whatre": "what're", "whats": "what's", "whatve": "what've", "whens": "when's", "whered": "where'd",
    "wheres": "where's", "whereve": "where've", "whod": "who'd", "whod've": "who'd've", "who'dve": "who'd've",
    "wholl": "who'll", "whos": "who's", "whove": "who've", "whyll": "why'll", "whyre": "why're", "whys": "why's",
    "wont": "won't", "wouldve": "would've", "wouldnt": "wouldn't", "wouldnt've": "wouldn't've",
    "wouldn'tve": "wouldn't've", "yall": "y'all", "yall'll": "y'all'll", "y'allll": "y'all'll",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've", "youd": "you'd",
    "youd've": "you'd've", "you'dve": "you'd've", "youll": "you'll", "youre": "you're", "youve": "you've",
}  # fmt: skip


def normalize_word(text: str) -> str:
    """Normalises an answer as the VQA evaluation does: punctuation, case, numbers, articles, contractions.

    A punctuation mark is replaced by a blank. It is deleted instead if the same mark stands next to a blank somewhere
    in the text, or if the text contains digit-comma-digit anywhere. Both tests look at the text before any replacement,
    so a single "1,000" deletes every mark. Full stops before a digit stay; the first 32 others are deleted.
    """
    has_digit_comma = _DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        vanishes = has_digit_comma or f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if vanishes else " ")
    cleaned = _PERIOD.sub("", cleaned, count=_MOST_PERIODS_REMOVED)
    words = (_NUMBERS.get(word, word) for word in cleaned.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES).replace(",", "")


def _counts(text: str) -> Counter[str]:
    return Counter(normalize_word(text).lower().split())


def exact_match(candidate: str, reference: str) -> float:
    """Returns the original's "exact match": distinct reference words found in the candidate / words of the candidate.

    This is not string equality: "yes it is" against "yes" gives 1/3. The value never exceeds the precision of `f1`, and
    is 0 for an empty candidate.
    """
    candidate_counts = _counts(candidate)
    total = candidate_counts.total()
    return len(candidate_counts.keys() & _counts(reference).keys()) / total if total else 0.0


def f1(candidate: str, reference: str) -> tuple[float, float, float]:
    """Returns token F1, precision and recall as the original counts them; recall is the paper's "open" number.

    True positives are the *candidate's* counts of shared words, for recall too. So repeating a right word raises
    recall, and the number of times that the reference contains the word does not matter. All three are 0 if no word is
    shared.
    """
    candidate_counts, reference_counts = _counts(candidate), _counts(reference)
    shared = candidate_counts.keys() & reference_counts.keys()
    if not shared:
        return 0.0, 0.0, 0.0
    true_positives = sum(candidate_counts[word] for word in shared)
    missed = sum(count for word, count in reference_counts.items() if word not in shared)
    precision = true_positives / candidate_counts.total()
    recall = true_positives / (true_positives + missed)
    return 2 * precision * recall / (precision + recall), precision, recall


class CandidateList:
    """Answer candidates, normalised and split once, for `candidate_accuracy` over many predictions.

    Args:
      candidates: the possible answers.

    Raises:
      ValueError: `candidates` is empty.
    """

    def __init__(self, candidates: Sequence[str | int]):
        if not candidates:
            raise ValueError("the list of answer candidates is empty; candidate accuracy needs at least one")
        self._texts = [normalize_word(str(candidate)) for candidate in candidates]
        self._words = [frozenset(text.lower().split()) for text in self._texts]

    def nearest(self, prediction: str) -> str:
        """Returns the first candidate, normalised, with the largest share of its distinct words in `prediction`."""
        words = _counts(prediction).keys()
        shares = [len(own & words) / len(own) if own else 0.0 for own in self._words]
        # The first maximum: a prediction that shares no word gets candidate 0, as in the original.
        return self._texts[shares.index(max(shares))]


def candidate_accuracy(prediction: str, reference: str, candidates: Sequence[str | int] | CandidateList) -> int:
    """Returns 1 if the candidate nearest to the prediction is the reference (both normalised), else 0.

    Raises:
      ValueError: the list of candidates is empty.
    """
    if not isinstance(candidates, CandidateList):
        candidates = CandidateList(candidates)
    return int(candidates.nearest(prediction) == normalize_word(reference))


_BLEU_WEIGHTS = [(0.25, 0.25, 0.25, 0.25), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0)]


def bleu(reference: str, candidate: str) -> tuple[float, float, float, float]:
    """Returns BLEU-4 and the 1-, 2- and 3-gram precisions with brevity penalty, by nltk's unsmoothed `sentence_bleu`.

    Lower-cases and splits the texts, but does not normalise them, because the original's callers do that. Without
    smoothing, an n-gram order without a match counts as the smallest normal float; hence values such as 1.8e-231.
    """
    sentence_bleu = bleu_score().sentence_bleu
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nltk warns at every n-gram order without a match, which is common here
        scores = sentence_bleu([reference.lower().split()], candidate.lower().split(), weights=_BLEU_WEIGHTS)
    return tuple(float(score) for score in scores)


def bleu_score() -> ModuleType:
    """Imports and returns nltk's module `translate.bleu_score`.

    The import takes a second and the other metrics do not need it, so it is not at the top of this file. On import nltk
    looks for a download directory and fails for a user without a home directory, for example in a container; so HOME is
    set during the import.
    """
    if "nltk" not in sys.modules and not os.path.isabs(os.path.expanduser("~")):
        # HOME may be unset, empty or relative.
        earlier = {name: os.environ[name] for name in ("HOME",) if name in os.environ}
        os.environ["HOME"] = os.sep
        try:
            import nltk  # noqa: F401
        finally:
            del os.environ["HOME"]
            os.environ |= earlier
    from nltk.translate import bleu_score

    return bleu_score


def is_substring_hit(prediction: str, reference: str) -> bool:
    """Returns whether the reference is a substring of the prediction (`run_eval_batch`); both are normalised once."""
    return normalize_word(reference) in normalize_word(prediction)


def is_yes_no_hit(prediction: str, reference: str) -> bool:
    """Returns whether reference, and "yes" or "no", are substrings of the prediction (`run_eval`'s closed accuracy).

    All texts are normalised once. The "no" in "normal" counts too.
    """
    normalized = normalize_word(prediction)
    return ("yes" in normalized or "no" in normalized) and normalize_word(reference) in normalized


# ---- the original's evaluators, which normalise both texts before each metric normalises them again; only their
# substring accuracies do not. A second pass matters: each removes at most 32 periods. -------------------------------


def normalized(texts: Iterable[object]) -> list[str]:
    """Normalises texts as the original's evaluators do."""
    return [normalize_word(str(text).lower()) for text in texts]


def open_values(prediction: str, reference: str, candidates: CandidateList | None) -> dict[str, float]:
    """Returns the metrics of an open answer; without candidates there is no `open_accuracy_candidates`."""
    predicted, gold = normalized((prediction, reference))
    values = {"exact_match": exact_match(predicted, gold)}
    values |= dict(zip(("f1", "precision", "recall"), f1(predicted, gold), strict=True))
    values |= dict(zip(("bleu", "bleu_1", "bleu_2", "bleu_3"), bleu(gold, predicted), strict=True))
    if candidates is not None:
        values["open_accuracy_candidates"] = candidate_accuracy(predicted, gold, candidates)
    return values | {"open_accuracy_substring": is_substring_hit(str(prediction), str(reference))}


def closed_values(prediction: str, reference: str) -> dict[str, float]:
    """Returns the metrics of a closed answer."""
    predicted, gold = normalized((prediction, reference))
    return {"closed_accuracy_yes_no": is_yes_no_hit(str(prediction), str(reference)),
            "closed_accuracy_substring": is_substring_hit(str(prediction), str(reference)),
            "closed_recall": f1(predicted, gold)[2]}
