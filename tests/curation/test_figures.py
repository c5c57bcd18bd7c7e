"""`curation figures`: every structure of JATS by hand, the published sets' layouts, and XML that means harm."""

import io
import json
import os
import tarfile
import time
from pathlib import Path

import pytest

from llavamed_jax.curation import mentions
from llavamed_jax.curation.__main__ import main
from llavamed_jax.curation.domains import domains_of
from llavamed_jax.utils import signals
from tests.support.pmc_bucket import picture

pytest.importorskip("lxml")
from llavamed_jax.curation import jats, jats_licence, prose

HEAD = ('<!DOCTYPE article PUBLIC "-//NLM//DTD JATS (Z39.96) Journal Archiving and Interchange DTD v1.2 20190208//EN" '
        '"JATS-archivearticle1.dtd">\n<article xmlns:xlink="http://www.w3.org/1999/xlink" xmlns:mml="http://www.w3.org/1998/Math/MathML">'
        '<front><article-meta><article-id pub-id-type="pmid">77</article-id><article-id pub-id-type="pmc">5</article-id>'
        '<permissions><copyright-statement>© Ours Ltd, 2019</copyright-statement><license xlink:href="http://creativecommons.org/licenses/by-nc-sa/4.0/"><license-p>x</license-p></license></permissions>'
        "{abstract}</article-meta></front>")


def article(body: str, floats: str = "", abstract: str = "") -> jats.Article:
    (found,) = jats.read_articles((HEAD.replace("{abstract}", abstract) + f"<body>{body}</body>{floats}</article>").encode())
    return found


def graphic(name: str) -> str:
    return f'<graphic xlink:href="{name}"/>'


def test_captions():
    found = article(
        '<fig id="F1"><object-id>x</object-id><label>Figure&nbsp;1.</label><caption><title>Two views.</title><p>First <italic>E.\n coli</italic>'
        ' at 10<sup>3</sup> &#956;m<sup><xref ref-type="bibr" rid="B1">12</xref></sup>.</p><p>Second <xref ref-type="bibr" rid="B2">[3]</xref>'
        " with <inline-formula><alternatives><tex-math>\\alpha</tex-math><mml:math><mml:mi>α</mml:mi></mml:math></alternatives></inline-formula>."
        "</p><list><list-item><p>(a) item</p></list-item><list-item><p>(b) other</p></list-item></list></caption>"
        "<alt-text>not this</alt-text><permissions><copyright-statement>nor this</copyright-statement></permissions>" + graphic("f1") + "</fig>"
        '<fig id="F2"><label>Figure 2</label>' + graphic("f2") + "</fig>"
        '<fig id="F3"><label>Figure 3</label><caption><p><bold>a</bold>CT. <bold>b</bold><italic>C. albicans</italic> (<bold>c</bold>–<bold>d</bold>)</p></caption>'
        "<graphic xlink:href='f3'><label>no</label></graphic></fig>"
        '<fig><graphic xlink:href="f4"><label>Figure 4</label><caption><p>Inside the graphic.</p></caption></graphic></fig>'
        '<fig id="F5"><label>Figure 5</label><caption><p>No file.</p></caption></fig>')
    assert (found.pmid, found.pmcid, found.licence) == ("77", "PMC5", "CC BY-NC-SA")
    assert [(each.id, each.label, each.caption, each.graphics, "".join(each.panels)) for each in found.figures] == [
        ("F1", "Figure 1.", "Two views. First E. coli at 10^3 μm. Second [3] with α. (a) item (b) other", [["f1"]], "AB"),
        ("F2", "Figure 2", "", [["f2"]], ""),
        ("F3", "Figure 3", "a CT. b C. albicans (c–d)", [["f3"]], "ABCD"),
        ("fig4", "Figure 4", "Inside the graphic.", [["f4"]], ""),
        ("F5", "Figure 5", "No file.", [], "")]


BIBR = '<xref ref-type="bibr" rid="B1">{}</xref>'.format


