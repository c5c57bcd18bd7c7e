"""Predictions in a file are answers to the questions that are asked: their prompts, images and controls are compared, not ids alone."""

import json
from pathlib import Path

import pytest
from PIL import Image

from llavamed_jax.cli import eval as cli
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering.answerer import Answer, Generation
from llavamed_jax.evaluation.answering.ask import predict
from llavamed_jax.evaluation.questions import questions_hash
from llavamed_jax.evaluation.scoring import score
from llavamed_jax.evaluation.scoring.controls import exchanged_images
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.predictions import check_asked, image_names
from llavamed_jax.utils.files import to_jsonl
from tests.support.answerers import StandIn

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
SAMPLES = read_vqa_rad(SAMPLE, "test")


def question(number, image="a.jpg", text="Is it?", kind="CLOSED", **fields):
    return VqaSample(number, Path(image), text, "yes", kind, **fields)


def line(number, **fields):
    return {"question_id": number, "text": "yes", **fields}


class Yes(StandIn):
    """Answers yes to everything."""

    name = "yes"

    def answers(self, questions, asked, generation, failed):
        yield from ((i, Answer("yes", "stop")) for i in asked)


def predictions(samples, shown=None, control=None):
    return predict(Yes(), samples, Generation(), shown, control=control)


def evaluate(workdir, *argv):
    config = str(ROOT / "configs" / "eval" / "vqa_rad.py")
    return cli.main(["--config", config, f"--config.data.root={SAMPLE}", "--workdir", str(workdir), *map(str, argv)])


# What may be changed in a file of our own answers -> the sentence that says so.
CHANGES = {
    "a prompt": (lambda each: each | {"prompt": "Is there a fracture?"},
                 "1 answer another prompt (question {id}: 'Is there a fracture?', not"),
    "a negation": (lambda each: each | {"prompt": each["prompt"].replace("the ", "no ").replace("?", " not?")},
                   "1 answer another prompt"),
    "an empty prompt": (lambda each: each | {"prompt": ""}, "1 answer another prompt (question {id}: ''"),
    "an image": (lambda each: each | {"metadata": each["metadata"] | {"image": "other.jpg"}},
                 "1 are about another image (question {id}: 'other.jpg'"),
    "an image beside": (lambda each: {key: each[key] for key in ("question_id", "text")} | {"image": "x/other.jpg"},
                        "about another image"),
    "a control": (lambda each: each | {"metadata": {"control": "noise"}}, "1 belong to a control (question {id}: 'noise'"),
}  # fmt: skip


