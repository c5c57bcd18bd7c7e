"""Reads the figures of an article in JATS XML, and the sentences of its text that mention them.

Structures (JATS Z39.96 and the NLM DTDs before it): `fig` anywhere in the article with `label`, `caption` (a `title`
and any number of paragraphs and lists) and `graphic`; several graphics in a `fig`, which are parts of it;
`alternatives` of one graphic; `fig-group` with a label and a caption of its own; labels and captions inside a
`graphic`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from llavamed_jax.curation import mentions
from llavamed_jax.curation.prose import Text, local, sentences, text_of
from llavamed_jax.curation.xml_bounds import parse

_HREF = "{http://www.w3.org/1999/xlink}href"
_GROUPS = ("fig-group", "figgrp")
_NO_TEXT = ("caption", "ref-list", "table-wrap", "front", "fig", "fig-group", "supplementary-material", "floats-group",
            "floats-wrap", "journal-meta", "boxed-text/caption")


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
      mentions: sentences of the article that mention the figure, in order.
    """

    id: str
    label: str
    caption: str
    graphics: list[list[str]]
    panels: list[str] = field(default_factory=list)
    mentions: list[Mention] = field(default_factory=list)


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
    figures, elements = [], {}
    for place, (fig, groups) in enumerate(_figs(root), start=1):
        figure = _figure(fig, groups, place)
        figures.append(figure)
        for element in (fig, *groups):
            if element.get("id"):
                elements.setdefault(element.get("id"), []).append(figure)
    _mention(root, figures, elements)
    return Article(f"PMC{number[0]}" if number else "", ids.get("pmid", ""), ids.get("doi", ""), _licence(root),
                   figures)


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
        elif name not in ("article", "sub-article", "response"):
            yield from _figs(child, groups)
        elif name != "article":
            yield from _figs(child)


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
    return Figure(fig.get("id") or f"fig{place}", _join_labels(labels), caption, graphics, panels)


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
    """Returns the files of alternatives: print and large ones first, thumbnails last."""
    uses = {each: f"{each.get('specific-use')} {each.get('content-type')}" for each in graphics}
    rank = lambda each: bool(re.search("thumb|preview|small|low", uses[each], re.IGNORECASE))
    return [each.get(_HREF) for each in sorted(graphics, key=rank) if each.get(_HREF)]


def _mention(root, figures: list[Figure], elements: dict[str, list[Figure]]) -> None:
    """Gives each figure the sentences that refer to it, by cross-reference or by name."""
    keys: dict[tuple[str, str], list[Figure]] = defaultdict(list)
    panels: dict[int, str] = {}
    for figure in figures:
        key = mentions.label_key(figure.label)
        if key is not None:
            keys[key[:2]].append(figure)
            panels[id(figure)] = key[2] or _panel_of_group(figure.label)
    for text in _paragraphs(root):
        plain = str(text)
        spans = sentences(plain)
        named = mentions.find(plain)
        for start, end in spans:
            hit: dict[int, tuple[Figure, list[str]]] = {}
            for each in named:
                if start <= each.start < end and not _is_foreign(each, text.links, elements):
                    for figure in _of_panels(keys.get((each.kind, each.number), []), each.panels, panels):
                        hit.setdefault(id(figure), (figure, []))[1].extend(each.panels)
            for begin, stop, ids in text.links:
                if start <= begin < end:
                    found = [figure for each in ids for figure in elements.get(each, [])]
                    letters = _letters(plain[begin:stop]) if len(found) > 1 else ()
                    for figure in _of_panels(found, letters, panels):
                        hit.setdefault(id(figure), (figure, []))
            for figure, letters in hit.values():
                figure.mentions.append(Mention(plain[start:end].strip(), tuple(dict.fromkeys(letters))))


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


def _is_foreign(named: mentions.Mention, links: list, elements: dict) -> bool:
    """Returns whether a name lies in a cross-reference to something else, such as supplementary material."""
    inside = [ids for begin, stop, ids in links if begin <= named.start < stop]
    return bool(inside) and not any(each in elements for ids in inside for each in ids)


def _paragraphs(root) -> Iterator[Text]:
    """Yields the text of each paragraph outside captions, tables and references."""
    for child in root:
        name = local(child)
        if name in _NO_TEXT or not name:
            if name == "front":
                for abstract in (each for each in child.iter() if local(each) in ("abstract", "trans-abstract")):
                    yield from _paragraphs(abstract)
            continue
        if name == "p":
            text = Text()
            text.add(child.text)
            for each in child:
                text.add_child(each)
            yield text
        elif name != "article":
            yield from _paragraphs(child)


_LICENCES = (("publicdomain/zero", "CC0"), ("by-nc-nd", "CC BY-NC-ND"), ("by-nc-sa", "CC BY-NC-SA"),
             ("by-nc", "CC BY-NC"), ("by-nd", "CC BY-ND"), ("by-sa", "CC BY-SA"), ("/by/", "CC BY"))


_WORDS = re.compile(r"creative commons attribution\W{0,3}(non-?\s?commercial)?\W{0,3}"
                    r"(share-?\s?alike|no-?\s?deriv\w*)?", re.IGNORECASE)


def _licence(root) -> str:
    """Returns the licence's code from the address or the words that the article gives; `unknown` without them."""
    meta = _child(root, "front", "article-meta", "permissions")
    if meta is None:
        return "unknown"
    texts = [value for each in meta.iter() for value in (each.get(_HREF), each.text if local(each) == "license_ref"
                                                         else None) if value]
    address = next((text.lower() for text in texts if "creativecommons.org" in text.lower()), "")
    found = next((code for part, code in _LICENCES if part in address.rstrip("/") + "/"), "")
    words = _WORDS.search(text_of(meta)) if not found else None
    if words:
        found = "CC BY" + ("-NC" if words[1] else "") + {"s": "-SA", "n": "-ND"}.get((words[2] or " ")[0].lower(), "")
    return found or "unknown"
