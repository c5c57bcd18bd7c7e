"""Chat questions as LLaVA-Med publishes them: what is read, and what is refused."""

import hashlib
import json
import os
from collections import Counter
from pathlib import Path

import pytest

from llavamed_jax.datasets.qa50 import DOMAINS, PUBLISHED_SHA256, read_chat_questions
from llavamed_jax.errors import UserError
from tests.support.chat_set import SAMPLE, chat_records, write_chat_set


def test_questions_are_read_as_published(tmp_path):
    records = chat_records()
    path = write_chat_set(tmp_path, records)
    found = read_chat_questions(tmp_path, SAMPLE / "images")
    assert found.file == path and found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() and not found.is_published
    assert [q.question_id for q in found.questions] == list(range(193))
    assert Counter(q.kind for q in found.questions) == {"conversation": 143, "detailed_description": 50}
    # The eight with two domains count in the first of the original's order, which is not the order in the file.
    assert Counter(q.domain for q in found.questions) == {"chest_xray": 37, "mri": 38, "histology": 44, "gross": 34, "ct_scan": 40}
    assert sum(q.mentions is None for q in found.questions) == 14
    first, record = found.questions[0], records[0]
    assert first.text == record["text"] and first.text == first.question + "\n<image>" and first.text[:-8] == first.question
    assert (first.reference, first.caption, first.label) == (record["gpt4_answer"], record["fig_caption"], record["fig_label"])
    sample = first.sample()
    assert (sample.question, sample.answer, sample.answer_type) == (first.question, first.reference, "OPEN")
    assert sample.image == SAMPLE / "images" / record["image"] and sample.image.is_file()


def test_images_lie_beside_the_file_unless_a_folder_is_named(tmp_path):
    path = write_chat_set(tmp_path)
    assert read_chat_questions(path).questions[0].image.parent == tmp_path / "images"


@pytest.mark.parametrize(
    "true, domain", [({"ct_scan", "chest_xray"}, "chest_xray"), ({"gross", "histology"}, "histology"), ({"ct_scan", "mri"}, "mri"),
                     ({"ct_scan", "gross"}, "gross"), (set(DOMAINS), "chest_xray"), ({"ct_scan"}, "ct_scan")])  # fmt: skip
def test_the_first_true_domain_counts(tmp_path, true, domain):
    record = chat_records()[0] | {"domain": {name: name in true for name in reversed(DOMAINS)}}
    write_chat_set(tmp_path, [record])
    assert read_chat_questions(tmp_path).questions[0].domain == domain


_GONE = object()


@pytest.mark.parametrize(
    "change, sentence",
    [
        ({"gpt4_answer": _GONE}, "line 2 has no 'gpt4_answer'; text was expected"),
        ({"gpt4_answer": " "}, "line 2 has the gpt4_answer ' '; text was expected"),
        ({"text": "Where is it?"}, "line 2 has the text 'Where is it?'; a question that ends with"),
        ({"text": "<image>\nWhere is it?"}, "a question that ends with"),
        ({"question_id": None}, "line 2 has the question_id None; a number or text was expected"),
        ({"question_id": True}, "line 2 has the question_id True"),
        ({"question_id": 0}, "line 2 repeats the question_id 0 of line 1"),
        ({"question_id": "0"}, "line 2 repeats the question_id '0' of line 1"),
        ({"image": ""}, "line 2 has the image ''; the name of a file was expected"),
        ({"pair_id": _GONE}, "line 2 has no 'pair_id'"),
        ({"fig_label": 3}, "line 2 has the fig_label 3; text was expected"),
        ({"in_text_mention": _GONE}, "line 2 has no 'in_text_mention'; a list or null was expected"),
        ({"in_text_mention": "see Fig. 1"}, "line 2 has the in_text_mention 'see Fig. 1'; a list or null was expected"),
        ({"domain": "mri"}, "line 2 has the domain 'mri'; an object of chest_xray, mri"),
        ({"domain": {name: False for name in DOMAINS}}, "one of them true"),
        ({"domain": {"mri": True}}, "line 2 has the domain {'mri': True}"),
        ({"domain": {name: 1 for name in DOMAINS}}, "true or false, one of them true"),
        ({"type": "chat"}, "line 2 has the type 'chat'; conversation or detailed_description was expected"),
        ({"type": ["conversation"]}, "line 2 has the type ['conversation']"),
    ],
)
def test_a_record_that_is_none_is_one_sentence(tmp_path, change, sentence):
    first, second = chat_records()[:2]
    second = {key: value for key, value in (second | change).items() if value is not _GONE}
    write_chat_set(tmp_path, [first, second])
    with pytest.raises(UserError) as error:
        read_chat_questions(tmp_path)
    assert sentence in str(error.value) and "\n" not in str(error.value) and "jsonl" in str(error.value)


@pytest.mark.parametrize(
    "data, sentence",
    [
        (b"", "holds no question"),
        (b"\n\n", "holds no question"),
        (b'{"question_id": 1', "line 1 is not valid JSON"),
        (b"[1]\n", "line 1 holds a JSON list; an object with a chat question was expected"),
        (b"\xff\xfe\x00", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(tmp_path, data, sentence):
    path = tmp_path / "q.jsonl"
    path.write_bytes(data)
    with pytest.raises(UserError, match=sentence):
        read_chat_questions(path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_chat_questions(tmp_path / "absent")


def test_line_separators_inside_of_text_part_no_lines(tmp_path):
    record = chat_records()[0] | {"fig_caption": "two\u2028lines\x85 of text"}
    (tmp_path / "q.jsonl").write_text("\ufeff" + json.dumps(record, ensure_ascii=False) + "\r\n", encoding="utf-8")
    assert read_chat_questions(tmp_path / "q.jsonl").questions[0].caption == record["fig_caption"]


def test_the_published_file():
    path = os.environ.get("LLAVA_MED_QA50", "")
    if not path:
        pytest.skip("LLAVA_MED_QA50 names no copy of llava_med_eval_qa50_qa.jsonl, which is not part of the project")
    found = read_chat_questions(Path(path))
    assert found.sha256 == PUBLISHED_SHA256 and found.is_published
    assert Counter(q.domain for q in found.questions) == {"chest_xray": 37, "mri": 38, "histology": 44, "gross": 34, "ct_scan": 40}
    assert Counter(q.kind for q in found.questions) == {"conversation": 143, "detailed_description": 50}
    assert sum(q.mentions is None for q in found.questions) == 14 and len({q.image for q in found.questions}) == 50