@pytest.mark.parametrize("which", ["--predictions", "--against"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_line_that_answers_something_else_is_refused(change, which, tmp_path, capsys):
    own = predictions(SAMPLES)
    capsys.readouterr()
    (tmp_path / "good.jsonl").write_text(to_jsonl(own))
    alter, sentence = CHANGES[change]
    (tmp_path / "bad.jsonl").write_text(to_jsonl([alter(own[0]), *own[1:]]))
    files = ("bad.jsonl", "good.jsonl") if which == "--predictions" else ("good.jsonl", "bad.jsonl")
    assert evaluate(tmp_path / "w", "--predictions", tmp_path / files[0], "--against", tmp_path / files[1]) == 1
    error = capsys.readouterr().err
    assert f"do not answer the {len(SAMPLES)} questions" in error and sentence.format(id=own[0]["question_id"]) in error
    assert error.startswith("error: ") and error.count("\n") == 1 and not (tmp_path / "w").exists()


def test_lines_that_answer_the_questions_are_taken_without_a_word(tmp_path, capsys):
    (tmp_path / "good.jsonl").write_text(to_jsonl(predictions(SAMPLES)))
    capsys.readouterr()
    assert evaluate(tmp_path / "w", "--predictions", tmp_path / "good.jsonl", "--against", tmp_path / "good.jsonl") == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("judge", [[], ["--config.judge.model=tiny"]], ids=["no judge", "judge"])
def test_a_dry_run_checks_predictions_as_a_run_does(judge, tmp_path, capsys):
    """Ids, prompts, images, controls, files that are none, and other answers in the workdir; nothing is written."""
    own = predictions(SAMPLES)
    bad = {name: [alter(own[0]), *own[1:]] for name, (alter, _) in CHANGES.items()}
    bad |= {"another id": [own[0] | {"question_id": "not there"}, *own[1:]], "a missing line": own[1:], "no line": [],
            "an id twice": [*own, own[0]]}
    capsys.readouterr()
    for lines in list(bad.values())[-4 if judge else 0:]:
        (tmp_path / "bad.jsonl").write_text(to_jsonl(lines))
        command = ["--predictions", tmp_path / "bad.jsonl", *judge]
        assert evaluate(tmp_path / "w", *command, "--dry_run") == 1
        dry = capsys.readouterr().err
        assert dry.startswith("error: ") and dry.count("\n") == 1 and not (tmp_path / "w").exists()
        assert evaluate(tmp_path / "w", *command) == 1
        assert capsys.readouterr().err == dry
    assert evaluate(tmp_path / "w", "--predictions", tmp_path / "none.jsonl", *judge, "--dry_run") == 2
    assert "none.jsonl" in capsys.readouterr().err
    (tmp_path / "good.jsonl").write_text(to_jsonl(own))
    assert evaluate(tmp_path / "w", "--predictions", tmp_path / "good.jsonl", *judge, "--dry_run") == 0
    out, err = capsys.readouterr()
    assert ("open answers" if judge else f"{len(SAMPLES)} questions; nothing is judged") in out and not err
    assert not (tmp_path / "w").exists()
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "predictions.jsonl").write_text(to_jsonl([own[0] | {"text": "other"}, *own[1:]]))
    assert evaluate(tmp_path / "w", "--predictions", tmp_path / "good.jsonl", *judge, "--dry_run") == 2
    assert "holds predictions.jsonl of another" in capsys.readouterr().err


def test_a_dry_run_warns_of_lines_that_state_only_ids(tmp_path, capsys):
    (tmp_path / "ids.jsonl").write_text(to_jsonl([line(sample.question_id) for sample in SAMPLES]))
    assert evaluate(tmp_path / "w", "--predictions", tmp_path / "ids.jsonl", "--dry_run") == 0
    assert f"{len(SAMPLES)} of {len(SAMPLES)} lines" in capsys.readouterr().err and not (tmp_path / "w").exists()


@pytest.mark.parametrize("which", ["--predictions", "--against", "--dry_run"])
@pytest.mark.parametrize("control", ["image", None])
def test_answers_about_exchanged_images_are_no_answers(control, which, tmp_path, capsys):
    """By what the file says of the control, and where it says nothing by the image's name."""
    shown = exchanged_images(SAMPLES, 0)
    (tmp_path / "own.jsonl").write_text(to_jsonl(predictions(SAMPLES)))
    (tmp_path / "exchanged.jsonl").write_text(to_jsonl(predictions(SAMPLES, shown, control)))
    flags = {"--predictions": ["--predictions", "exchanged.jsonl"],
             "--against": ["--predictions", "own.jsonl", "--against", "exchanged.jsonl"],
             "--dry_run": ["--predictions", "own.jsonl", "--against", "exchanged.jsonl",
                           "--dry_run"]}[which]  # fmt: skip
    assert evaluate(tmp_path / "w", *(tmp_path / word if word.endswith(".jsonl") else word for word in flags)) == 1
    title = "belong to a control" if control else "are about another image"
    assert f"{len(SAMPLES)} {title} (question {SAMPLES[0].question_id}: " in capsys.readouterr().err


def test_slakes_images_have_one_name_and_are_told_apart(tmp_path):
    """All of SLAKE's images are called source.jpg; what is stated is as much of the path as tells them apart."""
    samples = [question(n, f"/data/imgs/xmlab{n}/source.jpg") for n in range(3)]
    own, exchanged = predictions(samples), predictions(samples, exchanged_images(samples, 0))
    assert [each["metadata"]["image"] for each in own] == [f"xmlab{n}/source.jpg" for n in range(3)]
    assert check_asked(samples, own) == dict.fromkeys(check_asked(samples, own), 0)
    with pytest.raises(UserError,
                       match="3 are about another image .question 0: 'xmlab[12]/source.jpg', not 'xmlab0/source.jpg'"):
        check_asked(samples, exchanged)
    for image in ("source.jpg", "imgs/xmlab1/source.jpg", "/elsewhere/imgs/xmlab1/source.jpg",
                  "imgs\\xmlab1\\source.jpg"):
        check_asked(samples[1:2], [line(1, image=image)])
    hashes = {questions_hash([question(0, f"imgs/{name}/source.jpg"),
                                   question(1, "imgs/x/source.jpg")]) for name in "ab"}
    assert len(hashes) == 2, "which of two images is asked about is part of the test"


def test_names_are_as_long_as_they_must_be():
    paths = ["/a/b/1.jpg", "/a/c/1.jpg", "/x/b/1.jpg", "/a/b/2.jpg", "1.jpg"]
    assert list(image_names(paths).values()) == ["a/b/1.jpg", "c/1.jpg", "x/b/1.jpg", "2.jpg", "1.jpg"]
    assert image_names(["1.jpg", "1.jpg"]) == {"1.jpg": "1.jpg"} and image_names([]) == {}
    assert image_names(["a.dcm#frame=1", "a.dcm#frame=2"])["a.dcm#frame=1"] == "a.dcm#frame=1"


@pytest.mark.parametrize("prompt, counts", [
    ("<image>\nIs  it? ", 0), ("IS IT?", 0), ("Is it?\n<image>", 0), ("Answer yes or no. Is it?", 1),
    ("Is it? Options: [yes, no]", 1)])
def test_a_prompt_may_have_more_than_the_question(prompt, counts):
    """Blanks, case and the image's marker do not count; a frame around the question is counted in a warning."""
    assert check_asked([question(1)], [line(1, prompt=prompt)])["have a prompt with more text than the question"] == counts


def test_multiple_choice_may_be_asked_elsewhere_without_its_options():
    sample = question(1, text="Where?\nA. left\nB. right\nAnswer with the letter.", kind="CHOICE",
                      options=("left", "right"))
    check_asked([sample], [line(1, prompt="Where?")])
    for prompt in ("What?", "", " <image>\n"):
        with pytest.raises(UserError, match="another prompt"):
            check_asked([sample], [line(1, prompt=prompt)])
    for kind in ("OPEN", "CLOSED"):  # half a question is another one
        with pytest.raises(UserError, match="another prompt"):
            check_asked([question(1, text="Is it large or small?", kind=kind)], [line(1, prompt="Is it large")])


def test_an_image_out_of_parquet_has_a_name_of_ours():
    sample = question(1, f"images/{'0a' * 16}.jpg")
    check_asked([sample], [line(1, image="test_0001.jpg")])
    with pytest.raises(UserError, match="another image"):
        check_asked([sample], [line(1, image=f"{'0b' * 16}.jpg")])


@pytest.mark.parametrize("fields",
                         [{}, {"prompt": None}, {"prompt": 5}, {"metadata": None}, {"metadata": []}, {"metadata": {}},
                          {"image": None},
                                    {"image": ["a.jpg"]}, {"image": "data:image/png;base64,AAAA"},
                          {"metadata": {"image": 3}}])  # fmt: skip
def test_what_a_line_does_not_state_is_counted(fields):
    counts = check_asked([question(1)], [line(1, **fields)])
    assert counts["state no prompt and are joined by question_id"] == counts["state no image"] == 1


def test_lines_with_ids_alone_are_scored_with_a_warning(tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line(sample.question_id)) + "\n" for sample in SAMPLES))
    assert evaluate(tmp_path / "w", "--predictions", tmp_path / "p.jsonl", "--against", tmp_path / "p.jsonl") == 0
    n = len(SAMPLES)
    warning = (f"warning: {tmp_path / 'p.jsonl'}: {n} of {n} lines state no prompt and are joined by question_id; "
               f"{n} of {n} lines state no image\n")
    assert capsys.readouterr().err == 2 * warning


