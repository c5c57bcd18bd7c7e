"""Parses XML that nobody vouches for: no entity is loaded, no network is used, and size and depth are bounded."""

from __future__ import annotations

from llavamed_jax.curation.extra import needed

MOST_XML = 100 * 10**6  # bytes


def parse(body: bytes):
    """Parses XML with lxml and returns its root; None if it is not well-formed or has more than 100 MB.

    External entities and DTDs are not read. Of internal entities only those that libxml2 expands within its own bounds
    stay, so that a few lines cannot become gigabytes. Trees are at most 256 levels deep (libxml2's bound).
    """
    etree = needed("lxml.etree", "reads XML")
    if len(body) > MOST_XML:
        return None
    parser = etree.XMLParser(resolve_entities=False, load_dtd=False, no_network=True, huge_tree=False,
                             remove_comments=True, remove_pis=True, dtd_validation=False)
    try:
        return etree.fromstring(body, parser)
    except (etree.XMLSyntaxError, ValueError):
        return None
