"""Results of a batch service as they come: nothing is paid for twice, and what was paid for counts."""

import json

import pytest

from llavamed_jax.curation import __main__ as command_line
from llavamed_jax.curation.instruct_cost import Budget, Prices
from tests.support.figure_records import figure, write_lines
from tests.support.openai_server import OpenAiServer, Raw

BOM = b"\xef\xbb\xbf"
EXPIRED = {"response": None, "error": {"code": "batch_expired"}}


class Batch:
    """A run in a folder, by batches."""

    def __init__(self, tmp_path, capsys, count):
        self.folder, self.out, self._capsys = tmp_path, tmp_path / "out", capsys
        write_lines(tmp_path / "figures.jsonl", [figure(n) for n in range(count)])

    def run(self, *words, status=0):
        """What a run says."""
        self._capsys.readouterr()
        argv = ["instruct", "--figures", str(self.folder / "figures.jsonl"), "--out", str(self.out), "--model", "tiny", *words]
        assert command_line.main(argv) == status
        return "".join(self._capsys.readouterr())

    def write(self):
        """The requests that are new."""
        before = {*self.out.glob("batch/requests-*")}
        self.run("--batch", "write")
        return [json.loads(line) for file in {*self.out.glob("batch/requests-*")} - before for line in file.read_text().splitlines()]

    def read(self, *lines, head=b"", status=0):
        """What is said of results."""
        file = self.folder / "results.jsonl"
        file.write_bytes(b"".join(head + json.dumps(line).encode() + b"\n" for line in lines))
        return self.run("--batch", "read", "--batch_results", str(file), status=status)

    def lost(self):
        file = self.out / "lost.jsonl"
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        return [(line["prompt_tokens"], line["completion_tokens"]) for line in lines]


@pytest.fixture
def batch(tmp_path, capsys):
    return lambda count: Batch(tmp_path, capsys, count)


