"""Which set lies at a place: the hub's parquet files of three sets with the same columns, and every set under every other's name."""

import io
import json
import logging
import pickle
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets import detect
from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.hub_rows import read_hub
from llavamed_jax.datasets.registry import SETS
from llavamed_jax.datasets.slake import read_slake
from llavamed_jax.datasets.training import read_training
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import questions

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"


def encoded(name):
    """A small picture of its own for each name."""
    file = io.BytesIO()
    Image.new("RGB", (4, 4), tuple(hash(str(name)).to_bytes(8, "big", signed=True)[:3])).save(file, "PNG")
    return file.getvalue() + str(name).encode()


def row(question="Is it?", answer="yes", image="a", **more):
    return {"image": {"bytes": encoded(image), "path": None}, "question": question, "answer": answer, **more}


def of(sample, *fields):
    names = {"answer_type": "answer_type", "content_type": "question_type", "location": "organ", "q_lang": "language"}
    more = {field: getattr(sample, names[field]) for field in fields}
    return row(sample.question, sample.answer.lower(), sample.image, **more)


@pytest.fixture
def hub(tmp_path):
    """A function that writes parquet files as the hub has them and gives their folder."""
    arrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra [parquet], is not installed")
    import pyarrow.parquet

    def write(folder="hub", card="", **splits):
        (tmp_path / folder / "data").mkdir(parents=True, exist_ok=True)
        if card:
            (tmp_path / folder / "README.md").write_text(card)
        for name, rows in splits.items():
            pyarrow.parquet.write_table(arrow.Table.from_pylist(rows),
                                        tmp_path / folder / "data" / f"{name}-00000-of-00001.parquet")
        return tmp_path / folder

    return write


# ---- which set parquet files are of ----


def test_three_columns_are_no_set(hub):
    root = hub(train=[row()], test=[row(), row("What?", "Left")])
    assert detect.named_by_parquet(root) is None and detect.layout_of(root) == "parquet"
    for name in ("vqa_rad", "slake", "llava_med", "choices", "captions"):
        with pytest.raises(UserError, match="data.name=parquet") as raised:
            questions.load_samples(name, str(root), "test", "clean")
        assert "PathVQA" not in str(raised.value) and "pathvqa" not in str(raised.value)
    assert [s.answer_type for s in questions.load_samples("parquet", str(root), "test", "clean")[0]] == ["CLOSED",
                                                                                                         "OPEN"]
    assert len(read_training(root)) == 1 and read_training(root).found[0].startswith("parquet train: 1 question ")


CARDS = {"pathvqa": "---\npretty_name: PathVQA\n---\n# Dataset Card for PathVQA\n",
         "vqa_rad": "# Dataset Card for VQA-RAD\n",
         "slake": "---\nlicense: x\n---\n# Slake-VQA-English\n"}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_names_a_set(hub, name):
    root = hub(card=CARDS[name], train=[row()], test=[row()])
    assert detect.layout_of(root) == name == detect.set_at(root, name)
    assert len(questions.load_samples(name, str(root), "test", "clean")[0]) == 1
    for other in set(CARDS) - {name}:
        with pytest.raises(UserError, match=f"looks like .*: data.name={name}$"):
            questions.load_samples(other, str(root), "test", "clean")


@pytest.mark.parametrize("card", [
    "# My questions\nThey are not from PathVQA.\n", "# PathVQA and VQA-RAD in one\n", "# Pathology\n", "pathvqa\n",
    "\udcff".encode("utf-8", "surrogateescape")])
def test_a_card_that_names_none_or_two_is_no_sign(hub, card):
    root = hub(test=[row()])
    (root / "README.md").write_bytes(card if isinstance(card, bytes) else card.encode())
    assert detect.named_by_parquet(root) is None


def test_the_hubs_cache_and_columns_name_a_set(hub):
    slake = {"img_name": "x", "q_lang": "en", "location": "Lung", "modality": "CT", "content_type": "Organ",
             "answer_type": "OPEN"}
    assert detect.named_by_parquet(hub("datasets--flaviagiammarino--path-vqa/snapshots/0a", test=[row()])) == "pathvqa"
    root = hub("s", test=[row(**slake), row(**slake | {"q_lang": "zh"})])
    assert detect.named_by_parquet(root) == "slake"
    (sample,) = read_slake(root, "test")
    assert (sample.organ, sample.modality, sample.question_type, sample.answer_type) == ("Lung", "CT", "Organ", "OPEN")
    assert len(read_slake(root, "test", "zh")) == 1 and len(read_slake(root, "test", "all")) == 2
    assert detect.named_by_parquet(hub("r", test=[row(phrase_type="freeform", image_organ="HEAD")])) == "vqa_rad"
    assert detect.named_by_parquet(hub("one", test=[row(modality="CT")])) is None, "a column of other sets too"
    for column in ("location", "q_lang", "phrase_type", "img_id"):
        assert detect.named_by_parquet(hub(f"one {column}", test=[row(**{column: "x"})])) is None, "one column is no sign"
    assert detect.named_by_parquet(hub("both", card=CARDS["pathvqa"],
                                        test=[row(**slake)])) is None, "two signs of two sets"