@pytest.mark.parametrize(("marked", "plain"), [
    ("10<sup>2</sup> and 10<sup>\u22123</sup> cm<sup>2</sup>", "10^2 and 10^\u22123 cm^2"), ("10 <sup>3</sup> cells", "10 ^3 cells"),
    ("H<sub>2</sub>O, T<sub>2</sub>-weighted, SpO<sub>2</sub>, V<sub>max</sub>", "H2O, T2-weighted, SpO2, Vmax"), ("10<sub>2</sub>", "10_2"),
    ("SO<sub>4</sub><sup>2\u2212</sup>, Ca<sup>2+</sup>, CD4<sup>+</sup>", "SO4^2\u2212, Ca^2+, CD4+"), ("e<sup>n + 1</sup>x", "e^(n + 1)x"),
    ("<sup>99m</sup>Tc, [<sup>18</sup>F]FDG and <sup>18</sup><italic>F</italic>", "99mTc, [18F]FDG and 18F"), ("1<sup>st</sup> Name<sup>®</sup>", "1st Name®"),
    ("<bold>10<sup>2</sup></bold>", "10^2"), ("lesion<sup>3</sup>", "lesion^3"), ("<sup>a</sup> p", "a p"),
    (f"lesion<sup>{BIBR(12)}</sup>.", "lesion."), (f"lesion<sup>{BIBR(12)}–{BIBR(14)}, {BIBR(3)}</sup>.", "lesion."),
    (f"lesion{BIBR('<sup>12</sup>')}<sup>,</sup>{BIBR('<sup>13</sup>')} is", "lesion is"), (f"in 5{BIBR(12)},{BIBR(13)} cases", "in 5 12, 13 cases"),
    (f"et al.{BIBR(7)} [{BIBR(8)}] ({BIBR(9)})", "et al. 7 [8] (9)"), ('size<sup><xref ref-type="table-fn" rid="t">a</xref></sup>', "size"),
    ("<mml:msup> <mml:mn>10</mml:mn> <mml:mn>2</mml:mn> </mml:msup> m", "10^2 m"),
    ("<mml:mfrac><mml:mn>1</mml:mn><mml:msub><mml:mi>T</mml:mi><mml:mn>2</mml:mn></mml:msub></mml:mfrac>", "1/T2"),
])
def test_what_is_raised_or_lowered_keeps_its_meaning(marked, plain):
    found = article(f'<fig id="F1"><label>Fig. 1</label><caption><p>{marked}</p></caption>{graphic("f1")}</fig><p>Fig. 1: {marked}</p>')
    assert (found.figures[0].caption, found.figures[0].mentions[0].sentence) == (plain, f"Fig. 1: {plain}")


def test_sentences_belong_to_the_figures_of_their_article_and_language():
    fig = lambda name, language="": (f'<fig id="{name}"{language}><label>Figure 1</label><caption><p>{name}</p></caption>{graphic(name)}</fig>')
    say = lambda text, rid: f'<p>{text} (<xref ref-type="fig" rid="{rid}">Figure 1</xref>).</p>'
    (found,) = jats.read_articles(
        ('<article xml:lang="en-GB" xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta><abstract>' + say("Abstract", "A")
         + '</abstract><trans-abstract xml:lang="es">' + say("Resumen", "A") + "</trans-abstract></article-meta></front><body>" + fig("A")
         + '<fig-group id="G">' + fig("B", ' xml:lang="en"').replace("Figure 1", "Figure 2") + fig("C", ' xml:lang="es"').replace("Figure 1", "Figura 2")
         + "</fig-group>" + say("Text", "A") + say("Both", "G").replace("Figure 1", "Figure 2") + '</body><sub-article article-type="translation" xml:lang="es">'
         "<front-stub><abstract>" + say("Compendio", "D") + "</abstract></front-stub><body>" + fig("D") + say("Texto", "D") + say("De otro", "A")
         + '</body><response><body>' + fig("") + say("Reply", "A") + "<p>In Figure 1.</p></body></response></sub-article></article>").encode())
    assert {each.id: [one.sentence.split(" (")[0] for one in each.mentions] for each in found.figures} == {
        "A": ["Abstract", "Text"], "B": ["Both"], "C": [], "D": ["Compendio", "Texto"], "fig5": ["In Figure 1."]}


BY = "https://creativecommons.org/licenses/by/4.0/"


@pytest.mark.parametrize(("permissions", "wanted"), [
    (f'<license xlink:href="{BY}"><license-p>x</license-p></license>', "CC BY"),
    ('<license><license-p>This is distributed under the Creative Commons Attribution License, which permits unrestricted use.</license-p></license>', "CC BY"),
    ('<license license-type="CC-BY-NC"/>', "CC BY-NC"), ('<license><license-p>CC BY–NC–ND 4.0</license-p></license>', "CC BY-NC-ND"),
    ('<license><license-p>Creative Commons Attribution-NonCommercial-ShareAlike 4.0</license-p></license>', "CC BY-NC-SA"),
    (f'<license xlink:href="{BY}"><license-p>Free use in any medium, except commercial use.</license-p></license>', "CC BY-NC"),
    (f'<license xlink:href="{BY}"><license-p>Provided that no modifications or adaptations are made.</license-p></license>', "CC BY-ND"),
    (f'<license xlink:href="{BY}"><license-p>This article is CC BY, and its figures are CC BY-NC-ND.</license-p></license>', "CC BY-NC-ND"),
    (f'<license xlink:href="{BY}"><license-p>It permits commercial and non-commercial re-use without permission.</license-p></license>', "CC BY"),
    (f'<license xlink:href="{BY}"><license-p>The Creative Commons Public Domain Dedication waiver '
     '(http://creativecommons.org/publicdomain/zero/1.0/) applies to the data.</license-p></license>', "CC BY"),
    (f'<license xlink:href="{BY}"><license-p>If material is not included in the article\'s Creative Commons licence and your intended use is not permitted '
     'by statutory regulation, you will need to obtain permission directly from the copyright holder.</license-p></license>', "CC BY"),
    (f'<license xlink:href="{BY}"/><license xlink:href="https://creativecommons.org/licenses/by-nc/4.0/"/>', "CC BY-NC"),
    (f'<license xlink:href="{BY}"/><license><license-p>For unrestricted research re-use.</license-p></license>', "unknown"),
    (f'<license xlink:href="{BY}"/><license license-type="open-access"/>', "CC BY"),
    ('<license><license-p>The CC BY figure is reused with permission.</license-p></license>', "unknown"),
    ('<license><license-p>This article is not licensed under CC BY.</license-p></license>', "unknown"),
    ('<license xlink:href="https://creativecommons.org/publicdomain/zero/1.0/"/>', "CC0"), ('<license xlink:href="https://creativecommons.org/"/>', "unknown"),
    ("<license><license-p>Open access. Creative Commons.</license-p></license>", "unknown"), ("<copyright-statement>© CC</copyright-statement>", "unknown"),
    (f'<license><ali:license_ref xmlns:ali="http://www.niso.org/schemas/ali/1.0/">{BY}</ali:license_ref></license>', "CC BY"),
])
def test_the_most_restrictive_reading_of_a_licence_wins(permissions, wanted):
    before, _, after = HEAD.replace("{abstract}", "").partition("<permissions>")
    head = f"{before}<permissions>{permissions}</permissions>{after.partition('</permissions>')[2]}"
    (found,) = jats.read_articles(f"{head}<body/></article>".encode())
    assert found.licence == wanted