def test_a_data_set_whose_ids_match_is_another(tmp_path, capsys):
    """Two sets of rows numbered from 1, about other images."""
    for name, text in (("one", "Is it?"), ("two", "What is it?")):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / f"{name}.png")
        rows = [{"id": n, "image": f"{name}.png", "answer_type": "OPEN",
                 "conversations": [{"from": "human", "value": f"{text} {n}"},
                                   {"from": "gpt", "value": "x"}]} for n in range(1, 4)]
        (tmp_path / name / "test.json").write_text(json.dumps(rows))
    samples = [question(n, tmp_path / "two" / "two.png", f"What is it? {n}") for n in range(1, 4)]
    (tmp_path / "two.jsonl").write_text(to_jsonl(predictions(samples)))
    argv = ["--config", str(ROOT / "configs" / "eval" / "llava_med.py"), "--predictions", str(tmp_path / "two.jsonl"),
            "--workdir"]
    assert cli.main([*argv, str(tmp_path / "a"), f"--config.data.root={tmp_path / 'one'}"]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "3 answer another prompt (question 1: 'What is it? 1', not 'Is it? 1'); 3 are about another image" in error
    assert cli.main([*argv, str(tmp_path / "b"), f"--config.data.root={tmp_path / 'two'}"]) == 0


def test_a_score_is_of_answers_to_its_questions():
    """Whoever calls it; answers that say that they are of a control are scored as one."""
    samples = [question(n, f"{n}.jpg", f"Is it {n}?") for n in range(3)]
    own = predictions(samples)
    assert score.score(AnswerSet(samples, own))["n_closed"] == 3
    assert score.score(AnswerSet(samples, predictions(samples, ["x.jpg"] * 3, "noise")))["n_closed"] == 3
    for change in ({"prompt": "Is it 7?"}, {"metadata": {"image": "x.jpg"}}):
        with pytest.raises(UserError, match="do not answer the 3 questions: 1 "):
            score.score(AnswerSet(samples, [own[0] | change, *own[1:]]))
