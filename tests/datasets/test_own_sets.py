"""Sets of one's own: LLaVA-Med's test files, multiple choice, captions; every set written for training; wrong places."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets import captions, choices
from llavamed_jax.datasets.captions import read_captions
from llavamed_jax.datasets.choices import read_choices
from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.detect import layout_of
from llavamed_jax.datasets.llava_med import read_llava_med
from llavamed_jax.datasets.sample import to_llava
from llavamed_jax.datasets.slake import read_slake
from llavamed_jax.datasets.training import read_training
from llavamed_jax.datasets.vqa_rad import VQA_RAD_FILE, read_vqa_rad
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation import questions
from tests.support.words import instead

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "set" / "images").mkdir(parents=True)
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (4, 4)).save(tmp_path / "set" / "images" / name)
    return tmp_path / "set"


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) if path.suffix == ".jsonl" else json.dumps(rows))
    return path


def record(number, human="Is it?\n<image>", gpt="yes", key="conversations", **fields):
    turns = [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}]
    return {"id": number, "image": "images/a.jpg", "answer_type": "CLOSED", key: turns, **fields}


def choice(number=1, options=("liver", "lung", "left"), answer="B", **fields):
    return {"id": number, "image": "images/a.jpg", "question": "What is shown?", "options": options, "answer": answer, **fields}


# ---- LLaVA-Med's test files ----


def test_llava_meds_own_test_format(folder):
    rows = [record(300648006, "Where is this?\n<image>", "urinary", answer_type="OPEN", question_type="where"),
            record("x2", "<image>\nIs it? Please choose from the following two options: [yes, no]", 1, "conversatons"),
            record(3, answer_type="yes/no"), record(4, answer_type="number", image=["images/b.jpg"])]
    write(folder / "test.json", rows)
    write(folder / "test_w_options.jsonl", rows[1:2])
    samples = read_llava_med(folder)
    assert [(s.question_id, s.question, s.answer, s.answer_type, s.question_type) for s in samples] == [
        (300648006, "Where is this?", "urinary", "OPEN", "where"),
        ("x2", "Is it? Please choose from the following two options: [yes, no]", "1", "CLOSED", None),
        (3, "Is it?", "yes", "CLOSED", None), (4, "Is it?", "yes", "OPEN", None)]
    assert [s.image.name for s in samples] == ["a.jpg"] * 3 + ["b.jpg"]
    assert read_llava_med(folder / "test_w_options.jsonl") == samples[1:2]
    for row in rows:
        row["image"] = Path(row["image"] if isinstance(row["image"], str) else row["image"][0]).name
    assert [s.image for s in read_llava_med(write(folder / "names.json", rows), images=folder / "images")] == [s.image for s in samples]


def test_files_with_the_counts_of_a_published_set_say_so(shared, tmp_path):
    """VQA-RAD's test questions, in LLaVA-Med's format."""
    samples = read_vqa_rad(shared / "data" / "vqa_rad", "test")
    file = write(tmp_path / "test.json", list(map(to_llava, samples)))
    again = read_llava_med(file)
    assert describe(again, "llava_med", "test") == (
        "llava_med test: 451 questions on 203 images, 179 open, 272 closed, as published of vqa_rad")
    assert "published" not in describe(again[1:], "llava_med", "test") and "published" not in describe(again, "llava_med", "train")
    assert [(s.question_id, s.question, s.answer, s.answer_type) for s in again] == [
        (s.question_id, s.question, s.answer, s.answer_type) for s in samples]


@pytest.mark.parametrize("row, sentence", [
    ({**record(1), "id": None}, "row 0 of .* has the id None; text"), (record(True), "has the id True"), (5, "row 0 of .* has no 'id'"),
    ({"image": "images/a.jpg", "conversations": []}, "has no 'id'; {id, image, answer_type, conversations} was expected$"),
    ({"id": 1, "image": "images/a.jpg", "answer_type": "OPEN"}, "has no conversations"),
    (record(1, answer_type="MAYBE"), "answer_type 'MAYBE'; OPEN or CLOSED or"),
    (record(1, image=["images/a.jpg"] * 2), "has 2 images; one was expected"), (record(1, image=None), "the image None"),
    (record(1, image="c.jpg"), "c.jpg does not exist"), (record(1, gpt=None), "as turn 1"),
    ({**record(1), "conversations": record(1, "Is it?")["conversations"] * 2}, "has 4 turns; one question and its answer"),
    ({"qid": 1, "img_name": "x", "answer_type": "OPEN"}, "has no 'id'; .* the row looks like one of SLAKE")])
def test_bad_llava_med(folder, row, sentence):
    write(folder / "test.json", [row])
    with pytest.raises(UserError, match=sentence) as raised:
        read_llava_med(folder)
    assert "\n" not in str(raised.value)


# ---- multiple choice ----


def test_the_prompt_of_multiple_choice():
    assert choices.prompt("What is shown?", ["liver", "lung"]) == (
        "What is shown?\nA. liver\nB. lung\nAnswer with the letter of the right option.")


@pytest.mark.parametrize("options, answer, text", [
    (["liver", "lung"], "B", "lung"), (["liver", "lung"], "b", "lung"), (["liver", "lung"], "liver", "liver"),
    ({"B": "lung", "A": "liver"}, "A", "liver"), ([1, 2.5, "x"], "B", "2.5"), ([" 4 ", "5"], 4, "4"),
    (["A", "B", "AB", "O"], "B", "B"), (["A", "B", "AB", "O"], "O", "O"), (["x", "x", "y"], "C", "y")])
def test_options_and_answers(folder, options, answer, text):
    write(folder / "test.json", [choice(options=options, answer=answer, modality="CT", question_type="organ")])
    (sample,) = read_choices(folder)
    assert (sample.answer, sample.answer_type, sample.modality, sample.question_type) == (text, "CHOICE", "CT", "organ")
    assert sample.question == choices.prompt("What is shown?", sample.options)
    letter = "ABCD"[sample.options.index(text)]
    assert f"\n{letter}. {text}\n" in sample.question and to_llava(sample)["conversations"][1]["value"] == letter


def test_choices_of_json_lines_and_other_splits(folder):
    write(folder / "test.jsonl", [choice(1), {**choice(), "id": None, "question_id": "q2"}])
    write(folder / "val.json", [choice(3)])
    assert [s.question_id for s in read_choices(folder)] == [1, "q2"]
    assert [s.question_id for s in read_choices(folder, "validation")] == [3]
    assert describe(read_choices(folder), "choices", "test") == "choices test: 2 questions on 1 image, 2 multiple choice"


@pytest.mark.parametrize("changes, sentence", [
    (dict(answer="D"), "row 0 of .* has the answer 'D'; a letter up to C or an option's text"),
    (dict(answer="kidney"), "has the answer 'kidney'"), (dict(answer=None), "the answer None"), (dict(answer=""), "empty answer"),
    (dict(options=["liver"]), "has 1 options; a list of 2 to 26"), (dict(options="liver"), "no list of options"),
    (dict(options={"A": "x", "C": "y"}), "has the options A, C; letters from A on"),
    (dict(options=["x", None]), "has the option None"), (dict(options=["x", ""]), "empty option"),
    (dict(options=["B", "A"], answer="A"), "the letter of one option and the text of another"),
    (dict(options=["x", "x"], answer="A"), "its right option 'x' 2 times"), (dict(question=" "), "empty question"),
    (dict(image=["a", "b"]), "has 2 images; one was expected"), (dict(options=[str(n) for n in range(27)]), "has 27 options")])
def test_bad_choices(folder, changes, sentence):
    write(folder / "test.json", [choice(**changes)])
    with pytest.raises(UserError, match=sentence):
        read_choices(folder)


# ---- captions ----


def test_captions_and_reports(folder):
    rows = [{"id": 1, "image": "images/a.jpg", "caption": "A chest."}, {"id": 2, "image": "images/b.jpg", "report": "No effusion."},
            {"id": 3, "image": "images/b.jpg", "reference": "x", "modality": "MR"}, record(4, "<image>\nWhat?", "An arm.")]
    samples = read_captions(write(folder / "reports.json", rows))
    assert [(s.question, s.answer, s.answer_type) for s in samples] == [
        (captions.INSTRUCTION, text, "CAPTION") for text in ("A chest.", "No effusion.", "x", "An arm.")]
    assert {s.question for s in read_captions(folder / "reports.json", question="Write the findings.")} == {"Write the findings."}
    write(folder / "own.json", rows[3:])
    assert read_captions(folder / "own.json", question="")[0].question == "What?"
    assert describe(samples, "captions", "test") == "captions test: 4 questions on 2 images, 4 to be described"


@pytest.mark.parametrize("row, sentence", [
    ({"id": 1, "image": "images/a.jpg"}, "has no 'caption'; {id, image, caption} or"),
    ({"image": "images/a.jpg", "caption": "x"}, "has no 'id'"), ({"id": 1, "image": "images/a.jpg", "caption": " "}, "empty caption"),
    ({"id": 1, "image": "images/a.jpg", "caption": ["x"]}, "the caption a list; text"),
    (record(1, gpt=""), "empty answer"), (choice(), "has no 'caption'; .*looks like one of multiple choice")])
def test_bad_captions(folder, row, sentence):
    write(folder / "test.json", [row])
    with pytest.raises(UserError, match=sentence):
        read_captions(folder)


def test_an_image_asked_about_without_a_question(folder):
    write(folder / "test.json", [{"id": 1, "image": "images/a.jpg", "caption": "x"}])
    with pytest.raises(UserError, match="has no question; set data.question"):
        read_captions(folder, question=" ")


def test_frames_of_a_file_are_images_of_their_own(folder):
    write(folder / "test.json", [{"id": n, "image": f"images/a.jpg#frame={n}", "caption": "x"} for n in (1, 2)])
    assert len({sample.image for sample in read_captions(folder)}) == 2


# ---- files ----


@pytest.mark.parametrize("content, sentence", [
    (b"\xff\xfe[1]", "is not UTF-8 text"), (b"[{]", "is not valid JSON"), (b'{"id": 1}\n{"id"', "line 2 of .* is not valid JSON"),
    (b"[" * 10**5 + b"]" * 10**5, "is nested too deeply"), (b'[{"id": "\\ud800"}]', "half a surrogate pair in its id")])
@pytest.mark.parametrize("read", [read_llava_med, read_choices, read_captions])
def test_files_that_cannot_be_read(folder, read, content, sentence):
    (folder / "test.json").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        read(folder)


@pytest.mark.parametrize("read", [read_llava_med, read_choices, read_captions])
def test_wrong_places_name_what_they_look_like(folder, read):
    with pytest.raises(UserError, match="test.json does not exist; .*vqa_rad looks like VQA-RAD .*: data.name=vqa_rad"):
        read(SAMPLE)
    with pytest.raises(UserError, match="test.json does not exist; .*vqa_rad looks like VQA-RAD"):
        read(SAMPLE.parent)
    with pytest.raises(UserError, match="test.json does not exist$"):
        read(folder)
    with pytest.raises(UserError, match="'dev'; one of train, validation, test"):
        read(folder, "dev")


def test_what_a_place_looks_like(folder, tmp_path):
    assert layout_of(SAMPLE) == layout_of(SAMPLE / VQA_RAD_FILE) == "vqa_rad" and layout_of(folder) is None
    assert layout_of(tmp_path / "nowhere") is None
    rows = {"llava_med": record(1), "choices": choice(), "captions": {"caption": "x"}, "slake": {"img_name": "x"}, None: {}}
    for name, row in rows.items():
        assert layout_of(write(folder / "test.json", [row])) == layout_of(folder) == name
        assert layout_of(write(folder / "x.jsonl", [row, "damaged"])) == name
    (folder / "imgs").mkdir()
    assert layout_of(folder) == "slake"
    with pytest.raises(UserError, match="does not exist; .*set looks like SLAKE"):
        read_vqa_rad(folder)
    with pytest.raises(UserError, match="does not exist; .* looks like VQA-RAD"):
        read_slake(SAMPLE)


def test_data_train_takes_each_of_them(folder):
    write(folder / "train.json", [choice(1), choice(2)])
    assert [r["conversations"][1]["value"] for r in read_training(folder).readable()] == ["B", "B"]
    assert read_training(folder).found == ("choices train: 2 questions on 1 image, 2 multiple choice",)
    write(folder / "train.json", [{"id": 1, "image": "a.jpg", "report": "x"}])
    assert [r["conversations"][1]["value"] for r in read_training(folder / "train.json", folder / "images").readable()] == ["x"]
    write(folder / "train.json", [record(1), record(2)])
    assert [r["id"] for r in read_training(folder).readable()] == [1, 2] and read_training(folder).found == ()


# ---- evaluation ----


def config(name, root, *overrides):
    return load_config(str(ROOT / "configs" / "eval" / f"{name}.py"), [f"data.root={root}", *overrides])


def load(cfg):
    data = cfg.data
    return questions.load_samples(data.name, data.root, data.split, cfg.protocol, data.held_out, **questions.further(data))


def test_configs_are_short_and_name_their_set():
    files = sorted((ROOT / "configs" / "eval").glob("*.py"))
    assert {"vqa_rad", "slake", "pathvqa", "llava_med", "choices", "captions"} <= {file.stem for file in files}
    for name in ("vqa_rad", "slake", "pathvqa", "llava_med", "choices", "captions"):
        text = (ROOT / "configs" / "eval" / f"{name}.py").read_text()
        assert len(text.splitlines()) <= 32 and config(name, "x").data.name == name
        with pytest.raises(UsageError, match="'v2' does not exist"):
            load_config(f"{ROOT / 'configs' / 'eval' / name}.py:v2")


def test_ids_that_several_questions_have_are_listed(folder):
    write(folder / "test.json", [record(1), record("1"), record(2), record(3), record(3)])
    with pytest.raises(UserError, match=r"has 2 ids that more than one question has \(1, 3\)"):
        load(config("llava_med", folder))


def test_training_rows_beside_the_questions_or_where_data_train_says(folder, caplog):
    file = write(folder / "test.json", [record(1)])
    assert load(config("llava_med", folder))[1] == [] and "has no train.json and data.train is empty" in caplog.text
    write(folder / "train.json", [record(2), record(3)])
    assert [s.question_id for s in load(config("llava_med", folder))[1]] == [2, 3]
    other = write(folder / "other.json", [record(4)])
    assert [s.question_id for s in load(config("llava_med", file, f"data.train={other}"))[1]] == [4]


def test_languages_of_slake(shared, capsys):
    root = shared / "data" / "slake"
    for language, counts in {"en": (1053, "as published"), "zh": (41, "; published: 1046 questions"), "all": (1094, "; published: 2099 questions on 96 images")}.items():
        cfg = config("slake", root, "data.split=validation", f"data.language={language}")
        samples, _ = load(cfg)
        assert len(samples) == counts[0] and questions.describe(cfg, samples).endswith(counts[1])
    with pytest.raises(UsageError, match="data.language is 'fr'; en, zh or all was expected"):
        load(config("slake", root, "data.language=fr"))


# ---- written for training ----


def test_every_set_is_written_and_read_back(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # relative roots give absolute paths
    write(folder / "test.json", [record(1), record("ü2", "Wo?\n<image>", "größer", answer_type="OPEN", question_type="x")])
    write(folder / "choices.jsonl", [choice(1), choice("2", {"A": "liver", "B": "<b>"}, "A")])
    write(folder / "captions.json", [{"id": 1, "image": "images/b.jpg", "caption": "Two\nlines."}])
    sets = {"llava_med": ["set/test.json"], "choices": ["set/choices.jsonl"], "captions": ["set/captions.json", "data.question=Write."],
            "vqa_rad": [SAMPLE, "data.split=train"]}
    for name, (root, *overrides) in sets.items():
        out = tmp_path / "out" / name / "train.json"
        out.parent.mkdir(parents=True)
        argv = ["--config", str(ROOT / "configs" / "eval" / f"{name}.py"), f"--config.data.root={root}",
                *(f"--config.{override}" for override in overrides), "--write_llava", str(out)]
        assert cli.main(argv) == 0
        assert capsys.readouterr().out.endswith(f": written to {out}\n") and [p.name for p in out.parent.iterdir()] == ["train.json"]
        samples, _ = load(config(name, root, *overrides))
        wanted = [{**r, "image": [str(Path(r["image"][0]).absolute())]} for r in map(to_llava, samples)]
        assert list(read_training(out).readable()) == wanted
        assert [type(r["image"]) for r in json.loads(out.read_text())] == [str] * len(wanted)
        assert all(Path(r["image"][0]).is_file() for r in wanted)
        before = out.read_bytes()
        assert cli.main(argv) == 1 and out.read_bytes() == before
        assert capsys.readouterr().err == f"error: {out} exists; a new file was expected\n"


def test_the_published_sets_are_written_and_read_back(shared, tmp_path):
    """And asked again as a file in LLaVA-Med's format, with what reports break questions down by."""
    for name, split, count in (("vqa_rad", "train", 1797), ("slake", "validation", 1053)):
        cfg = config(name, shared / "data" / name, f"data.split={split}")
        line = questions.write_llava(cfg, tmp_path / f"{name}.json")
        assert f" {count} questions " in line and ", as published: written to " in line
        assert list(read_training(tmp_path / f"{name}.json").readable()) == [
            {**r, "image": [str(Path(r["image"][0]).absolute())]} for r in map(to_llava, load(cfg)[0])]
        same = ("question_id", "question", "answer", "answer_type", "question_type", "organ", "modality")
        assert [[getattr(s, key) for key in same] for s in read_llava_med(tmp_path / f"{name}.json")] == [
            [getattr(s, key) for key in same] for s in load(cfg)[0]]