@pytest.mark.parametrize(("figure", "wanted"), [
    ("<caption><p>CT.</p></caption>", ""), ("<caption><p>CT. Reprinted with permission from Elsevier.</p></caption>", "unknown"),
    ("<caption><p>CT. Image reused from [3] with permission, CC BY.</p></caption>", "unknown"),
    ("<caption><p>CT. Used with the patient's permission.</p></caption>", ""), ("<caption><p>CT, from [3] (CC BY-NC 4.0).</p></caption>", "CC BY-NC"),
    ("<caption><p>CT.</p></caption><attrib>By permission of the Mayo Foundation.</attrib>", "unknown"),
    *((f"<caption><p>{caption}</p></caption>", "unknown") for caption in (  # a patient in the sentence gave no permission
        "Axial CT of a patient with sarcoidosis, used with permission of Elsevier.", "MRI in a patient with glioma (with permission of Springer Nature).",
        "Familial polyposis, by permission of the Mayo Foundation.", "Subject positioning, adapted with permission of Wiley.",
        "CT of a patient used with permission.", "CT, used with permission from the patient and Elsevier.", "CT, used with permission from the patient, and Elsevier.",
        "CT, with permission of American Family Physician.", "CT, reproduced with permission of the family medicine journal.", "CT of the patient, all rights reserved.",
        "CT, used with the patient's permission and by permission of Wiley.", "CT, used with permission from elsevier for the patient.")),
    *((f"<caption><p>{caption}</p></caption>", "") for caption in (
        "CT, published with permission of the patient.", "CT, used with the permission of his or her parents.", "CT (with permission from the patient and her family).",
        "CT, used with the patient\u2019s written permission.", "CT, reproduced with parental permission.", "CT, used with informed consent and permission.",
        "CT, used with permission from the patient\u2019s mother for publication.", "CT, obtained with informed consent.")),
    ("<caption><p>CT. Reprinted from Smith et al. [12].</p></caption>", "unknown"), ("<caption><p>CT, courtesy of Dr. X.</p></caption>", "unknown"),
    ("<caption><p>CT, adapted and modified from [3], CC BY-SA 4.0.</p></caption>", "CC BY-SA"), ("<caption><p>CT of cells from [3].</p></caption>", ""),
    ("<caption><p>CT.</p></caption><attrib>© 2015 Elsevier.</attrib>", "unknown"), ("<caption><p>CT (c) of 2015.</p></caption><attrib>Photo: A. B.</attrib>", ""),
    ("<caption><p>CT.</p></caption><permissions><copyright-statement>© 2015 The Author(s)</copyright-statement></permissions>", ""),
    ("<caption><p>CT.</p></caption><permissions><copyright-holder>WHO</copyright-holder></permissions>", "unknown"),
    ("<caption><p>CT.</p></caption><permissions><copyright-statement>Copyright © 2020 Ours Ltd</copyright-statement><copyright-year>2020</copyright-year></permissions>", ""),
    (f'<caption><p>CT.</p></caption><permissions><copyright-holder>WHO</copyright-holder><license xlink:href="{BY}"/></permissions>', "CC BY"),
    (f'<caption><p>CT.</p></caption><permissions><license xlink:href="{BY}"/></permissions>', "CC BY"),
    ("<caption><p>CT.</p></caption><permissions><copyright-statement>© Elsevier. All rights reserved.</copyright-statement></permissions>", "unknown"),
])
def test_a_figure_may_have_a_licence_of_its_own(figure, wanted):
    found = article(f'<fig id="F1"><label>Fig. 1</label>{figure}{graphic("f1")}</fig>')
    assert found.figures[0].licence == wanted
    assert jats_licence.strictest(["CC BY 4.0", wanted or "CC BY 4.0"]) == {"": "CC BY 4.0", "CC BY": "CC BY"}.get(wanted, wanted)


