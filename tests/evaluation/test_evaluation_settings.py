"""What an evaluation is made of: which predictions the control scores, which rows a baseline comes from, which settings
reach the model. Each assertion fails for one way to mix them up."""

import hashlib
import json
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from llavamed_jax import chat
from llavamed_jax.cli import convert
from llavamed_jax.cli import eval as cli
from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets.sample import VqaSample
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.evaluation import run
from llavamed_jax.evaluation.answering import asked
from llavamed_jax.evaluation.answering.answerer import Generation
from llavamed_jax.evaluation.answering.ask import ask
from llavamed_jax.evaluation.answering.local import LocalModel
from llavamed_jax.evaluation.questions import questions_hash
from llavamed_jax.evaluation.report import details
from llavamed_jax.evaluation.results import Outcome
from llavamed_jax.evaluation.scoring import controls, score
from llavamed_jax.evaluation.scoring.items import AnswerSet
from llavamed_jax.evaluation.scoring.predictions import read_predictions
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from llavamed_jax.utils.files import to_jsonl
from tests.support.answerers import StandIn
from tests.support.small_sample import small_sample
from tests.support.words import instead

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "samples" / "vqa_rad"
EOS = 2


def evaluation(workdir, arguments="", **changes):
    values = {"data.root": SAMPLE} | changes
    cfg = load_config(f"{ROOT / 'configs/eval/vqa_rad.py'}{arguments}", [f"{k}={v}" for k, v in values.items()])
    return run.open_evaluation(cfg, workdir)


