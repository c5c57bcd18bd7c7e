"""Remarks behind an answer: "as seen in the image", "because it is bright", "很明显".

A remark states evidence for the answer and never another answer. So remarks are a closed list: every clause behind the
answer has to be one of the forms below from its first word to its last ("it is visible", never "it is MRI"). Only a
reason ("because …", "Explanation: …") may have other words. It has to tell how something looks, and may not take the
answer back, give another one, or name another side, plane or modality.
"""

from __future__ import annotations

import re

_MOST = 1600  # characters of a remark; keeps the search linear in the length of an answer

_MODALITY = r"(?:cts?|mris?|mr|x-?rays?|ultrasounds?|pet|radiographs?)"
_PICTURE = (r"(?:(?:provided|given|attached|uploaded|above|displayed|medical|same|whole|entire)\s+)?"
            rf"(?:{_MODALITY}\s+)?(?:images?|pictures?|scans?|figures?|films?|photos?|slices?|views?|radiographs?|"
            rf"x-?rays?|cts?|mris?)(?:\s+(?:findings?|features?|appearance|provided|given|shown|above|alone|itself))?")
_HOW = r"(?:very\s+|well\s+|best\s+|quite\s+|easily\s+|clearly\s+|readily\s+)?"
_SEEN = (r"(?:seen|shown|visible|visuali[sz]ed|evident|apparent|obvious|clear|observed|noted|identified|demonstrated|"
         r"depicted|indicated|recogni[sz]able)")
_THE_PICTURE = rf"(?:the|this|these|that|what)\s+{_PICTURE}(?:\s+shows?)?"
_WHERE = rf"(?:\s+(?:here|(?:in|on|from|by|within)\s+{_THE_PICTURE}))?"
_SURE = (r"(?:clearly|definitely|certainly|obviously|evidently|indeed|surely|of\s+course|i\s+(?:think|believe)|"
         r"i\s+am\s+(?:sure|certain|confident)|with\s+(?:(?:very\s+)?(?:high|full|great)\s+)?(?:confidence|certainty))")
_ENGLISH = "|".join((
    _SURE,
    rf"(?:as\s+|it\s+|which\s+|this\s+|that\s+)?(?:(?:is|are|was|were|can\s+be|it\s+is)\s+)?{_HOW}{_SEEN}{_WHERE}",
    rf"it's\s+{_HOW}{_SEEN}{_WHERE}",
    rf"(?:as\s+)?(?:i|we|you|one)\s+(?:can\s+)?{_HOW}see(?:\s+(?:it|this|that))?{_WHERE}",
    rf"see(?:\s+{_THE_PICTURE})?",
    rf"(?:as\s+)?(?:the|this|these)\s+{_PICTURE}\s+(?:clearly\s+)?(?:shows?|demonstrates?|confirms?|indicates?|"
    rf"reveals?|depicts?|suggests?)(?:\s+(?:it|this|that|so))?(?:\s+clearly)?",
    rf"(?:in|on|from|by|according\s+to|based\s+on|judging\s+(?:by|from)|given|due\s+to)\s+{_THE_PICTURE}",
    rf"(?:the|this)\s+(?:finding|lesion|structure|organ|abnormality|feature|object)\s+is\s+{_HOW}{_SEEN}{_WHERE}",
    r"(?:this|that|it)\s+is\s+(?:correct|certain|sure)",
))
_IN_PICTURE = r"(?:从|在|由|如)?(?:本|该|此|这张|这幅)?(?:图|图片|图像|影像|片子|片)(?:中|上|里|内|可)?"
_CLEARLY = r"(?:可以|可|能|能够)?(?:很|非常|十分)?(?:清楚|清晰|明显)?(?:地)?"
_CHINESE = "|".join((
    rf"(?:{_IN_PICTURE})?{_CLEARLY}(?:看到|看出|看见|见到|可见|显示|所示|见)",
    r"(?:这|它)?(?:很|非常|十分)?(?:明显|清楚|清晰|显然|确定|肯定|当然|确实)",
    rf"根据{_IN_PICTURE}", r"见图",
))
_EVIDENCE = re.compile(rf"(?:{_ENGLISH}|{_CHINESE})", re.I)
_REASON = re.compile(r"(?:because|since|due\s+to|as\s+(?:it|there|the|this|we|i)\b)|因为|由于|因", re.I)
_EXPLANATION = re.compile(r"(?:explanation|reason(?:ing)?|rationale|justification|理由|解释|说明|原因)\s*:", re.I)

_CLAUSE = re.compile(r"[,:()\u3000]|\s-\s|(?<=\w)-(?=\s)")
_SENTENCE = re.compile(r"[;!?\n]|\.(?!\d)")
# A reason with one of these takes the answer back or gives another one.
_SAYS_ELSE = re.compile(
    r"\b(?:also|but|rather|instead|actually|or|nor|not|\w+n't|no|yes|wrong|incorrect|correct|however|although|though|"
    r"may|might|could|would|should|possibly|probably|perhaps|maybe|alternatively|answers?|options?|choices?|likely)\b"
    r"|[不但而或没无非否]|应该|可能|也许|答案|正确|错误|其实|实际", re.I)
# What a reason has to tell: how something looks, or that it is seen.
_ADJECTIVES = (r"visible|seen|shown|evident|clear|bright\w*|dark\w*|dens\w*|large\w*|bigg?\w*|small\w*|round\w*|"
               r"located|enlarged|symmetric\w*|asymmetric\w*|sharp|irregular|fluid|air|typical|consistent")