def test_groups_parts_and_alternatives():
    found = article(
        '<fig-group id="G1"><label>Figure 1</label><caption><p>Both.</p></caption>'
        '<fig id="F1a"><label>(a)</label><caption><p>Left.</p></caption>' + graphic("f1a") + "</fig>"
        '<fig id="F1b"><label>Figure 1b</label><caption><p>Right.</p></caption>' + graphic("f1b") + "</fig></fig-group>"
        '<fig id="F2"><label>Fig. 2</label><caption><p>Parts.</p></caption>' + graphic("f2-1") + graphic("f2-2") + graphic("f2-1") + "</fig>"
        '<fig id="F3"><label>Fig. 3</label><caption><p>One.</p></caption><alternatives><graphic specific-use="thumbnail" xlink:href="t.gif"/>'
        '<graphic xlink:href="f3.tif"/><media mimetype="image" xlink:href="f3.png"/></alternatives></fig>'
        '<p>Text <fig id="F4"><label>Fig. 4</label><caption><p>In a paragraph.</p></caption>' + graphic("f4") + "</fig> goes on (Fig. 1B).</p>"
        '<p><xref ref-type="fig" rid="G1">Figure 1</xref> is all. <xref ref-type="fig" rid="F1a">Figure 1a</xref> is left.</p>',
        '<floats-group><fig id="F6"><label>Fig. 6</label><caption><p>Floats.</p></caption>' + graphic("f6") + "</fig></floats-group>",
        '<abstract abstract-type="graphical"><p><fig id="ga"><caption><p>Abstract.</p></caption>' + graphic("ga") + "</fig></p></abstract>")
    figures = {each.id: each for each in found.figures}
    assert list(figures) == ["ga", "F1a", "F1b", "F2", "F3", "F4", "F6"]
    assert [(each.label, each.caption) for each in found.figures[1:3]] == [("Figure 1 (a)", "Both. Left."), ("Figure 1b", "Both. Right.")]
    assert figures["F2"].graphics == [["f2-1"], ["f2-2"]] and figures["F3"].graphics == [["f3.tif", "f3.png", "t.gif"]]
    assert [each.sentence for each in figures["F1a"].mentions] == ["Figure 1 is all.", "Figure 1a is left."]
    assert [each.sentence for each in figures["F1b"].mentions] == ["Text goes on (Fig. 1B).", "Figure 1 is all."]


def test_mentions():
    figs = "".join(f'<fig id="F{n}"><label>Fig. {n}</label><caption><p>Caption {n}, as in Fig. 2.</p></caption>{graphic(f"f{n}")}</fig>' for n in range(1, 7))
    found = article(
        figs + '<sec><title>Results of Fig. 1</title><p>Fig. 2b shows it. See Figs <xref ref-type="fig" rid="F2">2</xref>–<xref ref-type="fig" rid="F4">4</xref> '
        'and 6 (i.e. Dr. Smith et al. showed 3.5 mm in Supplementary Fig. 1). No figure here! <italic>C.</italic> <italic>elegans</italic> ('
        '<xref ref-type="fig" rid="F1 F5">all of them</xref>) ends.</p><p>Compare <xref ref-type="supplementary-material" rid="S1">Fig. 3</xref> and Figure 10. '
        "Figures 1, 2 and 3 patients were seen (Fig. 5a,c–e).</p></sec>"
        "<table-wrap><caption><p>Fig. 1 in a table</p></caption></table-wrap>",
        '<back><app><p>In the appendix, Figure 6.</p></app><ref-list><ref><mixed-citation>Fig. 1</mixed-citation></ref></ref-list></back>',
        "<abstract><p>Abstract of Fig. 4.</p></abstract>")
    got = {each.id: [(mention.sentence[:24], "".join(mention.panels)) for mention in each.mentions] for each in found.figures}
    second, third, last = ("See Figs 2–4 and 6 (i.e.", ""), ("C. elegans (all of them)", ""), "Figures 1, 2 and 3 patie"
    assert got == {"F1": [third, (last, "")], "F2": [("Fig. 2b shows it.", "B"), second, (last, "")], "F3": [second],
                   "F4": [("Abstract of Fig. 4.", ""), second], "F5": [third, (last, "ACDE")], "F6": [second, ("In the appendix, Figure ", "")]}


