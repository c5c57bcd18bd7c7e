"""`report.html`: one file, offline, true to its numbers, and safe against what a model may answer."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.data.questions import VqaSample
from llavamed_jax.evaluation import report, scoring

_VOID = {"meta", "img", "rect", "line", "br"}


class Page(HTMLParser):
    """Checks that tags close in order; collects attributes and text."""

    def __init__(self, html):
        super().__init__()
        self.open, self.attributes, self.words, self.tags = [], [], [], []
        self.feed(html)
        assert not self.open, f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.attributes += attributes
        self.tags.append(tag)
        if tag not in _VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in _VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture
def samples(tmp_path):
    result = []
    for i in range(30):
        path = tmp_path / f"{i:02}.png"
        Image.new("L" if i % 2 else "RGBA", (600, 400), color=i * 8 if i % 2 else (i * 8, 0, 0, 255)).save(path)
        organ = ("HEAD", "CHEST", "ABD")[i % 3]
        result.append(VqaSample(2 * i, path, "Is it <normal>?", "Yes", "CLOSED", question_type="PRES", organ=organ))
        result.append(VqaSample(2 * i + 1, path, "Where?", "left lung", "OPEN", question_type="POS", organ=organ))
    return result


def answers(samples, closed="No", open_="the left side"):
    return [
        {"question_id": s.question_id, "text": closed if s.answer_type == "CLOSED" else open_, "model_id": "small & new"}
        for s in samples
    ]


def test_it_is_one_offline_page_with_numbers_and_notice(samples):
    predictions = answers(samples)
    metrics = scoring.score(samples, predictions, dataset="vqa_rad", split="test")
    html = report.render(metrics, samples, predictions, details={"Run": {"date": "2026-01-01", "nested": {"a": [1]}}})
    page = Page(html)
    assert "For research use only: never for clinical decisions." in page.text
    assert "Evaluation on VQA-RAD, test split" in page.text and "small & new" in page.text
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links and all(value.startswith("data:image/jpeg;base64,") for value in links)
    assert "script" not in page.tags and "url(" not in html and "http" not in html
    assert f"{metrics['strict']['open_f1']:.1f}" == "50.0" and "50.0" in page.text
    assert "HEAD" in page.text and "By organ" in page.text and "By modality" not in page.text
    assert '{"a": [1]}' in page.text


def test_the_gallery_has_pictures_of_right_and_wrong_answers(samples):
    predictions = answers(samples)
    predictions[0]["text"] = "Yes."
    metrics = scoring.score(samples, predictions, dataset="vqa_rad", split="test")
    html = report.render(metrics, samples, predictions)
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', html)
    assert len(pictures) == 24, "of the 30 images 24 are drawn"
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.size == (256, 171)
    for kind, word in (("wrong", "wrong"), ("partly", "F1 50")):
        assert f'<span class="tag {kind}">{word}</span>' in html
    assert html == report.render(metrics, samples, predictions), "the same seed draws the same images"
    other = scoring.score(samples, predictions, dataset="vqa_rad", split="test", seed=1)
    assert html != report.render(other, samples, predictions)


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b < c", "日本語 Ω"])
def test_answers_are_escaped(samples, text):
    predictions = answers(samples, closed=text, open_=text)
    predictions[0]["model_id"] = text
    metrics = scoring.score(samples, predictions, dataset=text, split=text)
    page = Page(report.render(metrics, samples, predictions, predictions, {text: {text: text}}))
    assert "script" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(" ".join(text.split())) > 40


def test_the_control_stands_beside_the_result(samples):
    predictions, control = answers(samples, closed="Yes"), answers(samples, open_="right kidney")
    names = {"dataset": "slake", "split": "validation"}
    metrics, other = scoring.score(samples, predictions, **names), scoring.score(samples, control, **names)
    metrics["control"] = {
        "kind": "image",
        "seed": 0,
        "paper": other["paper"],
        "strict": other["strict"],
        "difference": scoring.difference(samples, predictions, control, 0),
    }
    assert metrics["control"]["difference"]["closed_accuracy"] == 100
    page = Page(report.render(metrics, samples, predictions, control))
    assert "images exchanged" in page.text and "difference" in page.text
    assert "right kidney" in page.text and "100.0 [100.0, 100.0]" in page.text


def test_organ_and_leakage_tables(samples):
    predictions = answers(samples)
    metrics = scoring.score(samples, predictions, samples[:6], dataset="vqa_rad", split="held_out")
    metrics["organ"] = {"question": "Which?", "n": 15, "hits": 11, "accuracy": 73.33, "exchanged": 28.57, "majority": 33.33}
    page = Page(report.render(metrics, samples, predictions))
    assert "held-out images" in page.text
    assert "73.3" in page.text and "11 of 15" in page.text and "mean over all 14 cyclic shifts" in page.text
    assert "Images that training rows show 3 of 30" in page.text


def test_images_that_cannot_be_read_and_classes_without_items(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    samples = [
        VqaSample(1, tmp_path / "broken.jpg", "Where?", "left", "OPEN"),
        VqaSample(2, Path("absent.jpg"), "Where?", "left", "OPEN"),
    ]
    predictions = answers(samples, open_="")
    page = Page(report.render(scoring.score(samples, predictions, dataset="x", split="y"), samples, predictions))
    assert page.text.count("image not found") == 2 and "2 image files could not be read" in page.text
    assert "(nothing)" in page.text
    assert "–" in page.text and "nan" not in page.text.lower() and "None" not in page.text


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (0.0, "0.0"), (1e-300, "&lt;0.05"), (0.06, "0.1"), (-0.01, "0.0"), (-3.25, "−3.2"), (100, "100.0")]
)
def test_numbers(value, text):
    assert report.number(value) == text
