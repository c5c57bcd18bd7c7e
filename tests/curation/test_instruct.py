"""`instruct` against a server with faults: complete, nothing asked twice, records that training reads; batches alike."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from llavamed_jax.curation import __main__ as command_line
from llavamed_jax.curation import instruct_batch, turns
from llavamed_jax.curation.figure_file import Figure, FigureFile
from llavamed_jax.curation.instruct_cost import Budget, Prices
from llavamed_jax.curation.instruct_prompt import OWN, read_instruct_prompt
from llavamed_jax.datasets.records import open_records
from llavamed_jax.datasets.training import read_training
from llavamed_jax.errors import UserError
from llavamed_jax.openai_client.cache import ReplyCache
from llavamed_jax.openai_client.replies import Reply
from llavamed_jax.pipeline import lengths
from llavamed_jax.processor import Processor
from tests.support.figure_records import conversation, figure, number_of, server, write_lines
from tests.support.openai_server import FAULTS, OpenAiServer, Raw

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad"


def words(tmp_path, url=None, *more, out="out", concurrency=16):
    where = ["--endpoint", url, "--timeout", "300", "--retries", "20", "--concurrency", str(concurrency)] if url else []
    return ["instruct", "--figures", str(tmp_path / "figures.jsonl"), "--out", str(tmp_path / out), "--model", "tiny", *where, *more]


@pytest.fixture
def fast(monkeypatch):
    """Requests are sent again at once."""
    from llavamed_jax.openai_client import client

    monkeypatch.setattr(client.random, "uniform", lambda low, high: 0.01)


def made(tmp_path, out="out"):
    return json.loads((tmp_path / out / "conversations.json").read_text(encoding="utf-8"))


def check(tmp_path, count, out="out"):
    """What is made of `count` figures, whichever way the replies came."""
    records = open_records(tmp_path / out / "conversations.json", tmp_path)
    read = [records[i] for i in range(len(records))]
    wanted = [n for n in range(count) if n % 20 not in (5, 7, 11)]
    by_id = {record["id"]: record for record in read}
    assert sorted(by_id) == sorted(figure(n)["pair_id"] for n in wanted) and len(read) == len(wanted)
    for n in wanted:
        record = by_id[figure(n)["pair_id"]]
        assert record["image"] == [str(tmp_path / f"{figure(n)['pair_id']}.jpg")] and "surplus" not in record
        assert len(record["conversations"]) == (4 if n % 20 in (3, 17) else 6)
        assert sum("<image>" in turn["value"] for turn in record["conversations"]) == 1
        assert "<image>" in record["conversations"][0]["value"]
        assert record["conversations"][1]["value"] == ("On the left." if n % 20 == 3 else f"It is image {n} with mRNA.")
    counts = json.loads((tmp_path / out / "summary.json").read_text(encoding="utf-8"))
    per = count // 20
    assert counts["replies"] == count and counts["conversations"] == len(wanted)
    assert counts["dropped_pairs"] == {turns.QUOTES: per, turns.REFUSES: 3 * per, turns.CUT: per}
    assert counts["replies_without_a_conversation"] == {"no turns in the reply": per, "no pair left": per, "empty reply": per}
    lost = [json.loads(line) for line in (tmp_path / out / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(each["reason"] for each in lost) == Counter(counts["dropped_pairs"]) + Counter(counts["replies_without_a_conversation"])


def test_many_figures_with_faults_and_a_restart(tmp_path, fast, capsys):
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(160)])
    faults = tuple(each for each in FAULTS if each != "slow")  # a timeout that a busy machine does not exceed is too long for this test
    with server(fault_rate=0.2, faults=faults, retry_after=0.01) as found:
        assert command_line.main(words(tmp_path, found.url, "--max_figures", "70")) == 0
        first = len(found.log)
        assert command_line.main(words(tmp_path, found.url)) == 0
        assert not found.asked_without_need() and len(found.log) > first > 70
        assert set(found.faults_met()) == set(faults)
        assert len({number_of(each.body) for each in found.log if each.fault is None}) == 160
        before = len(found.log)
        whole = (tmp_path / "out" / "conversations.json").read_bytes()
        assert command_line.main(words(tmp_path, found.url)) == 0  # nothing is left
        assert len(found.log) == before and (tmp_path / "out" / "conversations.json").read_bytes() == whole
    check(tmp_path, 160)
    processor = Processor.load(SAMPLES / "tokenizer.model", template="v1.5:mistral_instruct", image_size=28)
    measured = lengths.measure(read_training(tmp_path / "out" / "conversations.json", tmp_path), processor, 2048)  # as train.py does
    assert not measured.damaged and len(measured.tokens) == measured.images.sum() == 136 and not measured.truncated
    assert "160 replies are kept" in capsys.readouterr().out


def test_replies_that_do_not_come_in_time_are_asked_for_again(tmp_path, fast):
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(20)])
    with server(fault_rate=0.3, faults=("slow",), slow=60, seed=251) as found:
        argv = words(tmp_path, found.url)
        argv[argv.index("--timeout") + 1] = "0.7"
        assert command_line.main(argv) == 0
        assert found.faults_met()["slow"] >= 2
    check(tmp_path, 20)


def test_the_domains_take_turns_and_the_request_has_the_originals_shape(tmp_path):
    write_lines(tmp_path / "figures.jsonl", [*(figure(n) for n in range(0, 20, 5)), figure(1), figure(6), figure(2)])
    with server() as found:
        assert command_line.main(words(tmp_path, found.url, "--max_figures", "5", concurrency=1)) == 0
        assert [number_of(each.body) for each in found.log] == [0, 1, 2, 5, 6]  # chest X-ray, MRI, CT, chest X-ray, MRI
        assert command_line.main(words(tmp_path, found.url, "--without_mentions", out="captions")) == 0
    bodies = {number_of(each.body): each.body for each in found.log[:5]}
    assert all([each["role"] for each in body["messages"]] == ["system", *["user", "assistant"] * 8, "user"] for body in bodies.values())
    assert bodies[1]["messages"][-1]["content"] == ("Figure Caption:\nFigure 1: Caption number 1 of a mri image.\n\n"
                                                    "Figure Context:\n\t- Finding 1 is shown.")
    assert bodies[0]["messages"][-1]["content"] == "Figure Caption:\nFigure 0: Caption number 0 of a chest_xray image."
    assert bodies[1]["temperature"] == 0 and bodies[1]["max_tokens"] == 1024
    assert not any("Figure Context" in each["content"] for logged in found.log[5:] for each in logged.body["messages"])


def test_killed_runs_ask_about_no_figure_again(tmp_path):
    """Every reply that had been stored is kept; at most the requests in flight are repeated."""
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(60)])
    with server(delay=0.02) as found:
        for number in (signal.SIGKILL, signal.SIGTERM):
            argv = words(tmp_path, found.url, concurrency=4)
            child = subprocess.Popen([sys.executable, "-m", "llavamed_jax.curation", *argv], env=os.environ,
                                     stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, encoding="utf-8")
            begun, deadline = len(found.log), time.monotonic() + 60
            while len(found.log) < begun + 15 and time.monotonic() < deadline:
                time.sleep(0.01)
            child.send_signal(number)
            said = child.communicate(timeout=60)[1]
            assert child.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 75), said
        assert "run again to continue" in said
        kept = len(ReplyCache(tmp_path / "out" / "replies.jsonl"))
        assert 20 <= kept < 60 and len(made(tmp_path)) > 10  # what there is is written after a signal
        before = len(found.log)
        assert command_line.main(words(tmp_path, found.url)) == 0
        assert len(found.log) - before == 60 - kept
        assert len(found.asked_without_need()) <= 8  # four requests in flight at each stop
    check(tmp_path, 60)


def test_the_batch_path_makes_the_same(tmp_path, fast, monkeypatch, capsys):
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(100)])
    monkeypatch.setattr(instruct_batch, "MOST_REQUESTS", 40)
    monkeypatch.setattr(instruct_batch.Batches.write, "__defaults__", (40, instruct_batch.MOST_BYTES))
    assert command_line.main(words(tmp_path, None, "--batch", "write")) == 0
    files = sorted((tmp_path / "out" / "batch").glob("requests-*.jsonl"))
    requests = [[json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] for file in files]
    assert [len(each) for each in requests] == [40, 40, 20]
    flat = sum(requests, [])
    assert len({each["custom_id"] for each in flat}) == 100
    assert all((each["method"], each["url"], each["body"]["model"]) == ("POST", "/v1/chat/completions", "tiny") for each in flat)
    assert flat[0]["body"]["max_completion_tokens"] == 1024 and len(flat[0]["body"]["messages"]) == 18

    assert command_line.main(words(tmp_path, None, "--batch", "write")) == 0  # all are in a batch: nothing is written twice
    assert "100 figures are in batches" in capsys.readouterr().out and len(list((tmp_path / "out" / "batch").iterdir())) == 3
    with server() as found:
        assert command_line.main(words(tmp_path, found.url)) == 0 and not found.log  # nor asked about beside the batch

        def result(number, request, status=200):
            body = found.completion(request["body"]) if status == 200 else {"error": {"message": "no"}}
            return json.dumps({"id": f"r{number}", "custom_id": request["custom_id"], "error": None,
                               "response": {"status_code": status, "request_id": "x", "body": body}}) + "\n"

        lines = [result(n, request, 500 if n < 10 else 200) for n, request in enumerate(flat)]
    lines += [lines[50], '{"id": "r', "[]\n", "\n", result(999, flat[0] | {"custom_id": "another"}, 429),
              json.dumps({"id": "e", "custom_id": flat[10]["custom_id"], "response": None, "error": {"code": "batch_expired"}}) + "\n"]
    results = tmp_path / "results.jsonl"
    results.write_text("".join(lines[11:] + lines[:11]), encoding="utf-8")  # in another order
    for _ in range(2):  # the second time changes nothing
        assert command_line.main(words(tmp_path, None, "--batch", "read", "--batch_results", str(results))) == 0
        said = capsys.readouterr().out
        assert len(ReplyCache(tmp_path / "out" / "replies.jsonl")) == 90
    assert "of figures that have a reply" in said and "damaged lines" in said and "not in a batch" in said

    with server() as found:
        assert command_line.main(words(tmp_path, found.url)) == 0
        assert len(found.log) == 10  # those that failed
    check(tmp_path, 100)


def test_batch_files_stay_within_their_limits(tmp_path):
    assert (instruct_batch.MOST_REQUESTS, instruct_batch.MOST_BYTES) == (50_000, 200_000_000)
    figures = [each for _, each in FigureFile(write_lines(tmp_path / "f.jsonl", [figure(n) for n in range(30)])).figures()]
    batches = instruct_batch.Batches(tmp_path)
    figures = [(read_instruct_prompt().key(each), each) for each in figures]
    files = batches.write(figures, lambda each: {"text": "ä" * 100}, most_bytes=7000)
    assert sum(count for _, count in files) == 30 and len(files) > 2
    assert all(file.stat().st_size <= 7000 for file, _ in files)
    with pytest.raises(UserError, match="at most 100 were expected"):
        batches.write(figures, lambda each: {"text": "x" * 100}, most_bytes=100)
    strange = [figure(1)["pair_id"], "x" * 39, "ünï", "x" * 38]
    keys = [read_instruct_prompt().key(Figure(each, "", "c")) for each in strange]
    assert [key.startswith(f"{each}-") for key, each in zip(keys, strange)] == [True, False, False, True]
    assert all(len(key) <= 55 and key.isascii() for key in keys)
    assert all(len(json.loads(line)["custom_id"]) <= 64 for file, _ in files for line in file.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("changes", [{"fig_caption": "Caption number 1, corrected."}, {"in_text_mention": ["Finding 1 is gone."]}, {"fig_label": "Fig. 9"}])
@pytest.mark.parametrize("is_batch", [False, True])
def test_a_figure_that_has_changed_is_asked_again_and_no_other(tmp_path, capsys, changes, is_batch):
    """The reply to the old caption stands under its own key: it is used again when the old caption is back, and its cost counts."""
    rows = [figure(n) for n in range(3)]
    write_lines(tmp_path / "figures.jsonl", rows)
    prices = ["--price_prompt", "1", "--price_answer", "1"]
    with server() as found:
        def go():
            if not is_batch:
                return command_line.main(words(tmp_path, found.url, *prices))
            before = {*(tmp_path / "out/batch").glob("requests-*")}
            status = command_line.main(words(tmp_path, None, "--batch", "write", *prices))
            new = {*(tmp_path / "out/batch").glob("requests-*")} - before
            results = tmp_path / "results.jsonl"
            requests = [json.loads(line) for file in new for line in file.read_text(encoding="utf-8").splitlines()]
            found.log.extend(requests)
            results.write_text("".join(json.dumps({"custom_id": each["custom_id"], "error": None, "response": {
                "status_code": 200, "body": found.completion(each["body"])}}) + "\n" for each in requests), encoding="utf-8")
            return status or command_line.main(words(tmp_path, None, "--batch", "read", "--batch_results", str(results), *prices))

        assert go() == 0 and len(found.log) == 3
        first = made(tmp_path)
        write_lines(tmp_path / "figures.jsonl", [rows[0], rows[1] | changes, rows[2]])
        capsys.readouterr()
        assert go() == 0 and len(found.log) == 4 and len(made(tmp_path)) == 3
        assert "1 request; 2 replies are kept, 1 to questions that this run does not ask; " in capsys.readouterr().out
        write_lines(tmp_path / "figures.jsonl", rows)
        assert go() == 0 and len(found.log) == 4 and made(tmp_path) == first


def test_the_budget_stops_before_it_is_exceeded(tmp_path, capsys):
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(40)])
    prices = ["--price_prompt", "1000", "--price_answer", "1000", "--max_tokens", "100"]  # 7 and 10 to 20 tokens are counted
    with server() as found:
        assert command_line.main(words(tmp_path, found.url, *prices, "--dry_run")) == 0
        dry = capsys.readouterr().out
        assert "40 requests; 0 replies are kept; about" in dry and not (tmp_path / "out").exists()
        assert command_line.main(words(tmp_path, found.url, *prices, "--budget", "1")) == 75  # not even one
        assert not found.log
        assert "the budget of 1.00 US dollars allows no further request; 0 replies are kept" in capsys.readouterr().err
        assert command_line.main(words(tmp_path, found.url, *prices, "--budget", "3", concurrency=1)) == 75
        spent = json.loads((tmp_path / "out" / "summary.json").read_text(encoding="utf-8"))
        assert 2 <= spent["replies"] < 40 and 0 < spent["dollars"] <= 3 and len(found.log) == spent["replies"]
        assert len(made(tmp_path)) == spent["conversations"] > 0
        assert command_line.main(words(tmp_path, found.url, *prices, "--budget", "100")) == 0
        assert len(found.log) == 40
        tokens = sum(-(-len(each["content"].encode()) // 4) + 4 for logged in found.log for each in logged.body["messages"])
    assert f"about {tokens:,} prompt tokens (one per 4 bytes) and at most 4,000 reply tokens" in dry
    assert f"at most {(tokens + 4000) / 1000:,.2f} US dollars" in dry and tokens > 40 * 1000


def costs(tmp_path):
    return [(line["prompt_tokens"], line["completion_tokens"]) for line in map(json.loads, (tmp_path / "out/lost.jsonl").read_text(encoding="utf-8").splitlines())]


@pytest.mark.parametrize(("answer", "lost"), [
    (lambda body: {"choices": []}, None), (lambda body: {"choices": [{"message": {}}], "usage": {"prompt_tokens": 900, "completion_tokens": 50}}, (900, 50)),
    (lambda body: Raw.response(b"<html>"), None), (lambda body: Raw.response(b'{"choices"', headers={"Content-Length": "999"}), None),
    (lambda body: Raw.response(b"", pause=9), None), (lambda body: Raw.response(b'{"error": {"message": "busy"}}', "500 Oops"), ())])
def test_attempts_that_were_paid_for_in_vain_count(tmp_path, fast, capsys, answer, lost):
    """At the tokens that the server reports, else at those that were reserved; also in later runs. A status of failure costs nothing."""
    write_lines(tmp_path / "figures.jsonl", [figure(0)])
    argv = ["--price_prompt", "0", "--price_answer", "10000", "--max_tokens", "100"]  # 1 US dollar at most
    with OpenAiServer(answer) as found:
        def go(budget):
            words_of_it = words(tmp_path, found.url, *argv, "--budget", budget)
            is_late = isinstance(raw := answer({}), Raw) and raw.pause
            for flag, value in (("--retries", "3"), ("--timeout", "0.5" if is_late else "300")):
                words_of_it[words_of_it.index(flag) + 1] = value
            return command_line.main(words_of_it)

        assert go("3.2") == 1
        if lost == ():
            assert len(found.log) == 4 and not (tmp_path / "out/lost.jsonl").exists()
            return
        each = 0.5 if lost else 1.0
        attempts = min(4, int((3.2 - 1) / each) + 1)  # the next one might cost one dollar
        assert ("the budget of 3.20 US dollars allows no further attempt" in capsys.readouterr().err) == (not lost)
        assert len(found.log) <= attempts == len(costs(tmp_path))  # one that was not accepted in time counts too
        assert all(tokens == lost if lost else tokens[1] == 100 and tokens[0] > 1000 for tokens in costs(tmp_path))
        assert go("3.2") == (75 if not lost else 1) and len(costs(tmp_path)) == attempts + (1 if lost else 0)
    assert f"{attempts} paid for without a reply" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/summary.json").read_text())["paid_without_a_reply"] == len(costs(tmp_path))


@pytest.mark.parametrize(("answer", "retries"), [(lambda body: {"choices": []}, "0"), (lambda body: Raw.response(b" " * 2_000_000), "3")])
def test_a_budget_that_ended_no_attempt_is_not_blamed(tmp_path, fast, capsys, answer, retries):
    write_lines(tmp_path / "figures.jsonl", [figure(0)])
    with OpenAiServer(answer) as found:
        argv = words(tmp_path, found.url, "--price_prompt", "0", "--price_answer", "10000", "--max_tokens", "100", "--budget", "1.5")
        argv[argv.index("--retries") + 1] = retries
        assert command_line.main(argv) == 1 and len(costs(tmp_path)) == 1
    assert "1 figure was not answered" in (said := capsys.readouterr().err) and "no further attempt" not in said


@pytest.mark.parametrize("there", [["replies.jsonl"], ["batch/requests-00001.jsonl"], []])
@pytest.mark.parametrize("version", [None, 1, 3, "gone"])
def test_a_folder_with_keys_of_another_version_is_refused_untouched(tmp_path, capsys, there, version):
    write_lines(tmp_path / "figures.jsonl", [figure(0)])
    out, settings = tmp_path / "out", tmp_path / "out/settings.json"
    assert command_line.main(words(tmp_path, None, "--batch", "write")) == 0  # makes the settings
    (out / "batch/requests-00001.jsonl").unlink()
    (out / "batch").rmdir()
    written = json.loads(settings.read_text(encoding="utf-8"))
    settings.write_text(json.dumps({name: value for name, value in written.items() if name != "keys"} | ({"keys": version} if version else {})), encoding="utf-8")
    if version == "gone":
        settings.unlink()
    for name in there:
        (out / name).parent.mkdir(exist_ok=True)
        write_lines(out / name, [{"key": "10000_F0", "text": "User: a", "finish_reason": "stop", "prompt_tokens": 1, "completion_tokens": 1, "custom_id": "10000_F0"}])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    for more in (["--dry_run"], ["--max_tokens", "2048"], [], ["--batch_results", str(tmp_path / "figures.jsonl")]):
        mode = "read" if "--batch_results" in more else "write"
        assert command_line.main(words(tmp_path, None, "--batch", mode, *more)) == (2 if there else 0)
        if not there:
            assert more == ["--dry_run"] or json.loads(settings.read_text(encoding="utf-8"))["keys"] == written["keys"]
            if more != ["--dry_run"]:
                return
            continue
        assert "finish it with the version that made it, or give another --out" in capsys.readouterr().err
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def empty(finish, text="", **message):
    return lambda body: {"id": "x", "object": "chat.completion", "created": 1, "model": "tiny", "usage": {"prompt_tokens": 7, "completion_tokens": 9},
                         "choices": [{"index": 0, "message": {"role": "assistant", "content": text} | message, "finish_reason": finish}]}


@pytest.mark.parametrize("answer", [empty("length"), empty("stop", reasoning_content="hm"), empty("length", "User: What is th"), empty("stop"), empty("content_filter")])
def test_replies_without_content_end_a_run_and_more_tokens_ask_them_again(tmp_path, capsys, answer):
    write_lines(tmp_path / "figures.jsonl", [figure(20 * n) for n in range(22)])
    is_short = [True]
    with OpenAiServer(lambda body: answer(body) if is_short[0] and number_of(body) >= 60 else conversation(body)) as found:
        go = lambda tokens: command_line.main(words(tmp_path, found.url, "--max_tokens", tokens, concurrency=1))
        assert go("64") == 1
        said, is_withheld = capsys.readouterr().err, answer(None)["choices"][0]["finish_reason"] == "content_filter"
        assert "16 replies in a row have no content" in said and ("a higher --max_tokens, with which" in said, "are not asked for again" in said) == (not is_withheld, is_withheld)
        assert len(made(tmp_path)) == 3 and 19 <= len(found.log) <= 21
        kept, before = len(ReplyCache(tmp_path / "out/replies.jsonl")), len(found.log)
        assert go("32") == 2 and "the same value, more, or another folder" in capsys.readouterr().err
        is_short[0] = False
        assert command_line.main(words(tmp_path, found.url, "--max_tokens", "128", "--dry_run")) == 0
        assert len(ReplyCache(tmp_path / "out/replies.jsonl")) == kept and json.loads((tmp_path / "out/settings.json").read_text())["max_tokens"] == 64
        capsys.readouterr()
        assert go("128") == 0
        again = 0 if is_withheld else kept - 3
        assert f"--max_tokens was 64: {again} replies without content are asked for again" in capsys.readouterr().out
        assert len(found.log) - before == 22 - kept + again and len(made(tmp_path)) == 22 - (kept - 3 - again)
        assert costs(tmp_path) == [(7, 9)] * again if again else not (tmp_path / "out/lost.jsonl").exists()
        assert go("128") == 0 and len(found.log) - before == 22 - kept + again
        assert command_line.main(words(tmp_path, found.url, "--max_tokens", "128", "--temperature", "1")) == 2


def test_results_of_another_run_are_not_taken(tmp_path, capsys):
    """Other settings, another folder; and after more tokens, the results of before."""
    write_lines(tmp_path / "figures.jsonl", [figure(0), figure(1)])

    def batch(out, tokens, text=None):
        before = {*(tmp_path / out / "batch").glob("requests-*")}
        assert command_line.main(words(tmp_path, None, "--batch", "write", "--max_tokens", tokens, out=out)) == 0
        requests = [json.loads(line) for file in {*(tmp_path / out / "batch").glob("requests-*")} - before for line in file.read_text(encoding="utf-8").splitlines()]
        body = lambda asked: empty("length")(asked) if text is None else empty("stop", text)(asked)
        results = tmp_path / f"{out}-{tokens}.jsonl"
        results.write_text("".join(json.dumps({"custom_id": each["custom_id"], "error": None, "response": {"status_code": 200, "body": body(each["body"])}}) + "\n"
                                   for each in requests), encoding="utf-8")
        return results, len(requests)

    def read(out, tokens, *files):
        capsys.readouterr()
        assert command_line.main(words(tmp_path, None, "--batch", "read", "--batch_results", *map(str, files), "--max_tokens", tokens, out=out)) == 0
        return capsys.readouterr().out

    pair = "User: What?\n\nAssistant: A nodule."
    (one, _), (other, _) = batch("out", "64"), batch("other", "32", pair)
    assert "2 of questions that were not in a batch of this run" in read("out", "64", other)
    assert "results: 2 replies" in read("out", "64", one) and not made(tmp_path)
    again, count = batch("out", "128", pair)
    results = again.read_text(encoding="utf-8")
    assert count == 2 and batch("out", "128", pair)[1] == 0  # they are pending now
    again.write_text(results, encoding="utf-8")
    assert "2 of questions that were asked again with more tokens, 2 replies" in read("out", "128", one, again) and len(made(tmp_path)) == 2
    late, _ = batch("late", "64")
    assert "results: 2 replies" in read("late", "128", late)  # read after the limit was raised
    assert batch("late", "256", pair)[1] == 2 and "of questions that were asked again" in read("late", "256", late)


@pytest.mark.parametrize("tokens", [64, 128])
def test_a_kill_before_an_empty_reply_is_forgotten_counts_it_once(tmp_path, capsys, tokens):
    write_lines(tmp_path / "figures.jsonl", [figure(0)])
    with OpenAiServer(empty("length")) as found:
        assert command_line.main(words(tmp_path, found.url, "--max_tokens", "64")) == 0
        kept = {name: (tmp_path / "out" / name).read_bytes() for name in ("replies.jsonl", "settings.json")}
        assert command_line.main(words(tmp_path, found.url, "--max_tokens", "128")) == 0
        assert "--max_tokens was 64: 1 reply without content is asked for again" in capsys.readouterr().out
        for name, content in kept.items():
            (tmp_path / "out" / name).write_bytes(content)
        assert command_line.main(words(tmp_path, found.url, "--max_tokens", str(tokens), "--dry_run")) == 0
        assert (" 1 paid for without a reply" in capsys.readouterr().out) == (tokens == 128)
        assert command_line.main(words(tmp_path, found.url, "--max_tokens", str(tokens))) == 0
    assert costs(tmp_path) == [(7, 9)] and len(found.log) == (2 if tokens == 64 else 3)


def test_a_batch_stays_within_the_budget(tmp_path, capsys):
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(40)])
    batch = ["--batch", "write", "--price_prompt", "1000", "--price_answer", "1000", "--max_tokens", "100", "--budget"]
    assert command_line.main(words(tmp_path, None, *batch, "7")) == 75  # about 2.2 US dollars each
    file = tmp_path / "out" / "batch" / "requests-00001.jsonl"
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    assert "allows no further request" in capsys.readouterr().err
    assert command_line.main(words(tmp_path, None, *batch, "7")) == 75  # what is in a batch counts as spent
    assert len(list(file.parent.iterdir())) == 1
    assert command_line.main(words(tmp_path, None, *batch, "1000")) == 0
    assert len(list(file.parent.iterdir())) == 2 and "37 requests; 0 replies are kept, 3 figures are in batches" in capsys.readouterr().out


def test_a_reservation_is_the_highest_cost():
    budget = Budget(10, Prices(1e6, 1e6), 2)
    assert budget.may_send("a", 2) and budget.may_send("b", 2) and not budget.may_send("c", 1)
    budget.settle("a", Reply("x", "stop", 3, 1))  # the server counts half as many again
    assert budget.spent == 4 and budget.may_send("c", 0) is False  # 4 + (3 + 2) + 2 = 11
    budget.free("b")
    assert budget.may_send("c", 2)
    budget.settle("c", Reply("five!", "stop"))  # a server that counts nothing
    assert budget.spent == 9


def test_figures_that_no_attempt_answers_are_named_and_asked_again(tmp_path, capsys):
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(10)])
    is_broken = [True]

    def answer(body):
        return {"choices": "?"} if is_broken[0] and number_of(body) == 4 else conversation(body)

    with OpenAiServer(answer) as found:
        argv = words(tmp_path, found.url)
        argv[argv.index("--retries") + 1] = "0"
        assert command_line.main(argv) == 1
        assert "1 figure was not answered (10004_F4): " in capsys.readouterr().err and len(made(tmp_path)) == 7
        is_broken[0] = False
        assert command_line.main(argv) == 0
        assert len(found.log) == 11
    assert len(made(tmp_path)) == 8  # of figures 5 and 7 none is made


def test_a_folder_has_one_set_of_settings_and_one_run(tmp_path, capsys):
    write_lines(tmp_path / "figures.jsonl", [figure(0)])
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("[[system]]\nWrite.\n", encoding="utf-8")
    with server(models=("tiny", "other")) as found:
        assert command_line.main(words(tmp_path, found.url)) == 0
        for more, name in ((["--without_mentions"], "mentions True"), (["--temperature", "0.5"], "temperature 0.0"),
                           (["--prompt", str(prompt)], "prompt '")):
            assert command_line.main(words(tmp_path, found.url, *more)) == 2
            assert f"holds replies that were made with {name}" in capsys.readouterr().err
        assert command_line.main(words(tmp_path, found.url, "--prompt", str(prompt), out="short")) == 0
        assert [each["role"] for each in found.log[-1].body["messages"]] == ["system", "user"]
        descriptor = os.open(tmp_path / "out", os.O_RDONLY)
        import fcntl
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        assert command_line.main(words(tmp_path, found.url)) == 1
        assert "another run is writing" in capsys.readouterr().err
        os.close(descriptor)


def test_the_originals_rules_by_a_switch(tmp_path):
    write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(20)])
    with server() as found:
        assert command_line.main(words(tmp_path, found.url, "--rules", "original")) == 0
    records = {each["id"]: each for each in made(tmp_path)}
    mended = records[figure(3)["pair_id"]]["conversations"]
    assert mended[1]["value"] == "Ct shows it." and len(mended) == 6
    assert list(records[figure(0)["pair_id"]]) == ["id", "image", "domain", "conversations"]
    assert figure(7)["pair_id"] not in records


def test_replies_of_the_originals_generator_are_cleaned_without_a_server(tmp_path, capsys):
    rows = [figure(0, result="User: What?\n\nAssistant: According to the figure caption, the scan shows a nodule."), figure(1),
            figure(2, result="User: a\n\nAssistant: It is CT, as mentioned in the context provided.")]
    write_lines(tmp_path / "figures.jsonl", rows)
    argv = ["instruct", "--figures", str(tmp_path / "figures.jsonl"), "--out", str(tmp_path / "out"), "--results"]
    assert command_line.main([*argv, "--rules", "original"]) == 0
    assert [record["conversations"][1]["value"] for record in made(tmp_path)] == ["The scan shows a nodule.", "It is CT."]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["conversations.json", "dropped.jsonl", "summary.json"]
    assert command_line.main(argv) == 0 and made(tmp_path) == []  # both name their source
    assert "0 conversations with 0 pairs, from 2 replies" in capsys.readouterr().out
    assert command_line.main([*argv, "--model", "tiny"]) == 2
    assert "--results asks nothing, so --model has no effect" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "status", "said"), [
    (["--batch", "read"], 2, "--batch read and --batch_results FILES belong together"),
    (["--batch", "write", "--endpoint", "http://x/v1"], 2, "--endpoint and --batch are both given"),
    ([], 2, "--endpoint is missing"),
    (["--batch", "write", "--budget", "3"], 2, "--budget needs --price_prompt and --price_answer"),
    (["--batch", "write", "--max_tokens", "0"], 2, "--max_tokens is 0; at least 1 was expected"),
    (["--batch", "write", "--temperature", "nan"], 2, "--temperature is nan"),
    (["--batch", "write", "--prompt", "missing.txt"], 2, "the prompt missing.txt cannot be read"),
    (["--endpoint", "nowhere"], 2, "the address 'nowhere' is not valid"),
    (["--batch", "read", "--batch_results", "missing.jsonl"], 1, "the file of results missing.jsonl does not exist"),
])
def test_mistakes_are_one_sentence(tmp_path, capsys, more, status, said):
    write_lines(tmp_path / "figures.jsonl", [figure(0)])
    assert command_line.main(words(tmp_path, None, *more)) == status
    err = capsys.readouterr().err
    assert said in err and len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(("text", "said"), [
    ("", "does not begin with the section [[system]]"), ("x\n[[system]]\ny", "does not begin with the section [[system]]"),
    ("[[system]]\n\n[[figure]]", "does not begin"), ("[[system]]\nx\n[[conversation]]\nUser: a", "example 1 of"),
    ("[[system]]\nx\n[[figure]]\na\n[[conversation]]\nUser: a", "has a conversation that cannot be used"),
    ("[[system]]\nx\n[[figure]]\n\n[[conversation]]\nUser: a", "has no text under [[figure]]"),
])
def test_a_prompt_that_cannot_be_used(tmp_path, text, said):
    (tmp_path / "p.txt").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as found:
        read_instruct_prompt(tmp_path / "p.txt")
    assert said in str(found.value)


def test_the_projects_own_prompt():
    prompt = read_instruct_prompt()
    assert prompt.file == OWN and len(prompt.examples) == 8
    assert all(len(turns.read_turns(example.conversation).pairs) == 3 for example in prompt.examples)
    assert 0 < sum(bool(example.mentions) for example in prompt.examples) < 8
