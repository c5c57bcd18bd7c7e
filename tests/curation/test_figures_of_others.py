"""Figures of other owners are `unknown`, wherever the figure says so; ordinary captions keep the article's licence."""

import time

import pytest

pytest.importorskip("lxml")
from llavamed_jax.curation import jats

OTHERS = """
Axial CT. Copyright © 2010 Elsevier.
Axial CT. © Mayo Foundation.
Axial CT © 2010. Elsevier.
Axial CT (Elsevier © 2010). All panels are of the authors' patient.
Copyright Elsevier 2010.
Image from Smith et al. [12], copyright Elsevier.
Copyright (c) 2010 Elsevier, reprinted by the authors.
Copyright holder: WHO.
© the original authors.
Permission was obtained from Elsevier.
Permission obtained from Springer to reproduce this figure.
Permission granted by Wiley.
Permission to reproduce the image was granted by the publisher.
CT of a patient. Permission from Elsevier.
CT; permission was obtained from the patient and from Elsevier.
The patient's permission was obtained, and permission was granted by Wiley.
Permission was obtained from the ethics committee and Elsevier.
Figure taken from Smith et al. (2010).
Figure taken from Smith, 2010.
Taken from ref. 12.
CT of the chest (taken from [12]).
Images were taken from Wikipedia.
The image is taken from a public website.
Photograph taken from Gray's Anatomy.
CT, taken from the article by Smith et al.
Diagram downloaded from https://example.org/a.
Adapted, with modifications, from Smith [12].
Adapted (with minor changes) from Smith.
Modified, from Smith.
Modified after Smith et al.
Figure modified after Netter.
Redrawn after reference 3.
Picture from Smith and Jones [4].
Source: Smith et al., Radiology 2010.
A victim of cholera (source: Wellcome Library, London).
Photo source:https://example.org/a
Image obtained from Wikipedia – available at an address.
The photo is downloaded from (http://example.org/a).
Sagittal section (from Boon et al.9)
Photo B: Deep Sea Productions©. (B) The deck.
[© Diogo Guerra 2015]
Used under license from Shutterstock.
Reproduced under licence from Elsevier.
Icon licensed from a library.
Image credit: Getty Images.
Photo credits: Dr. X.
Credit: NASA.
Courtesy of Dr. X.
""".strip().splitlines()
OURS = """
Blood was taken from the patient before surgery.
Specimens taken from the left lobe (2010).
Biopsies were taken from the antrum, and from Barrett's esophagus.
Image taken from the left side in a 45-year-old man.
Photograph taken from Patient B.
Representative images taken from Group A.
Images taken from Wistar rats show the liver.
Section taken from reference tissue (12 slides).
CT taken from the atlas to the sacrum.
Images were obtained from a Siemens scanner.
CT images obtained from T2-weighted sequences.
Panels from (a) the liver and (b) the spleen.
Images from (1) a control and (2) a patient.
Treatment was modified after surgery.
The dose was modified after Day 3.
Modified after chemotherapy; MRI at 3 months.
The protocol was modified, with images from both eyes shown.
Written permission was obtained from the patient.
Written informed permission to publish this case and its images was obtained from the patient's parents.
Permission for publication was given by the patient.
The patient's permission was obtained.
Permission was obtained from the local ethics committee.
Permission was granted by the institutional review board of the hospital.
No permission was required.
The image is free of copyright.
Axial CT. © 2019 Ours Ltd. The arrow shows a nodule.
Axial CT. Copyright © 2020 the Authors.
The authors hold the copyright.
Axial, (b) coronal and (c) sagittal CT.
Image credit: the authors.
Source: our own archive.
Sources: hospital records.
Source: Shahid Rajaie Hospital MRI center, Tehran.
Source: Ir-192 for brachytherapy.
Dimensions as measured using OsiriX©: axial length.
Cataract taken from patient IV:4.
[The patient has given explicit permission for this photograph to be published]
The retrieved guidewire (printed with permission of the patient).
Animals were kept under licence from the Home Office.
The patient was licensed to drive.
The drug was used under a licence for children.
A permissive stenosis; the credit goes unmentioned.
""".strip().splitlines()
ARTICLE = ('<article xmlns:xlink="http://www.w3.org/1999/xlink"><front><article-meta><permissions><copyright-statement>© Ours Ltd, 2019'
           '</copyright-statement></permissions></article-meta></front><body>{}</body></article>')
