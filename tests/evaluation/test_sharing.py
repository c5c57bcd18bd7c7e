"""An evaluation by several processes: who is asked what, how answers come together, and two real processes against one."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.errors import UserError
from llavamed_jax.evaluation.answering import sharing
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.evaluation.answering.resume import Partial
from llavamed_jax.parallel import distributed
from tests.support import xla
from tests.support.fake_eval import Model
from tests.support.several import ends, two
from tests.support.training_runs import write_start

ROOT = Path(__file__).resolve().parents[2]
DEMO = ["--config", "configs/eval/vqa_rad.py:demo", "--checkpoint", "runs/x"]


# --- shares ---


def test_shares_keep_images_together_and_are_even():
    images = ["a", "b", "a", "c", "d", "a", "e", "b", "f", "a"]
    shares = [sharing.share(images, k, 3) for k in range(3)]
    assert shares == [[0, 2, 5, 9], [1, 6, 7], [3, 4, 8]]
    for images in (["a"] * 5, [str(i % 7) for i in range(100)], [f"{i * i % 31}" for i in range(451)], []):
        shares = [sharing.share(images, k, 4) for k in range(4)]
        assert sorted(i for share in shares for i in share) == list(range(len(images)))
        owners = [{images[i] for i in share} for share in shares]
        assert sum(map(len, owners)) == len(set(images)), "an image has one owner"
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert sharing.share(["a", "b"]) == [0, 1]


def test_answers_come_together_in_the_first(monkeypatch):
    mine = {0: [0, 2], 1: [1, 3, 4]}
    answers = [{0: Answer("a", "stop", 3), 2: Answer("ü", "length"), 1: Answer("taken over, and not its own", "stop")},
               {1: Answer("b", "stop"), 3: Answer("d", "stop")}]
    sent = {}

    def collected(k, everyone):
        monkeypatch.setattr(distributed, "process_count", lambda: 2)
        monkeypatch.setattr(distributed, "gather", lambda value: (sent.__setitem__(k, value), everyone)[1])
        return sharing.collected(5, mine[k], answers[k], {4: UserError("it is broken")} if k else {})

    assert collected(1, []) == (dict.fromkeys(range(5), sharing.ELSEWHERE), {})
    with pytest.raises(UserError, match="the processes disagree about 3 of 5 questions"):
        collected(0,
                  [b"[{}, {}]",
                   b'[{"0": {"text": "", "finish_reason": "stop"}, "2": {"text": "", "finish_reason": "stop"}}, {}]'])
    found, failed = collected(0, [sent[0], sent[1]])
    assert found == {0: answers[0][0], 2: answers[0][2], 1: answers[1][1], 3: answers[1][3]}
    assert failed.keys() == {4} and str(failed[4]) == "it is broken"


def test_a_partial_file_takes_over_what_others_have(tmp_path, capsys):
    final = tmp_path / "p.jsonl"
    for k in range(3):
        Partial(final, {"key": 1}, k).add(k, Answer(str(k), "stop"))
    Partial(final, {"key": 2}, 3).add(9, Answer("of another key", "stop"))
    (tmp_path / "p.jsonl.x.partial").write_text("somebody else's")
    capsys.readouterr()
    again = Partial(final, {"key": 1}, 1)
    assert {i: answer.text for i, answer in again.answers.items()} == {0: "0", 1: "1", 2: "2"}
    assert capsys.readouterr().err == f"{again.path}: 3 answers of an earlier start are reused\n"
    Partial(final, {"key": 1}, 2).add(5, Answer("later", "stop"))
    assert len(again) == 4, "what is on the disk"
    assert again.path.name == "p.jsonl.1.partial" and len(again.path.read_text().splitlines()) == 2, "each keeps its own"
    again.remove()
    assert [file.name for file in tmp_path.iterdir()] == ["p.jsonl.x.partial"]


# --- two processes ---


def kept(workdir):
    return {file.name: len(file.read_text().splitlines()) - 1 for file in workdir.glob("predictions.jsonl*.partial")}


@pytest.fixture
def by_one(tmp_path, monkeypatch):
    """What one process makes of the demo's questions, with a model that computes nothing."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli.common, "load_assistant", lambda args: Model(0, -1))
    assert cli.main([*DEMO, "--workdir", str(tmp_path / "one")]) == 0
    return tmp_path / "one"


