"""An evaluation's workdir that somebody removes, moves or replaces meanwhile: no sentence names a file or an answer that is not there."""

import errno
import fcntl
import json
import os
import shutil
import signal

import pytest

from llavamed_jax.cli import eval as cli
from llavamed_jax.cli import eval_parts
from llavamed_jax.evaluation import results
from llavamed_jax.evaluation.answering.answerer import Answer
from llavamed_jax.openai_client.cache import ReplyCache
from llavamed_jax.openai_client.replies import Reply
from tests.evaluation.test_results import ROOT, SAMPLE, SAMPLES, Says

GONE = ("was removed, moved or replaced during the evaluation, together with the answers saved there; no results are "
        "written")


class Acting(Says):
    """Says one thing, and does something when a question is asked for the n-th time."""

    def __init__(self, number, act):
        super().__init__("yes")
        self.number, self.act = number, act

    def answers(self, questions, asked, generation, failed):
        for i in asked:
            self.seen += 1
            if self.seen == self.number:
                self.act()
            yield i, Answer(self.text, "stop")


@pytest.fixture
def evaluate(monkeypatch):
    def evaluate(workdir, number, act, *more):
        model = Acting(number, act)
        monkeypatch.setattr(eval_parts, "local", lambda args: model)
        config = str(ROOT / "configs" / "eval" / "vqa_rad.py")
        words = ["--config", config, f"--config.data.root={SAMPLE}", "--workdir", str(workdir), "--checkpoint", str(SAMPLE), *more]
        return cli.main(words), model
    return evaluate


def ways(work, elsewhere):
    """How a workdir goes, by name."""
    return {"removed": lambda: shutil.rmtree(work), "moved": lambda: work.rename(elsewhere),
            "replaced": lambda: (work.rename(elsewhere), shutil.copytree(elsewhere, work)),
            "emptied": lambda: (shutil.rmtree(work), work.mkdir())}


@pytest.mark.parametrize("number", [1, 3, len(SAMPLES), len(SAMPLES) + 2], ids=["first", "third", "last", "of the control"])
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_workdir_that_goes_ends_the_evaluation(evaluate, tmp_path, capsys, how, number):
    work = tmp_path / "w"
    status, model = evaluate(work, number, ways(work, tmp_path / "elsewhere")[how], "--control", "image")
    said = capsys.readouterr()
    assert status == 1 and said.err.splitlines()[-1] == f"error: the workdir {work} {GONE}"
    assert "report:" not in said.out and model.seen <= number + 1, "what is asked after that would be lost"
    assert not (work / "metrics.json").exists() and work.exists() == (how == "replaced")


@pytest.mark.parametrize("how", ["removed", "moved", "emptied"])
def test_answers_that_are_gone_are_not_said_to_be_kept(evaluate, tmp_path, capsys, how):
    """A signal: not 75, for nothing is there to go on with."""
    work = tmp_path / "w"
    go = ways(work, tmp_path / "elsewhere")[how]
    status, _ = evaluate(work, 5, lambda: (go(), os.kill(os.getpid(), signal.SIGTERM)))
    said = capsys.readouterr()
    assert status == 1 and f"error: the workdir {work} {GONE}" in said.err and "are kept in" not in said.err


@pytest.mark.parametrize("moment", ["while they are written", "when they are written"])
def test_results_that_are_not_there_are_not_reported(evaluate, tmp_path, monkeypatch, capsys, moment):
    work, replace, done = tmp_path / "w", os.replace, []

    def act(source, target):
        is_last = str(target) == str(work / "metrics.json")
        if moment == "while they are written" and is_last:
            shutil.rmtree(work)
        replace(source, target)
        if is_last:
            done.append(1)
            (work / "report.html").unlink()
    monkeypatch.setattr(results.os, "replace", act)
    status, _ = evaluate(work, -1, None)
    said = capsys.readouterr()
    assert status == 1 and "report:" not in said.out
    if moment == "while they are written":
        assert said.err.splitlines()[-1] == f"error: the workdir {work} {GONE}"
    else:
        sentence = f"{work}/report.html was removed right after it was written; {len(SAMPLES)} answers are kept in {work}"
        assert done and said.err.splitlines()[-1] == f"error: {sentence}"


def test_a_file_system_without_locks_is_said_and_the_evaluation_goes_on(evaluate, tmp_path, monkeypatch, capsys):
    def flock(descriptor, operation):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", flock)
    status, _ = evaluate(tmp_path / "w", -1, None)
    assert status == 0
    warning = f"warning: {tmp_path / 'w'} cannot be locked (Operation not supported), so a second run"
    assert capsys.readouterr().err.count(warning) == 1


@pytest.mark.parametrize("is_stopped", [False, True])
def test_a_file_of_answers_that_is_removed_is_written_anew(evaluate, tmp_path, capsys, is_stopped):
    work = tmp_path / "w"
    path = work / "predictions.jsonl.partial"

    def act():
        path.unlink()
        if is_stopped:
            os.kill(os.getpid(), signal.SIGTERM)
    status, _ = evaluate(work, 5, act)
    said = capsys.readouterr().err
    assert f"warning: {path} was removed during the evaluation; it is written again with its 4 answers" in said
    if is_stopped:
        assert status == 75 and "5 answers are kept" in said
        status, model = evaluate(work, -1, None)
        assert status == 0 and model.seen == len(SAMPLES) - 5, "they are kept"
    assert status == 0 and len((work / "predictions.jsonl").read_text().splitlines()) == len(SAMPLES)


def test_replies_that_were_paid_for_are_written_anew(tmp_path, capsys):
    path = tmp_path / "judge_cache.jsonl"
    cache = ReplyCache(path)
    for key in "abc":
        if key == "c":
            path.unlink()
        cache.add(key, Reply(key, "stop", 1, 1))
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "b", "c"]
    assert f"warning: {path} was removed; it is written again with its 2 replies" in capsys.readouterr().err
