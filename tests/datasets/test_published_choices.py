"""The published multiple-choice sets, read from files in their published layouts: rows, prompts, images, counts, mistakes."""

import csv
import io
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets import detect, rows
from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.find import asked_split, find_sets
from llavamed_jax.datasets.registry import SETS, Selection
from llavamed_jax.datasets.sample import CHOICE, OPEN, all_images, clusters, to_llava
from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import questions
from llavamed_jax.evaluation.answering import local
from llavamed_jax.evaluation.answering.answerer import Answer, Generation
from llavamed_jax.evaluation.answering.ask import predict
from llavamed_jax.evaluation.answering.endpoint import _requests
from llavamed_jax.evaluation.scoring import controls
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.score import group_keys, score
from llavamed_jax.evaluation.scoring.strict import right_choice
from tests.support import published_sets

DIRECTLY = "Answer with the option's letter from the given choices directly."


def picture(color=0):
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (color, 1, 2)).save(file, "PNG")
    return file.getvalue()


def put(path, data=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(picture() if data is None else data.encode() if isinstance(data, str) else data)
    return path


def table(path, header, *rows):
    file = io.StringIO(newline="")
    csv.writer(file).writerows([header, *rows])
    return put(path, file.getvalue())


def parquet(path, rows):
    arrow = pytest.importorskip("pyarrow", reason="pyarrow, the extra [parquet], is not installed")
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(arrow.Table.from_pylist(rows), path)


def read(name, root, split="test", images=None):
    return SETS[name].questions(Selection(root, split, images=images))


# ---- the five layouts ----

SECOND = ("index", "Figure_path", "Caption", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer", "split")
FIRST = ("Figure_path", "Question", "Answer", "Choice A", "Choice B", "Choice C", "Choice D", "Answer_label")
CELLS = (" A:CT, plain", " B:MRI ", " C: CT", " D:")


def test_pmc_vqa(tmp_path, caplog):
    put(tmp_path / "figures" / "a.jpg")
    table(tmp_path / "test_2.csv", SECOND, ("0", "a.jpg", "c", " What, then?\n", *CELLS, "B", "test"),
          ("1", "a.jpg", "c", "Q", *CELLS, "E", "test"), ("2", "a.jpg", "c", "Q", " A:x", " B:x", " C:y", " D:z", "B", "test"))
    table(tmp_path / "test_clean.csv", FIRST, ("a.jpg", "Q", "CT", *CELLS, "C"), ("a.jpg", "Q", "A", *CELLS, " A"))
    first, twice = read("pmc_vqa", tmp_path)
    assert (first.answer, first.options, first.answer_type) == ("MRI", ("CT, plain", "MRI", "CT", ""), CHOICE)
    assert first.question == ("<image>\n\nQuestion:  What, then?\n\nOptions: \n A:CT, plain\n B:MRI \n C: CT\n D:\n" + DIRECTLY)
    assert (first.question_id, twice.question_id) == (0, 2), "an id is the row, so the row that is left out keeps its own"
    assert right_choice(twice) == 1 and twice.options[:2] == ("x", "x"), "the letter tells equal options apart"
    assert to_llava(twice)["conversations"][1]["value"] == "B"
    assert "1 rows were left out" in caplog.text and "row 1 of" in caplog.text
    assert [s.answer for s in read("pmc_vqa", tmp_path / "test_clean.csv")] == ["CT", "CT, plain"]
    assert detect.layout_of(tmp_path) == detect.layout_of(tmp_path / "test_clean.csv") == "pmc_vqa"
    for root, count in ((tmp_path, "33430"), (tmp_path / "test_clean.csv", "2000")):
        cfg = load_config("configs/eval/pmc_vqa.py", [f"data.root={root}"])
        assert f"published: {count} questions" in questions.describe(cfg, read("pmc_vqa", root))
        assert questions.source_files(cfg.data)[0].name.startswith("test_")


def test_another_sets_table_is_no_pmc_vqa(tmp_path):
    """`test.csv` and `train.csv` are names of many sets; the columns decide."""
    data = published_sets.write(tmp_path / "data", ("vqa_rad", "slake", "pmc_vqa"))
    for folder in (data, data / "slake", data / "aaa"):
        for name in ("train.csv", "test.csv", "test_2.csv"):
            table(folder / name, ("image", "question", "answer"), ("a.jpg", "Q", "A"))
    found = find_sets(data, ("vqa_rad", "slake", "pmc_vqa"))
    assert found.folders == {name: data / name for name in ("vqa_rad", "slake", "pmc_vqa")} and found.repeated == []
    assert detect.layout_of(data / "aaa") is None and detect.layout_of(data / "slake") == "slake"
    for header in ('\ufeff"Figure_path","Choice A","x"', "x,Figure_path,Choice A"):
        put(tmp_path / "b" / "test.csv", f"{header}\r\n1,2,3\r\n")
        assert detect.layout_of(tmp_path / "b") == detect.layout_of(tmp_path / "b" / "test.csv") == "pmc_vqa"


def test_pmc_vqas_images_of_both_versions(tmp_path):
    """The published folder has both; each image is taken from where it is, first from the folder of its version."""
    for name in ("figures/two.jpg", "figures/both.jpg", "images/one.jpg", "images/both.jpg"):
        put(tmp_path / name)
    table(tmp_path / "test_2.csv", SECOND, *((i, name, "c", "Q", *CELLS, "B", "test") for i, name in enumerate(("two.jpg", "both.jpg", "one.jpg"))))
    table(tmp_path / "test_clean.csv", FIRST, *((name, "Q", "CT", *CELLS, "C") for name in ("one.jpg", "both.jpg", "two.jpg")))
    of = lambda root: [str(sample.image.relative_to(tmp_path)) for sample in read("pmc_vqa", root)]
    assert of(tmp_path) == ["figures/two.jpg", "figures/both.jpg", "images/one.jpg"]
    assert of(tmp_path / "test_clean.csv") == ["images/one.jpg", "images/both.jpg", "figures/two.jpg"]
    with pytest.raises(UserError, match="two.jpg does not exist"):
        read("pmc_vqa", tmp_path / "test_clean.csv", images=tmp_path / "images")


def test_pmc_vqas_training_rows_are_read_if_they_are_there(tmp_path, caplog):
    """The majority letter is that of `train_2.csv`; without it, or without its images, that of the questions."""
    put(tmp_path / "figures" / "a.jpg")
    rows = lambda *letters: [(i, "a.jpg", "c", "Q", *CELLS, letter, "x") for i, letter in enumerate(letters)]
    table(tmp_path / "test_2.csv", SECOND, *rows(*"BBA"))
    load = lambda: questions.load_samples("pmc_vqa", str(tmp_path), "test", "clean", "", images="")
    assert load()[1] == [] and caplog.text == "", "there is no data.train to speak of"
    table(tmp_path / "train_2.csv", SECOND, *rows(*"CCA"))
    samples, training = load()
    said = [{"question_id": sample.question_id, "text": "A"} for sample in samples]
    assert score(AnswerSet(samples, said, training))["baselines"]["majority_choice_letter"] == "C"
    table(tmp_path / "train_2.csv", SECOND, (0, "b.jpg", "c", "Q", *CELLS, "C", "x"))
    assert load()[1] == [] and "the training rows cannot be read, so majority answers are those of the questions themselves" in caplog.text


def test_the_split_that_is_there_is_asked(tmp_path):
    """As the reader of the set finds it: PathVQA's release names its files otherwise, IU X-Ray has one for all splits."""
    published_sets.write(tmp_path, ("pathvqa", "iu_xray", "pmc_vqa"))
    assert [asked_split(name, tmp_path / name, "test") for name in ("pathvqa", "iu_xray", "pmc_vqa")] == ["test"] * 3
    shutil.rmtree(tmp_path / "pathvqa" / "qas" / "test")
    put(tmp_path / "pathvqa" / "validation.json", "[]")
    assert asked_split("pathvqa", tmp_path / "pathvqa", "test") == "validation"
    for kept, split in (("val", "validation"), ("test", "test"), ("train", "test")):
        put(tmp_path / "r2gen" / "annotation.json", json.dumps({"train": [], "val": [], "test": []} | {kept: [{"id": "CXR1"}]}))
        assert asked_split("iu_xray", tmp_path / "r2gen", "test") == split
    put(tmp_path / "r2gen" / "annotation.json", "{")
    assert asked_split("iu_xray", tmp_path / "r2gen", "test") == "test", "reading the set says what is wrong"


@pytest.mark.parametrize("answer", ["", "  "])
def test_a_row_of_pmc_vqa_without_an_answer_is_left_out(answer, tmp_path, caplog):
    put(tmp_path / "a.jpg")
    table(tmp_path / "test_2.csv", SECOND, ("0", "a.jpg", "c", "Q", *CELLS, answer, "test"), ("1", "a.jpg", "c", "Q", *CELLS, "B", "test"))
    assert [sample.question_id for sample in read("pmc_vqa", tmp_path)] == [1]
    assert "1 rows were left out" in caplog.text, "an empty option is no right one for an empty answer"


@pytest.mark.parametrize("data, sentence", [
    (b"\xff\xfe", "not UTF-8"), ("Figure_path,Question\na,b\n", "row 0 of .* has no 'Choice A'"),
    (",".join(SECOND) + "\n" + ",".join("abcdefghijkl"), "more cells than the header"), ('a,"b\n', "line 1 of .*test_2.csv is not CSV"),
    (",".join(SECOND) + '\n0,"b\n', "line 2 of .*test_2.csv is not CSV"), (",".join(SECOND) + "\n" + ",".join(SECOND) + '\n0,"b\n' + "c\n" * 9, "line 3 of .*test_2.csv is not CSV: unexpected end"),
    (",".join(SECOND) + "\n" + ",".join(SECOND) + "\n" + "x" * (2**24 + 1), "line 3 of .*test_2.csv is not CSV: field larger"), (None, "does not exist")])
def test_bad_csv_files(tmp_path, data, sentence):
    if data is not None:
        put(tmp_path / "test_2.csv", data)
    with pytest.raises(UserError, match=sentence):
        read("pmc_vqa", tmp_path)


def test_a_cell_of_csv_may_be_longer_than_the_limit_of_the_library(tmp_path):
    long = "x" * 131_073
    table(tmp_path / "test_2.csv", SECOND, ("0", "a.jpg", long, "Q", *CELLS, "B", "test"))
    before = csv.field_size_limit(131_072)
    try:
        (row,) = rows.read_table(tmp_path / "test_2.csv", SECOND, "pmc_vqa")
    finally:
        csv.field_size_limit(before)
    assert row.value[SECOND[2]] == long


OMNI = {"dataset": "ACRIMA", "question_id": "ACRIMA_0", "question_type": "Modality Recognition", "question": "Which?",
        "gt_answer": "CT", "image_path": "Images/ACRIMA/0.png", "option_A": "MRI", "option_B": "CT", "modality_type": "CT"}


def test_omnimedvqa(tmp_path, caplog):
    put(tmp_path / "Images" / "ACRIMA" / "0.png")
    more = [OMNI, OMNI | {"option_C": "CT", "option_D": "US"}, OMNI | {"gt_answer": "PET"}, OMNI | {"gt_answer": "a"}]
    put(tmp_path / "QA_information" / "Open-access" / "B.json", json.dumps(more))
    put(tmp_path / "QA_information" / "Open-access" / "A.json", json.dumps([OMNI | {"question_id": "A_0"}]))
    put(tmp_path / "QA_information" / "Restricted-access" / "C.json", json.dumps([OMNI]))
    samples = read("omnimedvqa", tmp_path)
    assert [(s.question_id, s.right) for s in samples] == [("A_0", 1), ("ACRIMA_0", 1), ("ACRIMA_0#2", 2), ("ACRIMA_0#3", 0)]
    assert samples[0].question == f"<image>\n\nQuestion: Which?\nOptions: \nA. MRI\nB. CT\n{DIRECTLY}"
    assert (samples[0].question_type, samples[0].modality) == ("Modality Recognition", "CT")
    assert "1 rows were left out" in caplog.text
    assert describe(samples, "omnimedvqa", "test").endswith("published: 88996 questions on 82059 images")
    assert detect.layout_of(tmp_path) == "omnimedvqa"
    one = tmp_path / "QA_information" / "Open-access" / "A.json"
    assert len(read("omnimedvqa", one)) == 1 and detect.layout_of(one) == "omnimedvqa"
    put(one, json.dumps([{key: value for key, value in OMNI.items() if key != "image_path"}]))
    with pytest.raises(UserError, match="row 0 of .*A.json has no 'image_path'"):
        read("omnimedvqa", tmp_path)
    put(one, json.dumps([OMNI | {"image_path": "Images/none.png"}]))
    with pytest.raises(UserError, match="none.png does not exist"):
        read("omnimedvqa", tmp_path)


XPERT = {"id": "MM-1", "question": "Which?\nAnswer Choices: (A) x (B) y", "options": {"B": "y", "A": "x"}, "label": "B",
         "images": ["1-a.jpeg", "1-b.jpeg"], "medical_task": "Diagnosis", "body_system": "Nervous", "question_type": "Reasoning"}


@pytest.fixture
def xpert(tmp_path):
    for index, name in enumerate(("1-a", "1-b", "2-a")):
        put(tmp_path / "images" / f"{name}.jpeg", picture(index))
    rows = [XPERT, XPERT | {"id": "MM-2", "images": ["2-a.jpeg"], "options": [{"letter": "A", "content": "x"}, {"letter": "B", "content": "y"}]}]
    put(tmp_path / "MM" / "test.jsonl", "\n".join(map(json.dumps, rows)))
    return tmp_path


def test_medxpertqa_mm(xpert):
    two, one = read("medxpertqa_mm", xpert)
    assert [image.name for image in two.images] == XPERT["images"] and one.more_images == ()
    assert two.question == ("<image_1>: <image>\n<image_2>: <image>\n\nQuestion: Which?\nAnswer Choices: (A) x (B) y\n"
                            f"Options: \nA. x\nB. y\n{DIRECTLY}")
    assert one.question.startswith("<image_1>: <image>\n\nQuestion") and one.options == ("x", "y")
    assert (two.answer, two.organ, two.question_type) == ("y", "Nervous", "Reasoning")
    assert "2 questions on 3 images" in describe([two, one], "medxpertqa_mm", "test")
    assert detect.layout_of(xpert) == detect.layout_of(xpert / "MM" / "test.jsonl") == "medxpertqa_mm"
    assert read_training(xpert, split="test").record(0)["image"] == [str(image) for image in two.images]
    cfg = load_config("configs/eval/medxpertqa_mm.py", [f"data.root={xpert}"])
    questions.write_llava(cfg, xpert / "llava.json")
    first, second = json.loads((xpert / "llava.json").read_text())
    assert [len(first["image"]), first["conversations"][0]["value"].count("<image>"), second["image"]] == [
        2, 2, str((xpert / "images" / "2-a.jpeg").absolute())]


@pytest.mark.parametrize("changes, sentence", [
    ({"images": []}, "no list of images"), ({"images": [3]}, "has the images 3"), ({"options": {"A": "x", "C": "y"}}, "letters from A on"),
    ({"options": {"A": "x"}}, "has 1 options"), ({"images": ["none.png", "1-a.jpeg"]}, "none.png does not exist")])
def test_bad_rows_of_several_images(xpert, changes, sentence):
    put(xpert / "MM" / "test.jsonl", json.dumps(XPERT | changes))
    with pytest.raises(UserError, match=sentence):
        read("medxpertqa_mm", xpert)


def mmmu(identity, kind="multiple-choice", **more):
    return {"id": identity, "question": "What is <image 1>?", "options": "['the liver', \"Crohn's\"]", "answer": "B", "question_type": kind,
            "img_type": "['CT']", "subfield": "x", "image_1": {"bytes": picture(1), "path": None}, "image_2": None} | more


def test_mmmu_med(tmp_path):
    from llavamed_jax.datasets.mmmu_med import SUBJECTS

    rows = [mmmu("v_1"), mmmu("v_2", image_2={"bytes": picture(2), "path": None}), mmmu("v_3", "open", options="[]", answer="['two', '2']")]
    for subject in SUBJECTS:
        mine = [row | {"id": f"{subject}-{row['id']}"} for row in rows]
        parquet(tmp_path / subject / "validation-00000-of-00001.parquet", mine)
        parquet(tmp_path / subject / "test-00000-of-00001.parquet", [mmmu("t", answer="?")])
    samples = read("mmmu_med", tmp_path, "validation")
    assert [s.answer_type for s in samples[:3]] == [CHOICE, CHOICE, OPEN] and len(samples) == 15
    assert samples[0].question == ("<image>\n\nWhat is <image 1>?\n\n(A) the liver\n(B) Crohn's\n\n\n        " + DIRECTLY)
    assert samples[2].question == "<image>\n\nWhat is <image 1>?\n\n        Answer the question using a single word or phrase."
    assert samples[0].answer == "Crohn's" and samples[2].answer == "two" and len(samples[1].images) == 2
    assert len(set(all_images(samples))) == 2, "an image is written once"
    assert describe(samples, "mmmu_med", "validation").startswith("mmmu_med validation: 15 questions on 2 images, 5 open, 10 multiple")
    assert "published: 150 questions" in describe(samples, "mmmu_med", "validation") and detect.layout_of(tmp_path) == "mmmu_med"
    with pytest.raises(UserError, match=r"do not state the answers of the test split; MedEvalKit's utils/MMMU/answer.json in"):
        read("mmmu_med", tmp_path)
    tests = [mmmu("test_1", answer="?"), mmmu("test_2", "open", options="[]", answer="?"), mmmu("test_3", "open", options="[]", answer="?")]
    for number, subject in enumerate(SUBJECTS):
        parquet(tmp_path / subject / "test-00000-of-00001.parquet", tests if number == 0 else [mmmu(subject, answer="?")])
    golds = {"test_1": "A", "test_2": "50", "test_3": ["two", "2"]} | dict.fromkeys(SUBJECTS[1:], "B")
    put(tmp_path / "answer.json", json.dumps({name: {"question_type": "x", "ground_truth": gold} for name, gold in golds.items()}))
    assert [s.answer for s in read("mmmu_med", tmp_path)] == ["the liver", "50", "two"] + ["Crohn's"] * 4
    assert tmp_path / "answer.json" in SETS["mmmu_med"].files(tmp_path, "test") and tmp_path / "answer.json" not in SETS["mmmu_med"].files(tmp_path, "validation")
    (tmp_path / "Pharmacy" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match="Pharmacy has no parquet file"):
        read("mmmu_med", tmp_path, "validation")
    assert load_config("configs/eval/mmmu_med.py", []).data.split == "validation"


@pytest.mark.parametrize("stated, wanted", [
    ("['CT', 'MRI']", ["CT", "MRI"]), ("['Body Scans: MRI, CT scans, and X-rays']", ["Body Scans: MRI, CT scans, and X-rays"]), (["CT", "MRI", "CT"], ["CT", "MRI"]),
    ("CT, MRI", ["CT", "MRI"]), ("[]", ["not stated"]), ([], ["not stated"]), ("[CT]", ["[CT]"]), (None, ["not stated"]), ("[1, 2]", ["1", "2"])])
def test_a_list_of_modalities_is_several_groups(tmp_path, stated, wanted):
    put(tmp_path / "a.png")
    row = {"id": 1, "image": "a.png", "question": "Q", "options": ["x", "y"], "answer": "A", "modality": stated}
    put(tmp_path / "test.json", json.dumps([row]))
    (sample,) = read("choices", tmp_path)
    assert group_keys(sample, "modality") == wanted
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    written = {"id": 1, "image": "a.png", "answer_type": "OPEN", "conversations": turns, "modality": sample.modality}
    put(tmp_path / "l" / "test.json", json.dumps([written]))
    put(tmp_path / "l" / "a.png")
    assert group_keys(read("llava_med", tmp_path / "l")[0], "modality") == wanted, "as --write_llava writes it"


def frames(count, **more):
    shown = {f"image_{i}": {"bytes": picture(i), "path": None} if i <= count else None for i in range(1, 6)}
    return {"question": "Which?", "options": ["x", "y", "z"], "correct_answer": "C", "organ": "heart", "modality": "CT", **shown, **more}


def test_medframeqa(tmp_path):
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [frames(2, question_id="q1"), frames(5, question_id="q2")])
    samples = read("medframeqa", tmp_path)
    assert [(s.question_id, len(s.images), s.answer, s.organ) for s in samples] == [("q1", 2, "z", "heart"), ("q2", 5, "z", "heart")]
    assert samples[0].question == f"<image_1>: <image>\n<image_2>: <image>\n\nQuestion: Which?\nOptions: \nA.x\nB.y\nC.z\n{DIRECTLY}"
    assert "2 questions on 5 images, 2 multiple choice; published: 2851 questions" in describe(samples, "medframeqa", "test")
    assert detect.layout_of(tmp_path) == "medframeqa"
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [frames(0)])
    with pytest.raises(UserError, match="has no image; encoded bytes were expected"):
        read("medframeqa", tmp_path)
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [{"question": "Q", "image_1": b"x"}])
    with pytest.raises(UserError, match="has no column correct_answer and options"):
        read("medframeqa", tmp_path)


