"""`report.html`: one file, offline, true to its numbers, and safe against what a model may answer."""

import base64
import io
import re
import tomllib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.evaluation.report import page as page_of
from llavamed_jax.evaluation.report import report
from llavamed_jax.evaluation.scoring import score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.images.thumbnail import thumbnail
from llavamed_jax.utils import code

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
        Image.new("L" if i % 2 else "RGBA", (300, 200), color=i * 8 if i % 2 else (i * 8, 0, 0, 255)).save(path)
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
    metrics = score.score(AnswerSet(samples, predictions), dataset="vqa_rad", split="test")
    html = report.render(metrics, AnswerSet(samples, predictions), details={"Run": {"date": "2026-01-01", "nested": {"a": [1]}}})
    page = Page(html)
    assert "For research use only: never for clinical decisions." in page.text
    assert "Evaluation on VQA-RAD, test split" in page.text and "small & new" in page.text
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert links and all(value.startswith("data:image/jpeg;base64,") for value in links)
    assert "script" not in page.tags and "url(" not in html and "http" not in html
    assert f"{metrics['strict']['open_f1']:.1f}" == "50.0" and "50.0" in page.text
    assert "HEAD" in page.text and "By organ" in page.text and "By modality" not in page.text
    assert '{"a": [1]}' in page.text


def parts(html):
    """The sections of a page by their titles."""
    found = re.split("<h2>(.*?)</h2>", html)
    return dict(zip(found[1::2], found[2::2], strict=True))


def test_the_gallery_has_pictures_of_right_and_wrong_answers(samples):
    predictions = answers(samples)
    predictions[0]["text"] = "Yes."
    metrics = score.score(AnswerSet(samples, predictions), dataset="vqa_rad", split="test")
    html = report.render(metrics, AnswerSet(samples, predictions))
    pictures = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', parts(html)["Pictures, questions, answers"])
    assert len(pictures) == 24, "of the 30 images 24 are drawn"
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert image.size == (256, 171)
    for kind, word in (("wrong", "wrong"), ("partly", "F1 50")):
        assert f'<span class="tag {kind}">{word}</span>' in html
    assert html == report.render(metrics, AnswerSet(samples, predictions)), "the same seed draws the same images"
    other = score.score(AnswerSet(samples, predictions), dataset="vqa_rad", split="test", seed=1)
    assert html != report.render(other, AnswerSet(samples, predictions))


def test_as_many_right_as_wrong_answers_are_drawn(samples):
    predictions = answers(samples)
    for i in (0, 4, 8, 12, 16):  # five closed answers are right, 25 wrong, and all 30 open ones partly right
        predictions[i]["text"] = f"Yes, {i}"
    metrics = score.score(AnswerSet(samples, predictions), dataset="vqa_rad", split="test")
    page = parts(report.render(metrics, AnswerSet(samples, predictions)))["Right, partly right and wrong answers"]
    titles = re.findall(r'<h3>(.*?) <span class="ci">(.*?)</span></h3>', page)
    assert titles == [("Right", "5 of 5"), ("Partly right", "6 of 30"), ("Wrong", "6 of 25")]
    counts = [len(re.findall(f'<span class="tag {kind}">', page)) for kind in ("right", "partly", "wrong")]
    assert counts == [5, 6, 6] and page.count("<figure>") == 17
    right = page.split("<h3>")[1]
    assert sorted(re.findall(r"Yes, (\d+)", right), key=int) == ["0", "4", "8", "12", "16"]
    other = score.score(AnswerSet(samples, predictions), dataset="vqa_rad", split="test", seed=1)
    again = parts(report.render(other, AnswerSet(samples, predictions)))["Right, partly right and wrong answers"]
    assert re.findall("alt=.(.*?)\"", again) != re.findall("alt=.(.*?)\"", page), "another seed draws others"


