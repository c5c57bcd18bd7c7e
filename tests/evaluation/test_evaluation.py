"""Scoring, controls, asking a model, and the command line of `eval.py`."""

import itertools
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llavamed_jax.assistant import LlavaMed
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.cli import eval as cli
from llavamed_jax.config import preset
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.datasets.slake import read_slake
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation import questions, results, run
from llavamed_jax.evaluation.answering import local, resume
from llavamed_jax.evaluation.answering.answerer import Answer, Generation
from llavamed_jax.evaluation.answering.ask import ask, predict
from llavamed_jax.evaluation.report.summary import prompts, summary
from llavamed_jax.evaluation.scoring import controls, score
from llavamed_jax.evaluation.scoring.items import AnswerSet, answer_candidates
from llavamed_jax.evaluation.scoring.predictions import join, read_predictions
from llavamed_jax.evaluation.scoring.strict import is_strictly_right, open_scores
from llavamed_jax.generation import engine
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.utils.files import to_jsonl, write_text

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
CONFIG = str(ROOT / "configs" / "eval" / "vqa_rad.py")


def question(number, answer, kind="CLOSED", image="a.jpg", text="Is it?", **fields):
    return VqaSample(number, Path(image), text, answer, kind, **fields)


def prediction(number, text):
    return {"question_id": number, "text": text}


# --- scoring ---


