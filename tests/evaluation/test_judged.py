"""Open VQA answers judged right or wrong: off unless a judge is named, and apart from every string metric."""

import json
import re

import numpy as np
import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli.common import load_config
from llavamed_jax.datasets import sample as samples_of_sets
from llavamed_jax.datasets.vqa_rad import read_vqa_rad
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation import run
from llavamed_jax.evaluation.judging import open_answers
from llavamed_jax.evaluation.report import summary
from llavamed_jax.evaluation.scoring import statistics
from llavamed_jax.utils.files import to_jsonl, write_text
from tests.evaluation.test_report import Page
from tests.support.chat_set import ROOT, SAMPLE
from tests.support.openai_server import OpenAiServer

CONFIG = str(ROOT / "configs" / "eval" / "vqa_rad.py")
OPEN = [sample for sample in read_vqa_rad(SAMPLE, "test") if sample.answer_type == "OPEN"]
UNSURE, LATE, RIGHT = ("unsure", "late", "right")


def answers():
    """Of the open questions the first is not judged in a form that can be read, the second not at once; every other is right."""
    said = {sample.question_id: f"{RIGHT if i % 2 else 'wrong'} {i}" for i, sample in enumerate(OPEN)}
    said |= {OPEN[0].question_id: UNSURE, OPEN[1].question_id: LATE}
    return [{"question_id": s.question_id, "text": said.get(s.question_id, "yes")} for s in read_vqa_rad(SAMPLE, "test")]


def judge(body):
    text = body["messages"][1]["content"]
    answer = re.search(r"\[Answer\]\n(.*)\n\n\[End of Answer\]", text)[1]
    if answer == UNSURE or answer == LATE and "Mind the form" not in text:
        return "It depends."
    return "Right." if answer.split()[0] in (RIGHT, LATE) else "wrong\nAnother finding."


def evaluation(workdir, server=None, **changes):
    values = {"data.root": SAMPLE} | ({"judge.model": "tiny", "judge.endpoint": server.url} if server else {}) | changes
    return run.open_evaluation(load_config(CONFIG, [f"{key}={value}" for key, value in values.items()]), workdir)


@pytest.fixture
def predictions(tmp_path):
    write_text(tmp_path / "p.jsonl", to_jsonl(answers()))
    return tmp_path / "p.jsonl"


def test_open_answers_are_judged_apart_from_the_string_metrics(tmp_path, predictions):
    without = run.score_file(evaluation(tmp_path / "without"), predictions)
    assert "judged" not in without
    assert {path.name for path in (tmp_path / "without").iterdir()} == {"metrics.json", "report.html", "tensorboard"}
    with OpenAiServer(judge) as server:
        own = evaluation(tmp_path / "with", server)
        found = run.score_file(own, predictions)
        assert run.score_file(evaluation(tmp_path / "with", server), predictions) == found
        asked = len(OPEN) + 2
        assert len(server.log) == asked and server.asked_without_need() == [], "the second time nothing is asked"
    assert {key: value for key, value in found.items() if key != "judged"} == without
    result = found["judged"]
    n, n_right = len(OPEN), len(OPEN) // 2
    assert (result["n_open"], result["n_unscored"], result["unscored"]) == (n, 1, [OPEN[0].question_id])
    assert result["open_accuracy"] == pytest.approx(100 * n_right / (n - 1))
    right = [np.nan, *(float(i % 2) for i in range(1, n))]
    images = [str(sample.image) for sample in OPEN]
    wanted = statistics.intervals(statistics.resample([statistics.mean("open_accuracy", np.array(right))], images, 0))
    assert len(set(images)) < n and wanted.items() <= result.items(), "images are drawn"
    assert result["judge"]["n_asked_again"] == 2 and result["judge"]["model"] == "tiny"
    lines = [json.loads(line) for line in (tmp_path / "with" / "judged.jsonl").read_text().splitlines()]
    assert [line["question_id"] for line in lines] == [sample.question_id for sample in OPEN]
    assert [line["is_right"] for line in lines] == [None, *(bool(i % 2) for i in range(1, n))]
    assert lines[1]["first_judge_text"] == "It depends." and lines[2]["judge_text"] == "wrong\nAnother finding."
    prompt = server.log[-1].body["messages"][1]["content"]
    assert "Gold Answer" in prompt and "image" not in prompt.partition("[System]")[0].lower().replace(OPEN[0].question.lower(), "")
    page = Page((tmp_path / "with" / "report.html").read_text())
    assert "Open answers, judged" in page.text and f"of {n - 1} judged answers" in page.text
    assert "Open answers, judged" not in (tmp_path / "without" / "report.html").read_text()
    text = summary.summary(found)
    assert "open accuracy, judged" in text and f"unscored and not counted: 1 of {n}: {OPEN[0].question_id}" in text


def test_a_request_that_fails_is_reported_and_the_report_is_written(tmp_path, predictions):
    def answer(body):
        return {"choices": []} if UNSURE in body["messages"][1]["content"] else judge(body)

    with OpenAiServer(answer) as server:
        own = evaluation(tmp_path / "out", server, **{"judge.retries": 0})
        with pytest.raises(UserError, match=f"^1 of {len(OPEN)} open answers were not judged and are reported as unscored"):
            run.score_file(own, predictions)
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["judged"]["unscored"] == [OPEN[0].question_id]
    assert "no choices" in json.loads((tmp_path / "out" / "judged.jsonl").read_text().splitlines()[0])["error"]


def test_a_dry_run_says_what_it_would_cost(tmp_path, capsys):
    argv = ["--config", CONFIG, f"--config.data.root={SAMPLE}", "--workdir", str(tmp_path / "w"), "--checkpoint", "preset:small"]
    argv.append("--dry_run")
    assert cli.main(argv) == 0
    assert f"{len(read_vqa_rad(SAMPLE, 'test'))} questions; nothing is judged" in capsys.readouterr().out
    assert cli.main([*argv, "--config.judge.model=tiny", "--config.judge.price_answer=1"]) == 0
    out = capsys.readouterr().out
    assert f"{len(read_vqa_rad(SAMPLE, 'test'))} questions; judge " in out, "what is asked, too"
    assert f"{len(OPEN)} open answers: " in out and "US dollars" in out and not (tmp_path / "w").exists()


def test_only_open_answers_are_judged(tmp_path):
    cfg = load_config(CONFIG, [f"data.root={SAMPLE}", "judge.model=tiny"])
    samples = read_vqa_rad(SAMPLE, "test")
    asked, texts, prompts = open_answers.open_texts(open_answers.open_judge(cfg, tmp_path), samples, [str(i) for i in range(len(samples))])
    assert asked == OPEN and len(prompts) == len(OPEN) < len(samples)
    assert texts == [str(i) for i, sample in enumerate(samples) if sample.answer_type == samples_of_sets.OPEN]


def test_a_config_without_the_group_judges_nothing(tmp_path):
    cfg = load_config(CONFIG, [f"data.root={SAMPLE}"])
    with cfg.unlocked():
        del cfg["judge"]
    assert run.open_evaluation(cfg, tmp_path / "w").scorer.judge is None
