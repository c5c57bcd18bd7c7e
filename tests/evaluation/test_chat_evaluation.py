"""Chat evaluation by a judge: numbers that are computed by hand, 193 questions through faults, stops and starts, and the report."""

import functools
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets.qa50 import ChatQuestion
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import chat, chat_published, run
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.evaluation.judging.judge import Verdict
from llavamed_jax.evaluation.questions import source_files
from llavamed_jax.evaluation.report import chat_report
from llavamed_jax.openai_client import client
from llavamed_jax.utils.files import to_jsonl, write_text
from tests.evaluation.test_against import scalars
from tests.evaluation.test_report import Page
from tests.support.answerers import StandIn
from tests.support.chat_set import (
    CONFIG,
    ROOT,
    SAMPLE,
    chat_answers,
    chat_records,
    is_unread,
    judge,
    scores,
    write_chat_set,
)
from tests.support.openai_server import FAULTS, OpenAiServer

# For what need not be shown on 193: both types, all domains; one question is unscored (144), two are asked about again (24, 84).
FEW = [record for record in chat_records() if record["question_id"] % 12 == 0 or record["question_id"] in (1, 45)]
COUNTS = dict(zip(chat_published.COLUMNS, (143, 50, 37, 38, 44, 34, 40, 193), strict=True))  # as the paper prints them
IMAGES = len({record["image"] for record in FEW})


def settings(folder, server=None, **changes):
    values = {
        "data.root": folder, "data.images": SAMPLE / "images", "judge.model": "tiny", "judge.timeout": 2.0,
        "judge.endpoint": server.url if server else "http://127.0.0.1:9/v1",
    } | changes  # fmt: skip
    return [f"{key}={value}" for key, value in values.items()]


def evaluation(tmp_path, server=None, workdir="out", **changes):
    found = run.open_evaluation(load_config(CONFIG, settings(tmp_path / "set", server, **changes)), tmp_path / workdir)
    found.scorer.judge.service.backoff = 0.01
    return found


def write(folder, records):
    """Questions, and predictions for them in another order."""
    write_chat_set(folder / "set", records)
    write_text(folder / "p.jsonl", to_jsonl(chat_answers(records)[::-1]))
    return folder


@pytest.fixture
def hurried(monkeypatch):
    """The command line as it is, with short waits."""
    monkeypatch.setattr(client, "Service", functools.partial(client.Service, backoff=0.01))


@pytest.fixture
def folder(tmp_path):
    """The 193 questions."""
    return write(tmp_path, chat_records())


@pytest.fixture
def few(tmp_path):
    return write(tmp_path, FEW)


# --- numbers ---


def question(number, image, kind="conversation", domain="mri"):
    return ChatQuestion(number, Path(image), "Where?\n<image>", "There.", "Fig. 1", "A figure.", None, kind, domain)


def test_numbers_are_counted_by_hand():
    questions = [
        question(1, "a.jpg"), question(2, "a.jpg", "detailed_description"), question(3, "b.jpg", domain="gross"),
        question(4, "b.jpg", domain="gross"), question(5, "c.jpg", "detailed_description", "ct_scan"),
    ]  # fmt: skip
    values = [(10, 5), (4, 6), (8, 2), None, None]
    found = chat.chat_scores(questions, [Verdict(value) for value in values], seed=0)
    overall = found["overall"]
    assert overall["pred_relative_score"] == pytest.approx(100 * (0.5 + 1.5 + 0.25) / 3)
    assert overall["ratio_of_means"] == pytest.approx(100 * 13 / 22), "another quantity, under another name"
    assert overall["gpt4_score"] == pytest.approx(22 / 3) and overall["pred_score"] == pytest.approx(13 / 3)
    assert (overall["data_size"], overall["n_unscored"]) == (3, 2)
    assert list(found["type"]) == ["conversation", "detailed_description"] and list(found["domain"]) == ["mri", "gross", "ct_scan"]
    assert found["type"]["conversation"]["pred_relative_score"] == pytest.approx(37.5)
    assert found["domain"]["mri"]["pred_relative_score"] == pytest.approx(100) and found["domain"]["mri"]["data_size"] == 2
    assert (found["domain"]["gross"]["pred_relative_score"], found["domain"]["gross"]["n_unscored"]) == (pytest.approx(25), 1)
    empty = found["domain"]["ct_scan"]
    assert empty["pred_relative_score"] is empty["ratio_of_means"] is empty["gpt4_score"] is None and empty["data_size"] == 0
    assert found["domain"]["mri"]["pred_relative_score_low"] is None, "one image gives no interval"
    json.dumps(found, allow_nan=False)


