"""Records of LLaVA files, found by their offsets: what each reads as, and what is refused."""

import io
import json
import pickle

import numpy as np
import pytest

from llavamed_jax.datasets import records
from llavamed_jax.datasets.records import FileRecords, MemoryRecords, find_records, open_records
from llavamed_jax.errors import UserError


def record(question, answer, **fields):
    return {"id": 1, **fields, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
    return path


def test_json_and_jsonl_and_both_spellings(tmp_path):
    rows = [record("<image>\nHow many?", 5, image="a.jpg"), record("Hi", "Ho"),
            record("<image> <image> which?", "b", image=["a.jpg", "b.jpg"]), record("<image> or <image>?", "x", image="a.jpg")]
    rows[1]["conversatons"] = rows[1].pop("conversations")
    as_list = open_records(write(tmp_path / "x.json", rows), tmp_path)
    as_lines = open_records(write(tmp_path / "x.jsonl", "\n".join(map(json.dumps, rows)) + "\n\n"))
    found = list(as_list)
    assert found == list(as_lines)
    assert found[0]["conversations"][1]["value"] == "5"
    assert found[0]["image"] == [str(tmp_path / "a.jpg")]
    assert [len(r["image"]) for r in found] == [1, 0, 2, 1] and not any("surplus" in r for r in found)
    assert as_list.fingerprint() != as_lines.fingerprint()


@pytest.mark.parametrize("question, images, used, surplus", [
    ("What?", "a.jpg", 0, 1), ("<image>", ["a.jpg", "b.jpg"], 1, 1), ("<image> <image>", ["a.jpg"], 1, 0),
    ("<image> <image>", ["a.jpg", "b.jpg", "c.jpg"], 2, 1), ("What?", None, 0, 0), ("What?", [], 0, 0)])
def test_images_that_no_marker_stands_for_are_surplus(tmp_path, question, images, used, surplus):
    found = open_records(write(tmp_path / "x.json", [record(question, "That.", image=images)]))[0]
    assert (len(found["image"]), found.get("surplus", 0)) == (used, surplus)


DAMAGED = [
    (3, "is not an object"), ({"id": 1}, "has no conversations"), ({"conversations": []}, "has no conversations"),
    ({"conversations": "x"}, "has no conversations"), ({"conversations": ["x"]}, "'x' as turn 0"),
    ({"conversations": [{"from": "robot", "value": "x"}]}, "'robot'.* as turn 0; {from: human or gpt"),
    ({"conversations": [{"from": "human"}]}, "as turn 0"), ({"conversations": [{"from": "human", "value": None}]}, "as turn 0"),
    ({"conversations": [{"from": ["human"], "value": "x"}]}, "as turn 0"),
    (record("a", "b", image=[1]), "has the image \\[1\\]"), (record("a", "b", image={"path": "x"}), "has the image {'path'"),
    ({"conversations": [{"from": "human", "value": "x"}] * 2}, "does not alternate"),
    (record("<image>", "b"), "0 images for 1 <image> markers"),
    ({"conversations": [{"from": "human", "value": "<image><image>"}, {"from": "gpt", "value": "<image>"}], "image": "x"},
     "1 images for 3 <image> markers"),
    (record("a", "b" * 500, image=7), "has the image 7"),
    (record("a", float("nan")), "nan} as turn 1"), (record("a", float("inf")), "inf} as turn 1"),
]


@pytest.mark.parametrize("row, sentence", DAMAGED)
def test_a_damaged_record_is_named_when_it_is_read_and_its_neighbours_are_whole(tmp_path, row, sentence):
    found = open_records(write(tmp_path / "x.json", [record("a", "b"), row, record("c", "d")]))
    assert len(found) == 3 and found[2]["conversations"][0]["value"] == "c"
    with pytest.raises(UserError, match=f"record 1 of .*x.json .*{sentence}") as error:
        found[1]
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_damaged_lines_are_named_when_they_are_read(tmp_path):
    lines = [json.dumps(record("a", "b")).encode(), b"nonsense", b'{"id": "\xff"}', b"[" * 100_000, json.dumps(record("c", "d")).encode()]
    found = open_records(write(tmp_path / "x.jsonl", b"\n".join(lines)))
    assert len(found) == 5 and found[4]["conversations"][0]["value"] == "c"
    for i, sentence in ((1, "is not valid JSON"), (2, "is not UTF-8 text"), (3, "is nested too deeply")):
        with pytest.raises(UserError, match=f"record {i} of .* {sentence}"):
            found[i]


@pytest.mark.parametrize("content, sentence", [
    ("[{", "record 0, which begins at byte 1, does not end"), ('[{"a": 1} {"b": 2}]', "record 0, which begins at byte 1,"),
    ('[{"a": 1},]', "record 1, which begins at byte 10,"),
    ('[{"a": 1}', "record 0, which begins at byte 1,"), ('[{"a": 1}] 5', "text follows the list of 1 records"), ("[" * 100_000, "nested too deeply")])
def test_a_list_that_is_no_json_is_refused(tmp_path, content, sentence):
    with pytest.raises(UserError, match=f"x.json.*{sentence}"):
        open_records(write(tmp_path / "x.json", content))


def test_missing_places(tmp_path):
    with pytest.raises(UserError, match="the data file .*x.json does not exist"):
        open_records(tmp_path / "x.json")
    with pytest.raises(UserError, match="the folder of images .*nowhere does not exist"):
        open_records(write(tmp_path / "x.json", [record("Hi", "Ho")]), tmp_path / "nowhere")


@pytest.mark.parametrize("window", [1, 7, 64, 2**20])
@pytest.mark.parametrize("form", [dict(), dict(indent=2), dict(ensure_ascii=False, separators=(",", ":"))])
def test_offsets_are_those_of_the_parsed_list(monkeypatch, window, form):
    """Strings with brackets, quotes, backslashes and letters of several bytes, through windows that cut everywhere."""
    rng = np.random.default_rng(0)
    alphabet = list('[]{},:"\\\n é中𝄞x ')
    rows = [{"v": "".join(rng.choice(alphabet, rng.integers(0, 30))), "n": [i, {"k": None}]} for i in range(40)] + [12345, "]", [], True]
    data = json.dumps(rows, **form).encode()
    monkeypatch.setattr(records, "_WINDOW", window)
    for prefix in (b"", b"\xef\xbb\xbf", b" \n"):
        found = find_records(io.BytesIO(prefix + data + b"\n"), "x")
        assert [json.loads((prefix + data)[begin:end]) for begin, end in found] == rows
    assert find_records(io.BytesIO(b" [ \n ] "), "x").shape == find_records(io.BytesIO(b""), "x").shape == (0, 2)


def test_offsets_of_a_large_file_are_kept_under_the_hash_of_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_WINDOW", 100)
    rows = [record(f"q{i}", "a") for i in range(20)]
    file = write(tmp_path / "x.json", rows)
    first = open_records(file, cache=tmp_path / "cache")
    kept, = (tmp_path / "cache").iterdir()
    assert first.fingerprint()[:24] in kept.name
    monkeypatch.setattr(records, "find_records", None)  # is not called again
    assert list(open_records(file, cache=tmp_path / "cache")) == list(first)
    monkeypatch.setattr(records, "find_records", find_records)
    for content in (b"", kept.read_bytes()[:-30], kept.read_bytes().replace(b"\x00\x00\x00", b"\x01\x00\x00", 40), b"\x80\x04."):
        kept.write_bytes(content)  # a disk that was full, a bit that flipped: found anew, and kept again
        assert list(open_records(file, cache=tmp_path / "cache")) == list(first)
        assert kept.read_bytes() != content
    write(file, rows[::-1])
    assert list(open_records(file, cache=tmp_path / "cache")) == [{**r, "image": []} for r in rows[::-1]]


def test_a_number_of_too_many_digits_is_the_trouble_of_its_record_alone(tmp_path):
    rows = [json.dumps(record("a", "b")), '{"id": ' + "9" * 5000 + "}", json.dumps(record("c", 2**70))]
    found = open_records(write(tmp_path / "x.json", f"[{', '.join(rows)}]"))
    assert len(found) == 3 and found[2]["conversations"][1]["value"] == str(2**70)
    with pytest.raises(UserError, match="^record 1 of .* is not valid JSON: .*digits"):
        found[1]


def test_an_id_can_be_written_down(tmp_path):
    rows = [record("a", "b") | {"id": name} for name in ("x", 7, float("nan"), {"a": 1}, None)]
    found = [row["id"] for row in open_records(write(tmp_path / "x.json", rows))]
    assert found == ["x", 7, "nan", "{'a': 1}", 4]


def test_what_travels_to_a_worker_is_offsets_and_not_records(tmp_path):
    rows = [record("q" * 1000, "a") for _ in range(100)]
    found = open_records(write(tmp_path / "x.json", rows))
    assert found[7]["conversations"] == rows[7]["conversations"]  # with the file open
    assert len(pickle.dumps(found)) < 16 * 100 + 1000
    again = pickle.loads(pickle.dumps(found))
    assert isinstance(again, FileRecords) and again[99] == found[99]


def test_records_in_memory():
    rows = [record(f"q{i}", "ü") for i in range(5)]
    kept = MemoryRecords(rows)
    assert list(kept) == rows and len(kept) == 5
    assert kept.fingerprint() == MemoryRecords(rows).fingerprint() != MemoryRecords(rows[:4]).fingerprint()
