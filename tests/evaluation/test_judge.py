"""The judge: each text asked about once, again only where the reply could not be read, and never paid for twice."""

import contextlib
import json
from collections import Counter
from dataclasses import replace

import pytest

from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.evaluation.judging.judge import Judge, check_answered, report_unscored
from llavamed_jax.evaluation.judging.prompts import CHAT_PROMPT, read_prompt, read_scores
from llavamed_jax.evaluation.judging.settings import judge_settings
from llavamed_jax.openai_client.cache import ReplyCache, request_key
from llavamed_jax.openai_client.client import ServiceError
from llavamed_jax.openai_client.replies import Reply
from tests.support.openai_server import OpenAiServer

PROMPT = replace(read_prompt("", CHAT_PROMPT), system="System.", reminder="Mind the form.")


def make(workdir, server=None, prompt=PROMPT, **changes):
    cfg = judge_settings()
    cfg.update(changes | {"model": changes.get("model", "tiny"), "endpoint": server.url if server else "http://127.0.0.1:9/v1"})
    found = Judge(cfg, prompt, read_scores, workdir)
    found.service.backoff = 0.01
    return found


def asked(server) -> Counter:
    """The texts that were answered, and how often."""
    return Counter(each.body["messages"][1]["content"] for each in server.log if each.fault is None)


def test_verdicts_come_in_order_and_say_what_was_said(tmp_path):
    with OpenAiServer(lambda body: body["messages"][1]["content"] + "\nBecause.") as server:
        found = make(tmp_path, server, max_tokens=55, temperature=0.5).verdicts(["1 2", "9,10", "3 4.5"])
    assert [verdict.value for verdict in found] == [(1, 2), (9, 10), (3, 4.5)]
    assert found[1].text == "9,10\nBecause." and found[1].first_text is None and not found[1].is_asked_again
    assert (found[0].prompt_tokens, found[0].completion_tokens, found[0].finish_reason) == (7, 3, "stop")
    body = server.log[0].body
    assert body["messages"][0] == {"role": "system", "content": "System."} and body["model"] == "tiny"
    assert (body["max_tokens"], body["temperature"]) == (55, 0.5)
    assert len(server.log) == 3


def test_what_cannot_be_read_is_asked_for_once_more_and_then_stays_unscored(tmp_path, capsys):
    def answer(body):
        text = body["messages"][1]["content"]
        return "5 6" if text == "good" or text == "halfMind the form.\n" else "Both are fine."

    with OpenAiServer(answer) as server:
        judge = make(tmp_path, server)
        found = judge.verdicts(["good", "half", "bad"])
    assert [verdict.value for verdict in found] == [(5, 6), (5, 6), None]
    assert [verdict.is_asked_again for verdict in found] == [False, True, True]
    assert (found[1].first_text, found[1].text) == ("Both are fine.", "5 6") and found[2].text == "Both are fine."
    assert found[1].prompt_tokens == 14, "both replies were paid for"
    assert asked(server) == {text: 1 for text in ("good", "half", "bad", "halfMind the form.\n", "badMind the form.\n")}
    assert judge.summary(found) | {"endpoint": ""} == {
        "model": "tiny", "endpoint": "", "temperature": 0.0, "wording": PROMPT.wording, "n_asked_again": 2,
        "prompt_tokens": 35, "completion_tokens": 13, "dollars": None,
    }  # fmt: skip
    report_unscored(found, [11, 12, 13], "answers")
    error = capsys.readouterr().err
    assert "for 2 of 3 answers the judge's reply could not be read" in error and "warning: unscored, 1 of 3 answers: 13" in error


def test_equal_texts_are_asked_about_and_paid_for_once(tmp_path):
    with OpenAiServer(lambda body: "4 4" if body["messages"][1]["content"] != "b" else "none") as server:
        judge = make(tmp_path, server, price_prompt=1e6, price_answer=1e6)
        texts = ["a", "b", "a", "b", "a"]
        assert str(judge.estimate(texts)).startswith("2 requests and 0 cached replies")
        found = judge.verdicts(texts)
    assert [verdict.value for verdict in found] == [(4, 4)] * 5
    assert asked(server) == {"a": 1, "b": 1, "bMind the form.\n": 1}
    cost, resumed = judge.summary(found), make(tmp_path, price_prompt=1e6, price_answer=1e6)
    assert (cost["prompt_tokens"], cost["completion_tokens"], cost["dollars"]) == (3 * 7, 2 + 1 + 2, 26)
    assert (judge.service.prompt_tokens, judge.service.completion_tokens) == (21, 5), "as the server counted"
    assert resumed.summary(resumed.verdicts(texts)) == cost | {"endpoint": resumed.service.url}