WITH = "Reproduced with permission from Elsevier."


def licence(inside: str, element: str = "fig") -> str:
    (found,) = jats.read_articles(ARTICLE.format(f'<{element} id="F1">{inside}</{element}>').encode())
    return found.figures[0].licence


def of_caption(text: str) -> str:
    return licence(f'<caption><p>{text}</p></caption><graphic xlink:href="a.jpg"/>')


@pytest.mark.parametrize("text", OTHERS)
def test_captions_that_name_another_owner(text):
    assert of_caption(text) == "unknown"
    assert licence(f'<attrib>{text}</attrib><graphic xlink:href="a.jpg"/>') == "unknown"


@pytest.mark.parametrize("text", OURS)
def test_ordinary_captions_keep_the_articles_licence(text):
    assert of_caption(text) == ""


@pytest.mark.parametrize("statement", [
    "<permissions><copyright-statement>© 2010 Elsevier. All rights reserved.</copyright-statement></permissions>",
    "<permissions><copyright-holder>Elsevier</copyright-holder></permissions>", f"<attrib>{WITH}</attrib>"])
@pytest.mark.parametrize("place", [
    "{}<graphic xlink:href='a.jpg'/>", "<graphic xlink:href='a.jpg'>{}</graphic>", "<media mimetype='image' xlink:href='a.jpg'>{}</media>",
    "<alternatives><graphic xlink:href='a.jpg'/><graphic xlink:href='b.jpg'>{}</graphic></alternatives>", "<caption><p>CT.{}</p></caption>"])
def test_statements_are_read_wherever_they_stand(place, statement):
    assert licence(place.format(statement)) == licence(place.format(statement), "fig-group") == "unknown"
    assert licence(place.format("<attrib>Photo: A. B.</attrib>")) == ""


@pytest.mark.parametrize("place", [
    "<caption><p>CT.<fn><p>{}</p></fn></p></caption>", "<caption><p>CT.</p><attrib>{}</attrib></caption>", "<p>{}</p>", "<fn><p>{}</p></fn>",
    "<fn-group><fn><label>a</label><p>{}</p></fn></fn-group>", "<caption><title>{}</title></caption>", "<disp-quote><p>{}</p></disp-quote>",
    "<graphic xlink:href='a.jpg'><caption><p>{}</p></caption></graphic>"])
def test_texts_are_read_wherever_they_stand(place):
    for text in (WITH, "© 2010 Elsevier.", "Modified after Smith et al."):
        assert licence(place.format(text)) == "unknown"
    assert licence(place.format("Written permission was obtained from the patient.")) == ""
    assert licence(place.format("CT, from [3] (CC BY-NC 4.0).")) == "CC BY-NC"
    other = f'<fig id="F1"><caption><p>{WITH}</p></caption><graphic xlink:href="b.jpg"/></fig>'  # says nothing of the figure around it
    assert licence(f'{place.format("CT.")}{other}<graphic xlink:href="a.jpg"/>') == ""


def test_owners_in_long_captions_take_no_time():
    for text in ("Permission to " * 5_000, "taken from " * 5_000, "© a" * 5_000, "A" * 50_000 + " taken from " + "A" * 50_000, "Figure was " * 5_000,
                 "taken from " + "Aa and " * 5_000, "modified, with " * 5_000, "under a licence of " * 5_000, "(" * 50_000 + " taken from"):
        begun = time.thread_time()
        of_caption(text)
        assert time.thread_time() - begun < 1, text[:20]  # the square would be many seconds
