"""SLAKE as other evaluation programs read it: the same questions and images, in each of their layouts."""

import base64
import csv
import io
import json

import pytest
from PIL import Image

from llavamed_jax.datasets.slake import read_slake
from llavamed_jax.errors import UserError
from samples import harness, harness_data

ROWS = [(7, 0, "Is it normal?", "Yes", "CLOSED", "en"), (8, 0, "Which\torgan?", "Lung", "OPEN", "en"), (9, 1, "Left\nor right?", '"Left"', "CLOSED", "en"),
        (10, 1, "正常？", "是", "CLOSED", "zh"), (11, 1, "Any lesion?", "no", "CLOSED", "en"), (12, 1, "Is it?", "No", "CLOSED", "en")]


@pytest.fixture
def source(tmp_path):
    for n in range(2):
        folder = tmp_path / "source" / "imgs" / f"xmlab{n}"
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (90 * n, 0, 0)).save(folder / "source.jpg")
    rows = [{"qid": q, "img_name": f"xmlab{n}/source.jpg", "img_id": n, "question": question, "answer": answer, "answer_type": kind, "q_lang": language,
             "location": "Chest", "modality": "CT", "base_type": "vqa", "content_type": "Organ", "triple": []} for q, n, question, answer, kind, language in ROWS]
    for name in ("train", "validate"):
        (tmp_path / "source" / f"{name}.json").write_text(json.dumps(rows))
    return tmp_path / "source"


def test_each_layout_has_the_same_questions_and_images(source, tmp_path):
    samples = harness_data.write(source, tmp_path / "out")
    assert [s.question_id for s in samples] == [7, 8, 9, 11, 12]
    lines = [json.loads(line) for line in (tmp_path / "out" / "lmms" / "questions.jsonl").read_text().splitlines()]
    assert [(line["qid"], line["question"], line["answer"], line["image"]) for line in lines] == [
        (s.question_id, s.question, s.answer, str(s.image)) for s in samples]
    tables = {name: list(csv.DictReader(io.StringIO((tmp_path / "out" / "LMUData" / f"{name}.tsv").read_text(), newline=""), delimiter="\t"))
              for name in harness_data.TABLES}
    assert [(row["index"], row["answer"]) for row in tables["SLAKE_YORN"]] == [("7", "Yes"), ("11", "No"), ("12", "No")]
    assert [(row["index"], row["question"], row["answer"]) for row in tables["SLAKE_GQA"]] == [("8", "Which\torgan?", "Lung"), ("9", "Left\nor right?", '"Left"')]
    assert tables["SLAKE_YORN"][2]["image"] == "11"  # the row that has the image
    assert base64.b64decode(tables["SLAKE_YORN"][1]["image"]) == (source / "imgs" / "xmlab1" / "source.jpg").read_bytes()
    assert [s.question for s in read_slake(tmp_path / "out" / "slake", "validation")] == [s.question for s in samples]


@pytest.mark.parametrize("name, lines", [("validation.json", False), ("val.jsonl", True)])
def test_the_validation_split_may_have_any_of_its_names(name, lines, source, tmp_path):
    """As SLAKE's reader has it; a second call, for another split or source, replaces what the first one linked."""
    rows = json.loads((source / "validate.json").read_text())
    (source / "validate.json").unlink()
    (source / name).write_text("".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))
    before = (source / "train.json").read_text()
    for split in ("validation", "train", "validation"):
        harness_data.write(source, tmp_path / "out", split, most=2)
        for each, ids in (("train", [7, 9] if split == "train" else [7, 8, 9, 11, 12]), (split, [7, 9])):
            assert [s.question_id for s in read_slake(tmp_path / "out" / "slake", each)] == ids
    assert (source / "train.json").read_text() == before
    (source / "train.json").unlink()
    (source / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in json.loads(before)[:3]))
    harness_data.write(source, tmp_path / "out")
    assert [s.question_id for s in read_slake(tmp_path / "out" / "slake", "train")] == [7, 8, 9]
    (source / "train.jsonl").rename(source / "train.json")
    (source / "train.json").unlink()
    with pytest.raises(UserError, match="train.json does not exist"):
        harness_data.write(source, tmp_path / "out")


def test_some_questions_are_spread_over_the_split(source, tmp_path):
    assert [s.question_id for s in harness_data.write(source, tmp_path / "out", most=2)] == [7, 9]
    assert [s.question_id for s in read_slake(tmp_path / "out" / "slake", "validation")] == [7, 9]


@pytest.mark.parametrize("text, is_error", [
    ("[LMMS_EVAL_REQUEST_FAILED after 5 retries] Connection error.", True), ("Failed to obtain answer via API. ", True), ("", False),
    ("Error code: 400 - {'error': {'message': 'x'}}", True), ("Failed to heal", False)])
def test_an_errors_text_is_no_answer(text, is_error):
    assert bool(harness.ERRORS.search(text)) is is_error