@pytest.mark.parametrize("more, status, sentence", [
    (["--workdir", "w"], 2, "writes one file and needs no --workdir"), (["--dtype", "float32"], 2, "--dtype needs a model"),
    (["--predictions", "p"], 2, "not allowed with"), (["--config.data.root=nowhere"], 1, "nowhere/test.json does not exist"),
    (["--config.data.split=dev"], 2, "data.split is 'dev'; train, validation or test was expected for llava_med"),
    (["--write_llava", "no/such/folder.json"], 1, "no/such/folder.json cannot be written: No such file")])
def test_what_cannot_be_written_leaves_nothing(folder, tmp_path, monkeypatch, capsys, more, status, sentence):
    monkeypatch.chdir(tmp_path)
    write(folder / "test.json", [record(1)])
    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), f"--config.data.root={folder}", "--write_llava", "out.json"]
    assert cli.main(instead(argv, more)) == status
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1 and [p.name for p in tmp_path.iterdir()] == ["set"]


def test_a_question_that_can_be_no_record_is_named_and_nothing_is_written(folder, tmp_path):
    write(folder / "test.json", [{"id": 7, "image": "images/a.jpg", "caption": "an <image> in an <image>"}])
    with pytest.raises(UserError, match="question 7 of .* has 1 images for 3 <image> markers"):
        questions.write_llava(config("captions", folder), tmp_path / "out.json")
    assert not (tmp_path / "out.json").exists()
