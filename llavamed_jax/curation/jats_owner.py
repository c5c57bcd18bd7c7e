"""Tells from the words beside a figure whether it belongs to somebody else: permissions, sources and copyright.

What a patient, a family or an ethics committee allowed says nothing about who owns a figure, and neither does what was
taken from a body: `biopsy taken from the left lobe`. So a source counts only if it is cited (`taken from Smith et al.`,
`[12]`, an address), or if it is a name on which a figure's phrase ends (`Image taken from Wikipedia.`).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator

_BY_PERMISSION = re.compile(
    r"\b(?:re-?us|re-?print|re-?produc|re-?publish|adapt|adopt|modif|borrow|tak|us|obtain)(?:e|ed|en|ing|ied)?\b"
    r"[^.;]{0,120}\bpermissions?\b|\b(?:by|with)\s+(?:\w+\s+){0,2}permissions?\b|\ball\s+rights\s+reserved\b",
    re.IGNORECASE)
_GIVEN = r"(?:obtained|received|secured|acquired|sought|granted|given)"
_OWNER_PERMITTED = re.compile(  # of a licence such words may speak of the reader: `permission is granted to copy`
    rf"\bpermissions?\s+(?:of|from|by)\b|\bpermissions?\b[^.;]{{0,80}}\b{_GIVEN}\b", re.IGNORECASE)
_NEEDS_NONE = re.compile(r"\b(?:without|no)\s+(?:\w+\s+){0,4}permissions?", re.IGNORECASE)

_PERSON = (r"\b(?:patients?|parents?|parental|guardians?|famil(?:y|ies)|participants?|subjects?|volunteers?|donors?|"
           r"mother|father|son|daughter|wife|husband|spouse|relatives?|child|next\s+of\s+kin)\b")
_OF_PERSON = (r"(?:his\s*(?:/|or)\s*her\s+)?(?-i:(?!(?:of|from|for|by|in|and|or)\b)[a-z'\u2019]+\s+){0,3}?"
              rf"{_PERSON}(?![\w'\u2019-])")
_TO_DO = r"(?:\s+(?:to|for)(?:\s+(?!(?:of|from|by)\b)\w+){1,8}?)?"  # permission `to publish this case`
_WAS_GIVEN = rf"(?:\s+(?:has|have|had|was|were|been|also)){{0,3}}(?:\s+{_GIVEN})?"
_BOARD = (r"(?:(?!(?:and|or)\b)[\w-]+\s+){0,5}?(?:ethics?|ethical|review)\s+(?:\w+\s+){0,2}?"
          r"(?:committees?|boards?|commissions?)\b")
_CONSENT = re.compile(  # of the person whom a figure shows, or of an ethics committee
    rf"{_PERSON}(?:['\u2019]s?)?\s+(?:(?:written|informed|verbal|oral|explicit|express|full|kind)\s+){{0,2}}"
    rf"(?:consent\s+and\s+)?permissions?\b(?!\s+(?:of|from|by)\b|{_TO_DO}{_WAS_GIVEN}\s+(?:of|from|by)\b)"
    rf"(?:{_TO_DO}{_WAS_GIVEN})"
    rf"|\bpermissions?{_TO_DO}{_WAS_GIVEN}\s+(?:of|from|by)\s+"
    rf"(?:{_OF_PERSON}(?:(?:\s*,)?\s*(?:and|or|/)\s*(?:of\s+|from\s+)?{_OF_PERSON})*"
    r"(?=\s*(?:[.,;:)\]]|$|(?:to|for|who|whose|in|is|was|were|has|after|shown|depicted|described|involved|concerned)\b))"
    rf"|{_BOARD})(?!\s*,?\s*(?:and|or)\b)"
    r"|\binformed\s+(?:written\s+)?(?:consent\s+(?:and|or)\s+)?permissions?\b(?!\s+(?:of|from|by)\b)", re.IGNORECASE)

_WORD = r"(?-i:[A-Z][\w'\u2019-]{0,40})"
_REFERENCE = (r"(?:refs?\b\.?\s*[\[(]?\d|references?\s*(?:[\[(]?\d|[.,;)]|$)|\[\s*\d|\(\s*\d{1,3}\s*\)\s*(?:[.,;)]|$)|"
              r"[(\[<]?(?:https?:|www\.|doi\b))")
_AUTHORS = (rf"{_WORD}(?:[\s,]+(?:and\s+|&\s+)?(?-i:[A-Z][\w'\u2019.-]{{0,40}})){{0,4}}\s*,?\s*"
            r"(?:et\s+al\b|and\s+(?:colleagues|co-?workers)\b|\[\s*\d)")
_WORK = r"(?:(?:an?|the)\s+(?:\w+\s+){0,2}?(?:study|article|paper|work|report|book|textbook|review)\s+(?:of|by)\s+)?"
_CITED = rf"(?:the\s+)?{_WORK}(?:{_REFERENCE}|{_AUTHORS})"
_IS_OURS = (r"(?!(?:patients?|cases?|subjects?|participants?|volunteers?|individuals?|donors?|groups?|panels?|videos?|"
            r"movies?|figs?|figures?|tables?|supplement\w*|additional|days?|weeks?|above|below|axial|coronal|sagittal|"
            r"left|right|author\w*)\b)")
_NAME = (rf"(?:the\s+)?{_IS_OURS}(?:(?-i:[A-Z](?=[\w'\u2019-]{{0,40}}[a-z])[\w'\u2019-]{{1,40}})|WHO|CDC|NASA|NIH)"
         r"(?:\s+(?:(?-i:[A-Z][\w.'\u2019-]{0,40})|of|the|and|for|&)){0,6}?\s*(?:[.,;:)(\]]|$|(?:19|20)\d\d\b)")
_BEGIN = r"(?:^|[.(\[:;]\s*)"
_FIGURE = (r"\b(?:figures?|figs?\.?|images?|pictures?|illustrations?|diagrams?|schematics?|schemes?|photos?|"
           r"(?:photo|photomicro|micro|radio)graphs?|drawings?|sketch(?:es)?|maps?|panels?|scans?)")
_WAS = r"(?:\s+(?:is|are|was|were|been|has|have|originally|partly|partially|kindly)){0,3}\s+"
_SOURCE = (  # a name, but not that of the authors' clinic or of an isotope
    r"(?-i:(?=[A-Z]))(?!authors?\b|own\b|our\b|[^\s.;)]*\d)"
    r"(?![^.;)]{0,100}\b(?:hospital|clinic|universit|department|faculty|institut|school))")
_FROM_ELSEWHERE = re.compile("|".join((
    r"\b(?:re-?(?:used?|printed|produced|published|drawn)|adapted|adopted|modified|borrowed)"
    r"(?:\s*[,(]\s*(?:with|and|in|but)\s[^.;,()]{0,60}[,)]|,(?=\s+from\b))?\s+(?:\w+\s+){0,3}from\b",
    rf"\b(?:re-?produced|re-?drawn|drawn|adapted|modified)\s+(?:\w+\s+){{0,2}}?after\s+{_CITED}",
    rf"(?:{_BEGIN}|{_FIGURE}{_WAS})(?:re-?drawn|drawn|adapted|modified)\s+after\s+{_NAME}",
    rf"\b(?:taken|copied|excerpted|downloaded)\s+(?:\w+\s+){{0,2}}?from\s+{_CITED}",
    rf"(?:{_BEGIN}|{_FIGURE}{_WAS})(?:taken|copied|excerpted|downloaded|sourced)\s+from\s+"
    rf"(?:{_NAME}|(?:the|an?)\s+(?:\w+\s+){{0,2}}?(?:web\s?site|internet|literature|textbook|online)\b)",
    rf"{_FIGURE}{_WAS}(?:(?:obtained|retrieved|extracted|sourced)\s+)?from\s+{_CITED}",
    rf"\(\s*from\s+{_CITED}",
    rf"(?:{_BEGIN}|{_FIGURE}\s+)sources?\s*:\s*(?:{_CITED}|{_SOURCE})",
    r"\bunder\s+(?:an?\s+|the\s+)?(?:[\w-]+\s+){0,2}?licen[cs]e\s+(?:from|of|by)\s+"
    r"(?!(?:\w+\s+){0,4}?(?:home\s+office|ministry|government|authorit\w+|ethic\w+)\b)",
    r"\blicen[cs]ed\s+from\b",
    rf"(?:{_FIGURE}\s+credits?\s*(?::|to\b)|\bcredits?\s*:)\s*(?!(?:the\s+|our\s+|all\s+)?(?:authors?|own|us)\b)\w",
    r"\b(?:getty\s+images|shutterstock|i-?stock(?:photo)?|adobe\s+stock|alamy|science\s+photo\s+library|"
    r"wikipedia|wikimedia)\b",
    r"\bcourtesy\b")), re.IGNORECASE)

_COPYRIGHT = re.compile(r"\u00a9|\(c\)|\bcopyright\b", re.IGNORECASE)
_CLAIMED = re.compile(  # a sign that is glued to the end of a product's name claims nothing about the figure
    r"(?:(?<!\w)\u00a9|\u00a9(?=\s*(?:(?:19|20)\d\d\b|[.,;)\]]|$))|\bcopyright(?:ed|s)?\b)"
    r"(?:[\s:,]*(?:\u00a9|\(c\)|copyright))*", re.IGNORECASE)
_NO_COPYRIGHT = re.compile(
    r"\b(?:no|not|without|free\s+(?:of|from)|any)\b(?:\s+\w+){0,4}?\s+copyright\w*|\bcopyright[\s-]*(?:free|expired|"
    r"permissions?|infring\w+)\b", re.IGNORECASE)
_LONGEST_OWNER = 300  # characters
_OF_AUTHORS = re.compile(
    r"(?:(?:holders?|owners?|notice|is|are|held|hold|retained|owned|remains?|belongs?|with|by|to|of|in|the|these|this|"
    r"present|all|our|its)\s+)*authors?\b")


def is_by_permission(sentence: str, is_of_figure: bool = False) -> bool:
    """Returns whether a sentence speaks of a permission that its owner gave, and not of a person's consent.

    Args:
      sentence: the sentence.
      is_of_figure: whether it speaks of a figure, and not of what a licence permits.
    """
    said = _CONSENT.sub("", _NEEDS_NONE.sub("", sentence))
    return bool(_BY_PERMISSION.search(said) or is_of_figure and _OWNER_PERMITTED.search(said))


def is_from_elsewhere(text: str) -> bool:
    """Returns whether a text names a source outside the article, or a giver."""
    return _FROM_ELSEWHERE.search(text) is not None


def states_copyright(text: str) -> bool:
    """Returns whether a statement has the sign or the word."""
    return _COPYRIGHT.search(text) is not None


def owner_in(text: str) -> str:
    """Returns the owner in a statement of copyright, without the sign, years and stops, in lower case."""
    return " ".join(re.findall(r"[^\W\d_]+", _COPYRIGHT.sub(" ", text).casefold()))


def owners_in(sentences: Iterable[str], has_panels: bool = True) -> Iterator[str]:
    """Yields the owners that sentences of a caption state, as `owner_in` writes them, with words that follow.

    The owner stands after the sign, or before it, or in the next sentence.

    Args:
      sentences: the sentences.
      has_panels: whether `(c)` alone is a panel, and no sign.
    """
    is_due = False
    for sentence in (_NO_COPYRIGHT.sub(" ", each) for each in sentences):
        sentence = sentence if has_panels else re.sub(r"\(c\)", "\u00a9", sentence, flags=re.IGNORECASE)
        if is_due and (owner := owner_in(sentence)):
            yield owner
        is_due = False
        for claim in _CLAIMED.finditer(sentence):
            before = sentence[max(claim.start() - _LONGEST_OWNER, 0):claim.start()].rstrip(" ,([")
            owner = owner_in(sentence[claim.end():claim.end() + _LONGEST_OWNER]) or owner_in(
                re.split(r"[.;:,()\[\]]", before)[-1])
            if owner:
                yield owner
            is_due = not owner


def is_of(owner: str, known: Collection[str]) -> bool:
    """Returns whether an owner is one of those that the article states, or its authors.

    Args:
      owner: one of `owners_in`.
      known: the article's owners, as `owner_in` writes them.
    """
    return bool(_OF_AUTHORS.match(owner)) or any(
        f"{owner} ".startswith(f"{each} ") for each in known if each)