def test_medframeqas_videos_are_clusters(tmp_path):
    rows = [frames(2, question_id=f"q{i}") | {"video_id": video} for i, video in enumerate(("v1", "v2", "v1", None))]
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", [row | {"image_1": {"bytes": picture(9 * i), "path": None}, "image_2": {
        "bytes": picture(9 * i + 1), "path": None}} for i, row in enumerate(rows)])
    names = clusters(read("medframeqa", tmp_path))
    assert names[0] == names[2] and len(set(names)) == 3


# ---- several images on their way to a model ----

class Recorder:
    """Answers every question with its letter, and keeps what it is asked."""

    name = "m"

    def answers(self, questions, asked, generation, failed):
        self.questions = questions
        for i in asked:
            yield i, Answer("B", "stop")


def test_all_images_are_asked_about_and_exchanged(xpert, tmp_path):
    samples, recorder = read("medxpertqa_mm", xpert), Recorder()
    lines = predict(recorder, samples, Generation())
    two = tuple(str(image) for image in samples[0].images)
    assert recorder.questions == [(samples[0].question, two), (samples[1].question, (str(samples[1].image),))]
    assert lines[0]["metadata"]["image"] == "1-a.jpeg" and lines[0]["metadata"]["more_images"] == ["1-b.jpeg"]
    assert "more_images" not in lines[1]["metadata"]
    assert AnswerSet(samples, lines, is_control_allowed=False).families["strict"][-1].parts.mean() == 1.0
    other = controls.exchanged_images(samples, 0)
    assert list(map(len, other)) == [2, 1] and all(a != b for a, b in zip(other[0], two, strict=True))
    with controls.noise_images(samples, tmp_path / "noise", 0) as shown:
        assert len({*shown[0], *shown[1]}) == 3