_A_PICTURE = (r"an?\s+(?:(?:cross-?\s?sectional|sectional|tomographic|two-dimensional|gr[ae]y-?\s?scale|"
              r"black[-\s]and[-\s]white|axial|coronal|sagittal|transverse|projection(?:al)?)\s+)+"
              r"(?:image|picture|view|slice|scan)s?\b")
# "It is …" states an answer, unless an adjective of appearance or a kind of picture follows; "there is" is a finding.
_LOOK = (rf"(?:(?:(?:very|more|clearly|the|a|an|so|most|well|quite)\s+)*(?:{_ADJECTIVES})"
         rf"(?=\s*(?:$|[,;:.!)\n])|\s+(?:in|on|at|from|by|to|and|here|than|of|with|within)\b)"
         rf"|{_A_PICTURE})")
_STATES = re.compile(
    r"\b(?:it|this|that|these|those|they|patient|images?|scans?|modality|diagnosis|finding|organ|side|plane)"
    rf"(?:'s|\s+(?:is|are|was|were|has|have))\b(?!\s+{_LOOK})|\A\s*[是为]|(?:这|那|它|图像?|影像)[^,]{{0,4}}是", re.I)
_SIGN = (r"(?:opacit\w+|opacification|consolidations?|bronchograms?|infiltrat\w+|densit\w+|lucen\w+|attenuation|"
         r"intensit\w+|signals?|contrast|shadow\w*|silhouettes?|thickening|enlargement|widening|blunting|brightness|"
         r"borders?|margins?|shapes?|textures?|appearance|artifacts?)")
_TELLS = re.compile(
    rf"(?:'s|(?<!there\s)\b(?:is|are|was|were|be|looks?|appears?))\s+(?:{_LOOK}|patchy|hazy|diffuse|irregular)"
    r"|\b(?:visible|seen|shown|shows?|showing|appears?|looks?|lies|demonstrates?|reveals?|indicates?|suggests?)\b"
    rf"|\b(?:bright|dark|dense|patchy|hazy|diffuse|irregular|increased|decreased|hyper\w+|hypo\w+)\s+{_SIGN}\b"
    rf"|\b(?:there\s+(?:is|are|was|were)|of|to|has|have|with)\s[^.;]{{0,60}}\b{_SIGN}\b|\b{_A_PICTURE}"
    r"|[见看显亮暗白黑]|位于|明显|密度|信号|阴影|边缘|形态", re.I)
# Words of which a remark may have only the answer's, if the answer has one of them.
_KINDS = [{name: re.compile(words, re.I) for name, words in kind.items()} for kind in (
    {"ct": r"\bcts?\b", "mr": r"\b(?:mris?|mr)\b", "x": r"\b(?:x-?\s?rays?|radiographs?)\b", "us": r"\bultrasounds?\b",
     "pet": r"\bpet\b"},
    {"left": r"\bleft\b|左", "right": r"\bright\b|右", "both": r"\b(?:both|bilateral)\b|双|两侧"},
    {"upper": r"\bupper\b|上[叶肺腹]", "middle": r"\bmiddle\b|中叶", "lower": r"\blower\b|下[叶肺腹]"},
    {"axial": r"\b(?:axial|transverse)\b|横断|轴[位状]", "coronal": r"\bcoronal\b|冠状",
     "sagittal": r"\bsagittal\b|矢状"},
)]


def _says_another(answer: str, rest: str) -> bool:
    """Returns whether a remark names a modality, a side or a plane, and not only those that the answer names."""
    for kind in _KINDS:
        own = {name for name, words in kind.items() if words.search(answer)}
        if own and {name for name, words in kind.items() if words.search(rest)} - own:
            return True
    numbers = re.findall(r"\d+", answer)
    return bool(numbers) and not set(re.findall(r"\d+", rest)) <= set(numbers)


def is_remark(answer: str, rest: str) -> bool:
    """Returns whether the text behind an answer is evidence for it, and states no other answer.

    Args:
      answer: the answer. If it names a modality, the remark may not name another one: "CT, as seen on the MRI" is no
        answer. The same goes for sides, planes and numbers.
      rest: the clean text behind it, without the punctuation that parts the two.
    """
    if not rest or len(rest) > _MOST:
        return False
    if _says_another(answer, rest):
        return False
    if label := _EXPLANATION.match(rest):
        return _is_reason(rest[label.end():])
    return all(_is_evidence(sentence) for each in _SENTENCE.split(rest) if (sentence := each.strip(" ,.-")))


def _is_evidence(sentence: str) -> bool:
    """Returns whether each clause of a sentence is evidence; the sentence may end with a reason."""
    if _REASON.match(sentence):
        return _is_reason(sentence)
    start = 0
    for end in [*(match.start() for match in _CLAUSE.finditer(sentence)), len(sentence)]:
        clause = sentence[start:end].strip(" ,:()-\u3000.")
        if _REASON.match(clause):
            return _is_reason(sentence[start:])
        if clause and not _EVIDENCE.fullmatch(clause):
            return False
        start = end
    return True


def _is_reason(text: str) -> bool:
    """Returns whether a reason tells how something looks, and gives no other answer: no bare "because right lung"."""
    return bool(_TELLS.search(text)) and not _SAYS_ELSE.search(text) and not _STATES.search(text) or bool(
        _EVIDENCE.fullmatch(text.strip(" .,")))
