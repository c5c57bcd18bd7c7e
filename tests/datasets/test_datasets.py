"""Readers: the official sets with the published counts, every quirk of the files, and one sentence for bad ones."""

import json
import logging
import math

import pytest
from PIL import Image

from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.sample import to_llava
from llavamed_jax.datasets.slake import read_slake
from llavamed_jax.datasets.training import read_training
from llavamed_jax.datasets.vqa_rad import VQA_RAD_FILE, read_vqa_rad
from llavamed_jax.errors import UserError


def row(qid, phrase="freeform", **changes):
    return {"qid": str(qid), "phrase_type": phrase, "image_name": "a.jpg", "image_organ": "HEAD", "question": f"Q{qid} ?",
            "question_frame": "NULL", "question_type": "PRES", "answer": "Yes", "answer_type": "CLOSED", **changes}


@pytest.fixture
def rad(tmp_path):
    """A cut of VQA-RAD that has each of the file's quirks."""
    rows = [row(0, answer_type="CLOSED ", question_type="PRSE, ATRIB"), row(1, answer=4, answer_type="OPEN", question_type="COUNT"),
            row(2, "test_freeform", question_frame="Is Q2 so?"), row(3, "para", question_frame="Is Q3 so?"), row(4, "test_para")]
    (tmp_path / VQA_RAD_FILE).write_text(json.dumps(rows))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images" / "a.jpg")
    return tmp_path


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def record(*values, **more):
    return {"id": "r", "conversations": [{"from": ("human", "gpt")[i % 2], "value": v} for i, v in enumerate(values)], **more}


# ---- VQA-RAD ----


def test_quirks_of_vqa_rad(rad):
    train = read_vqa_rad(rad, "train")
    assert [s.question_id for s in train] == [0, 1, 3]
    assert (train[0].answer_type, train[0].question_type) == ("CLOSED", "ATTRIB, PRES")
    assert (train[1].answer, train[1].answer_type, train[1].organ) == ("4", "OPEN", "HEAD")
    assert [s.question_id for s in read_vqa_rad(rad, "test")] == [2, 4]
    assert len(read_vqa_rad(rad / VQA_RAD_FILE, "all")) == 5


def test_paper_protocol_adds_every_rephrasing_and_says_so(rad, caplog):
    with caplog.at_level(logging.WARNING):
        samples = read_vqa_rad(rad, "train", "paper")
    assert [s.question_id for s in samples] == [0, 1, 3, "frame-2", "frame-3"]
    assert (samples[3].question, samples[3].answer) == ("Is Q2 so?", "Yes")
    assert "2 rephrasings were added to the training rows, and 1 of them rephrase test questions" in caplog.text
    assert len(read_vqa_rad(rad, "test", "paper")) == 2


@pytest.mark.parametrize("split, protocol, counts", [
    ("train", "clean", (1797, 770, 1027)), ("train", "paper", (3064, 1241, 1823)), ("test", "clean", (451, 179, 272))])
def test_published_counts_of_vqa_rad(shared, split, protocol, counts):
    samples = read_vqa_rad(shared / "data" / "vqa_rad", split, protocol)
    n_open = sum(s.answer_type == "OPEN" for s in samples)
    assert (len(samples), n_open, len(samples) - n_open) == counts
    assert describe(samples, "vqa_rad", split, protocol).endswith("as published")


def test_a_cut_is_described_beside_the_whole(rad):
    assert describe(read_vqa_rad(rad, "test"), "vqa_rad", "test", "clean") == (
        "vqa_rad test (clean): 2 questions on 1 image, 0 open, 2 closed; published: 451 questions on 203 images, 179 open, 272 closed")


def test_missing_images_are_counted(rad):
    rows = [row(0), row(1, image_name="b.jpg"), row(2, image_name="c.jpg")]
    write(rad / VQA_RAD_FILE, rows)
    with pytest.raises(UserError, match="b.jpg does not exist; 2 of 3 images are missing"):
        read_vqa_rad(rad, "train")


@pytest.mark.parametrize("change, sentence", [
    (lambda d: (d / VQA_RAD_FILE).unlink(), "does not exist"), (lambda d: write(d / VQA_RAD_FILE, "[{"), "is not valid JSON"),
    (lambda d: write(d / VQA_RAD_FILE, [{"qid": 1}]), "row 0 of .* has no 'answer_type'"),
    (lambda d: write(d / VQA_RAD_FILE, [row(0, answer_type="MAYBE")]), "answer_type 'MAYBE'; OPEN or CLOSED"),
    (lambda d: write(d / VQA_RAD_FILE, [row(0, image_name=None)]), "row 0 of .* has the image_name None; text"),
    (lambda d: write(d / VQA_RAD_FILE, [row(0, image_name=3)]), "image_name 3; text"),
    (lambda d: write(d / VQA_RAD_FILE, [row(0, answer=None)]), "answer None; text"),
    (lambda d: write(d / VQA_RAD_FILE, [{**row(0), "qid": None}]), "qid None; text"),
    (lambda d: (d / "images").rename(d / "other"), "has no folder images/")])
