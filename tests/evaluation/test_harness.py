"""`scoring=lmms_eval` and `scoring=vlmevalkit`: the rules of both programs, on cases that their own code was run on, and their prompts."""

import json

import pytest

from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.errors import UsageError
from llavamed_jax.evaluation import harness, run
from llavamed_jax.evaluation.scoring import lmms_eval, vlmevalkit
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.utils.files import to_jsonl, write_text
from tests.support.chat_set import SAMPLE


@pytest.mark.parametrize("text, gold, is_right", [
    ("Yes.", "Yes", True), ("yeah", "Yes", True), ("yes, it is", "Yes", False), ("是的", "Yes", True), ("没有", "No", True), ("nope!", "No", True),
    ("Left-Lung (lower)", "left lung", True), ("左肺（上）。", "左肺", True), ("X ray", "X-Ray", True), ("x-ray", "xray", True), ("", "None", False),
    ("none", "None", True), ("(lung)", "", True), ("1,000", "1 000", True), ("lungs", "Lung", False), ("True", "yes", True)])
def test_lmms_eval_compares_normalised_answers(text, gold, is_right):
    assert lmms_eval.is_right(text, gold) is is_right


@pytest.mark.parametrize("text, gold, is_right", [
    ("Yes.", "Yes", True), ("yes, it is", "yes", True), ("yes/no", "Yes", False), ("no; yes", "No", False), ("normal", "No", False), ("no.yes", "No", False),
    ("9,9 no", "No", True), ("yes-or 1,2", "Yes", False), ("no1.5", "No", False), ("<yes>", "Yes", True), ("", "No", False), ("None", "No", False),
    (" Lung\n", "lung", True), ("Lung.", "Lung", False), ("nan", "None", True), ("NA", "None", True), ("none", "None", False), ("", "null", True),
    ("2.0", "2", False)])
def test_vlmevalkit_looks_for_yes_or_no_and_compares_the_rest(text, gold, is_right):
    assert vlmevalkit.is_right(text, gold) is is_right


def samples():
    of = lambda n, question, answer, kind, language="en": VqaSample(n, f"{n}.jpg", question, answer, kind, language=language)
    return [of(1, "Is it normal?", "Yes", "CLOSED"), of(2, "Which organ? ", "Lung", "OPEN"), of(3, "哪个器官？", "左肺", "OPEN", "zh"),
            of(4, "Left or right?", "Left", "CLOSED")]


def config(name="slake", **changes):
    return load_config(f"configs/eval/{name}.py", [f"{key}={value}" for key, value in ({"data.root": "x"} | changes).items()])


@pytest.mark.parametrize("scoring, prompts, right", [
    ("lmms_eval", ["Is it normal?\nAnswer the question using a single word or phrase.", "Which organ?\nAnswer the question using a single word or phrase.",
                   "哪个器官？\n请用一个词或短语回答问题。", "Left or right?\nAnswer the question using a single word or phrase."], [True, True, False, False]),
    ("vlmevalkit", ["Is it normal?", "Which organ? \nAnswer the question using a single word or phrase.",
                    "哪个器官？\nAnswer the question using a single word or phrase.", "Left or right?\nAnswer the question using a single word or phrase."],
     [True, False, False, False])])
def test_questions_have_the_programs_prompts_and_each_answer_its_verdict(scoring, prompts, right):
    kit = harness.Harness(config(scoring=scoring), samples())
    assert [sample.question for sample in kit.asked] == prompts and kit.judge is None
    answers = AnswerSet(kit.asked, [{"question_id": n, "text": text} for n, text in enumerate(["YES", "lung.", "右肺", "left side"], 1)])
    scored = kit.score(answers, "validation")
    assert [line["is_right"] for line in scored.lines] == right and [line["question_id"] for line in scored.lines] == [1, 2, 3, 4]
    assert scored.metrics["accuracy"] == 25 * sum(right) and scored.metrics["closed_accuracy"] == 50
    assert (scored.metrics["n"], scored.metrics["n_closed"], scored.metrics["n_open"]) == (4, 2, 2)


def test_a_set_without_a_rule_is_refused():
    with pytest.raises(UsageError, match="scoring is lmms_eval, which has no rule for pathvqa; slake was expected"):
        harness.Harness(config("pathvqa", scoring="lmms_eval"), samples())


def test_logged_answers_are_scored_and_every_question_is_a_line(tmp_path):
    """Through the path of `eval.py --predictions`."""
    own = run.open_evaluation(config("vqa_rad", **{"data.root": SAMPLE, "data.held_out": "", "scoring": "vlmevalkit"}), tmp_path / "run")
    write_text(tmp_path / "p.jsonl", to_jsonl({"question_id": s.question_id, "prompt": s.question, "text": str(s.answer) if i % 3 else "?"}
                                              for i, s in enumerate(own.samples)))
    metrics = run.score_file(own, tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "run" / "vlmevalkit.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [s.question_id for s in own.samples]
    assert [line["is_right"] for line in lines] == [i % 3 != 0 for i in range(len(lines))]
    assert metrics["vlmevalkit"]["accuracy"] == pytest.approx(100 * sum(line["is_right"] for line in lines) / len(lines))
    assert "As VLMEvalKit (ms-vlmeval 0.0.20) scores" in (tmp_path / "run" / "report.html").read_text()
    assert "all, as VLMEvalKit scores" in own.scorer.summary(metrics)
