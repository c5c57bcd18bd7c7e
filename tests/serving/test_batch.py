"""Files of batch requests: every line is checked first, results are the model's own, and a stopped run goes on."""

import asyncio
import json

import pytest

from llavamed_jax.errors import UserError
from llavamed_jax.serving import batch, batch_run
from llavamed_jax.serving.batch_file import BatchRequest, Results, requests_of
from llavamed_jax.serving.batch_run import answer
from tests.support.server import CONVERSATIONS, MOST, data_url, picture, plainly, tiny_model


def line(name, messages, url="/v1/chat/completions", **more):
    body = {"input" if url.endswith("responses") else "messages": messages, "model": "gpt-9", "temperature": 0, **more}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def write(path, lines):
    path.write_text("".join(json.dumps(each) + "\n" for each in lines) + "\n", encoding="utf-8")
    return path


def read(path):
    return {each["custom_id"]: each for each in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


@pytest.fixture
def third(model):
    other = tiny_model()
    other.engine.programs, other.engine.batch_size = model.engine.programs, 4
    return other


def run(model, path, out):
    results = Results(out)
    try:
        return asyncio.run(answer(model, path, results, len(list(requests_of(path)))))
    finally:
        results.close()


def test_results_are_the_models_own_and_a_second_run_asks_only_what_failed(tmp_path, third, alone):
    asked = {name: m for name, m in CONVERSATIONS.items()}
    lines = [line(name, m, max_tokens=MOST) for name, m in asked.items()]
    lines += [line("responses", "What is shown?", "/v1/responses", max_output_tokens=MOST), line("wrong", [{"role": "nobody"}]),
              line("stream", CONVERSATIONS["text"], stream=True),
              line("broken", [{"role": "user", "content": [{"type": "image_url", "image_url": data_url(picture(1)[:60])}]}])]
    path, out = write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl"
    assert run(third, path, out) == {200: len(asked) + 1, 400: 3}
    found = read(out)
    for name, messages in asked.items():
        (wanted,) = alone.generate([plainly(messages)], max_new_tokens=MOST)
        reply = found[name]["response"]
        assert reply["status_code"] == 200 and found[name]["error"] is None
        assert reply["body"]["choices"][0]["message"]["content"] == wanted.text and reply["body"]["model"] == "tiny"
    assert found["responses"]["response"]["body"]["output"][0]["content"][0]["text"] == found["text"]["response"]["body"]["choices"][0]["message"]["content"]
    assert "the role 'nobody'" in found["wrong"]["response"]["body"]["error"]["message"]
    assert "a batch has no streams" in found["stream"]["response"]["body"]["error"]["message"]

    # What a killed run leaves: a torn line, and one that failed on the server.
    kept = out.read_text(encoding="utf-8").splitlines(keepends=True)
    failed = {**json.loads(kept[1]), "response": {"status_code": 503, "request_id": "x", "body": {}}}
    out.write_text(kept[0] + json.dumps(failed) + "\n" + "".join(kept[2:-1]) + kept[-1][:40], encoding="utf-8")
    again = run(tiny_like(third), path, out)
    assert sum(again.values()) == 2
    without_ids = lambda results: {name: (each["response"]["status_code"], text_of(each)) for name, each in results.items()}
    assert without_ids(read(out)) == without_ids(found)


def test_a_line_that_breaks_the_program_is_a_500_of_its_own(monkeypatch):
    def breaks(body, service):
        raise LookupError("no\nsuch thing")
    monkeypatch.setattr(batch_run.chat_completions, "read", breaks)
    status, body = asyncio.run(batch_run._result(None, BatchRequest("a", "/v1/chat/completions", {"messages": []})))
    assert (status, body["error"]["type"], body["error"]["message"]) == (500, "server_error", "the request failed: LookupError: no such thing")


def text_of(result):
    body = result["response"]["body"]
    if "output" in body:  # its ids are new each time
        return [{**item, "id": None} for item in body["output"]]
    return body["choices"][0]["message"]["content"] if "choices" in body else body.get("error")


def tiny_like(model):
    other = tiny_model()
    other.engine.programs, other.engine.batch_size = model.engine.programs, 4
    return other


@pytest.mark.parametrize("lines, sentence", [
    (["{"], "line 1 is not valid JSON"), (['{"custom_id": 1}'], "line 1 has the custom_id 1"),
    ([json.dumps(line("a", [])), "", json.dumps(line("a", []))], "line 3 repeats the custom_id 'a' of line 1"),
    ([json.dumps(line("a", [], url="/v1/embeddings"))], "'/v1/embeddings'; POST and /v1/chat/completions or /v1/responses were expected"),
    ([json.dumps({**line("a", []), "body": []})], "line 1 has the body "), (["[" * 100_000], "nested too deeply|not valid JSON")])
def test_a_broken_line_is_named_before_anything_is_loaded(tmp_path, capsys, lines, sentence):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match=sentence):
        list(requests_of(path))
    assert batch.main([str(path), str(tmp_path / "out.jsonl"), "--checkpoint", "nowhere"]) == 1
    assert "line" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_another_files_results_are_not_continued(tmp_path):
    path = write(tmp_path / "in.jsonl", [line("a", [])])
    foreign = write(tmp_path / "out.jsonl", [{"id": "1", "custom_id": "b", "response": {"status_code": 200, "body": {}}, "error": None}])
    results = Results(foreign)
    with pytest.raises(UserError, match="holds results of 'b', which the request file does not have"):
        results.check({"a"})
    with pytest.raises(UserError, match="another process"):
        Results(foreign)
    results.close()
    with pytest.raises(UserError, match="which is not a result of a batch"):
        Results(path)
    assert batch.main([str(path), str(path), "--checkpoint", "nowhere"]) == 2
    assert batch.main([str(tmp_path / "none.jsonl"), str(foreign), "--checkpoint", "nowhere"]) == 1
    done = write(tmp_path / "done.jsonl", [{"id": "1", "custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None}])
    assert batch.main([str(path), str(done), "--checkpoint", "nowhere"]) == 0  # nothing is left: no model is loaded
