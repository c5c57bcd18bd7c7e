"""What an evaluation is made of: which predictions the control scores, which rows a baseline comes from, which settings
reach the model. Each assertion fails for one way to mix them up."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavamed_jax.cli.common import load_config
from llavamed_jax.data.datasets import VqaSample, read_vqa_rad
from llavamed_jax.data.processor import Processor
from llavamed_jax.data.tokenizer import Tokenizer
from llavamed_jax.evaluation import controls, run, scoring, vqa

ROOT = Path(__file__).resolve().parent.parent
SAMPLE = ROOT / "samples" / "vqa_rad"
EOS = 2


def evaluation(workdir, arguments="", **changes):
    values = {"data.root": SAMPLE} | changes
    return run.Evaluation(load_config(f"{ROOT / 'configs/eval/vqa_rad.py'}{arguments}", [f"{k}={v}" for k, v in values.items()]), workdir)


class Reader:
    """Gives the gold answer where it sees the question's own image, and an answer that is never right elsewhere."""

    def __init__(self, samples, max_prompt=10**6, tokens=()):
        self.gold = {(sample.question.strip(), Path(sample.image).name): str(sample.answer) for sample in samples}
        tokenizer = Tokenizer.load(SAMPLE / "tokenizer.model")
        self.processor = Processor(None, tokenizer, "v1.5:mistral_instruct", image_size=28)
        self.engine = SimpleNamespace(max_prompt=max_prompt, eos=EOS)
        self.settings, self.organ_settings, self.tokens = [], [], list(tokens)

    def generate(self, conversations, **settings):
        parts = [messages[0]["content"] for messages in conversations]
        is_organ = parts[0][1]["text"] == controls.ORGAN_QUESTION
        (self.organ_settings if is_organ else self.settings).append(settings)
        keys = [(text["text"], Path(image["image"]).name) for image, text in parts]
        return [SimpleNamespace(text=self.gold.get(key, "a kangaroo"), finish_reason="stop") for key in keys]

    def generate_tokens(self, rows, images, **settings):
        self.settings.append(settings)
        return [self.tokens for _ in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation with its control, of a model that is right exactly where it sees the image that is asked about."""
    workdir = tmp_path_factory.mktemp("evaluation")
    job = evaluation(workdir, ":demo", **{"data.held_out": SAMPLE / "held_out.json", "generation.temperature": 0.7,
                                          "generation.max_new_tokens": 11, "generation.batch_size": 5, "seed": 3})
    model = Reader(job.samples)
    return job, model, job.run(model, "runs/x", with_control=True), workdir


def test_the_control_scores_its_own_answers(finished):
    job, _, result, workdir = finished
    exchanged = scoring.read_predictions(workdir / "predictions_control_image.jsonl")
    own = scoring.read_predictions(workdir / "predictions.jsonl")
    assert {each["text"] for each in exchanged} == {"a kangaroo"} and "a kangaroo" not in {each["text"] for each in own}
    for family in ("strict", "paper"):
        assert result["control"][family] == scoring.score(job.samples, exchanged, job.training, seed=3)[family]
    assert result["strict"]["closed_accuracy"] == result["strict"]["open_exact"] == 100
    assert result["control"]["strict"]["closed_accuracy"] == result["control"]["strict"]["open_exact"] == 0
    assert result["control"]["paper"]["closed_recall"] == 0 < result["paper"]["closed_recall"]


def test_the_difference_is_predictions_minus_control(finished):
    *_, result, _ = finished
    difference = result["control"]["difference"]
    assert difference["closed_accuracy"] == difference["closed_accuracy_low"] == difference["open_exact"] == 100
    samples = [VqaSample(n, Path(f"{n}.jpg"), "?", "yes", "CLOSED") for n in range(4)]
    first, second = ([{"question_id": n, "text": text} for n, text in enumerate(texts)] for texts in (["yes"] * 3 + ["no"], ["no"] * 4))
    assert scoring.difference(samples, first, second, 0)["closed_accuracy"] == 75
    assert scoring.difference(samples, second, first, 0)["closed_accuracy"] == -75


def test_settings_of_the_config_reach_the_model(finished):
    job, model, _, _ = finished
    batches = -(-len(job.samples) // 5)
    assert len(model.settings) == 2 * batches and model.engine.batch_size == 5
    assert {(s["temperature"], s["max_new_tokens"], s["num_beams"]) for s in model.settings} == {(0.7, 11, 1)}
    assert [s["seed"] for s in model.settings] == [3 + 5 * i for i in range(batches)] * 2


def test_the_organ_is_asked_greedily_whatever_the_questions_are_asked_with(finished):
    _, model, _, _ = finished
    assert model.organ_settings and {(s["temperature"], s["max_new_tokens"]) for s in model.organ_settings} == {(0.0, 11)}


@pytest.mark.parametrize("training, answer, accuracy", [("yes", "yes", 25), ("", "no", 75)])
def test_the_majority_answer_comes_from_training_rows_where_there_are_any(training, answer, accuracy):
    asked = [VqaSample(n, Path("a.jpg"), "?", gold, "CLOSED") for n, gold in enumerate(["no", "no", "no", "yes"])]
    rows = [VqaSample("t", Path("b.jpg"), "?", training, "CLOSED")] if training else []
    baselines = scoring.score(asked, [{"question_id": n, "text": "x"} for n in range(4)], rows)["baselines"]
    assert (baselines["majority_closed_answer"], baselines["majority_closed"]) == (answer, accuracy)


def test_the_papers_protocol_reaches_candidates_and_leakage_table(tmp_path):
    predictions = tmp_path / "p.jsonl"
    results = {}
    for protocol in ("clean", "paper"):
        job = evaluation(tmp_path / protocol, protocol=protocol)
        predictions.write_text("".join(json.dumps({"question_id": s.question_id, "text": "x"}) + "\n" for s in job.samples))
        results[protocol] = job.score_file(predictions)
        rows = read_vqa_rad(SAMPLE, "train", protocol)
        assert results[protocol]["leakage"]["training_rows"] == len(rows)
        assert job.training == rows and job.samples == read_vqa_rad(SAMPLE, "test", "clean")
    leaked = [results[protocol]["leakage"]["questions_in_training"] for protocol in ("clean", "paper")]
    assert leaked[0] < leaked[1]


@pytest.mark.parametrize("tokens, reason", [([70, 71, EOS], "stop"), ([70, EOS], "stop"), ([70, 71, 72], "length")])
def test_a_cut_prompt_whose_last_allowed_token_ends_the_answer_is_finished(tokens, reason):
    model = Reader([], max_prompt=12, tokens=tokens)
    image = str(next((SAMPLE / "images").iterdir()))
    answer, = vqa.ask(model, [("What is shown? " * 9, image)], vqa.Generation(max_new_tokens=3, temperature=0.5, seed=4))
    assert answer.finish_reason == reason and answer.tokens_cut > 0
    assert answer.text == model.processor.decode(tokens).strip()
    assert model.settings == [dict(max_new_tokens=3, temperature=0.5, num_beams=1, seed=4)]