def result(request, name="1", status=200, text="User: What?\n\nAssistant: A liver.", **more):
    body = {"choices": [{"message": {"content": text}, "finish_reason": "stop"}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
    return {"id": name, "custom_id": request["custom_id"], "response": {"status_code": status, "body": body}, "error": None} | more


@pytest.mark.parametrize("lines", [
    lambda asked: asked, lambda asked: [{"custom_id": each["custom_id"], "response": None, "error": None} for each in asked],
    lambda asked: [{"custom_id": each["custom_id"], "response": {}} for each in asked], lambda asked: [[], 1]])
def test_a_file_without_results_changes_nothing(batch, lines):
    run = batch(2)
    asked = run.write()
    assert "results.jsonl has no result in its 2 lines; a file of results or of errors" in run.read(*lines(asked), status=1)
    assert run.write() == [] and "2 replies" in run.read(*map(result, asked)), "they are pending still"
    assert "results: none" in run.read()
    assert "1 damaged lines, 1 of figures that have a reply" in run.read(lines(asked)[0], result(asked[0]))


@pytest.mark.parametrize(("head", "status"), [(BOM, 200), (b"", "200"), (BOM, "200")])
def test_forms_of_a_paid_reply(batch, head, status):
    run = batch(2)
    assert "results: 2 replies" in run.read(*[result(each, status=status) for each in run.write()], head=head)
    assert len(json.loads((run.out / "conversations.json").read_text())) == 2


FILTERED = {"code": "content_filter", "message": "The response was filtered"}


@pytest.mark.parametrize(("answer", "is_withheld"), [
    ({"response": {"status_code": 400, "body": {"error": FILTERED}}}, True),
    ({"response": {"status_code": 400, "body": FILTERED | {"code": "content_policy_violation"}}}, True),
    ({"response": {"status_code": 400, "body": None}, "error": FILTERED}, True), ({"response": None, "error": FILTERED}, True),
    ({"response": {"status_code": 500, "body": {"error": FILTERED}}}, False),
    ({"response": {"status_code": 400, "body": {"error": {"code": "bad", "message": "no"}}}}, False), (EXPIRED, False)])
def test_a_withheld_question_is_not_sent_again(batch, answer, is_withheld):
    run = batch(1)
    [asked] = run.write()
    said = run.read(result(asked, **answer))
    assert ("withheld by the server's filter: 1" in said) == is_withheld and ("results: 1 failures" in said) != is_withheld
    assert len(run.write()) == (not is_withheld) and run.lost() == []


@pytest.mark.parametrize("removed", ["", "before", "after"])
def test_a_failure_frees_only_its_own_request(batch, removed):
    run = batch(1)
    [first] = run.write()
    run.read(result(first, **EXPIRED))
    if removed == "before":
        (run.out / "batch/requests-00001.jsonl").unlink()
    [second] = run.write()
    if removed == "after":
        (run.out / "batch/requests-00001.jsonl").unlink()
    run.read(result(first, "another name", **EXPIRED))
    assert run.write() == [], "the second request is pending"
    run.read(result(second, **EXPIRED))
    [third] = run.write()
    assert len({each["custom_id"] for each in (first, second, third)}) == 3
    assert "1 replies" in run.read(result(third)) and run.lost() == []


@pytest.mark.parametrize("is_first_request", [True, False])
@pytest.mark.parametrize("text", ["User: What?\n\nAssistant: A liver.", "User: Where?\n\nAssistant: Below."])
def test_a_second_paid_reply_counts_once(batch, text, is_first_request):
    run = batch(1)
    [first] = run.write()
    run.read(result(first, "0", **EXPIRED))
    [second] = run.write()
    one, other = result(second, "1"), result(first if is_first_request else second, "2", text=text)
    assert "results: 1 replies, 1 further replies, which count as paid for" in run.read(one, other, result(first, "0", **EXPIRED)).replace(
        ", 1 of figures that have a reply", "")
    for _ in range(2):
        assert "results: 2 of figures that have a reply" in run.read(one, other) and run.lost() == [(100, 10)]
    (run.out / "batch/replied.jsonl").unlink()  # a folder of before
    assert "results: 1 of figures that have a reply" in run.read(one) and run.lost() == [(100, 10)]


def test_what_a_reply_in_vain_costs_follows_from_the_request(batch):
    """The body's limit under either name, and without one that of the run; requests are read once for all results."""
    run = batch(3)
    asked = run.write()
    for each, limit in zip(asked, ({"max_completion_tokens": 50}, {"max_tokens": 60}, {"max_tokens": None}), strict=True):
        del each["body"]["max_completion_tokens"]
        each["body"] |= limit | {"messages": [{"role": "user", "content": "x" * 400}]}
    asked[2]["body"]["messages"][0]["content"] = [{"type": "text", "text": "x" * 400}]
    (run.out / "batch/requests-00001.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    nothing = {"response": {"status_code": 200, "body": {"choices": []}}}
    assert "results: 3 failures" in run.read(*[result(each, **nothing) for each in asked])
    assert run.lost()[:2] == [(104, 50), (104, 60)] and run.lost()[2][1] == 1024 and 100 <= run.lost()[2][0] <= 130


def test_replies_become_conversations_although_the_service_ends_the_run(batch):
    run, quota = batch(6), {"error": {"message": "You exceeded your current quota", "code": "insufficient_quota"}}

    def answer(body):
        if len(server.log) > 3:
            return Raw.response(json.dumps(quota).encode(), "429 Too Many Requests")
        return "User: What?\n\nAssistant: A liver."

    with OpenAiServer(answer) as server:
        for _ in range(2):  # the second time nothing new comes
            said = run.run("--endpoint", server.url, "--concurrency", "1", status=1)
            assert "You exceeded your current quota; 3 replies are kept in " in said and said.count("error: ") == 1
            assert len(json.loads((run.out / "conversations.json").read_text())) == 3
            (run.out / "conversations.json").unlink()
        assert command_line.main(["instruct", "--figures", str(run.folder / "figures.jsonl"), "--out", str(run.folder / "new"),
                                  "--model", "tiny", "--endpoint", server.url]) == 1
    assert not (run.folder / "new/conversations.json").exists(), "without a reply there is nothing to write"


@pytest.mark.parametrize("dollars", [None, 1e9])
def test_a_request_is_weighed_in_a_time_of_its_own(dollars):
    """However many are in flight: a batch has 50,000 a file."""
    class Counting(Prices):
        def dollars(self, prompt_tokens, answer_tokens):
            counts.append(1)
            return super().dollars(prompt_tokens, answer_tokens)

    counts = []
    budget = Budget(dollars, Counting(1.0, 1.0), 10)
    assert all(budget.may_send(number, 5) for number in range(300))
    assert len(counts) <= 3 * 300