@pytest.mark.parametrize("text, wanted", [
    ("Fig. 2b", "2B"), ("Figs. 1A–C, 3 and 5", "1ABC 3 5"), ("Figure 3 (a, b)", "3AB"), ("Figs. 2a,b and 3c–e", "2AB 3CDE"), ("Fig. 3, A and B", "3"),
    ("Figures 2 through 4", "2 3 4"), ("Figure 2 to 4 weeks", "2"), ("Figures 2 and Fig. 4a", "2 4A"), ("FIGURE 1.", "1"), ("Fig.1", "1"), ("Fig 10.2", "10.2"),
    ("Fig. 1 & 2", "1 2"), ("figure(s) 3", "3"), ("In Fig. 5, a patient", "5"), ("fig. 20% of", ""), ("configure 3", ""), ("Fig. S1", "S1"), ("Figure 1, 2005", "1"),
    ("Figs. S1–S3", "S1 S2 S3"), ("Figure II", "II"), ("Fig. IIa", "IIA"), ("Figs. I–III and V", "I II III V"), ("Figure IV (a, b)", "IVAB"), ("FIG. IX B", "IXB"),
    ("Fig. 2 and I saw", "2"), ("Figure Ideal", ""), ("Figure IIII", ""), ("figure ii", ""), ("Figures II, III show", "II III"), ("Fig. X. I", "X"), ("the figure is", ""), ("Figs. 1–900", "1 900"), ("figures were", "")])
def test_names_of_figures(text, wanted):
    assert " ".join(each.number + "".join(each.panels) for each in mentions.find(text)) == wanted
    assert mentions.label_key("Supplementary Figure 2") == ("supplementary figure", "2", "") and mentions.label_key("3.") == ("figure", "3", "")
    assert [mentions.label_key(each) for each in ("Figure II.", "VIII", "Fig. IIIa")] == [("figure", "II", ""), ("figure", "VIII", ""), ("figure", "III", "A")]
    assert mentions.label_key("Figure 1—figure supplement 2") != mentions.label_key("Figure 1") and mentions.label_key("(a)") is None


def test_sentences():
    text = "We saw 3.5 mm in Fig. 2. E. coli (strain A. B) grew vs. others, e.g. C.I. Direct red. It ended! Is it? 5 cases et al. 2004 were “so.” Yes"
    assert [text[start:end].strip() for start, end in prose.sentences(text)] == [
        "We saw 3.5 mm in Fig. 2.", "E. coli (strain A. B) grew vs. others, e.g. C.I. Direct red.", "It ended!", "Is it?", "5 cases et al. 2004 were “so.”", "Yes"]


