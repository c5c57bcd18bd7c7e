"""The sample: what is held out stays out, and everything in it follows from the rows that it holds."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "vqa_rad"
TRAINING_FILES = ("alignment.json", "instruct.json", "vqa_train.json", "organ.json")


def load(name: str):
    return json.loads((SAMPLE / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def maker():
    """The script that made the sample."""
    spec = importlib.util.spec_from_file_location("make_vqa_rad", ROOT / "samples" / "make_vqa_rad.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def rows(maker):
    return load(maker.ANNOTATIONS)


def test_sixty_images_twenty_an_organ_fifteen_held_out(rows):
    organ = {row["image_name"]: row["image_organ"] for row in rows}
    held_out = load("held_out.json")["images"]
    assert Counter(organ.values()) == {"HEAD": 20, "CHEST": 20, "ABD": 20}
    assert Counter(organ[name] for name in held_out) == {"HEAD": 5, "CHEST": 5, "ABD": 5}
    assert {path.name for path in (SAMPLE / "images").iterdir()} == set(organ)


def test_no_two_images_share_a_case(rows):
    """Else a held-out image could be another slice of a patient that was trained on."""
    of_case = {}
    for row in rows:
        of_case.setdefault(row["image_case_url"], set()).add(row["image_name"])
    assert all(len(names) == 1 for names in of_case.values())


def test_at_most_four_megabytes():
    assert sum(path.stat().st_size for path in SAMPLE.rglob("*") if path.is_file()) <= 4_000_000


@pytest.mark.parametrize("name", TRAINING_FILES)
def test_training_never_sees_held_out_images(name):
    held_out = set(load("held_out.json")["images"])
    assert {record["image"] for record in load(name)}.isdisjoint(held_out)
    assert len({record["image"] for record in load(name)}) == 45


def test_training_never_sees_test_rows(rows):
    """Held by question id, since the same words may stand in a test row and in a training row."""
    test_ids = {row["qid"] for row in rows if row["phrase_type"].startswith("test_")}
    assert {record["id"] for record in load("vqa_train.json")}.isdisjoint(test_ids)


def test_every_training_row_is_there_once(rows):
    held_out = set(load("held_out.json")["images"])
    expected = [row["qid"] for row in rows if row["image_name"] not in held_out and not row["phrase_type"].startswith("test_")]
    assert sorted(record["id"] for record in load("vqa_train.json")) == sorted(expected)


def test_organ_question_of_every_training_image(maker, rows):
    organ = {row["image_name"]: row["image_organ"] for row in rows}
    turns = {record["image"]: [turn["value"] for turn in record["conversations"]] for record in load("organ.json")}
    assert len(turns) == 45
    for image, turn in turns.items():
        assert turn == [f"<image>\n{maker.ORGAN_QUESTION}", maker.ORGAN_ANSWERS[organ[image]]]


def test_training_files_follow_from_the_rows(maker, rows):
    for name, records in maker.training_files(rows).items():
        assert records == load(name), f"{name} is not what samples/make_vqa_rad.py derives from the rows"


def test_captions_say_what_the_answers_say(maker):
    row = {"image_organ": "CHEST", "question_type": "MODALITY"}
    asked = [
        row | {"question": "What imaging modality was used?", "answer": "X-ray"},
        row | {"question": "Is this a CT scan?", "answer": "no"},
        row | {"question": "Is this a PA film?", "answer": "Yes", "question_type": "PLANE"},
    ]
    assert maker.caption(asked) == "Chest, X-ray, PA view."
    assert maker.caption([row | {"question": "Is this a CT scan?", "answer": "no"}]) == "Chest."


def test_tokenizer_is_like_llamas(maker):
    """Byte fallback and a space before the first word; the text of the training files comes back unchanged."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(SAMPLE / "tokenizer.model"))
    assert tokenizer.vocab_size() == maker.VOCABULARY
    assert (tokenizer.unk_id(), tokenizer.bos_id(), tokenizer.eos_id(), tokenizer.pad_id()) == (0, 1, 2, -1)
    assert tokenizer.encode("Head.", out_type=str) == ["▁Head", "."]
    texts = [turn["value"] for name in TRAINING_FILES for record in load(name) for turn in record["conversations"]]
    for text in [*texts, "two  blanks\n", "naïve 漢"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.unk_id() not in ids
    assert tokenizer.serialized_model_proto() == maker.tokenizer_model({name: load(name) for name in TRAINING_FILES})


def test_no_image_shows_the_uploaders_name(maker):
    for path in (SAMPLE / "images").iterdir():
        with Image.open(path) as image:
            band = np.asarray(image.convert("L"))[-maker.CAPTION_BAND + 8 :]  # a JPEG block may smear eight rows
        assert band.max() <= 16, f"{path.name} has something written at its lower edge"


def test_sample_is_cut_from_the_whole(maker, rows, shared):
    """The rows are the official ones, unchanged; the images differ from the official ones in the blackened band alone."""
    source = shared / "data" / "vqa_rad"
    names = {row["image_name"] for row in rows}
    whole = json.loads((source / maker.ANNOTATIONS).read_text(encoding="utf-8"))
    assert rows == [row for row in whole if row["image_name"] in names]
    for name in sorted(names):
        with Image.open(source / "images" / name) as official, Image.open(SAMPLE / "images" / name) as cut:
            assert official.size == cut.size
            top = np.s_[: -maker.CAPTION_BAND - 16]
            difference = np.abs(np.asarray(official.convert("L"), int)[top] - np.asarray(cut.convert("L"), int)[top])
        assert difference.mean() < 0.5, name