class Reader:
    """Gives the gold answer where it sees the question's own image, and an answer that is never right elsewhere."""

    seen: ClassVar[dict] = {}

    def __init__(self, samples, max_prompt=10**6, tokens=()):
        tokenizer = Tokenizer.load(SAMPLE / "tokenizer.model")
        self.processor = Processor(None, tokenizer, "v1.5:mistral_instruct", image_size=28)
        self.engine = SimpleNamespace(max_prompt=max_prompt, eos=(EOS,))
        self.gold = {(*self.ids(sample.question.strip()), self.pixels(sample.image)): str(sample.answer) for sample in samples}
        self.settings, self.organ_settings, self.tokens, self.asked = [], [], list(tokens), 0

    def ids(self, question):
        content = [{"type": "image", "image": ""}, {"type": "text", "text": question}]
        return self.processor.expand(self.processor.encode(self.processor.prompt([{"role": "user", "content": content}])))

    def pixels(self, path):
        if path not in self.seen:  # by any of them
            self.seen[path] = self.processor.images_uint8([path])[0].tobytes()
        return self.seen[path]

    def answer_each(self, prompts, **settings):
        for index, (ids, (image,), _) in enumerate(prompts):
            if index == 0:
                (self.organ_settings if ids == self.ids(controls.ORGAN_QUESTION) else self.settings).append(settings)
            self.asked += 1
            yield index, SimpleNamespace(text=self.gold.get((*ids, image.tobytes()), "a kangaroo"), finish_reason="stop")

    def generate_tokens(self, rows, images, **settings):
        self.settings.append(settings)
        return [self.tokens for _ in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An evaluation with its control, of a model that is right exactly where it sees the image that is asked about."""
    workdir = tmp_path_factory.mktemp("evaluation")
    job = evaluation(workdir, ":demo", **{"data.root": small_sample(), "data.held_out": SAMPLE / "held_out.json", "generation.temperature": 0.7,
                                          "generation.max_new_tokens": 11, "generation.batch_size": 5, "seed": 3})
    model = Reader(job.samples)
    return job, model, run.evaluate(job, LocalModel(model, "x"), {"checkpoint": "runs/x"}, ["image"]), workdir


def test_the_control_scores_its_own_answers(finished):
    job, _, result, workdir = finished
    own = read_predictions(workdir / "predictions.jsonl")
    for name, table in (("image", result["control"]), ("noise", result["control"]["noise"])):
        shown = read_predictions(workdir / f"predictions_control_{name}.jsonl")
        assert {each["text"] for each in shown} == {"a kangaroo"} and "a kangaroo" not in {each["text"] for each in own}
        for family in ("strict", "paper"):
            assert table[family] == score.score(AnswerSet(job.samples, shown, job.scorer.training), seed=3)[family]
        assert table["strict"]["closed_accuracy"] == table["strict"]["open_exact"] == 0
        assert table["paper"]["closed_recall"] == 0 < result["paper"]["closed_recall"]
        assert (table["kind"], table["seed"]) == (name, 3)
    assert result["strict"]["closed_accuracy"] == result["strict"]["open_exact"] == 100


def test_every_image_has_a_noise_of_its_own_that_is_gone_afterwards(finished):
    job, _, result, workdir = finished
    predictions = read_predictions(workdir / "predictions_control_noise.jsonl")
    shown = {each["question_id"]: each["metadata"]["image"] for each in predictions}
    by_image = {str(sample.image): shown[sample.question_id] for sample in job.samples}
    assert all(shown[sample.question_id] == by_image[str(sample.image)] for sample in job.samples)
    assert len(set(by_image.values())) == len(by_image) == result["n_images"]
    assert not set(by_image.values()) & {Path(sample.image).name for sample in job.samples}
    assert not (workdir / "noise").exists() and result["control"]["noise"]["size"] == controls.NOISE_SIZE


def test_each_control_has_its_own_scores(tmp_path):
    job = evaluation(tmp_path)
    own, wrong = ([{"question_id": s.question_id, "text": text or s.answer} for s in job.samples] for text in ("", "a kangaroo"))
    answers = {name: AnswerSet(job.samples, lines) for name, lines in {run.OWN: own, "image": wrong, "noise": own}.items()}
    control = run._finish(job, answers, {}, {})["control"]
    for table, value in ((control, 0), (control["noise"], 100)):
        assert (table["strict"]["closed_accuracy"], table["difference"]["closed_accuracy"]) == (value, 100 - value)
        assert table["strict"]["open_exact"] == value


def test_hashes_are_of_what_was_read_asked_and_answered(tmp_path):
    job, sha256 = evaluation(tmp_path / "w"), lambda data: hashlib.sha256(data).hexdigest()
    predictions = [{"question_id": s.question_id, "text": "é"} for s in job.samples]
    file = SAMPLE / "VQA_RAD Dataset Public.json"
    found = Outcome({"asked": {"files": {"config.json": "0a"}}}, str)
    assert details.tables(job.cfg, None, AnswerSet(job.samples, predictions), found, {})["SHA-256"].items() >= {
        "predictions": sha256(to_jsonl(predictions).encode()), "questions": questions_hash(job.samples),
        str(file): sha256(file.read_bytes()), "config.json": "0a",
    }.items()  # fmt: skip
    first, *others = job.samples
    changes = [{"answer": "else"}, {"question": "else"}, {"image": Path("else")}, {"question_id": "else"}, {"options": ("else",)},
               {"answer_type": "else"}]
    hashes = {questions_hash([replace(first, **change), *others]) for change in ({}, *changes)}
    assert len(hashes) == 1 + len(changes)
    assert questions_hash([replace(first, image=Path("elsewhere") / first.image.name), *others]) in hashes


def test_the_difference_is_predictions_minus_control(finished):
    *_, result, _ = finished
    for difference in (result["control"]["difference"], result["control"]["noise"]["difference"]):
        assert difference["closed_accuracy"] == difference["closed_accuracy_low"] == difference["open_exact"] == 100
        assert difference["closed_accuracy_p"] == pytest.approx(2 / 2**15), "15 images, of which all but one exchange is less extreme"
    samples = [VqaSample(n, Path(f"{n}.jpg"), "?", "yes", "CLOSED") for n in range(4)]
    first, second = ([{"question_id": n, "text": text} for n, text in enumerate(texts)] for texts in (["yes"] * 3 + ["no"], ["no"] * 4))
    assert score.difference(AnswerSet(samples, first), AnswerSet(samples, second), 0)["closed_accuracy"] == 75
    assert score.difference(AnswerSet(samples, second), AnswerSet(samples, first), 0)["closed_accuracy"] == -75


def test_what_is_only_computed_of_the_answers_asks_nothing_anew(tmp_path):
    """Answers of a start that was stopped are taken over by one with other comparisons, and not by one with another seed."""
    def key(name, **changes):
        job = evaluation(tmp_path / name, **changes)
        return asked.key(StandIn(), job.cfg, job.samples, {"checkpoint": "runs/x"}, {})

    assert key("a") == key("b", **{"published": "from_llava", "data.trained_on": SAMPLE, "data.trained_on_images": "x"}) != key("c", seed=1)


def test_settings_of_the_config_reach_the_model(finished):
    job, model, result, _ = finished
    assert result["split"] == "held_out" and "these questions are from held_out" in result["published"]["reason"]
    assert model.settings == [dict(max_new_tokens=11, temperature=0.7, seed=3)] * 3 and model.engine.batch_size == 5


def test_the_organ_is_asked_greedily_whatever_the_questions_are_asked_with(finished):
    _, model, _, _ = finished
    assert model.organ_settings and {(s["temperature"], s["max_new_tokens"]) for s in model.organ_settings} == {(0.0, 11)}


@pytest.mark.parametrize("training, answer, accuracy", [("yes", "yes", 25), ("", "no", 75)])
def test_the_majority_answer_comes_from_training_rows_where_there_are_any(training, answer, accuracy):
    asked = [VqaSample(n, Path("a.jpg"), "?", gold, "CLOSED") for n, gold in enumerate(["no", "no", "no", "yes"])]
    rows = [VqaSample("t", Path("b.jpg"), "?", training, "CLOSED")] if training else []
    baselines = score.score(AnswerSet(asked, [{"question_id": n, "text": "x"} for n in range(4)], rows))["baselines"]
    assert (baselines["majority_closed_answer"], baselines["majority_closed"]) == (answer, accuracy)


def test_the_papers_protocol_reaches_candidates_and_leakage_table(tmp_path):
    predictions = tmp_path / "p.jsonl"
    results = {}
    for protocol in ("clean", "paper"):
        job = evaluation(tmp_path / protocol, protocol=protocol)
        predictions.write_text("".join(json.dumps({"question_id": s.question_id, "text": "x"}) + "\n" for s in job.samples))
        results[protocol] = run.score_file(job, predictions)
        rows = read_vqa_rad(SAMPLE, "train", protocol)
        assert results[protocol]["leakage"]["training_rows"] == len(rows)
        assert job.scorer.training == rows and job.samples == read_vqa_rad(SAMPLE, "test", "clean")
    leaked = [results[protocol]["leakage"]["questions_in_training"] for protocol in ("clean", "paper")]
    assert leaked[0] < leaked[1]


@pytest.mark.parametrize("tokens, reason", [([70, 71, EOS], "stop"), ([70, EOS], "stop"), ([70, 71, 72], "length")])
def test_a_cut_prompt_whose_last_allowed_token_ends_the_answer_is_finished(tokens, reason):
    model = Reader([], max_prompt=12, tokens=tokens)
    image = str(next((SAMPLE / "images").iterdir()))
    answer, = ask(LocalModel(model, "m"), [("What is shown? " * 9, (image,))], Generation(max_new_tokens=3, num_beams=2, seed=4))
    assert answer.finish_reason == reason and answer.tokens_cut > 0
    assert answer.text == model.processor.decode(tokens).strip()
    assert model.settings == [dict(max_new_tokens=3, num_beams=2, seed=4)]


class Stopping(Reader):
    """Sends a signal before the last of so many answers, behind which it is obeyed."""

    def __init__(self, samples, answers):
        super().__init__(samples)
        self.left = answers

    def answer_each(self, prompts, **settings):
        for answer in super().answer_each(prompts, **settings):
            self.left -= 1
            if not self.left:
                signal.raise_signal(signal.SIGTERM)
            yield answer


def test_an_evaluation_that_a_signal_stopped_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    argv = ["--config", f"{ROOT / 'configs/eval/vqa_rad.py'}:demo", f"--config.data.root={small_sample()}", "--checkpoint", "runs/x", "--control", "image",
            "--workdir"]
    samples = evaluation(tmp_path / "w", ":demo", **{"data.root": small_sample(), "data.held_out": SAMPLE / "held_out.json"}).samples
    n = len(samples)

    def start(model, workdir, *more):
        monkeypatch.setattr(cli.common, "load_assistant", lambda args: model)
        return cli.main([*argv, str(tmp_path / workdir), *more])

    assert start(Stopping(samples, 32), "w") == 75
    assert "stopped; 32 answers are kept" in capsys.readouterr().err
    with (tmp_path / "w" / "predictions.jsonl.partial").open("a") as file:
        file.write('{"question": 32, "te')  # as a process leaves it that was killed while it wrote
    second = Stopping(samples, n - 32 + 5)
    assert start(second, "w") == 75 and second.asked == n - 32 + 5, "what was answered is not asked again"
    assert f"stopped; {n + 5} answers are kept" in capsys.readouterr().err
    assert start(Reader(samples), "w") == 0 and start(Reader(samples), "whole") == 0
    for name in ("predictions.jsonl", "predictions_control_image.jsonl", "metrics.json"):
        assert (tmp_path / "w" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((tmp_path / "w").glob("*.partial"))
    assert start(Stopping(samples, 7), "other") == 75
    other = Reader(samples)
    assert start(other, "other", "--config.seed=1") == 0 and other.asked >= 2 * n, "of another seed nothing is kept"
    assert "asked again" in capsys.readouterr().err


@pytest.mark.parametrize("more, status, sentence", [
    (["--workdir", "file"], 1, "the workdir file is a file"),
    (["--workdir", ""], 2, "the workdir is empty"),
    (["--config.seed=-1"], 2, "seed is -1; 0 to 2147483647 was expected"),
    (["--config.generation.temperature=nan"], 2, "generation.temperature is nan; a number of at least 0"),
    (["--config.generation.num_beams=0"], 2, "generation.num_beams is 0; at least 1"),
    (["--config.generation.num_beams=100000"], 2, "generation.num_beams is 100000; at most 128 was expected"),
    (["--config.generation.batch_size=1000000000"], 2, "generation.batch_size is 1000000000; at most 4096 was expected"),
    (["--config.generation.max_new_tokens=1" + 90 * "0"], 2, "0…; at most 131072 was expected"),
    (["--config.generation.num_beams=3", "--config.generation.temperature=0.2"], 2, "generation.num_beams is 3 and generation.temp"),
    (["--config.data.split=x"], 2, "data.split is 'x'"),
    (["--template", "foo"], 2, "--template: the template 'foo' does not exist; one of v1.5:"),
    (["--checkpoint", "preset:x"], 2, "--checkpoint: the preset 'x' does not exist; one of small"),
])
def test_settings_that_are_wrong_are_said_before_a_model_is_loaded(more, status, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    held_out = [f"--config.data.root={SAMPLE}", f"--config.data.held_out={SAMPLE / 'held_out.json'}"]
    argv = ["--config", f"{ROOT / 'configs/eval/vqa_rad.py'}:demo", *held_out, "--workdir", "w", "--checkpoint", "nowhere"]
    monkeypatch.setattr("llavamed_jax.cli.common.load_assistant", None)
    assert cli.main(instead(argv, more)) == status
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_lone_surrogate_in_an_answer_is_written_escaped(tmp_path):
    job = evaluation(tmp_path)
    (tmp_path / "p.jsonl").write_text("".join(f'{{"question_id": "{s.question_id}", "text": "no \\ud800"}}\n' for s in job.samples))
    run.score_file(job, tmp_path / "p.jsonl")
    assert "no \\ud800" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("main, argv", [(cli.main, []), (convert.main, ["export"]), (convert.main, ["verify"]), (chat.main, [])])
def test_help_fits_a_screen(main, argv, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--help"])
    lines = capsys.readouterr().out.splitlines()
    assert stop.value.code == 0 and 5 < len(lines) <= 24 and max(map(len, lines)) <= 100