def test_counts_name_a_set(hub):
    assert detect.named_by_parquet(hub("p", test=[row()] * 6719)) == "pathvqa"
    assert detect.named_by_parquet(hub("v", test=[row()] * 451, train=[row()] * 1793)) == "vqa_rad"
    assert detect.named_by_parquet(hub("x", test=[row()] * 451, train=[row()] * 100)) is None


def test_vqa_rads_272_closed_questions(shared, hub, caplog):
    """By `answer_type`; without that column 251 of them, those answered by yes or no, and a warning."""
    samples = read_vqa_rad(shared / "data" / "vqa_rad", "test")
    root = hub(test=[of(s, "answer_type") for s in samples])
    for found in (read_vqa_rad(root, "test"), read_hub(root, "test")):
        assert [s.answer_type for s in found] == [s.answer_type for s in samples]
        assert sum(s.answer_type == "CLOSED" for s in found) == 272
    assert describe(read_vqa_rad(root, "test"), "vqa_rad", "test", "clean").endswith("as published")
    with pytest.raises(UserError, match="looks like VQA-RAD .*: data.name=vqa_rad"):
        questions.load_samples("pathvqa", str(root), "test", "clean")
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        found = read_vqa_rad(hub("plain", test=[of(s) for s in samples]), "test")
    assert sum(s.answer_type == "CLOSED" for s in found) == 251
    assert "only the 251 questions with the answer yes or no count as closed; the published set has 272 closed questions" in caplog.text
    with pytest.raises(UserError, match="lack the rephrasings; protocol=paper needs VQA_RAD"):
        read_vqa_rad(root, "train", "paper")


def test_slakes_counts(shared, hub):
    samples = read_slake(shared / "data" / "slake", "validation")
    root = hub(validation=[of(s, "answer_type", "content_type", "location") for s in samples])
    assert detect.layout_of(root) == "slake"
    assert describe(read_slake(root, "validation"), "slake", "validation", "en").endswith("as published")


@pytest.mark.parametrize("kind, closed",
                         [("CLOSED ", True), ("closed", True), ("OPEN", False), ("yes/no", True), ("other", False),
                          (None, True)])
def test_answer_types_are_read(hub, kind, closed):
    (sample, _) = read_hub(hub(test=[row(answer_type=kind), row(answer_type="OPEN")]), "test")
    assert (sample.answer_type == "CLOSED") is closed
    with pytest.raises(UserError, match="row 0 of the split test .* has the answer_type 'maybe'"):
        read_hub(hub("bad", test=[row(answer_type="maybe")]), "test")


def test_an_evaluation_is_called_what_it_is(hub, tmp_path, capsys):
    root = hub(train=[row()],
               test=[row(answer="abnormal", answer_type="CLOSED"), row(answer_type="CLOSED"),
                     row("Where?", "left", answer_type="OPEN")])
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"question_id": f"test-{i}",
                                                          "text": "yes"}) + "\n" for i in range(3)))
    for config in ("pathvqa", "parquet"):
        argv = ["--config", str(ROOT / "configs" / "eval" / f"{config}.py"), f"--config.data.root={root}", "--workdir",
                str(tmp_path / config)]
        assert cli.main([*argv, "--predictions", str(tmp_path / "p.jsonl")]) == 0
        metrics = json.loads((tmp_path / config / "metrics.json").read_text())
        assert (metrics["dataset"], metrics["n_closed"], metrics["n_open"]) == ("parquet", 2, 1)
        assert "the paper has no numbers for parquet" in metrics["published"]["reason"]
        assert capsys.readouterr().out.startswith("parquet test: 3 questions on 1 image, 1 open, 2 closed\n")


# ---- every set under every other's name ----


