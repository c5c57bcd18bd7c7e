"""Reads the figures of an article in JATS XML, and the sentences of its text that mention them.

Structures (JATS Z39.96 and the NLM DTDs before it): `fig` anywhere in the article with `label`, `caption` (a `title`
and any number of paragraphs and lists) and `graphic`; several graphics in a `fig`, which are parts of it;
`alternatives` of one graphic; `fig-group` with a label and a caption of its own; labels and captions inside a
`graphic`. An article and each `sub-article` or `response` in it, such as a translation, have figures and sentences of
their own.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from llavamed_jax.curation import mentions
from llavamed_jax.curation.jats_licence import licence_of_article, licence_of_figure, strictest
from llavamed_jax.curation.prose import Text, local, sentences, text_of
from llavamed_jax.curation.xml_bounds import parse
from llavamed_jax.utils import signals

_HREF = "{http://www.w3.org/1999/xlink}href"
_LANGUAGE = "{http://www.w3.org/XML/1998/namespace}lang"
_GROUPS = ("fig-group", "figgrp")
_ARTICLES = ("article", "sub-article", "response")
_SMALL = re.compile(r"thumb|preview|\b(?:small|low)|[-_](?:small|low)", re.IGNORECASE)
_MOST_ALIKE = 200  # figures with one number or one id
_NO_TEXT = ("caption", "ref-list", "table-wrap", "front", "front-stub", "fig", "fig-group", "supplementary-material",
            "floats-group", "floats-wrap", "journal-meta", "boxed-text/caption")


@dataclass
class Mention:
    """A sentence that mentions a figure, and the panels that it names, in capitals."""

    sentence: str
    panels: tuple[str, ...] = ()


@dataclass
class Figure:
    """A figure of an article.

    Attributes:
      id: the element's id; made from its place if it has none.
      label: such as `Fig. 2`; with that of its group before it.
      caption: every paragraph of the caption; with that of its group before it.
      graphics: names of the files of each part; the names of one part are alternatives, the best first.
      panels: panels that the caption explains, in capitals.
      mentions: sentences of its article or sub-article that mention the figure, in order, in the figure's language.
      licence: the figure's own licence as a code; "" for that of its article.
      language: the language that the XML states, such as `en`.
    """

    id: str
    label: str
    caption: str
    graphics: list[list[str]]
    panels: list[str] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)
    licence: str = ""
    language: str = ""


@dataclass
class Article:
    """An article: its ids ("" where the XML has none), the licence as a code, and its figures."""

    pmcid: str
    pmid: str
    doi: str
    licence: str
    figures: list[Figure]


def read_articles(body: bytes) -> list[Article] | None:
    """Reads the articles of an XML file; None if it is not well-formed XML or is larger than 100 MB.

    Args:
      body: the file. A wrapper with several articles (`pmc-articleset`, a reply of OAI) gives all of them.
    """
    root = parse(body)
    if root is None:
        return None
    found = [each for each in root.iter() if local(each) == "article"]
    return [_article(each) for each in found]


def _article(root) -> Article:
    ids = {each.get("pub-id-type", ""): text_of(each)
           for each in _children(root, "front", "article-meta", "article-id")}
    pmcid = next((ids[name] for name in ("pmcid", "pmc", "pmcaid") if ids.get(name)), "")
    number = re.search(r"\d+", pmcid)
    licence = licence_of_article(_child(root, "front", "article-meta", "permissions"))
    figures: list[Figure] = []
    for scope in _scopes(root):
        figures += _figures(scope, len(figures))
    return Article(f"PMC{number[0]}" if number else "", ids.get("pmid", ""), ids.get("doi", ""), licence, figures)


def _scopes(root) -> Iterator:
    """Yields an article, its sub-articles and its responses, in order."""
    yield root
    yield from root.iter("{*}sub-article", "{*}response")


def _figures(scope, number: int) -> list[Figure]:
    """Returns the figures of an article without its sub-articles, or of a sub-article, with their mentions.

    Args:
      scope: the element.
      number: the number of figures before it.
    """
    own = _child(scope, "front-stub", "permissions")
    own = own if own is not None else _child(scope, "front", "article-meta", "permissions")
    figures, elements = [], {}
    for place, (fig, groups) in enumerate(signals.checked(_figs(scope)), start=number + 1):
        figure = _figure(fig, groups, place)
        stated = [code for each in (fig, *groups) if (code := licence_of_figure(each))]
        if local(scope) != "article" and own is not None:
            stated.append(licence_of_article(own))
        figure.licence = strictest(stated) if stated else ""
        figures.append(figure)
        for element in (fig, *groups):
            if element.get("id"):
                elements.setdefault(element.get("id"), []).append(figure)
    _mention(scope, figures, elements)
    return figures


def _children(element, *path: str) -> Iterator:
    """Yields the elements at a path of local names."""
    for child in element:
        if local(child) == path[0]:
            if len(path) == 1:
                yield child
            else:
                yield from _children(child, *path[1:])


def _child(element, *path: str):
    return next(_children(element, *path), None)


def _figs(element, groups: tuple = ()) -> Iterator[tuple]:
    """Yields each `fig` with the groups that it is in, outermost first."""
    for child in element:
        name = local(child)
        if name == "fig":
            yield child, groups
            yield from _figs(child, groups)
        elif name in _GROUPS:
            inside = list(_figs(child, (*groups, child)))
            if inside:
                yield from inside
            else:  # graphics without `fig`
                yield child, groups
        elif name not in _ARTICLES:
            yield from _figs(child, groups)


def _figure(fig, groups: tuple, place: int) -> Figure:
    graphics, described = _graphics(fig)
    chain = (*groups, fig)
    labels = [text for element in chain if (text := _text(element, "label", ()))]
    captions = [text for element in chain if (text := _text(element, "caption", ()))]
    if not labels or groups and not _text(fig, "label", ()):
        labels += [text for each in described if (text := _text(each, "label", ()))][:1]
    if not _text(fig, "caption", ()):
        captions += list(dict.fromkeys(text for each in described if (text := _text(each, "caption", ()))))
    caption = " ".join(captions)
    marked = [letter for element in (*chain, *described) for letter in _marked(_child(element, "caption"))]
    panels = max(mentions.panels_of(caption), mentions.in_order(marked), key=len)
    return Figure(fig.get("id") or f"fig{place}", _join_labels(labels), caption, graphics, panels,
                  language=_language(fig))


def _language(element) -> str:
    """Returns the language of an element: its own or that around it, without a region; English is JATS's default."""
    stated = next((each.get(_LANGUAGE) for each in (element, *element.iterancestors()) if each.get(_LANGUAGE)), "en")
    return stated.partition("-")[0].lower()