def test_replies_are_kept_for_a_later_start(tmp_path):
    def answer(body):
        return "5 6" if "good" in body["messages"][1]["content"] else "none"

    with OpenAiServer(answer) as server:
        first = make(tmp_path, server).verdicts(["good", "bad"])
    with OpenAiServer(answer) as other:  # another address: a judge is known by its name
        judge = make(tmp_path, other)
        assert str(judge.estimate(["good", "bad"])) == "no requests; 3 replies are cached"
        assert judge.verdicts(["good", "bad"]) == first and judge.n_kept == 3
        assert not other.log
        make(tmp_path, other, temperature=0.1).verdicts(["good"])
        make(tmp_path, other, max_tokens=9).verdicts(["good"])
        make(tmp_path, other, prompt=replace(PROMPT, system="Other.")).verdicts(["good"])
        assert len(other.log) == 3, "another setting or system message is another question"
    with pytest.raises(ServiceError, match="cannot be reached"):
        make(tmp_path, model="large").verdicts(["good"])


def test_a_file_of_replies_may_be_shared(tmp_path):
    with OpenAiServer(lambda body: "5 6") as server:
        for name in ("a", "b"):
            judge = make(tmp_path / name, server, cache=str(tmp_path / "kept" / "replies.jsonl"))
            judge.verdicts(["x"])
    assert len(server.log) == 1 and not (tmp_path / "b").exists()


def test_half_a_line_is_passed_over_and_the_file_only_grows(tmp_path, capsys):
    path = tmp_path / "replies.jsonl"
    cache = ReplyCache(path)
    replies = {key: Reply(f"text \u2028 {key} \ud800", "stop", 1, 2) for key in "abc"}
    for key, reply in replies.items():
        cache.add(key, reply)
    whole = path.read_bytes()
    half = whole[:-9]
    path.write_bytes(half)
    cache = ReplyCache(path)
    assert "1 of 3 lines are not complete replies and are skipped" in capsys.readouterr().err
    assert cache.get("a") == replies["a"] and "c" not in cache and cache.get("c") is None
    cache.add("c", replies["c"])
    assert path.read_bytes().startswith(half + b"\n") and {key: ReplyCache(path).get(key) for key in "abc"} == replies


_NO_NUMBER = '{"key": "k", "text": "x", "finish_reason": "stop", "prompt_tokens": "x", "completion_tokens": 1}'


@pytest.mark.parametrize("line", ["[]", "1", "{}", '{"key": "k"}', _NO_NUMBER, "\xff"])
def test_lines_that_are_no_replies_count_for_nothing(tmp_path, line, capsys):
    path = tmp_path / "replies.jsonl"
    ReplyCache(path).add("a", Reply("x", "stop"))
    path.write_bytes(line.encode("latin-1") + b"\n" + path.read_bytes())
    cache = ReplyCache(path)
    assert cache.get("a") == Reply("x", "stop") and "k" not in cache
    assert "1 of 2 lines" in capsys.readouterr().err


def test_replies_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="r.jsonl cannot be read: Not a directory"):
        ReplyCache(tmp_path / "file" / "r.jsonl")
    cache = ReplyCache(tmp_path / "r.jsonl")
    (tmp_path / "r.jsonl").mkdir()
    with pytest.raises(UserError, match="r.jsonl cannot be written: "):
        cache.add("a", Reply("x", "stop"))


def test_a_cache_that_is_a_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="is a directory; a file was expected"):
        ReplyCache(tmp_path)


def test_a_key_is_of_model_messages_and_settings():
    messages, settings = [{"role": "user", "content": "x"}], {"max_tokens": 1, "temperature": 0.0}
    keys = [
        request_key("a", messages, settings), request_key("b", messages, settings),
        request_key("a", [{"role": "user", "content": "y"}], settings), request_key("a", messages, settings | {"temperature": 1.0}),
    ]  # fmt: skip
    assert len(set(keys)) == 4 and keys[0] == request_key("a", messages, dict(reversed(settings.items())))


