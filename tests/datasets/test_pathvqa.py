"""PathVQA: the release's layout, its pickles and hostile ones, and the hub's parquet files; the tests make small ones themselves."""

import errno
import io
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.datasets import parquet
from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.hub_rows import read_hub
from llavamed_jax.datasets.pathvqa import read_pathvqa
from llavamed_jax.datasets.pickles import read_plain_pickle
from llavamed_jax.datasets.registry import SETS
from llavamed_jax.datasets.sample import to_llava
from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DESCRIBED = [
    {"answer_type": "other", "img_id": "test_0648", "label": {"urinary": 1}, "question_id": 300648006, "question_type": "where",
     "sent": "Where is this?"},
    {"answer_type": "yes/no", "img_id": "test_0648", "label": {"yes": 1}, "question_id": 300648007, "question_type": "yes/no",
     "sent": "Is this urinary?"},
    {"answer_type": "number", "img_id": "test_0001", "label": {"4": 0.5, "5": 0.3}, "question_id": 300001000, "question_type": "how many",
     "sent": "How many are there?"},
]
PLAIN = [{"image": row["img_id"], "question": row["sent"], "answer": next(iter(row["label"]))} for row in DESCRIBED]


@pytest.fixture
def release(tmp_path):
    """The folder `pvqa/` of the release, with three test questions about two images and one of each other split."""
    root = tmp_path / "pvqa"
    for split, names in {"train": ["train_0422"], "val": ["val_0261"], "test": ["test_0648", "test_0001"]}.items():
        (root / "images" / split).mkdir(parents=True)
        (root / "qas" / split).mkdir(parents=True)
        for name in names:
            Image.new("RGB", (6, 4)).save(root / "images" / split / f"{name}.jpg")
        rows = PLAIN if split == "test" else [{"image": names[0], "question": "What?", "answer": "No"}]
        (root / "qas" / split / f"{split}_qa.pkl").write_bytes(pickle.dumps(rows))
    return root


def described(release, rows=DESCRIBED, protocol=4):
    (release / "qas" / "test_vqa.pkl").write_bytes(pickle.dumps(rows, protocol))


def test_questions_with_ids_and_types_are_read_first(release):
    described(release)
    samples = read_pathvqa(release, "test")
    assert [(s.question_id, s.question, s.answer, s.answer_type, s.question_type) for s in samples] == [
        (300648006, "Where is this?", "urinary", "OPEN", "where"), (300648007, "Is this urinary?", "yes", "CLOSED", "yes/no"),
        (300001000, "How many are there?", "4", "OPEN", "how many")]
    assert samples[0].image == release / "images" / "test" / "test_0648.jpg"
    assert to_llava(samples[0]) == {
        "id": 300648006, "image": [str(samples[0].image)], "answer_type": "OPEN", "conversations": [
            {"from": "human", "value": "<image>\nWhere is this?"}, {"from": "gpt", "value": "urinary"}]}


def test_plain_questions_are_named_by_image_and_number(release):
    samples = read_pathvqa(release, "test")
    assert [(s.question_id, s.answer, s.answer_type, s.question_type) for s in samples] == [
        ("test_0648-0", "urinary", "OPEN", None), ("test_0648-1", "yes", "CLOSED", None), ("test_0001-0", "4", "OPEN", None)]
    assert [s.answer_type for s in read_pathvqa(release, "validation")] == ["CLOSED"]  # "No"


def test_training_takes_the_release_and_says_what_it_found(release):
    data = read_training(release)
    assert [record["image"] for record in data.readable()] == [[str(release / "images" / "train" / "train_0422.jpg")]]
    assert data.found == ("pathvqa train (official): 1 question on 1 image, 0 open, 1 closed; published: 19755 questions on 2599 "
                          "images, 9949 open, 9806 closed",)
    assert len(read_training(release, split="validation")) == 1