def _marked(caption) -> Iterator[str]:
    """Yields the panels that a caption sets in bold or italics without parentheses: `<bold>A</bold> Axial CT`."""
    for each in caption.iter() if caption is not None else ():
        if local(each) in ("bold", "italic"):
            yield from mentions.only_panels(text_of(each))


def _text(element, name: str, otherwise: tuple) -> str:
    found = _child(element, name)
    return text_of(found) if found is not None else "".join(otherwise)


def _join_labels(labels: list[str]) -> str:
    """Joins the labels of a group and of a figure in it: `Figure 2` and `Figure 2a` are `Figure 2a`."""
    joined = ""
    for label in labels:
        is_whole = joined and label.rstrip(" .:").lower().startswith(joined.rstrip(" .:").lower())
        joined = label if is_whole or not joined else f"{joined} {label}"
    return joined


def _graphics(fig) -> tuple[list[list[str]], list]:
    """Returns the files of each part of a figure, and the `graphic` elements with a label or a caption."""
    parts: list[list[str]] = []
    described = []

    def walk(element) -> None:
        for child in element:
            name = local(child)
            if name == "alternatives":
                names = _ordered([each for each in child.iter() if local(each) in ("graphic", "media")])
                parts.extend([names] if names else [])
            elif name == "graphic" or name == "media" and (child.get("mimetype") or "").startswith("image"):
                if child.get(_HREF):
                    parts.append([child.get(_HREF)])
                if any(local(each) in ("label", "caption") for each in child):
                    described.append(child)
            elif name not in ("fig", "caption", "table-wrap", "disp-formula", "inline-formula", *_GROUPS):
                walk(child)

    walk(fig)
    unique = {tuple(names): names for names in parts}
    return list(unique.values()), described


def _ordered(graphics: list) -> list[str]:
    """Returns the files of alternatives: print and large ones first, then `.gif`, those that are called small last."""
    found = [each for each in graphics if each.get(_HREF)]
    uses = {each: f"{each.get('specific-use')} {each.get('content-type')} {each.get(_HREF)}" for each in found}
    is_small = lambda each: bool(_SMALL.search(uses[each]))
    rank = lambda each: (is_small(each), each.get(_HREF).lower().endswith(".gif"))
    return [each.get(_HREF) for each in sorted(found, key=rank)]