def test_an_estimate_is_counted_by_hand(tmp_path):
    judge = make(tmp_path, max_tokens=100, price_prompt=30.0, price_answer=60.0)
    found = judge.estimate(["x" * 400, "é" * 100])
    # "System." is 7 bytes: 2 tokens. 400 bytes are 100, 200 bytes are 50; each of the four messages takes 4 more.
    assert (found.requests, found.kept, found.prompt_tokens, found.answer_tokens) == (2, 0, 2 + 100 + 2 + 50 + 4 * 4, 200)
    assert found.dollars == pytest.approx((170 * 30 + 200 * 60) / 1e6)
    assert str(found) == (
        "2 requests and 0 cached replies; about 170 prompt tokens (one per 4 bytes) and at most 200 reply tokens,"
        " not counting repeated requests: at most 0.02 US dollars"
    )
    assert "cost unknown" in str(make(tmp_path).estimate(["x"]))
    assert not list(tmp_path.iterdir()), "nothing is written for an estimate"


def test_an_estimate_counts_what_is_left_to_ask(tmp_path):
    judge = make(tmp_path)
    for text, reply in (("a", "5 5"), ("b", "none")):
        judge.cache.add(request_key("tiny", PROMPT.messages(text), judge.settings), Reply(reply, "stop"))
    found = judge.estimate(["a", "b", "c"])
    assert (found.requests, found.kept) == (2, 2), "b is to be asked about again, c for the first time"


def test_faults_cost_repetitions_of_the_failed_alone(tmp_path):
    texts = [f"{i % 9 + 1} {i % 10 + 1} {i}" for i in range(60)]

    def answer(body):
        first, second, _ = body["messages"][1]["content"].split()[:3]
        return f"{first} {second}"

    with OpenAiServer(answer, fault_rate=0.3, slow=20.0, seed=616) as server:
        found = make(tmp_path, server, timeout=2, concurrency=4).verdicts(texts)
    assert [verdict.value for verdict in found] == [(i % 9 + 1, i % 10 + 1) for i in range(60)]
    assert len(server.faults_met()) == 8, "every kind of fault was met"
    assert asked(server) == {text: 1 for text in texts}
    assert len(server.log) == 60 + server.faults_met().total()


def test_a_request_that_is_refused_fails_alone_and_is_asked_again_by_the_next_start(tmp_path):
    refused = {"content": "filtered"}

    def answer(body):
        return {"error": {"message": "content management policy"}} if body["messages"][1]["content"] in refused.values() else "5 6"

    with OpenAiServer(answer) as server:
        judge = make(tmp_path, server, retries=1)
        found = judge.verdicts(["a", "filtered", "b"])
        assert [verdict.value for verdict in found] == [(5, 6), None, (5, 6)]
        assert "content management policy" in found[1].error and found[1].text == "" and not found[1].is_asked_again
        with pytest.raises(UserError, match="^1 of 3 answers were not judged and are reported as unscored: .*policy.*run again"):
            check_answered(found, "answers")
        refused.clear()
        again = make(tmp_path, server).verdicts(["a", "filtered", "b"])
    check_answered(again, "answers")
    assert [verdict.value for verdict in again] == [(5, 6)] * 3
    assert asked(server) == {"a": 1, "b": 1, "filtered": 3}


def test_what_was_said_before_the_judge_went_away_is_kept(tmp_path):
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(OpenAiServer(lambda body: "5 6", key="right-key-1", models=("tiny",)))
        with pytest.raises(UserError, match="Incorrect API key"):
            make(tmp_path, server).verdicts(["a"])
        stack.enter_context(pytest.MonkeyPatch.context()).setenv("JUDGE_API_KEY", "right-key-1")
        assert make(tmp_path, server).verdicts(["a"])[0].value == (5, 6)
    lines = (tmp_path / "judge_cache.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["5 6"] and "right-key" not in lines[0]


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"model": ""}, "judge.model is empty"),
        ({"max_tokens": 0}, "judge.max_tokens is 0"),
        ({"temperature": -1.0}, "judge.temperature is -1.0"),
        ({"temperature": float("nan")}, "judge.temperature is nan"),
        ({"price_prompt": -1.0}, "judge.price_prompt is -1.0"),
        ({"price_answer": float("inf")}, "judge.price_answer is inf"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"timeout": 0.0}, "timeout is 0.0"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_settings_that_are_wrong(tmp_path, changes, sentence):
    with pytest.raises(UsageError) as error:
        make(tmp_path, **changes)
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_an_address_that_is_none(tmp_path):
    for endpoint in ("", "api.openai.com", "ftp://x"):
        cfg = judge_settings()
        cfg.update({"model": "tiny", "endpoint": endpoint})
        with pytest.raises(UsageError):
            Judge(cfg, PROMPT, read_scores, tmp_path)