def test_counts_as_published():
    """Spec 3.1 a second time, for PathVQA of which no data lies here: questions, images, open, closed of the release."""
    assert [SETS["pathvqa"].published[split, "official"] for split in ("train", "validation", "test")] == [
        (19755, 2599, 9949, 9806), (6279, 832, 3144, 3135), (6761, 858, 3370, 3391)]
    assert all(total == n_open + closed for each in SETS.values() for (_, variant), (total, _, n_open, closed) in each.published.items()
               if variant != "parquet" and n_open is not None)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_pickles_of_every_protocol(tmp_path, protocol):
    plain = [{"a": "größe", "b": 2.5, "c": None, "d": (True, -3, (1, 2, 3, 4)), "e": 10**30, "f": [[], {}, ()]}, {1: "x" * 300}] * 2
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(plain, protocol))
    assert read_plain_pickle(tmp_path / "x.pkl") == plain


class Command:
    def __reduce__(self):
        return os.system, (f"touch {os.environ['PROOF']}",)


DEEP = 200_000  # a dict with such a key ends a process that does not look at it
HOSTILE = {
    "a command": (lambda: pickle.dumps([Command()]), "holds the instruction (STACK_)?GLOBAL"),
    "a command, as Python 2 wrote it": (lambda: b"cos\nsystem\n(S'touch proof'\ntR.", "holds the instruction GLOBAL"),
    "a command without a global": (lambda: b"(S'touch proof'\nios\nsystem\n.", "holds the instruction INST"),
    "a numpy number": (lambda: pickle.dumps([np.float64(1)]), "holds the instruction (STACK_)?GLOBAL"),
    "a set": (lambda: pickle.dumps([{"x"}], 4), "holds the instruction EMPTY_SET"),
    "bytes": (lambda: pickle.dumps([b"x"]), "holds the instruction SHORT_BINBYTES"),
    "a persistent id": (lambda: b"P1\n.", "holds the instruction PERSID"),
    "an extension": (lambda: b"\x82\x01.", "holds the instruction EXT1"),
    "an unknown byte": (lambda: b"\x01.", "holds the byte 1, which is not a pickle instruction"),
    "a nested key": (lambda: b"})" + b"\x85" * DEEP + b"K\x01s.", "holds a tuple as the key of a dict"),
    "nested keys": (lambda: b"}()" + b"\x85" * DEEP + b"K\x01u.", "holds a tuple as the key of a dict"),
    "a deep list": (lambda: b"]" * DEEP + b"a" * (DEEP - 1) + b".", "row 0 of .* has no 'image'"),
    "a deep question": (lambda: b"](}(Vimage\nVa\nVanswer\nVa\nVquestion\n" + b"]" * DEEP + b"a" * (DEEP - 1) + b"ue.",
                        "row 0 of .* has the question a list; text"),
    "a list of itself": (lambda: b"]q\x00h\x00a.", "row 0 of .* has no 'image'"),
    "a number of a million digits": (lambda: pickle.dumps([{**PLAIN[0], "answer": 1 << 4_000_000}]), "the answer a number with too many digits"),
    "a memo of gigabytes": (lambda: b"K\x01r\xff\xff\xff\xff.", "holds a int; a list of rows"),
    "text of exabytes": (lambda: b"\x8d" + b"\xff" * 7 + b"\x0fabc.", "is empty or ends too early"),
    "half a surrogate pair": (lambda: pickle.dumps([{**PLAIN[0], "question": "\ud800"}]), "half a surrogate pair in its question"),
    "cut off": (lambda: pickle.dumps(PLAIN)[:-9], "is not a pickle or is damaged|ends too early"),
    "nothing": (lambda: b"", "is empty or ends too early"),
    "text": (lambda: b"image,question,answer\n", "is not a pickle or is damaged|holds the"),
    "a dict": (lambda: pickle.dumps({"a": 1}), "holds a dict; a list of rows was expected"),
    "rows of another kind": (lambda: pickle.dumps([1]), "row 0 of .* has no 'image'"),
    "an answer that is none": (lambda: pickle.dumps([{**PLAIN[0], "answer": None}]), "has the answer None; text"),
    "an answer that is no number": (lambda: pickle.dumps([{**PLAIN[0], "answer": float("nan")}]), "has the answer nan; text"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_and_damaged_pickles_are_one_sentence(release, name, tmp_path, monkeypatch):
    monkeypatch.setenv("PROOF", str(tmp_path / "proof"))
    monkeypatch.chdir(tmp_path)
    make, sentence = HOSTILE[name]
    (release / "qas" / "test" / "test_qa.pkl").write_bytes(make())
    with pytest.raises(UserError, match=sentence) as raised:
        read_pathvqa(release, "test")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("change, sentence", [
    ({"label": {}}, "row 0 of .*test_vqa.pkl has no answer in its label"), ({"label": [1]}, "has no answer in its label"),
    ({"answer_type": "maybe"}, "has the answer_type 'maybe'; YES/NO or OTHER or NUMBER"), ({"answer_type": 3}, "the answer_type 3"),
    ({"question_id": None}, "has the question_id None; text"), ({"img_id": 5}, "has the img_id 5; text"),
    ({"img_id": "a\0b"}, "has the img_id 'a.x00b'; text"), ({"img_id": "test_9999"}, "the image .*test_9999.jpg does not exist")])
def test_bad_rows(release, change, sentence):
    described(release, [{**DESCRIBED[0], **change}])
    with pytest.raises(UserError, match=sentence):
        read_pathvqa(release, "test")


def test_missing_files(release, tmp_path):
    with pytest.raises(UserError, match="'dev'; one of train, validation, test"):
        read_pathvqa(release, "dev")
    (release / "qas" / "val" / "val_qa.pkl").unlink()
    with pytest.raises(UserError, match="qas/val/val_qa.pkl does not exist$"):
        read_pathvqa(release, "validation")
    with pytest.raises(UserError, match="does not exist; .*pvqa looks like PathVQA"):
        read_pathvqa(tmp_path, "test")


# ---- parquet ----


def encoded(color, kind="JPEG"):
    file = io.BytesIO()
    Image.new("RGB", (5, 5), color).save(file, kind)
    return file.getvalue()


@pytest.fixture
def hub(tmp_path):
    """A function that writes parquet files as the hub has them and gives their folder."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra [parquet], is not installed")
    import pyarrow.parquet

    def write(**splits):
        (tmp_path / "hub" / "data").mkdir(parents=True, exist_ok=True)
        for name, rows in splits.items():
            table = arrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, tmp_path / "hub" / "data" / f"{name.replace('_', '-')}-of-00002-0f.parquet")
        return tmp_path / "hub"
    return write


def parquet_row(question, answer, image):
    return {"image": {"bytes": image, "path": "x.jpg"}, "question": question, "answer": answer}


def test_parquet_images_become_files_named_by_content(hub):
    red, blue = encoded("red"), encoded("blue", "PNG")
    root = hub(test_00000=[parquet_row("a?", "Yes", red), parquet_row("b?", "red", blue)], test_00001=[parquet_row("c?", "no", red)],
               train_00000=[parquet_row("d?", "x", red)], validation_00000=[parquet_row("e?", "x", encoded("green"))])
    samples = read_pathvqa(root, "test")
    assert [(s.question_id, s.question, s.answer, s.answer_type) for s in samples] == [
        ("test-0", "a?", "Yes", "CLOSED"), ("test-1", "b?", "red", "OPEN"), ("test-2", "c?", "no", "CLOSED")]
    assert samples[0].image == samples[2].image != samples[1].image and {s.image.suffix for s in samples} == {".jpg", ".png"}
    assert samples[0].image.read_bytes() == red and samples[1].image.read_bytes() == blue
    (train,) = read_pathvqa(root, "train")
    assert train.image == samples[0].image, "one image is one path in every split"
    written = {path: path.stat().st_mtime_ns for path in (root / "images").iterdir()}
    assert len(written) == 2
    assert read_pathvqa(root, "test") == samples
    assert {path: path.stat().st_mtime_ns for path in (root / "images").iterdir()} == written, "written once"
    assert describe(samples, "pathvqa", "test", "parquet").endswith("; published: 6719 questions on 858 images")
    assert len(read_training(root)) == len(read_training(root, split="validation")) == 1


def test_parquet_images_go_where_data_images_says_and_half_written_ones_are_written_again(hub, tmp_path):
    root = hub(test_00000=[parquet_row("a?", "Yes", encoded("red"))])
    (sample,) = read_pathvqa(root, "test", tmp_path / "elsewhere")
    assert sample.image.parent == tmp_path / "elsewhere" and not (root / "images").exists()
    sample.image.write_bytes(b"half")
    assert read_pathvqa(root, "test", tmp_path / "elsewhere")[0].image.read_bytes() == encoded("red")


@pytest.mark.parametrize("make, sentence", [
    (lambda hub: hub(test_00000=[parquet_row("a?", "b", None)]), "row 0 of .*test-00000.* has no image; encoded bytes"),
    (lambda hub: hub(test_00000=[{"image": "a.jpg", "question": "a", "answer": "b"}]), "row 0 of .* has no image"),
    (lambda hub: hub(test_00000=[{"question": "a", "answer": "b"}]), "has no column image; its columns are question, answer"),
    (lambda hub: hub(test_00000=[parquet_row("a?", None, b"x"), parquet_row("a?", "b", b"x")]),
     "row 0 of the split test of .* has the answer None; text"),
    (lambda hub: hub(train_00000=[parquet_row("a?", "b", b"x")]), "no parquet file of the split test; .*data/test-.*parquet was expected"),
])
def test_bad_parquet(hub, make, sentence):
    root = make(hub)
    with pytest.raises(UserError, match=sentence):
        read_pathvqa(root, "test")


@pytest.mark.parametrize("damage", [
    lambda data: b"", lambda data: b"no parquet", lambda data: data[:-20], lambda data: data[:4] + b"\0" * 60 + data[64:]])
def test_a_parquet_file_that_is_none(hub, damage):
    root = hub(test_00000=[parquet_row("a?", "Yes", encoded("red"))] * 3)
    (file,) = (root / "data").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(UserError, match="cannot be read as a parquet file|is damaged|has no image") as raised:
        read_pathvqa(root, "test")
    assert "\n" not in str(raised.value) and str(file) in str(raised.value)


def test_a_folder_that_cannot_be_written(hub, tmp_path):
    root = hub(test_00000=[parquet_row("a?", "Yes", encoded("red"))])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written to .*file.*set data.images to another folder"):
        read_pathvqa(root, "test", tmp_path / "file")


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_a_read_only_set_is_read_and_its_images_are_in_the_cache(number, hub, tmp_path, monkeypatch, caplog):
    """VQA-RAD, SLAKE and a suite have no key for the folder of the images."""
    root, cache, real = hub(test_00000=[parquet_row("a?", "Yes", encoded("red")), parquet_row("b?", "No", encoded("blue"))]), tmp_path / "cache", parquet.save_whole

    def save(path, write):
        if not path.is_relative_to(cache):
            raise OSError(number, os.strerror(number))
        real(path, write)

    monkeypatch.setattr(parquet, "save_whole", save)
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    for _ in range(2):
        assert [sample.image.parent for sample in read_hub(root, "test")] == [cache / "llavamed_jax" / "parquet_images"] * 2
    assert caplog.text.count("they are written to") == 2 and os.strerror(number) in caplog.text
    monkeypatch.setattr(parquet, "save_whole", lambda path, write: save(tmp_path, write))
    shutil.rmtree(cache)
    with pytest.raises(UserError, match="cannot be written to .*, nor to the user's cache .*XDG_CACHE_HOME"):
        read_hub(root, "test")


def test_without_pyarrow_one_sentence_has_the_pip_line(tmp_path, monkeypatch):
    (tmp_path / "test-00000-of-00001.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'llavamed-jax\[parquet\]'$"):
        list(parquet.read_parquet([tmp_path / "test-00000-of-00001.parquet"], ("question",), tmp_path))


def test_predictions_of_the_release_are_joined_by_its_ids(release, tmp_path):
    """`eval.py --predictions` from start to end, with the config."""
    from llavamed_jax.cli import eval as cli

    described(release)
    predictions = tmp_path / "p.jsonl"
    predictions.write_text("".join(json.dumps({"question_id": row["question_id"], "text": "yes"}) + "\n" for row in DESCRIBED))
    argv = ["--config", str(ROOT / "configs" / "eval" / "pathvqa.py"), f"--config.data.root={release}", "--predictions", str(predictions)]
    assert cli.main([*argv, "--workdir", str(tmp_path / "w")]) == 0
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())
    assert (metrics["dataset"], metrics["n_open"], metrics["n_closed"], metrics["strict"]["closed_accuracy"]) == ("pathvqa", 2, 1, 100)
    assert "test_vqa.pkl" in (tmp_path / "w" / "report.html").read_text(encoding="utf-8"), "the hash of the questions' file"