def test_bad_vqa_rad(rad, change, sentence):
    change(rad)
    with pytest.raises(UserError, match=sentence):
        read_vqa_rad(rad, "train")


def test_unknown_split_and_protocol(rad):
    with pytest.raises(UserError, match="'dev'; one of train, test, all"):
        read_vqa_rad(rad, "dev")
    with pytest.raises(UserError, match="'dirty'; one of clean, paper"):
        read_vqa_rad(rad, "train", "dirty")


# ---- SLAKE ----


@pytest.mark.parametrize("split, counts", [("train", (4919, 2976, 1943)), ("validation", (1053, 631, 422))])
def test_published_counts_of_slake(shared, split, counts):
    samples = read_slake(shared / "data" / "slake", split)
    n_open = sum(s.answer_type == "OPEN" for s in samples)
    assert (len(samples), n_open, len(samples) - n_open) == counts
    assert describe(samples, "slake", split, "en").endswith("as published")
    assert len(read_slake(shared / "data" / "slake", split, "all")) > len(samples)


def test_slake_without_a_split_names_the_file(tmp_path):
    with pytest.raises(UserError, match="test.json does not exist"):
        read_slake(tmp_path, "test")


def test_slake_fields_and_language(tmp_path):
    entry = {"img_name": "xmlab1/source.jpg", "question": "What?", "answer": "MRI", "q_lang": "en", "location": "Abdomen",
             "modality": "MRI", "answer_type": "OPEN", "content_type": "Modality", "qid": 7}
    write(tmp_path / "train.json", [entry, {**entry, "q_lang": "zh", "qid": 8}])
    (tmp_path / "imgs" / "xmlab1").mkdir(parents=True)
    Image.new("RGB", (4, 4)).save(tmp_path / "imgs" / "xmlab1" / "source.jpg")
    (sample,) = read_slake(tmp_path, "train")
    assert (sample.question_id, sample.organ, sample.modality, sample.question_type) == (7, "Abdomen", "MRI", "Modality")
    assert len(read_slake(tmp_path, "train", "zh")) == 1
    assert [s.question_id for s in read_slake(tmp_path, "train", "all")] == [7, 8]
    assert to_llava(sample)["conversations"] == [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "MRI"}]
    assert len(read_training(tmp_path)) == 1


# ---- LLaVA files ----


def test_mixture_and_its_weights(rad, tmp_path):
    file = write(tmp_path / "x.json", [record("Hi", "Ho")] * 4)
    data = read_training([{"path": file, "weight": 0.5}, {"path": str(rad), "weight": 2}])
    assert data.sizes == (2, 6) and (len(data), data.num_records) == (8, 7)
    assert [data.record(i)["id"] for i in range(7)] == ["r"] * 4 + [0, 1, 3]
    for entries, sentence in (([], "is empty"), ([{"file": "x"}], "keys path, images and weight"),
                              ([1], "1; {path"), ([str(file)], "{path"), ([{"path": 1}], "the path 1; text"),
                              ([{"path": file, "weight": math.nan}], "at most 1000"),
                              ([{"path": file, "weight": 0}], "more than 0 and at most 1000 was expected"),
                              ([{"path": file, "weight": 0.1}], "is too small: an epoch would use none of its 4 records")):
        with pytest.raises(UserError, match=sentence):
            read_training(entries)


def test_a_source_of_a_mixture_may_have_images_of_its_own(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
    file = write(tmp_path / "x.json", [{**record("<image>\nHi", "Ho"), "image": "i.png"}])
    data = read_training([{"path": file, "images": str(tmp_path / "a")}, {"path": file}], tmp_path / "b")
    assert [data.record(i)["image"] for i in (0, 1)] == [[str(tmp_path / name / "i.png")] for name in "ab"]


def test_missing_places(tmp_path):
    with pytest.raises(UserError, match="x.json does not exist"):
        read_training(tmp_path / "x.json")
    with pytest.raises(UserError, match="holds none of the known data sets: VQA-RAD"):
        read_training(tmp_path)
    file = write(tmp_path / "x.json", [record("Hi", "Ho")])
    with pytest.raises(UserError, match="the folder of images .*nowhere does not exist"):
        read_training(file, tmp_path / "nowhere")
