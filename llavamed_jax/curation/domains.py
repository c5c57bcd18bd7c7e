"""Tells from a caption which of LLaVA-Med's domains a figure belongs to: chest X-ray, CT, MRI, histology, gross.

Gross is macroscopic pathology: specimens, and organs at surgery or autopsy; not photographs of patients. A figure may
belong to several, and to none, which is called "other". The rules are words; `docs/data.md` says how often they agree
with a reading by eye.
"""

from __future__ import annotations

import re

from llavamed_jax.datasets.qa50 import DOMAINS

_RADIOGRAPH = (r"(?:x[-\u2010-\u2015 ]?rays?\b(?! (?:diffract|crystal|structure|scatter|photoelectron|absorption|"
               r"fluoresc|spectr|microanaly|beam|source|tube|powder|irradiat|computed|CT|micro))|radiograph\w*|radiogram\w*|"
               r"roentgenogra\w*|skiagram\w*)")
_CHEST = (r"(?:chest|thora(?:x|cic|cal)|lungs?|pulmonary|hemithora\w*|pneumothora\w*|pleura\w*|mediastin\w*|cardiac "
          r"silhouette|cardiomegaly|lobe|diaphragm)")
_RULES = {
    "chest_xray": [
        rf"\bchest\s+(?:(?:plain|PA|AP|portable|frontal|lateral|posteroanterior|anteroposterior|postero-anterior|"
        rf"antero-posterior|supine|erect|film|digital|initial)\s+)*(?:{_RADIOGRAPH}|film\b|roentgen\w*)",
        r"(?-i:\bCXRs?\b)",
        rf"{_RADIOGRAPH}[^.]{{0,60}}\b(?:of|in|at) (?:the |his |her |both |a )?(?:\w+ ){{0,3}}{_CHEST}\b",
        rf"\b{_CHEST}\b[^.,;]{{0,25}}\b{_RADIOGRAPH}",
        rf"{_RADIOGRAPH}[^.]{{0,120}}\b(?:pneumothora\w*|pleural effusion|cardiomegaly|mediastin\w*|lung fields?|"
        r"(?:upper|lower|middle) lobes?|hemithora\w*|hemidiaphragm|costophrenic|pulmonary)\b",
    ],
    "ct_scan": [
        r"(?-i:\b(?:CT|CTA|HRCT|CECT|NCCT|MDCT|CBCT|MSCT|CTPA|PET-?CT|SPECT-?CT|CCTA|QCT|DECT)s?\b)(?!\s?(?:values?\b|DNA|genes?\b))",
        r"\bcomputed\b.{0,20}\btomogra\w*|\bcomputeri[sz]ed (?:axial )?tomogra\w*|\bCAT[- ]scans?\b|\btomodensitom\w*",
        r"(?-i:\b(?:\w+-|[234]D[- ]?)CTs?\b|\bC\. ?T\.|\bTC scan)",
    ],
    "mri": [
        r"(?-i:\b(?:f?MRIs?|MRCP|MRA|MRV|DWI|FLAIR|CMR|MP-?RAGE|STIR|DTI)\b)",
        r"(?-i:\bMR)[ -](?:imag\w*|scans?|angio\w*|cholangio\w*|enterogra\w*|venogra\w*|arthrogra\w*|urogra\w*|"
        r"sequence)",
        r"\bmagnetic[ -]resonance\b(?! spectr)",
        r"\bT[12]\*?\s?-?\s?(?:weighted|w\b|WI\b|FSE|TSE|fat|sagittal|axial|coronal|sequence|image)",
        r"(?-i:\bMR\b)(?!.*(?:mitral|regurgit))|(?-i:\bIRM\b|\bNMR\b(?! (?:spectr|data|structure)))|"
        r"\bdiffusion image|\bbright[ -]blood\b",
        r"\bgadolinium\b|\bproton[ -]density\b|\bdiffusion[ -](?:weighted|tensor)\b",
    ],
    "histology": [
        r"\bhisto(?:log|path|morpho|chem)\w*|\b(?:micro)?photomicrogra\w*|\bcytolog\w*|\bcytopath\w*",
        r"(?-i:\bH\s?(?:&|&amp;|and|-|/|\+)\s?E\b)|\bh(?:a)?ematoxyl\w*|\beosin\b",
        r"\bimmuno(?:histo|cyto|peroxidase)\w*|(?-i:\bIHC\b)",
        r"\b(?:Giemsa|Masson\w*|trichrome|PAS|Papanicolaou|Pap|Gram|Ziehl|Congo red|Alcian|silver|Nissl|Gomori|Wright|"
        r"toluidine|reticulin|von Kossa|oil red|Sirius|safranin|Sudan|Prussian)\b[^.]{0,25}\bstain\w*",
        r"\b(?:light )?microscop(?:y|ic|ical)\b(?<!electron microscopy)(?!.{0,30}\bCT\b)[^.]{0,60}\b(?:section|"
        r"tissue|specimen|biops|tumou?r|cells|findings|examination|appearance|features|lesion)",
        r"\b(?:original )?magnification\b[^.]{0,20}\d|"
        r"(?:[x×]\s?(?:20|40|50|60|63|100|200|250|400|500|600|1000|1,000)\b|"
        r"\b(?:20|40|50|60|63|100|200|250|400|500|600|1000|1,000)\s?[x×](?!\s?\d))",
        r"\b(?:tissue|biopsy|paraffin|kidney|liver|tumou?r|skin) sections?\b[^.]{0,60}\bstain\w*|"
        r"\bbone marrow (?:smear|aspirate|biops\w*)|\bblood smear|"
        r"\bpathologic(?:al)? (?:findings|section|slide|examination|specimen)|"
        r"\bmicrograph\b",
    ],
    "gross": [
        r"\bgross(?:ly)?\b(?! (?:tumou?r volume|domestic|motor|total|hematuria|haematuria|target))|\bmacroscop\w*",
        r"\b(?:surgical|resected|excised|operative|resection|autopsy|amputat\w*|nephrectomy|necropsy|gastrectomy|"
        r"colectomy|pathologic(?:al)?|explanted|enucleated) (?:\w+ )?specimens?\b"
        r"(?! (?:show\w*|stain\w*|reveal\w*)[^.]*stain)",
        r"\bintra-?operative (?:\w+ ){0,2}(?:photo\w*|view|picture|image|finding|appearance|aspect)\w*|\bperoperative",
        r"\bcut (?:surface|section)\b|\bspecimen photogra\w*|\bphotogra\w* of (?:the )?(?:\w+ )?specimen",
        r"\b(?:post-?mortem|autopsy|necropsy|cadaver\w*)\b(?![ -](?:CT|MR))|\bdissection of (?!the (?:aorta|carotid))",
        r"\b(?:surgical|operative|laparoscopic|thoracoscopic) (?:\w+ )?(?:photo(?:graph)?s?|picture|appearance|aspect|"
        r"view|findings?|field)\b|\bat (?:surgery|operation|laparotomy|thoracotomy)\b",
    ],
}  # fmt: skip
_NOT_HISTOLOGY = re.compile(r"(?:scanning|transmission) electron|\b[ST]EM\b|confocal|fluorescen", re.IGNORECASE)
_COMPILED = {name: [re.compile(rule, re.IGNORECASE | re.DOTALL) for rule in rules] for name, rules in _RULES.items()}
_LONGEST = 10_000  # characters; no caption in print has as many
_OF_STAINS = 4  # the first rules of histology; fluorescence and electron microscopes meet the others too


def domains_of(caption: str) -> dict[str, bool]:
    """Returns the domains of a caption, in LLaVA-Med's order of keys; all False is "other".

    Only the first 10,000 characters count, which bounds the time.
    """
    caption = caption[:_LONGEST]
    found = {name: any(rule.search(caption) for rule in rules) for name, rules in _COMPILED.items()}
    if found["histology"] and _NOT_HISTOLOGY.search(caption):
        found["histology"] = any(rule.search(caption) for rule in _COMPILED["histology"][:_OF_STAINS])
    return {name: found[name] for name in DOMAINS}