def test_two_processes_answer_as_one_and_one_that_is_killed_ends_both(by_one, tmp_path):
    """Killed, started again, finished: the predictions are those of one process, and every file is there once."""
    tmp_path = tmp_path / "two"
    running = two("tests.support.fake_eval", "0.1", "--", *DEMO, "--workdir", str(tmp_path), HEARTBEAT="4")
    deadline = time.monotonic() + 60
    while (len(kept(tmp_path)) < 2 or min(kept(tmp_path).values()) < 5) and time.monotonic() < deadline:
        time.sleep(0.05)
    running[1].kill()
    begun = time.monotonic()
    (first, _, said), _ = ends(running)
    assert first == 1 and time.monotonic() - begun < 60
    assert said.splitlines()[-1] == ("error: process 1 has ended or cannot be reached, so process 0 ends too; the saved state is kept, "
                                     "and starting all processes again resumes from it")
    assert "coordination_service" not in said and "stack trace" not in said and "Traceback" not in said
    before = kept(tmp_path)
    assert set(before) == {"predictions.jsonl.partial", "predictions.jsonl.1.partial"} and min(before.values()) >= 5

    (first, out, said), (second, silent_out,
                         silent_err) = ends(two("tests.support.fake_eval", "0", "--", *DEMO, "--workdir", str(tmp_path)))
    assert (first, second) == (0, 0), said + silent_err
    assert silent_out == silent_err == "" and "report: " in out
    is_asked_still = before["predictions.jsonl.partial"] < 71  # it may have been done with its share before the other was killed
    assert ("questions, process 0 of 2: 71 of 71" in said) == is_asked_still
    # Process 0 takes over what both had answered, which may since have grown by what process 1 answers now.
    assert int(said.partition(" answers of an earlier start")[0].rsplit(" ", 1)[-1]) >= sum(before.values())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.json", "predictions.jsonl", "report.html",
                                                                "tensorboard"]
    for name in ("predictions.jsonl", "metrics.json"):
        assert (tmp_path / name).read_text() == (by_one / name).read_text()


def test_a_process_that_fails_says_why_to_all(tmp_path):
    begun = time.monotonic()
    (first, _, said), (second, _,
                       said_there) = ends(two("tests.support.fake_eval", "0.05", "1", "--", *DEMO, "--workdir", str(tmp_path)))
    assert (first, second) == (1,
                               1) and time.monotonic() - begun < 120  # the start of both, on a busy machine, included
    assert re.fullmatch(rf"error: (the model is tired; \d+ answers are kept in {tmp_path})\n", said_there)
    # Who started the first process says it, and a line of its progress may still be under way.
    assert f"error: process 1 failed: {said_there.removeprefix('error: ').strip()}" in said.splitlines()


def test_processes_that_were_started_with_something_else_end_before_anything_is_asked(tmp_path):
    """A flag and a key of the config that both have, and what only one has: all of it is named at once."""
    both, first, second = DEMO[:2], DEMO[2:], ["--checkpoint", "runs/y", "--config.generation.max_new_tokens=7", "--config.seed=1",
                                               "--dtype", "bfloat16", "--control", "image"]
    found = ends(two("tests.support.fake_eval", "0.1", "--", *both, "--workdir", str(tmp_path / "w"), only_first=first, only_second=second))
    for status, _, said in found:
        assert status == 2 and "process 1 was started differently from process 0: " in said
        for named in ("'generation.max_new_tokens' (16 in process 0, 7 in process 1)", "--dtype (missing in process 0)",
                      "the config key 'seed' (0 in process 0, 1 in process 1)", "--control ([] in process 0, ['image'] in process 1)",
                      "--checkpoint ('runs/x' in process 0, 'runs/y' in process 1)"):
            assert named in said, said
        assert "the same was expected in all processes" in said and "Traceback" not in said
    assert found[0][2].splitlines()[-1] == found[1][2].splitlines()[-1]
    assert not list(tmp_path.glob("w/*"))


def test_a_signal_to_one_stops_both(tmp_path):
    running = two("tests.support.fake_eval", "0.1", "--", *DEMO, "--workdir", str(tmp_path))
    deadline = time.monotonic() + 60
    while (len(kept(tmp_path)) < 2 or min(kept(tmp_path).values()) < 1) and time.monotonic() < deadline:
        time.sleep(0.05)
    running[1].send_signal(signal.SIGTERM)
    (first, _, said), (second, _, silent) = ends(running)
    assert (first, second, silent) == (75, 75, "") and "answers are kept in" in said.splitlines()[-1]


@pytest.mark.slow
def test_two_processes_with_a_real_model_answer_as_one(tmp_path):
    """Four devices each, over two of which the rows of an engine lie."""
    start = write_start(tmp_path / "start")
    command = ["--config", "configs/eval/vqa_rad.py:demo", "--config.generation.max_new_tokens=4", "--checkpoint",
               str(start),
               "--mesh", "data=4", "--control", "image"]
    four = {"XLA_FLAGS": xla.flags(4)}
    running = two("llavamed_jax.cli.eval", *command, "--workdir", str(tmp_path / "two"), **four)
    assert [status for status, *_ in ends(running)] == [0, 0]
    done = subprocess.run([sys.executable, "eval.py", *command, "--workdir", str(tmp_path / "one")], cwd=ROOT,
                          env={**os.environ, **four},
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("predictions.jsonl", "predictions_control_image.jsonl", "metrics.json"):
        assert (tmp_path / "two" / name).read_text() == (tmp_path / "one" / name).read_text()
    texts = [json.loads(line)["text"] for line in (tmp_path / "two" / "predictions.jsonl").read_text().splitlines()]
    assert len(set(texts)) > 5