def test_a_hand_computed_score():
    samples = [
        question(1, "No", image="a.jpg", organ="HEAD", question_type="PRES"),
        question(2, "Yes", image="a.jpg", organ="HEAD", question_type="PRES, SIZE"),
        question(3, "Yes", image="b.jpg", organ="CHEST", question_type="SIZE"),
        question(4, "left lower lobe", "OPEN", image="b.jpg", organ="CHEST", question_type="POS"),
        question(5, "Left lung", "OPEN", image="c.jpg", organ="CHEST", question_type="POS"),
    ]
    texts = {1: "It looks normal.", 2: "Yes, it is.", 3: "no", 4: "left lung left", 5: "The left lung."}
    training = [question("t1", "left lung", "OPEN"), question("t2", "left", "OPEN"), question("t3", "Yes")]
    result = score.score(AnswerSet(samples, [prediction(n, text) for n, text in texts.items()], training))

    assert answer_candidates([*training[::-1], *training]) == ["left", "left lung"], "of open questions, each once"
    paper, strict = result["paper"], result["strict"]
    assert (result["n_open"], result["n_closed"], result["n_images"]) == (2, 3, 3)
    # "normal" holds "no"; "yes it is" holds "yes"; "no" does not hold "yes".
    assert paper["closed_accuracy_yes_no"] == paper["closed_accuracy_substring"] == pytest.approx(200 / 3)
    assert strict["closed_accuracy"] == pytest.approx(100 / 3)
    assert paper["closed_recall"] == pytest.approx(100 / 3)
    assert paper["recall"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert paper["exact_match"] == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert paper["open_accuracy_substring"] == pytest.approx(50)
    assert paper["open_accuracy_candidates"] == pytest.approx(50)  # both answers are nearest to "left lung"
    assert strict["open_exact"] == pytest.approx(50)
    assert strict["open_f1"] == pytest.approx(100 * (2 * 1 / 6 + 1) / 2)  # the second "left" finds no partner
    assert result["baselines"] == {
        "majority_closed": pytest.approx(200 / 3),
        "majority_closed_answer": "yes",
        "constant_yes_no": 100,
    }
    assert set(result["groups"]) == {"question_type", "organ"}  # no modality is stated
    assert result["groups"]["question_type"]["SIZE"]["n_closed"] == 2  # a question of two types counts in both
    assert result["groups"]["organ"]["HEAD"]["closed_accuracy"] == 50
    json.dumps(result, allow_nan=False)


def test_names_are_those_of_the_interface():
    result = score.score(AnswerSet([question(1, "yes")], [prediction(1, "yes")]))
    names = "exact_match f1 precision recall bleu bleu_1 bleu_2 bleu_3 open_accuracy_candidates open_accuracy_substring"
    names += " closed_accuracy_yes_no closed_accuracy_substring closed_recall"
    assert {key for key in result["paper"] if not re.search("_(low|high)$", key)} == set(names.split())
    strict = ["closed_accuracy", "open_exact", "open_f1"]
    assert list(result["strict"]) == [f"{name}{end}" for name in strict for end in ("", "_low", "_high")]


def test_a_class_without_items_is_none_and_not_zero():
    only_closed = score.score(AnswerSet([question(1, "yes")], [prediction(1, "yes")]))
    assert only_closed["strict"]["open_f1"] is None and only_closed["paper"]["bleu"] is None
    assert only_closed["strict"]["closed_accuracy"] == 100
    assert only_closed["strict"]["closed_accuracy_low"] is None, "one image gives no interval"
    only_open = score.score(AnswerSet([question(1, "left", "OPEN")], [prediction(1, "left")]))
    assert only_open["paper"]["closed_recall"] is None and only_open["baselines"]["majority_closed"] is None
    assert only_open["paper"]["open_accuracy_candidates"] is None, "there are no training rows"


def test_a_short_answer_is_the_candidate_and_not_the_reference():
    paper = score.score(AnswerSet([question(1, "left lung", "OPEN")], [prediction(1, "left")]))["paper"]
    assert paper["bleu_1"] == pytest.approx(100 * np.exp(1 - 2)), "every word is right, and the brevity penalty is of two to one"
    assert (paper["precision"], paper["recall"], paper["exact_match"]) == (100, 50, 100)


@pytest.mark.parametrize("text, answer, value", [("The Left.", "left", 100), ("left lung", "left", 0), ("left", "left lung", 0)])
def test_strict_open_answers_are_equal_or_wrong(text, answer, value):
    assert score.score(AnswerSet([question(1, answer, "OPEN")], [prediction(1, text)]))["strict"]["open_exact"] == value


@pytest.mark.parametrize(
    "text, answer, is_right",
    [
        ("Yes", "yes", True),
        ("yes, a mass", "Yes", True),
        ("No.", "no", True),
        ("normal", "no", False),
        ("not at all", "no", False),
        ("there is no mass", "no", False),
        ("left side", "left", False),
        ("The left", "left", True),
        ("", "no", False),
        ("none", "no", False),
    ],
)
def test_strict_closed_accuracy(text, answer, is_right):
    assert is_strictly_right(text, answer) is is_right


@pytest.mark.parametrize(
    "text, answer, value",
    [("left left left", "left left", 4 / 5), ("left left", "left", 2 / 3), ("The left, one", "1 LEFT.", 1), ("", "a", 0), ("", "left", 0)],
)
def test_strict_f1_finds_each_word_as_often_as_both_have_it(text, answer, value):
    assert open_scores(text, answer)[1] == open_scores(answer, text)[1] == pytest.approx(value)


def test_ids_that_do_not_fit_are_one_error_that_lists_them():
    samples = [question(1, "yes"), question(2, "no"), question(3, "no")]
    with pytest.raises(UserError) as error:
        join(samples, [prediction(1, "a"), prediction(1, "b"), prediction(9, "c")])
    text = str(error.value)
    assert "2 without a prediction (2, 3)" in text
    assert "1 predicted more than once (1)" in text and "1 predicted but not asked (9)" in text
    with pytest.raises(UserError, match=r"1 asked more than once \(1\)"):
        join([question(1, "yes"), question(1, "no")], [prediction(1, "a")])
    assert join(samples, [prediction(str(n), f"t{n}") for n in (3, 2, 1)]) == ["t1", "t2", "t3"]


@pytest.mark.parametrize(
    "line, message",
    [
        ("{not json", "line 2 is not valid JSON"),
        ("[1]", 'line 2 is not a prediction; an object with "question_id"'),
        ('{"question_id": 2}', "line 2 is not a prediction; an object"),
        ('{"question_id": 2, "text": 5}', "line 2 is not a prediction; an object"),
    ],
)
def test_bad_prediction_lines_are_named(tmp_path, line, message):
    path = tmp_path / "p.jsonl"
    path.write_text('{"question_id": 1, "text": "a\\u2028b"}\n' + line + "\n")
    with pytest.raises(UserError, match=re.escape(message)):
        read_predictions(path)


def test_predictions_survive_writing_and_reading(tmp_path):
    predictions = [prediction(1, "two\nlines \u2028 and \x85 more"), prediction(2, "«ünïcode»")]
    write_text(tmp_path / "p.jsonl", to_jsonl(predictions))
    assert read_predictions(tmp_path / "p.jsonl") == predictions
    assert [path.name for path in tmp_path.iterdir()] == ["p.jsonl"]
    with pytest.raises(UserError, match="cannot be read"):
        read_predictions(tmp_path / "absent.jsonl")


def test_the_whole_of_vqa_rad(shared):
    root = shared / "data" / "vqa_rad"
    samples, training = read_vqa_rad(root, "test"), read_vqa_rad(root, "train")
    assert len(answer_candidates(training)) == 430
    result = score.score(AnswerSet(samples, [prediction(sample.question_id, sample.answer) for sample in samples], training))
    assert (result["n_open"], result["n_closed"], result["n_images"]) == (179, 272, 203)
    assert result["strict"]["closed_accuracy"] == result["strict"]["open_exact"] == 100
    assert result["strict"]["open_f1"] == result["paper"]["closed_accuracy_substring"] == 100
    # Of the 21 closed answers that are neither yes nor no, run_eval's rule lets three pass: "abnormal" holds a "no".
    assert result["paper"]["closed_accuracy_yes_no"] == pytest.approx(100 * (251 + 3) / 272)
    assert result["baselines"]["majority_closed"] == pytest.approx(100 * 133 / 272)
    assert result["baselines"]["constant_yes_no"] == pytest.approx(100 * 251 / 272)
    assert result["leakage"]["images_in_training"] == 202
    paper = score.leakage(samples, read_vqa_rad(root, "train", "paper"))
    assert paper["training_rows"] == 3064
    assert paper["open_answers_on_same_image_in_training"] > 100 > result["leakage"]["open_answers_on_same_image_in_training"]


def test_slake_scores_its_gold_as_right(shared):
    samples = read_slake(shared / "data" / "slake", "validation")
    result = score.score(AnswerSet(samples, [prediction(sample.question_id, sample.answer) for sample in samples]))
    assert result["strict"]["closed_accuracy"] == result["strict"]["open_exact"] == 100
    assert set(result["groups"]) == {"question_type", "organ", "modality"}


# --- controls ---


def test_exchanged_images_are_a_derangement_of_whole_images():
    samples = [question(n, "yes", image=f"{n % 7}.jpg") for n in range(40)]
    shown = controls.exchanged_images(samples, seed=5)
    mapping = dict(zip((str(sample.image) for sample in samples), (image for image, in shown), strict=True))
    assert all((mapping[str(sample.image)],) == images != (str(sample.image),) for sample, images in zip(samples, shown, strict=True))
    assert sorted(mapping) == sorted(mapping.values())
    assert shown == controls.exchanged_images(samples, seed=5) != controls.exchanged_images(samples, seed=6)
    with pytest.raises(UserError, match="at least 2"):
        controls.exchanged_images([question(1, "yes")], seed=0)


@pytest.mark.parametrize(
    "answer, organ",
    [
        ("Head.", "HEAD"),
        ("The chest, not the head", "CHEST"),
        ("ABDOMEN", "ABD"),
        ("This is the brain.", "HEAD"),
        ("gastrointestinal system", "ABD"),
        ("ahead", None),
        ("", None),
    ],
)
def test_named_organ(answer, organ):
    assert controls.named_organ(answer) == organ
    assert all(controls.named_organ(text) == key for key, text in controls.ORGAN_ANSWERS.items())


def fifteen():
    return [
        question(10 * i + j, "yes", image=f"{i:02}.jpg", organ=("HEAD", "CHEST", "ABD")[i % 3])
        for i in range(15)
        for j in range(2)
    ]


def test_a_perfect_reader_and_a_blind_one():
    samples = fifteen()
    organ_of = {str(sample.image): sample.organ for sample in samples}
    perfect = controls.organ_accuracy(lambda pairs: [controls.ORGAN_ANSWERS[organ_of[image]] for _, (image,) in pairs], samples)
    assert (perfect["n"], perfect["hits"], perfect["accuracy"]) == (15, 15, 100)
    assert perfect["exchanged"] == pytest.approx(100 * 4 / 14) and len(perfect["shifts"]) == 14
    assert perfect["majority"] == pytest.approx(100 / 3)
    blind = controls.organ_accuracy(lambda pairs: ["Head."] * len(pairs), samples)
    assert blind["accuracy"] == pytest.approx(100 / 3) == blind["exchanged"]
    silent = controls.organ_accuracy(lambda pairs: [""] * len(pairs), samples)
    assert silent["accuracy"] == silent["exchanged"] == 0


def test_shifts_equal_asking_every_pair():
    samples = fifteen()
    rng = np.random.default_rng(0)
    images = list(dict.fromkeys(str(sample.image) for sample in samples))
    said = {image: list(controls.ORGAN_ANSWERS.values())[rng.integers(3)] for image in images}
    result = controls.organ_accuracy(lambda pairs: [said[image] for _, (image,) in pairs], samples)
    organ_of = {str(sample.image): sample.organ for sample in samples}
    for shift in range(1, 15):
        asked = [said[images[(i + shift) % 15]] for i in range(15)]
        right = [controls.named_organ(text) == organ_of[image] for text, image in zip(asked, images, strict=True)]
        assert result["shifts"][shift - 1] == pytest.approx(100 * sum(right) / 15)


def test_organs_that_are_not_known():
    with pytest.raises(UserError, match="of None"):
        controls.organ_accuracy(lambda pairs: [], [question(1, "yes", image="a.jpg"), question(2, "yes", image="b.jpg")])


# --- asking a model ---


@dataclass
class FakeCompletion:
    text: str
    finish_reason: str = "stop"


class FakeProcessor:
    """One token a word; an image is four, and its pixels say which path it came from."""

    stop = ()

    def __init__(self):
        self.words, self.paths = [], []

    def for_evaluation(self):
        return self

    def question(self, text, images):
        assert len(images) == 1
        return "<image>\n" + text

    def encode(self, prompt):
        self.words += [word for word in prompt.split() if word not in self.words]
        return [-200 if word == "<image>" else self.words.index(word) for word in prompt.split()]

    def expand(self, row):
        return [token for token_or_image in row for token in ([-200] * 4 if token_or_image == -200 else [token_or_image])]

    def images_uint8(self, paths):
        self.paths += paths
        if "broken.jpg" in paths:
            raise UserError("broken.jpg is no image")
        return np.full((len(paths), 2, 2, 3), self.paths.index(paths[0]), np.uint8)

    def decode(self, tokens):
        return " ".join(self.words[token] for token in tokens)


class FakeModel:
    """Answers with question and image name, so that a test sees which were put together."""

    def __init__(self, max_length=64):
        self.processor, self.engine = FakeProcessor(), SimpleNamespace(max_prompt=max_length, eos=(2,))
        self.asked, self.settings = [], []

    def answer_each(self, prompts, **settings):
        """In pairs, the second of which is finished first."""
        self.settings.append(settings)
        prompts = enumerate(prompts)
        while pair := list(itertools.islice(prompts, 2)):
            yield from reversed([(index, self.answer(*prompt)) for index, prompt in pair])

    def answer(self, ids, images, nth):
        assert len(images) == 1 and list(ids[:4]) == [-200] * 4
        question, path = self.processor.decode(ids[4:]), self.processor.paths[images[0][0, 0, 0]]
        self.asked.append((question, path, nth))
        return FakeCompletion(self.text(question, path))

    def text(self, question, path):
        return f"{question} @ {Path(path).stem}"


def test_answers_come_back_in_order_and_images_are_asked_together():
    model = FakeModel()
    questions = [(f"q{i // 2}", (f"/x/{'abc'[i % 3]}.jpg",)) for i in range(25)]
    answers = ask(local.LocalModel(model, "m"), questions, Generation(max_new_tokens=5, batch_size=4, seed=3))
    assert [answer.text for answer in answers] == [f"{text} @ {Path(image).stem}" for text, (image,) in questions]
    assert model.settings == [dict(max_new_tokens=5, temperature=0.0, seed=3)]
    images = [image for _, image, _ in model.asked]
    assert [image for image, _ in itertools.groupby(images)] == [f"/x/{c}.jpg" for c in "abc"]
    assert sorted(model.processor.paths) == [f"/x/{c}.jpg" for c in "abc"], "an image is read once"
    twice = [("q", ("a.jpg",)), ("q", ("b.jpg",)), ("q", ("a.jpg",))]
    ask(local.LocalModel(model, "m"), twice, Generation())
    assert {("q", "a.jpg", 0), ("q", "a.jpg", 1), ("q", "b.jpg", 0)} == set(model.asked[25:]), "equal questions draw apart"


def test_images_are_read_ahead_but_not_all():
    processor = FakeProcessor()
    images = local.read_ahead(processor, [(f"{i}.jpg",) for i in range(100)])
    next(images)
    assert 1 < len(processor.paths) <= 12
    images.close()
    assert len(processor.paths) <= 12, "what nobody waits for any more is not read"


@pytest.mark.parametrize("with_partial", [True, False])
def test_a_question_that_cannot_be_answered_fails_alone(tmp_path, with_partial):
    class Failing(FakeModel):
        def answer(self, ids, images, nth):
            answer = super().answer(ids, images, nth)
            return UserError("the model computed NaN or infinite values") if answer.text.startswith("why") else answer

    questions = [("what", ("a.jpg",)), ("what", ("broken.jpg",)), ("why", ("a.jpg",)), ("when", ("b.jpg",))]
    kept = resume.Partial(tmp_path / "p", {}) if with_partial else None
    with pytest.raises(UserError, match="^2 of 4 questions could not be answered; the first, 'what' about broken.jpg: broken.jpg is no im"):
        ask(local.LocalModel(Failing(), "m"), questions, Generation(), partial=kept)
    if with_partial:
        model = FakeModel()
        found = resume.Partial(tmp_path / "p", {}).answers
        assert {i: answer.text for i, answer in found.items()} == {0: "what @ a", 3: "when @ b"}
        questions[1] = ("what", ("mended.jpg",))
        answers = ask(local.LocalModel(model, "m"), questions, Generation(), partial=kept)
        assert [answer.text for answer in answers] == ["what @ a", "what @ mended", "why @ a", "when @ b"] and len(model.asked) == 2


def test_beams_of_which_one_cannot_be_answered(capsys):
    class Searching(FakeModel):
        def generate_tokens(self, rows, images, **settings):
            found = [self.answer(ids, pixels, 0).text for ids, pixels in zip(rows, images)]
            if any("why" in text for text in found):
                raise UserError("request 1: the model computed NaN or infinite values")
            return [self.processor.encode(text) for text in found]

    questions, failed = [("what", ("a.jpg",)), ("why", ("a.jpg",)), ("when", ("b.jpg",))], {}
    model = Searching()
    found = dict(local.LocalModel(model, "m").answers(questions, range(3), Generation(num_beams=2, batch_size=3), failed))
    assert {i: answer.text for i, answer in found.items()} == {0: "what @ a", 2: "when @ b"} and list(failed) == [1]


def test_long_prompts_are_cut_with_a_counted_warning(capsys):
    model = FakeModel(max_length=8)
    long = "one two three four five six"
    answers = ask(local.LocalModel(model, "m"), [("short", ("a.jpg",)), (long, ("a.jpg",)), (long, ("b.jpg",))], Generation(max_new_tokens=2))
    assert [answer.tokens_cut for answer in answers] == [0, 2, 2]
    assert answers[0].text == "short @ a"
    assert answers[1] == Answer("one two three four @ a", "stop", 2), "the end is lost, as in the original"
    assert "2 of 3 prompts were longer than the model accepts and were cut at the end, as in the original (4 tokens in all)" in capsys.readouterr().err


@pytest.mark.parametrize("length, text, images, has_question, num_seen", [
    (9, "why so", 2, True, 2), (8, "why so", 2, False, 2), (7, "why so", 2, False, 1), (4, "why", 1, False, 1), (5, "why not", 1, True, 1),
    (8, "<image_1>: <image>\n<image_2>: <image>\nwhy", 2, False, 1), (11, "<image_1>: <image>\n<image_2>: <image>\nwhy so", 2, True, 2),
    (8, "why <image> or <image> is", 2, True, 1), (20, "why", 2, True, 2)])  # fmt: skip
@pytest.mark.parametrize("beams", [1, 2])
def test_a_question_that_was_cut_away_is_counted(length, text, images, has_question, num_seen, beams, capsys):
    """What stands behind the images is lost first; the names of images are no question."""
    shown = []

    class Several(FakeModel):
        def answer(self, ids, images, nth):
            shown.append((len(images), list(ids).count(-200)))
            return FakeCompletion("A")

        def generate_tokens(self, rows, images, **settings):
            return [self.processor.encode(self.answer(*each, 0).text) for each in zip(rows, images)]

    model = Several(length)
    model.processor.question = lambda text, paths: text if "<image>" in text else "<image>\n" * len(paths) + text
    samples = [replace(question(1, "A", text=text, image="a.jpg"), is_placed=True, more_images=tuple(map(Path, ["b.jpg"] * (images - 1))))]
    (line,) = predict(local.LocalModel(model, "m"), samples, Generation(num_beams=beams))
    assert line["metadata"].get("has_question", True) is has_question
    assert shown == [(num_seen, 4 * num_seen)] or length < 4
    result = score.score(AnswerSet(samples, [line]))
    assert (result["n_prompts_cut"], result["n_without_question"]) == ("prompt_tokens_cut" in line["metadata"], not has_question)
    said = capsys.readouterr().err
    assert ("the model saw no word of 1 of 1 questions" in said) is not has_question
    assert list(prompts({})) == [] and len(list(prompts(result))) == result["n_prompts_cut"] + result["n_without_question"]


def test_predictions_have_the_keys_of_the_original(capsys):
    samples = [question(1, "yes", text=" <image>\nIs it? "), question(2, "no", image="b.jpg", text="And now?")]
    first = predict(local.LocalModel(FakeModel(), "m"), samples, Generation())
    assert list(first[0]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert first[0]["prompt"] == "Is it?" and first[0]["text"] == "Is it? @ a"
    assert all(re.fullmatch("[2-9A-HJ-NP-Za-km-z]{22}", each["answer_id"]) for each in first)
    assert first[0]["answer_id"] != first[1]["answer_id"]
    assert first == predict(local.LocalModel(FakeModel(), "m"), samples, Generation())
    assert "questions: 2 of 2" in capsys.readouterr().err, "in a pipe progress is plain lines"


@pytest.mark.parametrize(
    "path, name",
    [
        ("/models/llava-med-v1.5", "llava-med-v1.5"),
        ("runs/vqa/", "vqa"),
        ("runs/vqa/checkpoints/40", "vqa_40"),
        ("x/llava/checkpoint-100", "llava_checkpoint-100"),
        ("microsoft/llava-med@main", "llava-med"),
        ("preset:small", "preset:small"),
    ],
)
def test_model_name(path, name):
    assert local.model_name(path) == name


# --- the program ---


def config(**changes):
    from llavamed_jax.cli.common import load_config

    defaults = {"data.root": SAMPLE, "data.held_out": SAMPLE / "held_out.json"} | changes
    return load_config(f"{CONFIG}:demo", [f"{key}={value}" for key, value in defaults.items()])


class OrganModel(FakeModel):
    """Names the organ it is shown, says yes to all else."""

    organs = {Path(sample.image).name: sample.organ for sample in read_vqa_rad(SAMPLE, "all")}

    def text(self, question, path):
        return controls.ORGAN_ANSWERS[self.organs[Path(path).name]] if question == controls.ORGAN_QUESTION else "Yes"


def test_an_evaluation_from_start_to_end(tmp_path):
    evaluation = run.open_evaluation(config(), tmp_path / "out")
    result = run.evaluate(evaluation, local.LocalModel(OrganModel(), "demo"), {"checkpoint": "runs/demo"}, ["image"])
    names = {"predictions.jsonl", "predictions_control_image.jsonl", "predictions_control_noise.jsonl", "metrics.json", "report.html",
             "tensorboard"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == result
    assert (result["split"], result["n_images"]) == ("held_out", 15)
    assert result["organ"]["hits"] == 15 and result["organ"]["exchanged"] == pytest.approx(100 * 4 / 14)
    # The answers do not depend on the image, so exchanging changes nothing, and the paired difference is exactly 0.
    assert result["control"]["strict"] == result["strict"]
    assert result["control"]["difference"]["closed_accuracy"] == result["control"]["difference"]["closed_accuracy_high"] == 0
    assert result["leakage"]["images_in_training"] == 0, "held-out images are in no training row"
    shown = read_predictions(tmp_path / "out" / "predictions_control_image.jsonl")
    own = read_predictions(tmp_path / "out" / "predictions.jsonl")
    assert all(a["metadata"]["image"] != b["metadata"]["image"] for a, b in zip(shown, own, strict=True))
    text = summary(result)
    assert "exchanged" in text and "noise" in text and "15 of 15" in text


def test_held_out_images_are_asked_and_never_trained_on():
    samples, training = questions.load_samples("vqa_rad", SAMPLE, "test", "clean", SAMPLE / "held_out.json")
    held_out = set(json.loads((SAMPLE / "held_out.json").read_text())["images"])
    assert {Path(sample.image).name for sample in samples} == held_out
    assert not held_out & {Path(sample.image).name for sample in training}
    assert len(samples) + len(training) == len(read_vqa_rad(SAMPLE, "all"))


def test_scoring_existing_predictions_loads_no_model(tmp_path, capsys):
    samples, _ = questions.load_samples("vqa_rad", SAMPLE, "test", "clean")
    predictions = [prediction(sample.question_id, "yes") for sample in samples]
    write_text(tmp_path / "p.jsonl", to_jsonl(predictions))
    argv = ["--config", CONFIG, f"--config.data.root={SAMPLE}", "--predictions", str(tmp_path / "p.jsonl")]
    for name in ("a", "b"):
        assert cli.main([*argv, "--workdir", str(tmp_path / name)]) == 0
    out = capsys.readouterr().out
    assert "closed accuracy, strict" in out and f"report: {tmp_path / 'a' / 'report.html'}" in out
    first, second = ((tmp_path / name / "metrics.json").read_text() for name in ("a", "b"))
    assert first == second
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"metrics.json", "report.html", "tensorboard"}


@pytest.mark.parametrize(
    "argv, status, message",
    [
        (["--workdir", "w", "--predictions", "p"], 2, "--config"),
        (["--config", CONFIG, "--workdir", "w"], 2, "--checkpoint --endpoint --predictions"),
        (["--config", CONFIG, "--workdir", "w", "--checkpoint", "c", "--predictions", "p"], 2, "not allowed with"),
        (["--config", CONFIG, "--workdir", "w", "--checkpoint", "c", "--control", "text"], 2, "--control"),
        (["--config", CONFIG, "--workdir", "w", "--predictions", "p", "--control", "image"], 2, "--control needs a model"),
        (["--config", CONFIG, "--workdir", "w", "--predictions", "p", "--dtype", "float32"], 2, "--dtype needs a model"),
        (["--config", CONFIG, "--workdir", "w", "--predictions", "p", "--nonsense"], 2, "--nonsense"),
        (["--config", CONFIG, "--workdir", "w", "--predictions", "p"], 2, "data.root is empty"),
        (["--config", "absent.py", "--workdir", "w", "--predictions", "p"], 2, "absent.py does not exist"),
        (["--config", f"{CONFIG}:v2", "--workdir", "w", "--predictions", "p"], 2, "'v2'"),
        (["--config", CONFIG, "--config.data.rot=x", "--workdir", "w", "--predictions", "p"], 2, "data.rot"),
        (["--config", CONFIG, "--config.protocol=dirty", "--workdir", "w", "--predictions", "p"], 2, "'dirty'"),
        (["--config", CONFIG, "--config.generation.batch_size=0", "--workdir", "w", "--predictions", "p"], 2, "batch_size is 0"),
        (["--config", CONFIG, "--config.data.name=pathvqx", "--workdir", "w", "--predictions", "p"], 2, "'pathvqx'"),
        (
            ["--config", CONFIG, f"--config.data.root={SAMPLE}", "--config.data.split=validation", "--workdir", "w", "--predictions", "p"],
            2,
            "train or test",
        ),
        (["--config", CONFIG, f"--config.data.root={ROOT / 'tests'}", "--workdir", "w", "--predictions", "p"], 1, "tests"),
        (["--config", CONFIG, f"--config.data.root={SAMPLE}", "--workdir", "w", "--predictions", "p.jsonl"], 2, "p.jsonl"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(argv, status, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == status
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_image_is_named(tmp_path):
    root = tmp_path / "rad"
    shutil.copytree(SAMPLE, root)
    victim = next((root / "images").iterdir())
    victim.unlink()
    with pytest.raises(UserError, match=victim.name):
        questions.load_samples("vqa_rad", root, "test", "clean")


def test_a_list_of_held_out_images_that_does_not_fit(tmp_path):
    path = tmp_path / "held_out.json"
    path.write_text('{"images": ["nowhere.jpg"]}')
    with pytest.raises(UserError, match="names images that no row"):
        questions.load_samples("vqa_rad", SAMPLE, "test", "clean", path)
    path.write_text("[]")
    with pytest.raises(UserError, match="holds a JSON list; an object was expected"):
        questions.load_samples("vqa_rad", SAMPLE, "test", "clean", path)
    with pytest.raises(UsageError, match="slake"):
        questions.load_samples("slake", SAMPLE, "test", "clean", path)


def test_a_failed_write_leaves_nothing_under_the_final_name(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        write_text(tmp_path / "metrics.json", "{}")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def tiny_model():
    """A model of random weights with the sample's tokenizer, small enough to compile in seconds."""
    small = preset("small")
    vision = replace(small.vision, hidden_size=32, intermediate_size=64, num_layers=3, num_heads=2, image_size=28, patch_size=14)
    decoder = replace(
        small.decoder, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, vocab_size=1024
    )
    cfg = replace(small, vision=vision, decoder=decoder, max_length=100)
    tokenizer = Tokenizer.load(SAMPLE / "tokenizer.model")
    assert tokenizer.vocab_size <= 1024
    return LlavaMed(cfg, load_params(random_checkpoint(cfg)), Processor(cfg, tokenizer))


@pytest.fixture
def one_bucket(monkeypatch):
    """Prompts of all lengths are run by one program, alone or eight at a time: tests/generation looks at the others."""
    monkeypatch.setattr(engine, "bucket", lambda length: 128)
    monkeypatch.setattr(engine, "cache_length", lambda length: 256)
    monkeypatch.setattr(engine, "batch_size", lambda number, length=1, shards=1: 1 if number == 1 else 8)


def test_a_real_model_of_random_weights_answers(tiny_model, one_bucket, tmp_path, monkeypatch, capsys):
    """The whole way through tower, projector, decoder and cache; an answer alone is the same as in a batch."""
    monkeypatch.setattr(cli.common, "load_assistant", lambda args: tiny_model)
    monkeypatch.chdir(ROOT)
    held_out = tmp_path / "two.json"
    held_out.write_text(json.dumps({"images": json.loads((SAMPLE / "held_out.json").read_text())["images"][:2]}))
    argv = ["--config", f"{CONFIG}:demo", f"--config.data.held_out={held_out}", "--config.generation.max_new_tokens=4"]
    for batch_size, control in ((1, []), (8, ["--control", "image"])):
        options = ["--workdir", str(tmp_path / f"b{batch_size}"), f"--config.generation.batch_size={batch_size}"]
        assert cli.main([*argv, *options, "--checkpoint", "runs/x", *control]) == 0
    first, second = (read_predictions(tmp_path / name / "predictions.jsonl") for name in ("b1", "b8"))
    assert first == second and len({each["text"] for each in first}) > 2
    exchanged = read_predictions(tmp_path / "b8" / "predictions_control_image.jsonl")
    assert [each["text"] for each in exchanged] != [each["text"] for each in second], "the image must matter"
    metrics = json.loads((tmp_path / "b8" / "metrics.json").read_text())
    assert metrics["organ"]["n"] == 2 and metrics["control"]["kind"] == "image"
    assert "are incomplete" in capsys.readouterr().err


def test_a_prompt_too_long_for_a_real_model_is_answered_from_its_beginning(tiny_model, one_bucket, capsys):
    image = str(next((SAMPLE / "images").iterdir()))
    generation = Generation(max_new_tokens=3)
    long = "Is the heart enlarged? " * 100
    answers = ask(local.LocalModel(tiny_model, "m"), [(long, (image,)), (long + "Is it not?", (image,)), ("Why?", (image,))], generation)
    assert answers[0].text == answers[1].text, "what differs between the two was cut"
    assert answers[1].tokens_cut > answers[0].tokens_cut > 0 == answers[2].tokens_cut
    assert "2 of 3 prompts were longer than" in capsys.readouterr().err