def test_a_thumbnail_is_of_the_file_as_it_is(tmp_path):
    """It is drawn once for all places of a page, and anew where the file has changed or is gone."""
    path = tmp_path / "a.png"
    found = []
    for color in ("red", "blue"):
        Image.new("RGB", (300, 200), color).save(path)
        found.append(thumbnail(path))
        assert thumbnail(path) is thumbnail(str(path)) is found[-1]
    red, blue = (Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).getpixel((9, 9)) for url in found)
    assert red[0] > 200 > 50 > red[2] and blue[2] > 200 > 50 > blue[0]
    path.unlink()
    assert thumbnail(path) is None


def test_huge_texts_are_cut_and_say_so(samples):
    predictions = answers(samples, open_="left lung " * 3000)
    samples = [*samples[:-1], VqaSample(59, samples[-1].image, "Where? " * 500, "left lung", "OPEN")]
    answered = AnswerSet(samples, predictions)
    html = report.render(score.score(answered, dataset="x", split="y"), answered, {"image": answered})
    page = Page(html)
    assert "(cut: 30,000 characters in all)" in page.text and "(cut: 3,500 characters in all)" in page.text
    assert max(map(len, page.words)) < 5000 and len(html) < 3_000_000, "pictures, and no answer in full"
    cut = page_of.environment().get_template("macros.html.j2").module.cut
    assert cut("x" * page_of.LONGEST_TEXT) == "x" * page_of.LONGEST_TEXT
    assert cut("<" * (page_of.LONGEST_TEXT + 1)).startswith("&lt;" * page_of.LONGEST_TEXT + "…"), "cut before it is escaped"


def test_multiple_choice_and_captions_have_tables_where_they_are_asked(samples):
    for name, sample, text, words in (
        ("choice", VqaSample(0, samples[0].image, "Where?", "left", "CHOICE", options=("right", "left")), "It may be B",
         ["unread", "chance 50.0"]),
        ("caption", VqaSample(0, samples[0].image, "Describe.", "a clear lung", "CAPTION"), "a lung",
         ["ROUGE-L 80", "Not computed", "GREEN", "BLEU-4"]),
    ):  # fmt: skip
        predictions = [{"question_id": 0, "text": text}]
        answered = AnswerSet([sample], predictions)
        page = Page(report.render(score.score(answered, dataset="x", split="y"), answered))
        assert all(word in page.text for word in words), name
        assert "Closed accuracy" not in page.text and "Open" not in page.text, "no table of what was not asked"


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a & b < c", "日本語 Ω"])
def test_answers_are_escaped(samples, text):
    predictions = answers(samples, closed=text, open_=text)
    predictions[0]["model_id"] = text
    metrics = score.score(AnswerSet(samples, predictions), dataset=text, split=text)
    answered = AnswerSet(samples, predictions)
    page = Page(report.render(metrics, answered, {"image": answered}, {text: {text: text}}))
    assert "script" not in page.tags and not [name for name, _ in page.attributes if name.startswith("on")]
    assert page.text.count(" ".join(text.split())) > 40


def spoilt(value, text):
    """A value of `metrics.json` in which each text is a hostile one, at whatever depth."""
    if isinstance(value, dict):
        return {key: spoilt(each, text) for key, each in value.items()}
    if isinstance(value, list):
        return [spoilt(each, text) for each in value]
    return text if isinstance(value, str) else value


HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "'><svg onload=alert(1)>", "</style><b>",
           "{{ 7 * 7 }}{% x %}{# y & z"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_text_in_every_field_is_shown_as_text(samples, text):
    """Questions, answers, golds, names of images, models, files, groups, judges, tables: every text that a page is made of."""
    samples = [replace(sample, question=text, answer=text if sample.answer_type == "OPEN" else sample.answer, organ=text + str(i % 2),
                       question_type=text + str(i % 3), modality=text, image=sample.image.with_name(text.replace("/", "") + str(i)))
               for i, sample in enumerate(samples)]  # fmt: skip
    samples += [VqaSample("c", Path(text.replace("/", "")), text, "a", "CHOICE", options=("a", "b")),
                VqaSample(text, Path("d.png"), text, text, "CAPTION")]
    lines = [{"question_id": sample.question_id, "text": text, "model_id": text} for sample in samples]
    answers = AnswerSet(samples, lines, samples)
    metrics = controlled(samples, lines, lines, lines, dataset="d", split="s")
    table = score.score(answers)
    row = {"value": 1.0, "other": 2.0, "difference": 3.0, "low": 0.5, "high": 4.0, "p": 0.5}
    metrics |= {
        "asked": {"template": "t", "generation": {"seed": "1"}}, "leakage": table["leakage"],
        "against": {"file": "f", "model_id": "m", "sha256": "s", "strict": {"open_f1": row}, "captions": {"rouge_l": row},
                    "paper": {name: row for name in table["paper"]}},
        "organ": {"question": "q", "n": 2, "hits": 1, "accuracy": 50.0, "exchanged": 0.0, "majority": 50.0, "answers": []},
        "judged": {"judge": {"model": "m", "n_asked_again": 0, "wording": "w"}, "open_accuracy": 1.0, "open_accuracy_low": None,
                   "open_accuracy_high": None, "n_open": 30, "n_unscored": 1, "unscored": ["u"]},
        "published": {"model": "m", "source": "s", "values": {"recall": 1.0}},
        "trained_on": {"data": "d", "records": 1, "records_not_readable": 0, "training_images": 1, "training_images_not_readable": 0,
                       "images": 1, "images_same_file": 0, "images_same_pixels": 0, "by_kind": {}},
    }  # fmt: skip
    groups = {group: {text + key: row for key, row in rows.items()} for group, rows in metrics["groups"].items()}
    shown = spoilt(metrics, text) | {"groups": groups}
    html = report.render(shown, answers, {"image": answers, "noise": answers}, {text: {text: text, "more": {text: text}}})
    page = Page(html)
    assert not [name for name, _ in page.attributes if name.startswith("on")] and text not in html
    plain = report.render(metrics, answers, {"image": answers, "noise": answers}, {"t": {"n": "v", "more": {"k": "v"}}})
    assert page.tags == Page(plain).tags, "no field adds or takes away an element"
    assert page.text.count(text) > 150, "and each is shown to the letter"


def controlled(samples, predictions, control, noise, **names):
    own, *others = (AnswerSet(samples, each) for each in (predictions, control, noise))
    metrics = score.score(own, **names)
    tables = [score.score(other, **names) | {"difference": score.difference(own, other)} for other in others]
    metrics["control"] = {"kind": "image", **tables[0], "noise": {"kind": "noise", "size": 336, **tables[1]}}
    return metrics


def test_the_controls_stand_beside_the_result(samples):
    predictions, control = answers(samples, closed="Yes"), answers(samples, open_="right kidney")
    noise = answers(samples, closed="Yes", open_="nothing at all")
    metrics = controlled(samples, predictions, control, noise, dataset="slake", split="validation")
    assert metrics["control"]["difference"]["closed_accuracy"] == 100
    others = {"image": AnswerSet(samples, control), "noise": AnswerSet(samples, noise)}
    html = report.render(metrics, AnswerSet(samples, predictions), others)
    page, table = Page(html), Page(parts(html)["Does the image matter?"])
    assert "images exchanged" in table.text and "noise, 336 pixels wide" in table.text
    assert "With another image in place of the image: the model loses 100.0 points of closed accuracy" in table.text
    assert "With noise in place of the image: the model loses 50.0 points of open F1 (p < 0.001)" in table.text
    assert "a difference of +0.0 points of closed accuracy (p = 1.000) is within chance" in table.text
    row = "Closed accuracy 100.0 [100.0, 100.0] 0.0 [0.0, 0.0] 100.0 [100.0, 100.0] <0.001 100.0 [100.0, 100.0] 0.0 [0.0, 0.0] 1.000"
    assert row in table.text, "own image, exchanged, difference, p, noise, difference, p"
    assert "exchanged right kidney noise nothing at all" in page.text