def test_intervals_resample_images():
    # 40 images with 5 equal questions each: the uncertainty is that of 40 draws.
    rng = np.random.default_rng(0)
    ratios = rng.uniform(0.2, 0.8, 40)
    questions = [question(i, f"{i // 5}.jpg") for i in range(200)]
    found = chat.chat_scores(questions, [Verdict((10.0, 10 * ratios[i // 5])) for i in range(200)], seed=1)["overall"]
    width = 2 * 1.96 * 100 * ratios.std() / np.sqrt(40)
    assert found["pred_relative_score_high"] - found["pred_relative_score_low"] == pytest.approx(width, rel=0.1)
    assert found["pred_score_high"] - found["pred_score_low"] == pytest.approx(width / 10, rel=0.1)
    assert found["gpt4_score_low"] == found["gpt4_score_high"] == found["gpt4_score"] == 10


# --- the whole ---


def check_whole(workdir, server, records):
    """The files of a whole run over questions, and that none was asked about without need."""
    assert server.asked_without_need() == []
    numbers = [record["question_id"] for record in records]
    reviews = [json.loads(line) for line in (workdir / "reviews.jsonl").read_text().splitlines()]
    assert [each["question_id"] for each in reviews] == numbers
    expected = {i: scores(i) for i in numbers if not is_unread(i, True)}
    unscored = [i for i in numbers if is_unread(i, True)]
    assert {each["question_id"]: (each["gpt4_score"], each["pred_score"]) for each in reviews if each["pred_score"]} == expected
    assert [each["question_id"] for each in reviews if each["pred_score"] is None] == unscored and unscored
    assert [each["question_id"] for each in reviews if "first_gpt_eval" in each] == [i for i in numbers if is_unread(i, False)]
    assert {each["gpt_eval"].partition("\n")[2] for each in reviews} == {"Because of the caption.", ""}
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert (metrics["n_questions"], metrics["n_unscored"], metrics["unscored"]) == (len(numbers), len(unscored), unscored)
    assert metrics["judge"]["n_asked_again"] == sum(is_unread(i, False) for i in numbers)
    found, points = metrics["overall"], np.array(list(expected.values()), float)
    assert found["pred_relative_score"] == pytest.approx(100 * (points[:, 1] / points[:, 0]).mean())
    assert found["ratio_of_means"] == pytest.approx(100 * points[:, 1].mean() / points[:, 0].mean())
    for tables in (metrics["domain"], metrics["type"]):
        assert sum(table["data_size"] for table in tables.values()) == len(expected)
    return metrics


def command(folder, server, workdir="out", **changes):
    overrides = [f"--config.{each}" for each in settings(folder / "set", server, **changes)]
    return ["--config", CONFIG, "--predictions", str(folder / "p.jsonl"), "--workdir", str(folder / workdir), *overrides]


def test_the_193_questions_through_faults(folder, hurried, capsys):
    with OpenAiServer(judge, fault_rate=0.1, slow=60, seed=149) as server:
        assert cli.main(command(folder, server, **{"judge.timeout": 1.5})) == 0
        metrics = check_whole(folder / "out", server, chat_records())
        kinds = {fault.split()[0] for fault in server.faults_met()}
        assert kinds == {"429", "500", "slow", "malformed", "empty", "dropped"}
        assert len(server.log) == 193 + 19 + server.faults_met().total()
    sizes = {name: table["data_size"] + table["n_unscored"] for group in ("type", "domain") for name, table in metrics[group].items()}
    assert sizes == {name: count for name, count in COUNTS.items() if name != "overall"}
    out, err = capsys.readouterr()
    assert "193 questions about 20 images, judged by tiny" in out and "unscored and left out of all means: 3 of 193 questions: 4, 74, 144" in out
    assert "193 requests and 0 cached replies; about" in err, "the estimate comes before the first call"
    assert "unscored, 3 of 193 answers: 4, 74, 144" in err
    asked = [each.body["messages"][1]["content"] for each in server.log]
    assert sum("\t- None\n" in text for text in asked if "[Question]" in text) >= 14
    assert not any("<image>" in text for text in asked)


def test_a_killed_run_pays_for_nothing_twice(folder, hurried):
    """SIGKILL, then SIGTERM, then to the end: what was kept is not asked about again, what is asked is kept."""
    with OpenAiServer(judge, fault_rate=0.1, faults=[each for each in FAULTS if each != "slow"], delay=0.02) as server:
        cache = folder / "out" / "judge_cache.jsonl"
        kept = []
        for stop, status in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 75)):
            run = subprocess.Popen([sys.executable, "eval.py", *command(folder, server)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
            enough = len(kept) + 40
            while run.poll() is None and not (cache.exists() and cache.read_bytes().count(b"\n") >= enough):
                time.sleep(0.01)
            run.send_signal(stop)
            error = run.communicate()[1]
            assert run.returncode == status, error
            assert not (folder / "out" / "reviews.jsonl").exists()
            before, kept = kept, [json.loads(line)["key"] for line in cache.read_text().splitlines()]
            assert kept[: len(before)] == before and len(kept) == len(set(kept)) < 193
        assert f"stopped; {len(kept)} answers are kept" in error
        answered = Counter(each.asked for each in server.log if each.fault is None)
        assert cli.main(command(folder, server)) == 0
        # The two stops may each have lost the replies that were under way, eight at most; all others were asked about once.
        repeated = {asked: times - 1 for asked, times in Counter(e.asked for e in server.log if e.fault is None).items() if times > 1}
        assert sum(repeated.values()) <= 16 and sum(answered.values()) - len(kept) >= sum(repeated.values())
        server.log = [each for i, each in enumerate(server.log) if each.asked not in {later.asked for later in server.log[i + 1 :]}]
        whole = check_whole(folder / "out", server, chat_records())
        n = len(server.log)
        assert cli.main(command(folder, server)) == 0 and len(server.log) == n, "a finished run is scored again for nothing"
        assert json.loads((folder / "out" / "metrics.json").read_text()) == whole


def test_a_dry_run_asks_nothing(folder, monkeypatch, capsys):
    def refuse(*_):
        raise AssertionError("nothing may be sent, nothing loaded")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(cli.common, "load_assistant", refuse)
    prices = {"judge.price_prompt": 30.0, "judge.price_answer": 60.0}
    argv = [*command(folder, None, **prices), "--dry_run"]
    assert cli.main(argv) == 0
    with_answers = capsys.readouterr().out
    argv[2:4] = ["--checkpoint", "preset:small"]
    assert cli.main(argv) == 0
    out, err = capsys.readouterr()
    assert "chat: 193 questions on 20 images, 143 conversation, 50 detailed_description, not the published file" in out
    assert "assuming answers as long as the references: 193 requests and 0 cached replies" in out and "US dollars" in out and not err
    assert "for the existing answers: 193 requests" in with_answers and "controls" not in out
    assert cli.main([*argv, "--control", "image"]) == 0
    out = capsys.readouterr().out
    assert "193 requests" in out and out.endswith("each of the two controls (images exchanged, noise) costs up to the same again\n")
    assert not (folder / "out").exists()


# --- a model answers ---


@dataclass
class Answerer(StandIn):
    """Answers by number; on an image that is not the question's own, as another number."""

    name: str = "tested"
    asked: int = 0

    def answers(self, questions, asked, generation, failed):
        numbers = {(record["text"].removesuffix("\n<image>"), record["image"]): record["question_id"] for record in FEW}
        for i in asked:
            self.asked += 1
            question, (image,) = questions[i]
            yield i, Answer(f"answer {numbers.get((question, Path(image).name), 193)}", "stop")


def test_a_model_is_asked_and_judged_and_so_is_the_control(few):
    with OpenAiServer(judge) as server:
        metrics = run.evaluate(evaluation(few, server), Answerer(), {"checkpoint": "runs/x"}, ["image"])
    names = {"predictions.jsonl", "predictions_control_image.jsonl", "predictions_control_noise.jsonl", "reviews.jsonl",
             "reviews_control_image.jsonl", "reviews_control_noise.jsonl", "metrics.json", "report.html", "judge_cache.jsonl",
             "tensorboard"}  # fmt: skip
    assert {path.name for path in (few / "out").iterdir()} == names
    prompts = [json.loads(line)["prompt"] for line in (few / "out" / "predictions.jsonl").read_text().splitlines()]
    assert prompts == [record["text"].removesuffix("\n<image>") for record in FEW]
    first, second = scores(193)
    assert metrics["control"]["overall"]["pred_relative_score"] == pytest.approx(100 * second / first)
    assert metrics["control"]["seed"] == 0 and metrics["overall"]["pred_relative_score"] != pytest.approx(100 * second / first)
    noise, overall = metrics["control"]["noise"]["overall"]["pred_relative_score"], chat.summary(metrics).splitlines()[2]
    assert overall.split()[-2:] == [f"{100 * second / first:.1f}", f"{noise:.1f}"] and "exchanged  noise" in chat.summary(metrics)
    written = scalars(few / "out" / "tensorboard")
    for name, table in {"": metrics, "control_exchanged/": metrics["control"], "control_noise/": metrics["control"]["noise"]}.items():
        value = pytest.approx(table["overall"]["pred_relative_score"], rel=1e-6)
        assert written[f"eval/chat_{metrics['split']}/{name}overall/pred_relative_score"] == (0, value)
    page = (few / "out" / "report.html").read_text()
    assert "Images exchanged" in page and "image exchanged: 2" in page


def test_one_server_answers_and_another_judges(few):
    def answer(body):
        question = next(part["text"] for part in body["messages"][-1]["content"] if part["type"] == "text")
        return f"answer {len(question)}"

    with OpenAiServer(answer, models=("answering",)) as model, OpenAiServer(judge) as server:
        argv = command(few, server)
        argv[2:4] = ["--endpoint", model.url, "--model", "answering"]
        assert cli.main(argv) == 0
    reviews = [json.loads(line) for line in (few / "out" / "reviews.jsonl").read_text().splitlines()]
    assert [each["text"] for each in reviews] == [f"answer {len(record['text']) - 8}" for record in FEW]
    for each in reviews:
        number = len(each["question"])
        assert (each["gpt4_score"], each["pred_score"]) == ((None, None) if is_unread(number, True) else scores(number))
    assert "answering" in Page((few / "out" / "report.html").read_text()).text


def test_answers_are_kept_while_the_judge_is_away(few):
    answerer = Answerer()
    with pytest.raises(UserError, match="cannot be reached"):
        run.evaluate(evaluation(few), answerer, {"checkpoint": "runs/x"})
    with OpenAiServer(judge) as server:
        run.evaluate(evaluation(few, server, **{"judge.max_tokens": 99}), answerer, {"checkpoint": "runs/x"})
        check_whole(few / "out", server, FEW)
    assert answerer.asked == len(FEW), "another judge is no reason to ask the model again"


def test_images_are_looked_for_only_where_a_model_sees_them(few, monkeypatch, capsys):
    monkeypatch.setattr(cli.common, "load_assistant", lambda args: pytest.fail("no model may be loaded"))
    with OpenAiServer(judge) as server:
        assert cli.main(command(few, server, **{"data.images": few})) == 0
        argv = command(few, server, "other", **{"data.images": few})
        argv[2:4] = ["--checkpoint", "preset:small"]
        assert cli.main(argv) == 1
    assert f"does not exist; {IMAGES} of {IMAGES} images are missing" in capsys.readouterr().err
    assert f"{IMAGES} of {IMAGES} image files could not be read" in (few / "out" / "report.html").read_text()
    assert not (few / "other").exists()


@pytest.mark.parametrize(
    "changes, status, sentence",
    [
        ({"judge.model": ""}, 2, "judge.model is empty"),
        ({"judge.prompt": "absent.txt"}, 2, "judge.prompt is absent.txt"),
        ({"judge.endpoint": "nowhere"}, 2, "the address 'nowhere' is not valid"),
        ({"data.root": ""}, 2, "data.root is empty; the file of chat questions"),
        ({"data.root": "absent"}, 1, "the questions absent cannot be read"),
        ({"judge.modl": "x"}, 2, "judge.modl"),
    ],
)
def test_mistakes_are_one_sentence_and_leave_nothing(few, monkeypatch, capsys, changes, status, sentence):
    monkeypatch.chdir(few)
    assert cli.main(command(few, None, **changes)) == status
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (few / "out").exists()


def test_predictions_that_do_not_fit(few, capsys):
    write_text(few / "p.jsonl", to_jsonl(chat_answers(FEW)[:-2] + [{"question_id": "x", "text": "?"}]))
    assert cli.main(command(few, None)) == 1
    assert "2 without a prediction (180, 192); 1 predicted but not asked (x)" in capsys.readouterr().err


# --- beside the paper ---


def test_the_papers_numbers_stand_only_beside_what_is_like_them(few, monkeypatch):
    names = dict(models=("gpt-4-0314",))
    with OpenAiServer(judge, **names) as server:
        own = evaluation(few, server, **{"judge.model": "gpt-4-0314"})
        metrics = run.score_file(own, few / "p.jsonl")
        reasons = metrics["differs_from_the_paper"]
        told = ("not the published file", "another wording", "unscored questions: 1")
        assert len(reasons) == 3 and all(text in reason for text, reason in zip(told, reasons, strict=True))
        assert "60K-IM" not in (few / "out" / "report.html").read_text()
    monkeypatch.setattr(chat_published, "ORIGINAL_WORDING", own.scorer.judge.prompt.wording)
    monkeypatch.setattr("llavamed_jax.datasets.qa50.PUBLISHED_SHA256", own.scorer.chat_set.sha256)
    with OpenAiServer(lambda body: "8 4", **names) as server:
        like = evaluation(few, server, "like", **{"judge.model": "gpt-4-0314"})
        assert run.score_file(like, few / "p.jsonl")["differs_from_the_paper"] == []
        page = Page((few / "like" / "report.html").read_text())
        assert "LLaVA-Med, 60K-IM 55.1 36.4 56.2 40.4 52.7 51.8 50.1 50.2" in page.text and "this run 50.0" in page.text
        for change, reason in (("judge.image_marker=true", "contains “<image>”"), ("judge.temperature=0.2", "0.2"), ("judge.model=gpt-4", "gpt-4,")):
            other = evaluation(few, server, "x", **{"judge.model": "gpt-4-0314"} | dict([change.split("=")]))
            found = chat_published.differences(other.scorer.chat_set, other.scorer.judge, other.cfg.judge.image_marker, 0)
            assert len(found) == 1 and reason in found[0]


def test_scores_beyond_the_scale_count_where_the_original_is_asked_for(few, capsys):
    """By default they are asked about again, and the run says what the original would have done; kept replies are read anew."""
    odd = {1: "8 0", 12: "8 11", 24: "9 5."}

    def answer(body):
        text = body["messages"][-1]["content"]
        number = int(re.search(r"\[Assistant 2\]\nanswer (\d+)\n", text)[1])
        return "8 4" if "Mind the form" in text else odd.get(number, "8 8")

    with OpenAiServer(answer) as server:
        strict = run.score_file(evaluation(few, server), few / "p.jsonl")
        assert strict["judge"]["n_asked_again"] == 3 and strict["judge"]["reading"] == "strict" and strict["n_unscored"] == 0
        assert any("3 replies were requested again" in reason for reason in strict["differs_from_the_paper"])
        count = len(server.log)
        original = run.score_file(evaluation(few, server, **{"judge.reading": "original"}), few / "p.jsonl")
        assert len(server.log) == count == len(FEW) + 3, "nothing is asked for it"
    assert original["judge"]["n_asked_again"] == 0 and original["judge"]["reading"] == "original"
    assert not any("judge.reading" in reason for reason in original["differs_from_the_paper"])
    rest = len(FEW) - 3
    assert strict["overall"]["pred_relative_score"] == pytest.approx(100 * (3 * 4 / 8 + rest) / len(FEW))
    assert original["overall"]["pred_relative_score"] == pytest.approx(100 * (0 / 8 + 11 / 8 + 5 / 9 + rest) / len(FEW))
    reviews = [json.loads(line) for line in (few / "out" / "reviews.jsonl").read_text().splitlines()]
    assert {each["question_id"]: each["pred_score"] for each in reviews if each["question_id"] in odd} == {1: 0, 12: 11, 24: 5}
    assert cli.main([*command(few, server), "--config.judge.reading=loose"]) == 2
    assert "judge.reading is 'loose'; strict or original was expected" in capsys.readouterr().err


def test_the_papers_table_is_the_papers():
    assert sum(COUNTS[name] for name in ("conversation", "detailed_description")) == COUNTS["overall"] == 193
    assert sum(COUNTS[name] for name in ("chest_xray", "mri", "histology", "gross", "ct_scan")) == 193
    # The parts' means, weighed, are the whole's, as far as one decimal says; LLaVA's row is 0.12 off in print.
    for title, values in chat_published.ROWS.items():
        row = dict(zip(chat_published.COLUMNS, values, strict=True))
        for parts in (("conversation", "detailed_description"), ("chest_xray", "mri", "histology", "gross", "ct_scan")):
            whole = sum(row[name] * COUNTS[name] for name in parts) / 193
            assert whole == pytest.approx(row["overall"], abs=0.125 if title == "LLaVA" else 0.1)


# --- the report ---


def test_the_report_is_one_offline_page(few):
    with OpenAiServer(judge) as server:
        run.score_file(evaluation(few, server), few / "p.jsonl")
    html = (few / "out" / "report.html").read_text()
    page = Page(html)
    links = [value for name, value in page.attributes if name in ("src", "href")]
    assert len(links) == IMAGES and all(value.startswith("data:image/jpeg;base64,") for value in links) and "script" not in page.tags
    assert "For research use only: never for clinical decisions." in page.text and "judged by tiny" in page.text
    assert page.text.count("Because of the caption.") == 18 and "Left out of all means: 1 of 19 questions" in page.text
    for text in ("Relative score", "Ratio of means", "Histology", "asked again 3, unscored 1", "would not compare", "GPT-4", "tested"):
        assert text in page.text
    assert "reference: 6" in page.text and "answer: 8" in page.text and "133 %" in page.text


def test_chat_questions_have_no_split(few):
    files = source_files(load_config(CONFIG, settings(few / "set", **{"data.split": "dev"})).data)
    assert files and files == sorted((few / "set").glob("*.jsonl"))


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "日本語 & Ω", "{{ 7 * 7 }}{% x %}", ""])
def test_texts_are_escaped(text):
    questions = [ChatQuestion(1, Path("a.jpg"), f"{text}\n<image>", text, text, text, None, "conversation", "mri")]
    reviews = [chat.review(questions[0], text, Verdict(None, text, text, "stop", text or None))]
    metrics = {
        "n_questions": 1, "n_images": 1, "n_unscored": 1, "unscored": [1], "judge": {"model": text, "n_asked_again": 1},
        "differs_from_the_paper": [text], "seed": 0, **chat.chat_scores(questions, [Verdict(None)], 0),
    }  # fmt: skip
    metrics["control"] = metrics | {"kind": "image", "noise": metrics}
    page = Page(chat_report.render(metrics, questions, reviews, {"image": reviews, "noise": reviews}, {"Run": {"x": text}}, text))
    assert not {"script", "img"} & set(page.tags) and not [name for name, _ in page.attributes if name.startswith("on")]
    assert "nan" not in page.text.lower() and "None" not in page.text and "image not readable" in page.text and "–" in page.text
    assert text in page.text if text else "(nothing)" in page.text
