"""IU X-Ray in its three published layouts, which the tests write: text, images, splits, what is left out, mistakes; and a run on it."""

import json

import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli import eval_parts
from llavamed_jax.cli.common import load_config
from llavamed_jax.config import preset
from llavamed_jax.datasets import detect
from llavamed_jax.datasets.counts import describe
from llavamed_jax.datasets.iu_xray import INSTRUCTION, split_of
from llavamed_jax.datasets.registry import SETS, Selection
from llavamed_jax.datasets.sample import CAPTION, all_images
from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.evaluation.report import details
from llavamed_jax.evaluation.results import Outcome
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.preflight.programs import planned_length
from tests.support import published_sets
from tests.support.answerers import StandIn

FINDINGS = "The heart is normal in size. The lungs are clear."


def put(path, data=b""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def read(root, split="test", **more):
    return SETS["iu_xray"].questions(Selection(root, split, **more))


def xml(identity, findings, *images):
    section = "" if findings is None else f'<AbstractText Label="FINDINGS">{findings}</AbstractText>'
    shown = "".join(f'<parentImage id="{name}"><panel/></parentImage>' for name in images)
    return (f'<?xml version="1.0" encoding="utf-8"?><eCitation><uId id="{identity}"/><MedlineCitation><Article><Abstract>'
            f'<AbstractText Label="INDICATION">XXXX</AbstractText>{section}<AbstractText Label="IMPRESSION">Normal.</AbstractText>'
            f"</Abstract></Article></MedlineCitation>{shown}</eCitation>")


def test_r2gens_file(tmp_path):
    published_sets.write(tmp_path, ("iu_xray",))
    root = tmp_path / "iu_xray"
    samples = read(root)
    assert [(s.question_id, len(s.images), s.question, s.answer_type) for s in samples] == [
        (f"CXR{2000 + i}_IM-0001", 1 + i % 2, INSTRUCTION, CAPTION) for i in range(4)]
    assert samples[1].answer == "The heart is normal in size. There are 1 nodules. No effusion."
    assert [image.relative_to(root).as_posix() for image in samples[1].images] == ["images/CXR2001/0.png", "images/CXR2001/1.png"]
    assert [s.question_id for split in ("train", "validation") for s in read(root, split)] == [f"CXR{k}_IM-0001" for k in (0, 1, 2, 3, 1000, 1001, 1002, 1003)]
    assert detect.layout_of(root) == "iu_xray"
    assert describe(samples, "iu_xray", "test", "R2Gen") == (
        "iu_xray test (R2Gen): 4 questions on 6 images, 4 to be described; published: 590 questions")
    record = read_training(root).record(1)
    assert record["conversations"] == [{"from": "human", "value": f"<image>\n<image>\n{INSTRUCTION}"},
                                       {"from": "gpt", "value": "The heart is normal in size. There are 1 nodules. No effusion."}]
    assert read(root, question=" Say it. ")[0].question == "Say it."
    mimic = {"train": [{"id": "02aa804e-bde0afdd", "study_id": 50414267, "report": "x", "image_path": ["p10/x.jpg"], "split": "train"}]}
    put(tmp_path / "mimic" / "annotation.json", json.dumps(mimic))
    assert detect.layout_of(tmp_path / "mimic") is None, "MIMIC-CXR's file has the same form"


def test_open_is_files(tmp_path, caplog):
    ids = [f"CXR{number}" for number in range(1, 41)]
    for number, identity in enumerate(ids, 1):
        put(tmp_path / "ecgen-radiology" / f"{number}.xml", xml(identity, FINDINGS.replace(". ", ".\n  "), f"{identity}_1", f"{identity}_2"))
        for view in (1, 2):
            put(tmp_path / "NLMCXR_png" / f"{identity}_{view}.png")
    put(tmp_path / "ecgen-radiology" / "41.xml", xml("CXR41", None, "CXR41_1"))
    put(tmp_path / "ecgen-radiology" / "42.xml", xml("CXR42", FINDINGS))
    found = {split: read(tmp_path, split) for split in ("train", "validation", "test")}
    assert sorted(s.question_id for samples in found.values() for s in samples) == sorted(ids)
    assert len(found["train"]) > len(found["test"]) > 0 < len(found["validation"])
    assert {split_of(s.question_id) for s in found["test"]} == {"test"} and {s.answer for s in found["train"]} == {FINDINGS}
    first = found["train"][0]
    assert [image.name for image in first.images] == [f"{first.question_id}_1.png", f"{first.question_id}_2.png"]
    assert [s.question_id for s in found["train"]] == [identity for identity in ids if split_of(identity) == "train"], "1, 2, … 10, not 1, 10, 2"
    said = [record.getMessage() for record in caplog.records]
    assert sum("studies are left out" in line for line in said) == len({split_of("CXR41"), split_of("CXR42")})
    assert detect.layout_of(tmp_path) == "iu_xray"
    for damaged in ("<eCitation>", *(f'<?xml version="1.0" encoding="{name}"?><eCitation/>' for name in ("gb2312", "foo", "idna"))):
        put(tmp_path / "ecgen-radiology" / "43.xml", damaged)
        with pytest.raises(UserError, match="43.xml is not XML"):
            read(tmp_path)


REPORTS = "uid,MeSH,Problems,image,indication,comparison,findings,impression\n"


def test_kaggles_tables(tmp_path, caplog):
    rows = "".join(f'{i},normal,normal,x,y,z,"{FINDINGS}",Normal.\n' for i in range(1, 31)) + '99,n,n,x,y,z,,"No findings."\n'
    put(tmp_path / "indiana_reports.csv", REPORTS + rows)
    views = "".join(f"{i},{i}_IM-2.dcm.png,Lateral\n{i},{i}_IM-1.dcm.png,Frontal\n" for i in range(1, 31))
    put(tmp_path / "indiana_projections.csv", "uid,filename,projection\n" + views)
    for i in range(1, 31):
        for view in (1, 2):
            put(tmp_path / "images" / "images_normalized" / f"{i}_IM-{view}.dcm.png")
    found = {split: read(tmp_path, split) for split in ("train", "validation", "test")}
    assert all(split_of(s.question_id) == split for split, samples in found.items() for s in samples), "as in Open-i's own files"
    samples = [s for samples in found.values() for s in samples]
    assert sorted(int(s.question_id[3:]) for s in samples) == list(range(1, 31)) and {s.answer for s in samples} == {FINDINGS}
    assert all([image.name[-9] for image in s.images] == ["1", "2"] for s in samples), "frontal first"
    assert len(all_images(samples)) == 60 and "1 have no findings, and 0 have findings but no image" in caplog.text
    put(tmp_path / "indiana_projections.csv", "uid,filename\n1,a.png\n")
    with pytest.raises(UserError, match="row 0 of .*indiana_projections.csv has no 'projection'"):
        read(tmp_path)
    (tmp_path / "indiana_projections.csv").unlink()
    with pytest.raises(UserError, match="indiana_projections.csv does not exist"):
        read(tmp_path)


def test_the_tables_and_the_folder_of_files_are_what_an_evaluation_depends_on(tmp_path):
    """Another order of a study's images is another question, though neither its text nor an image has changed."""
    ids = [i for i in range(1, 31) if split_of(f"CXR{i}") == "test"]
    kaggle, openi = tmp_path / "kaggle", tmp_path / "openi"
    put(kaggle / "indiana_reports.csv", REPORTS + "".join(f'{i},n,n,x,y,z,"{FINDINGS}",Normal.\n' for i in ids))
    for i in ids:
        put(openi / "ecgen-radiology" / f"{i}.xml", xml(f"CXR{i}", FINDINGS, f"{i}_1", f"{i}_2"))
        for view in (1, 2):
            put(kaggle / "images" / f"{i}_{view}.png", f"{i} {view}")
            put(openi / "images" / f"{i}_{view}.png", f"{i} {view}")

    def found(root):
        cfg, samples = load_config("configs/eval/iu_xray.py", [f"data.root={root}"]), read(root)
        answers = AnswerSet(samples, [{"question_id": sample.question_id, "text": "x"} for sample in samples])
        return asked.key(Reporter(), cfg, samples, {}, {}), details.tables(cfg, None, answers, Outcome({}, str), {})["SHA-256"]

    def projected(first, second):
        put(kaggle / "indiana_projections.csv", "uid,filename,projection\n" + "".join(f"{i},{i}_1.png,{first}\n{i},{i}_2.png,{second}\n" for i in ids))
        return found(kaggle)

    (one, recorded), (same, _), (other, changed) = (projected(*views) for views in (("Frontal", "Lateral"), ("frontal", "Lateral"), ("Lateral", "Frontal")))
    assert one == same and one.keys() == other.keys() and one != other
    table = str(kaggle / "indiana_projections.csv")
    assert set(recorded) == {"predictions", "questions", table, str(kaggle / "indiana_reports.csv")} and recorded[table] != changed[table]
    before, recorded = found(openi)
    folder = str(openi / "ecgen-radiology")
    assert set(recorded) == {"predictions", "questions", folder}
    put(openi / "ecgen-radiology" / f"{ids[0]}.xml", xml(f"CXR{ids[0]}", FINDINGS, f"{ids[0]}_2", f"{ids[0]}_1"))
    after, changed = found(openi)
    assert before != after and recorded[folder] != changed[folder]


def test_seven_tenths_of_the_studies_are_for_training():
    counts = [sum(split_of(f"CXR{i}") == split for i in range(1, 3956)) for split in ("train", "validation", "test")]
    assert sum(counts) == 3955 and [abs(count / 3955 - share) < 0.02 for count, share in zip(counts, (0.7, 0.1, 0.2), strict=True)] == [True] * 3


@pytest.mark.parametrize("rows, sentence", [
    ([], "has no 'test'"), ({"test": 3}, "has the test 3; a list was expected"), ({"test": [{"id": "CXR1", "image_path": ["a.png"]}]}, "has no 'report'"),
    ({"test": [{"id": "CXR1", "report": "x", "image_path": [4]}]}, "has the image_path 4"),
    ({"test": [{"id": "CXR1", "report": "x", "image_path": ["a.png"]}]}, "a.png does not exist"), (None, "holds neither annotation.json nor")])
def test_mistakes(rows, sentence, tmp_path):
    if rows is not None:
        put(tmp_path / "annotation.json", json.dumps(rows if rows else {}))
    with pytest.raises(UserError, match=sentence):
        read(tmp_path)
    with pytest.raises(UserError, match="data.question is empty|holds neither|has|does not exist"):
        read(tmp_path, question=" ")


class Reporter(StandIn):
    name = "reporter"

    def answers(self, questions, asked, generation, failed):
        assert generation.max_new_tokens == 256
        for i in asked:
            yield i, Answer("The heart is normal in size. No effusion.", "stop")


def test_an_evaluation_of_reports(tmp_path, monkeypatch, capsys):
    published_sets.write(tmp_path, ("iu_xray",), n=8)
    monkeypatch.setattr(eval_parts, "local", lambda args: Reporter())
    words = ["--config", "configs/eval/iu_xray.py", f"--config.data.root={tmp_path / 'iu_xray'}", "--checkpoint", "c", "--workdir", str(tmp_path / "w")]
    assert cli.main([*words, "--control", "image"]) == 0
    metrics = json.loads((tmp_path / "w" / "metrics.json").read_text())
    table = metrics["captions"]
    assert metrics["n_caption"] == 8 and metrics["dataset"] == "iu_xray" and metrics["leakage"]["training_rows"] == 8
    assert table["rouge_l"] == pytest.approx(100 * 2 * 8 / (8 + 12)) and 0 < table["rouge_l_summary"] < 100
    page = (tmp_path / "w" / "report.html").read_text()
    assert "Evaluation on IU X-Ray, test split" in page and "ROUGE-L, package rouge" in page and "sacreBLEU" in page


def test_the_recipe_trains_on_it(tmp_path):
    """The recipe's keys fit the set: its longest sample, two views and a report, fits a row of the small model."""
    published_sets.write(tmp_path, ("iu_xray",))
    cfg = load_config("configs/report.py:small", [f"data.train={tmp_path / 'iu_xray'}"])
    assert len(read_training(cfg.data.train)) == 4 and cfg.max_length == 320 and cfg.epochs == 3
    assert load_config("configs/report.py:v1,13b").loss_weighting == "sample"
    assert planned_length(load_config("configs/report.py"), preset("v15-7b")) == 1250