def _mention(root, figures: list[Figure], elements: dict[str, list[Figure]]) -> None:
    """Gives each figure the sentences that refer to it, by cross-reference or by name."""
    keys: dict[tuple[str, str], list[Figure]] = defaultdict(list)
    panels: dict[int, str] = {}
    for figure in figures:
        key = mentions.label_key(figure.label)
        if key is not None:
            keys[key[:2]].append(figure)
            panels[id(figure)] = key[2] or _panel_of_group(figure.label)
    # Of very many with one number or id, a sentence means none; otherwise it would be written as often.
    keys, elements = ({name: found for name, found in each.items() if len(found) <= _MOST_ALIKE}
                      for each in (keys, elements))
    for text, language in signals.checked(_paragraphs(root)):
        plain = str(text)
        spans = sentences(plain)
        starts = [start for start, _ in spans]
        hits: dict[int | None, dict[int, tuple[Figure, list[str]]]] = defaultdict(dict)  # by sentence, then by figure
        for each in _own(mentions.find(plain), text.links, elements):
            hit = hits[_sentence(spans, starts, each.start)]
            for figure in _of_panels(keys.get((each.kind, each.number), []), each.panels, panels):
                hit.setdefault(id(figure), (figure, []))[1].extend(each.panels)
        for begin, stop, ids in text.links:
            hit = hits[_sentence(spans, starts, begin)]
            found = [figure for each in ids for figure in elements.get(each, [])]
            letters = _letters(plain[begin:stop]) if len(found) > 1 else ()
            for figure in _of_panels(found, letters, panels):
                hit.setdefault(id(figure), (figure, []))
        for number in sorted(hits.keys() - {None}):
            sentence = plain[slice(*spans[number])].strip()
            for figure, letters in hits[number].values():
                if figure.language != language:  # a translation of an abstract, or of a figure
                    continue
                figure.mentions.append(Mention(sentence, tuple(dict.fromkeys(letters))))


def _sentence(spans: list[tuple[int, int]], starts: list[int], place: int) -> int | None:
    """Returns the number of the sentence that a place lies in; None between and behind sentences."""
    number = bisect.bisect_right(starts, place) - 1
    return number if number >= 0 and place < spans[number][1] else None


def _panel_of_group(label: str) -> str:
    match = re.search(r"[(\s]([A-Za-z])\)?[.:]?$", label)
    return match[1].upper() if match else ""


def _letters(text: str) -> tuple[str, ...]:
    found = mentions.find(text if re.search("fig", text, re.IGNORECASE) else f"Fig. {text}")
    return found[0].panels if found else ()


def _of_panels(figures: list[Figure], letters: tuple[str, ...] | list[str], panels: dict[int, str]) -> list[Figure]:
    """Of several figures with one number, which are panels of a group, picks those whose letter is named."""
    if len(figures) > 1 and letters:
        chosen = [figure for figure in figures if panels.get(id(figure)) in letters]
        return chosen or figures
    return figures


def _own(named: list[mentions.Mention], links: list, elements: dict) -> Iterator[mentions.Mention]:
    """Yields the names that do not lie in a cross-reference to something else, such as supplementary material.

    Both lists are gone through once, in the order of the text.
    """
    coming = deque(sorted(links, key=lambda link: link[0]))
    around: list[tuple[int, int, tuple[str, ...]]] = []
    for each in sorted(named, key=lambda one: one.start):
        while coming and coming[0][0] <= each.start:
            around.append(coming.popleft())
        around = [link for link in around if each.start < link[1]]
        if not around or any(one in elements for _, _, ids in around for one in ids):
            yield each


def _paragraphs(root) -> Iterator[tuple[Text, str]]:
    """Yields the text and the language of each paragraph outside captions, tables, references and sub-articles."""
    for child in root:
        name = local(child)
        if name in _NO_TEXT or not name:
            if name in ("front", "front-stub"):
                for abstract in (each for each in child.iter() if local(each) in ("abstract", "trans-abstract")):
                    yield from _paragraphs(abstract)
            continue
        if name == "p":
            text = Text()
            text.add(child.text)
            for each in child:
                text.add_child(each)
            yield text, _language(child)
        elif name not in _ARTICLES:
            yield from _paragraphs(child)