@pytest.fixture
def places(tmp_path, hub):
    """Each set in its own layout: name -> folder."""
    def folder(name, **files):
        root = tmp_path / "sets" / name
        for file, content in files.items():
            path = root / file.replace("__", "/")
            path = path.with_name(path.name.replace("_json", ".json").replace("_pkl", ".pkl").replace("_png", ".png"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return root

    picture, turns = encoded("x"), [{"from": "human", "value": "Is it?\n<image>"}, {"from": "gpt", "value": "yes"}]
    slake = {"img_name": "xmlab1/source.png", "question": "What?", "answer": "MRI", "q_lang": "en",
             "location": "Abdomen", "modality": "MRI",
             "answer_type": "OPEN", "content_type": "Modality", "qid": 7}
    plain = {"image": "test_1", "question": "Is it?", "answer": "yes"}
    picks = {"id": 1, "image": "a.png", "question": "What?", "options": ["liver", "lung"], "answer": "B"}
    llava, caption = {"id": 1, "image": "a.png", "answer_type": "CLOSED", "conversations": turns}, {"id": 1,
                                                                                                    "image": "a.png",
                                                                                                    "caption": "A lung."}
    splits = ("train", "test")
    found = {
        "vqa_rad": SAMPLE,
        "slake": folder("slake", train_json=[slake], test_json=[slake], imgs__xmlab1__source_png=picture),
        "pathvqa": folder("pathvqa",
                          **{f"qas__{s}__{s}_qa_pkl": pickle.dumps([plain | {"image": f"{s}_1"}]) for s in splits},
                          **{f"images__{s}__{s}_1_png": picture for s in splits}),
        "llava_med": folder("llava_med", train_json=[llava], test_json=[llava], a_png=picture),
        "choices": folder("choices", train_json=[picks], test_json=[picks], a_png=picture),
        "captions": folder("captions", train_json=[caption], test_json=[caption], a_png=picture),
        "parquet": hub(train=[row()], test=[row()]),
    }
    for split in splits:  # PathVQA's names have no ending
        (found["pathvqa"] / "images" / split / f"{split}_1.png").rename(found["pathvqa"] / "images" / split / f"{split}_1.jpg")
    return found


def test_every_set_under_every_name(places):
    """A set is read under its own name; under another's it is refused, and what it is called is what it is."""
    may = {("llava_med", "captions"),
           ("parquet", "pathvqa")}  # a LLaVA file's answers as captions; the second is called parquet
    for name, root in places.items():
        assert detect.layout_of(root) == name
        assert questions.load_samples(name, str(root), "test", "clean")[0], name
        assert len(read_training(root))
        for other in sorted(set(places) - {name}):
            if (name, other) in may:
                assert detect.set_at(root, other) == ("parquet" if name == "parquet" else other)
                continue
            with pytest.raises(UserError) as raised:
                questions.load_samples(other, str(root), "test", "clean")
            sentence = str(raised.value)
            named = [each for each, of in SETS.items() if f"looks like {of.title}" in sentence or f"data.name={each}" in sentence]
            assert named in ([name], []) or named == ["parquet"] == [name], (name, other, sentence)
            assert named or other == "parquet" or "looks like one of" in sentence, (name, other, sentence)


@pytest.mark.parametrize("keys, name", [
    ({"image", "question", "answer", "caption"}, None),
    ({"image", "question", "answer", "options", "caption"}, "choices"),
    ({"id", "image", "report"}, "captions"), ({"image", "question", "answer"}, None),
    ({"image", "answer", "reference"}, None),
    ({"conversations", "phrase_type", "options", "img_name"}, "llava_med"), (set(), None)])
def test_rows_of_questions_are_no_captions(keys, name):
    assert detect.layout_of_row(dict.fromkeys(keys, "x")) == name


def test_folders_that_share_a_name_with_a_set_are_not_it(tmp_path):
    (tmp_path / "qas").mkdir()
    assert detect.layout_of(tmp_path) is None, "a folder qas/ without its pickles"
    (tmp_path / "imgs").mkdir()
    (tmp_path / "imgs" / "photo1.jpg").write_bytes(b"")
    assert detect.layout_of(tmp_path) is None
    (tmp_path / "imgs" / "xmlab1").mkdir()
    assert detect.layout_of(tmp_path) == "slake"


def test_the_config_reads_it(hub):
    root = hub(test=[row(language="de"), row(language="en")])
    cfg = load_config(str(ROOT / "configs" / "eval" / "parquet.py"), [f"data.root={root}", "data.language=en"])
    samples, training = questions.load_samples(cfg.data.name, cfg.data.root, cfg.data.split, cfg.protocol,
                                               **questions.further(cfg.data))
    assert len(samples) == 1 and training == []
    assert questions.describe(cfg, samples) == "parquet test: 1 question on 1 image, 0 open, 1 closed"
    assert questions.source_files(cfg.data) == [root / "data" / "test-00000-of-00001.parquet"]


def test_slakes_languages_and_missing_types(hub, caplog):
    """Without `answer_type` the English questions are counted beside the published number, and the Chinese ones are named."""
    rows = [row("Is it?", "Yes", q_lang="en", img_name="x", location="Lung"), row("What?", "Lung", q_lang="en", img_name="x", location="Lung"),
            row("这是什么?", "左肺", q_lang="zh", img_name="x", location="Lung")]
    root = hub(test=rows)
    with caplog.at_level(logging.WARNING):
        assert [s.language for s in read_slake(root, "test", "zh")] == ["zh"]
        assert "1 questions are not in English" in caplog.text and "published" not in caplog.text
        caplog.clear()
        assert [s.answer_type for s in read_slake(root, "test", "en")] == ["CLOSED", "OPEN"]
        assert "only the 1 questions with the answer yes or no count as closed; the published set has 416" in caplog.text
        caplog.clear()
        assert len(read_slake(root, "test", "all")) == 3
    assert "the published set has 416" in caplog.text and "1 questions are not in English" in caplog.text
    assert SETS["slake"].published["test", "all"][0] == 2094 and SETS["slake"].published["test", "zh"][0] == 2094 - 1061