def test_organ_and_leakage_tables(samples):
    predictions = answers(samples)
    metrics = score.score(AnswerSet(samples, predictions, samples[:6]), dataset="vqa_rad", split="held_out")
    metrics["organ"] = {"question": "Which?", "n": 15, "hits": 11, "accuracy": 73.33, "exchanged": 28.57, "majority": 33.33}
    page = Page(report.render(metrics, AnswerSet(samples, predictions)))
    assert "held-out images" in page.text
    assert "73.3" in page.text and "11 of 15" in page.text and "mean over all 14 cyclic shifts" in page.text
    assert "Images that training rows show 3 of 30" in page.text


def test_what_the_model_was_trained_on_has_a_table(samples):
    predictions = answers(samples)
    metrics = score.score(AnswerSet(samples, predictions), dataset="slake", split="test")
    metrics["trained_on"] = {
        "data": "<train>.json", "records": 1234, "records_not_readable": 5, "training_images": 678, "training_images_not_readable": 9,
        "images": 30, "images_same_file": 11, "images_same_pixels": 2,
        "by_kind": {"CLOSED": {"questions": 30, "image_in_training": 13, "image_and_answer_in_training": 7}},
    }  # fmt: skip
    text = Page(parts(report.render(metrics, AnswerSet(samples, predictions)))["Overlap with what the model was trained on"]).text
    for words in ("<train>.json: 1234 records, 5 of them", "678 images, 9 of them", "same file 11 of 30", "another file 2 of 30",
                  "Closed questions whose image occurs 13 of 30", "image and answer occur 7 of 30"):  # fmt: skip
        assert words in text


def test_a_published_number_is_named_or_its_absence_explained(samples):
    predictions = answers(samples)
    metrics = score.score(AnswerSet(samples, predictions), dataset="vqa_rad", split="test")
    metrics["published"] = {"model": "LLaVA-Med (X), 15 epochs", "source": "the paper", "values": {"recall": 61.52}}
    text = Page(parts(report.render(metrics, AnswerSet(samples, predictions)))["As the paper computes them"]).text
    assert "LLaVA-Med (X), 15 epochs" in text and "61.5" in text
    metrics["published"] = {"reason": "No published numbers are shown: <why>."}
    text = Page(parts(report.render(metrics, AnswerSet(samples, predictions)))["As the paper computes them"]).text
    assert "No published numbers are shown: <why>." in text and "61.5" not in text


def test_images_that_cannot_be_read_and_classes_without_items(tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    samples = [
        VqaSample(1, tmp_path / "broken.jpg", "Where?", "left", "OPEN"),
        VqaSample(2, Path("absent.jpg"), "Where?", "left", "OPEN"),
    ]
    predictions = answers(samples, open_="")
    answered = AnswerSet(samples, predictions)
    page = Page(report.render(score.score(answered, dataset="x", split="y"), answered))
    # Once in the gallery of images, once among the right and wrong answers.
    assert page.text.count("image not readable") == 4 and page.text.count("2 image files could not be read") == 2
    assert "(nothing)" in page.text
    assert "–" in page.text and "nan" not in page.text.lower() and "None" not in page.text


@pytest.mark.parametrize(
    "value, text", [(None, "–"), (0.0, "0.0"), (1e-300, "<0.05"), (0.06, "0.1"), (-0.01, "0.0"), (-3.25, "−3.2"), (100, "100.0")]
)
def test_numbers(value, text):
    assert page_of.number(value) == text


def test_templates_are_shipped_and_count_as_code():
    """A file beside the code that the package needs: setuptools takes it along, and answers of other pages' code are asked anew."""
    package = Path(code.__file__).resolve().parents[1]
    patterns = tomllib.loads((package.parent / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-data"]
    shipped = {path for pattern in patterns["llavamed_jax"] for path in package.glob(pattern)}
    beside = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert {"report.html.j2", "chat.html.j2", "gallery.html.j2", "style.css"} <= {path.name for path in beside}
    assert beside == shipped and {path.suffix for path in beside} <= set(code._SUFFIXES)