def test_a_server_gets_the_images_at_their_places(xpert):
    samples = read("medxpertqa_mm", xpert)
    asked = [(s.question, tuple(map(str, s.images))) for s in samples] + [("Is it?", (str(samples[1].image),))]
    parts = [[part.get("text", "IMAGE") for part in message[0]["content"]] for _, message in _requests(asked, range(3), {})]
    assert parts[0][:4] == ["<image_1>: ", "IMAGE", "\n<image_2>: ", "IMAGE"] and parts[0][4].startswith("\n\nQuestion: Which?")
    assert parts[1][:2] == ["<image_1>: ", "IMAGE"] and parts[2] == ["IMAGE", "Is it?"]


def test_a_prompt_that_is_cut_keeps_whole_images():
    ids = np.array([1, *[-200] * 4, 2, *[-200] * 4, 3, 4], np.int32)
    images = [np.zeros(1), np.ones(1)]
    for limit, kept, count in ((12, 12, 2), (11, 11, 2), (10, 10, 2), (9, 6, 1), (6, 6, 1), (4, 1, 0)):
        cut, seen = local._cut(ids, images, limit)
        assert (len(cut), len(seen)) == (kept, count), limit
        assert (cut == -200).sum() == 4 * len(seen)
    cut, seen = local._cut(ids[:6], images[:1], 3)
    assert len(cut) == 3 and len(seen) == 1, "one image is cut as in the original"


def test_a_model_gets_all_images_of_a_question():
    said = []

    class Model:
        engine = SimpleNamespace(max_prompt=99)
        processor = SimpleNamespace(
            question=lambda text, images: f"{len(images)} {text}", encode=lambda text: [-200] * int(text[0]) + [7],
            expand=lambda ids: ids, images_uint8=lambda paths: np.full((1, 1, 1, 3), int(paths[0]), np.uint8))

        def answer_each(self, prompts, **settings):
            for index, (ids, images, _) in enumerate(prompts):
                said.append((list(ids), [int(image[0, 0, 0]) for image in images]))
                yield index, SimpleNamespace(text="x", finish_reason="stop")

    Model.processor.for_evaluation = lambda: Model.processor
    asked = [("q", ("1",)), ("q", ("2", "3")), ("q", ("2", "3", "4"))]
    assert len(list(local.LocalModel(Model(), "m").answers(asked, range(3), Generation(), {}))) == 3
    assert said == [([-200, 7], [1]), ([-200] * 2 + [7], [2, 3]), ([-200] * 3 + [7], [2, 3, 4])]