def test_xml_that_means_harm(tmp_path):
    (tmp_path / "secret").write_text("SECRET")
    body = '<article><body><fig id="F1"><label>Fig. 1</label><caption><p>Seen &x; end</p></caption></fig></body></article>'
    for entity in (f'SYSTEM "file://{tmp_path}/secret"', 'SYSTEM "http://127.0.0.1:9/x"', '"<p>inside</p>"'):
        (found,) = jats.read_articles(f"<!DOCTYPE article [<!ENTITY x {entity}>]>{body}".encode())
        assert found.figures[0].caption == "Seen end"
    bomb = '<!ENTITY a0 "hahahaha">' + "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    for use in (body, body.replace('id="F1"', 'id="&x;"')):
        found = jats.read_articles(f'<!DOCTYPE article [{bomb}<!ENTITY x "&a11;">]>{use}'.encode())
        assert found is None or len(found[0].figures[0].caption) < 100
    for bad in (b"", b"\\xff\\xfe\\0", b"<article>", b"<html><body>Please log in</body></html", b"<a>" * 5000 + b"</a>" * 5000,
                b'<article xmlns:x="y"><x:y z="&undefined;"/></article>'):
        assert jats.read_articles(bad) is None
    assert jats.read_articles(b"<html/>") == []
    wrapped = b'<OAI-PMH xmlns="o"><record><article xmlns="https://jats.nlm.nih.gov/ns/archiving/1.0/"><body><fig id="F1"/></body></article></record></OAI-PMH>'
    assert [each.id for each in jats.read_articles(wrapped)[0].figures] == ["F1"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_articles_to_records(tmp_path, capsys):
    folder = tmp_path / "out/articles/PMC5.2"
    folder.mkdir(parents=True)
    body = "".join(f'<fig id="F{n}"><label>Fig. {n}</label><caption><p>{text}</p></caption>{graphic(f"f{n}")}</fig>' for n, text in (
        (1, "Chest radiograph."), (2, "Axial CT."), (3, "Not here."), (4, ""), (1, "The same id."))) + "<p>Fig. 1 shows a chest. It is.</p>"
    (folder / "PMC5.2.xml").write_text(HEAD.replace("{abstract}", "") + f"<body>{body}</body></article>", encoding="utf-8")
    (folder / "broken.xml").write_text("<article>", encoding="utf-8")
    (folder / "f1.jpg").write_bytes(picture(1))
    (folder / "F2.PNG").write_bytes(picture(2, "PNG"))
    (folder / "f4.gif").write_bytes(picture(3, "GIF"))
    (tmp_path / "out/manifest.jsonl").write_text(json.dumps({"path": "articles/PMC5.2/PMC5.2.xml", "licence": "CC BY"}) + "\n{torn")
    made = tmp_path / "made"
    assert main(["figures", "--source", str(tmp_path / "out"), "--out", str(made)]) == 0
    said = capsys.readouterr().out
    first, second = lines(made / "figures.jsonl")
    no = {"chest_xray": False, "mri": False, "histology": False, "gross": False, "ct_scan": False}
    assert first == {"pair_id": "77_F1", "fig_id": "F1", "fig_label": "Fig. 1", "fig_caption": "Chest radiograph.", "panels": [], "licence": "CC BY",
                     "in_text_mention": [{"tokens": "Fig. 1 shows a chest.", "entities": []}], "pmid": "77", "pmcid": "PMC5", "doi": "", "graphic_ref": "f1",
                     "domain": no | {"chest_xray": True}, "image": "77_F1.jpg"}
    assert second["image"] == "77_F2.png" and second["in_text_mention"] is None and second["domain"] == no | {"ct_scan": True}
    assert (made / "images/77_F1.jpg").read_bytes() == picture(1) and {each.name for each in (made / "images").iterdir()} == {"77_F1.jpg", "77_F2.png"}
    assert sorted(each["reason"] for each in lines(made / "dropped.jsonl")) == ["damaged XML", "no caption", "no image file", "pair_id repeated"]
    assert "chest_xray 1, ct_scan 1" in said and "CC BY 2" in said and "mentioned in the text: 1" in said
    from llavamed_jax.curation.figure_file import FigureFile
    assert [(each.pair_id, each.domain, each.image) for each in map(FigureFile(made / "figures.jsonl").__getitem__, range(2))] == [
        ("77_F1", "chest_xray", "77_F1.jpg"), ("77_F2", "ct_scan", "77_F2.png")]
    assert main(["figures", "--source", str(tmp_path / "out"), "--out", str(made)]) == 1  # not empty
    assert main(["figures", "--source", str(tmp_path / "out"), "--out", str(tmp_path / "m2"), "--licence", "non-commercial"]) == 0
    assert lines(tmp_path / "m2/figures.jsonl") == [] and "holds no figure" in capsys.readouterr().err
    assert main(["figures", "--source", str(tmp_path / "m2" / "images"), "--out", str(tmp_path / "m3")]) == 2
    assert main(["figures", "--source", str(tmp_path / "nowhere"), "--out", str(tmp_path / "m3")]) == 2


@pytest.mark.parametrize("groups, kept", [("commercial", "ad"), ("non-commercial", "b"), ("commercial,non-commercial", "abd"), ("none", "abcd")])
def test_a_licence_keeps_what_it_allows(tmp_path, groups, kept):
    for name, code in {"a": "CC BY", "b": "cc by-nc 4.0", "c": "TDM", "d": "CC0"}.items():
        folder = tmp_path / "in" / name
        folder.mkdir(parents=True)
        (folder / "x.xml").write_text(f'<article><body><fig id="{name}"><caption><p>CT.</p></caption><graphic xmlns:l="http://www.w3.org/1999/xlink" l:href="f"/></fig></body></article>')
        (folder / "x.json").write_text(json.dumps({"license_code": code}))
        (folder / "f.jpg").write_bytes(picture(1))
    assert main(["figures", "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--licence", groups]) == 0
    assert [each["fig_id"] for each in lines(tmp_path / "out/figures.jsonl")] == list(kept)
    assert {each["reason"] for each in lines(tmp_path / "out/dropped.jsonl")} <= {"licence excluded by --licence"}


def test_one_file_that_cannot_be_read_costs_no_other(tmp_path, capsys):
    body = "".join(f'<fig id="F{n}"><label>Fig. {n}</label><caption><p>CT.</p></caption>{graphic(f"f{n}")}</fig>' for n in (1, 2))
    for name in "ab":
        (tmp_path / "j" / name).mkdir(parents=True)
        (tmp_path / "j" / name / f"{name}.xml").write_text(HEAD.replace("{abstract}", "").replace("77", name) + f"<body>{body}</body></article>")
        (tmp_path / "j" / name / "f1.jpg").write_bytes(picture(1))
    (tmp_path / "j/a/c.xml").symlink_to("nowhere.xml")
    (tmp_path / "j/a/f2.jpg").symlink_to("nowhere.jpg")
    os.mkfifo(tmp_path / "j/b/d.xml")
    (tmp_path / "m/figures").mkdir(parents=True)
    (tmp_path / "m/figures/ab_1.png").write_bytes(picture(5, "PNG"))
    (tmp_path / "m/a.jsonl").symlink_to("nowhere")
    (tmp_path / "m/b.jsonl").write_text(json.dumps({"pdf_hash": "ab", "fig_uri": "1.png", "s2_caption": "CT."}))
    (tmp_path / "r/test_images").mkdir(parents=True)
    (tmp_path / "r/test_images/x.jpg").write_bytes(picture(6))
    (tmp_path / "r/a_captions.csv").symlink_to("nowhere")
    (tmp_path / "r/license_information.csv").write_text("ID,License\n" + "y" * (2**24 + 1) + "\nx,CC BY\n")
    (tmp_path / "r/test_captions.csv").write_text("ID,Caption\nlong," + "y" * (2**24 + 1) + "\nx,MRI.\n")
    for name, layout, kept, dropped in (
            ("j", "jats", ["a_F1", "b_F1"], ["file that cannot be read"] * 2 + ["image file that cannot be read", "no image file"]),
            ("m", "medicat", ["ab_1"], ["file that cannot be read"]), ("r", "rocov2", ["x"], ["damaged row"] * 2 + ["file that cannot be read"])):
        assert main(["figures", "--source", str(tmp_path / name), "--out", str(tmp_path / f"made-{name}"), "--layout", layout]) == 0
        assert [row["pair_id"] for row in lines(tmp_path / f"made-{name}/figures.jsonl")] == kept
        assert sorted(each["reason"] for each in lines(tmp_path / f"made-{name}/dropped.jsonl")) == sorted(dropped)
        assert dropped[0] in capsys.readouterr().out
    assert lines(tmp_path / "made-r/figures.jsonl")[0]["licence"] == "CC BY"


def test_domains_that_a_model_has_told(tmp_path, capsys):
    (tmp_path / "r/test_images").mkdir(parents=True)
    for name in "abcd":
        (tmp_path / f"r/test_images/{name}.jpg").write_bytes(picture(6))
    (tmp_path / "r/test_captions.csv").write_text("ID,Caption\n" + "".join(f"{name},An MRI.\n" for name in "abcd"))
    answers = tmp_path / "domains.jsonl"
    argv = ["figures", "--source", str(tmp_path / "r"), "--domains", str(answers), "--out", str(tmp_path / "out")]
    rows = [{"pair_id": "a", "domain": "ct_scan"}, {"pair_id": "b", "domain": ["mri", "gross"]}, {"pair_id": "c", "domain": "other"},
            {"pair_id": "z", "domain": {"mri": True}}, {"pair_id": "b", "domain": {"histology": True, "mri": False}}]
    answers.write_text("".join(json.dumps(row) + "\n\n" for row in rows))
    assert main(argv) == 0
    assert ["+".join(key for key, is_in in row["domain"].items() if is_in) for row in lines(tmp_path / "out/figures.jsonl")] == ["ct_scan", "histology", "", "mri"]
    assert all(list(row["domain"]) == list(domains_of("")) for row in lines(tmp_path / "out/figures.jsonl"))
    assert "3 of 4 used; 1 other figure has those of its caption's words" in capsys.readouterr().out
    for text, said in (("{", "line 1 of"), ('{"pair_id": "a", "domain": "CT"}', "has the domain 'CT'"), ('{"domain": "mri"}', "pair_id and domain was expected"),
                       ('{"pair_id": "a", "domain": {"mri": 1}}', "object of booleans"), ('{"pair_id": "a"}', "has the domain")):
        answers.write_text(text)
        assert main([*argv[:-1], str(tmp_path / "no")]) == 1 and said in capsys.readouterr().err
    answers.unlink()
    assert main([*argv[:-1], str(tmp_path / "no")]) == 1 and "does not exist" in capsys.readouterr().err


def _fig(inner, name="F1", label="Fig. 1"):
    return f'<fig id="{name}"><label>{label}</label><caption><p>{inner}</p></caption>{graphic(name)}</fig>'


@pytest.mark.parametrize(("short", "long", "work"), [
    (9_000, 72_000, lambda n: len(prose.sentences("Fig. A " * n)) == 1),
    (12_500, 100_000, lambda n: len(prose.sentences("." * n + " A")) == 2),
    (3_750, 30_000, lambda n: len(mentions.find("Fig. 1 and 2 and " * n)) == 2 * n),
    (6_250, 50_000, lambda n: domains_of("MR specimen " * n + "mitral")),
    (2, 12, lambda n: len(article(_fig("<sup>" * n + "x" + "</sup>" * n)).figures) == 1),
    (1_000, 8_000, lambda n: len(article(_fig("x") + '<p>' + '<xref ref-type="fig" rid="F1">Fig. 1</xref> is. Fig. 2 was. ' * n + "</p>").figures[0].mentions) == n),
    (250, 2_000, lambda n: len(article(_fig("x", "G", "Fig. 3") * n + f'<p>{"Fig. 3 was. " * n}</p>').figures) == n),
], ids=["abbreviations", "stops", "lists", "domains", "levels", "links", "repeated"])
def test_text_that_means_harm_takes_no_time(short, long, work):
    """Each of these took a time that grows with the square of its length, or doubles with each level."""
    def cost(length):
        begun = time.thread_time()
        assert work(length)
        return time.thread_time() - begun

    # The square would be 8 times as much. Again where something else took the processor's caches.
    assert any(cost(long) < 3 * long / short * cost(short) + 0.05 for _ in range(3))


def test_a_signal_stops_the_reading_of_one_article(monkeypatch):
    count = [0]

    def check():
        count[0] += 1
        if count[0] == 50:
            raise KeyboardInterrupt

    monkeypatch.setattr(signals, "check", check)
    for body in ("<p>Fig. 1.</p>" * 100, f'<fig>{graphic("g")}</fig>' * 100):
        count[0] = 0
        with pytest.raises(KeyboardInterrupt):
            article(body)


def test_published_sets(tmp_path, capsys):
    shard = io.BytesIO()
    with tarfile.open(fileobj=shard, mode="w") as tar:
        for name, data in (("k1.jpg", picture(1)), ("k1.txt", b"Brain MRI."), ("k1.json", json.dumps({"article_metadata": {"pmid": 9, "license": "CC BY-NC"}}).encode()),
                           ("k2.txt", b"No image."), ("k2.json", b"{}"), ("k3.json", b"[1"), ("k4.png", picture(4, "PNG")), ("k4.json", b'{"caption": "Gross specimen."}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "b/commercial").mkdir(parents=True)
    (tmp_path / "b/commercial/0_999000000.tar").write_bytes(shard.getvalue())
    (tmp_path / "b/commercial/0_999000001.tar").write_bytes(shard.getvalue()[:700])
    (tmp_path / "m/figures").mkdir(parents=True)
    (tmp_path / "m/figures/ab_1-Figure1-1.png").write_bytes(picture(5, "PNG"))
    row = {"pdf_hash": "ab", "fig_uri": "1-Figure1-1.png", "fig_key": "Figure 1", "s2_caption": "Figure 1: CT.", "s2orc_references": ["See Fig. 1.", None],
           "oa_info": {"oa": {"license": "CC BY"}}}
    (tmp_path / "m/full.jsonl").write_text("".join(f"{text}\n" for text in (json.dumps(row), "{", json.dumps(row | {"fig_uri": "../../x.png"}))))
    (tmp_path / "r/test_images").mkdir(parents=True)
    (tmp_path / "r/test_images/ROCOv2_2023_test_000001.jpg").write_bytes(picture(6))
    (tmp_path / "r/test_captions.csv").write_text('ID,Caption\nROCOv2_2023_test_000001,"Chest X-ray, two\nlines."\nROCOv2_2023_test_000002,Gone.\nshort\n')
    (tmp_path / "r/license_information.csv").write_text("ID,PMCID,License\nROCOv2_2023_test_000001,PMC1,CC BY 4.0\n")
    wanted = {"b": [("k1", "Brain MRI.", "CC BY-NC", "k1.jpg", None), ("k4", "Gross specimen.", "unknown", "k4.png", None)],
              "m": [("ab_1-Figure1-1", "Figure 1: CT.", "CC BY", "ab_1-Figure1-1.png", [{"tokens": "See Fig. 1.", "entities": []}])],
              "r": [("ROCOv2_2023_test_000001", "Chest X-ray, two\nlines.", "CC BY 4.0", "ROCOv2_2023_test_000001.jpg", None)]}
    dropped = {"b": ["damaged JSON", "damaged shard: ReadError", "no image file"], "m": ["damaged line", "no image file"], "r": ["damaged row", "no image file"]}
    for name, layout in (("b", "biomedica"), ("m", "medicat"), ("r", "rocov2")):
        assert main(["figures", "--source", str(tmp_path / name), "--out", str(tmp_path / f"made-{name}")]) == 0
        assert f"({layout})" in capsys.readouterr().out
        assert [tuple(row[key] for key in ("pair_id", "fig_caption", "licence", "image", "in_text_mention")) for row in lines(tmp_path / f"made-{name}/figures.jsonl")] == wanted[name]
        assert sorted(each["reason"] for each in lines(tmp_path / f"made-{name}/dropped.jsonl")) == dropped[name]


@pytest.mark.parametrize("caption, wanted", [
    ("Frontal chest radiograph.", "chest_xray"), ("CXR on admission", "chest_xray"), ("Posteroanterior x-ray of the chest", "chest_xray"), ("Plain X-ray of the knee", ""),
    ("X-ray diffraction of the lung", ""), ("Chest CT and T2-weighted MRI", "ct_scan mri"), ("HRCT", "ct_scan"), ("Cone-beam computed tomography", "ct_scan"),
    ("Ct values of the PCR", ""), ("Optical coherence tomography", ""), ("Positron emission tomography", ""), ("FLAIR sequence", "mri"), ("mr smith", ""),
    ("Severe MR on colour Doppler, mitral valve", ""), ("NMR spectra", ""), ("Section (H&E, ×400)", "histology"), ("Photomicrograph, hematoxylin and eosin", "histology"),
    ("Scanning electron microscopy of enamel, × 50", ""), ("Gross specimen, cut surface", "gross"), ("gross tumor volume on CT", "ct_scan"),
    ("Intraoperative photograph of the liver", "gross"), ("Photograph of the patient's face", ""), ("Kaplan-Meier curves", "")])
def test_domains(caption, wanted):
    assert {name for name, is_in in domains_of(caption).items() if is_in} == set(wanted.split())
