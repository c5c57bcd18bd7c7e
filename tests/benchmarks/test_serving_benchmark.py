"""The serving benchmark's own parts: transformers as the server's engine, and faults that a server outlives."""

import numpy as np
import pytest
from PIL import Image
from starlette.datastructures import Headers

from benchmarks import serving, serving_day, serving_faults
from llavamed_jax.serving.hosts import Hosts
from llavamed_jax.serving.limits import Limits
from tests.support.server import running, tiny_model


def test_transformers_behind_the_routes_gives_our_answers(tmp_path):
    pytest.importorskip("torch", reason="torch's CPU build is not installed")
    import llavamed_jax as lm
    from benchmarks.serving_transformers import served_by_transformers

    path = serving.tiny(tmp_path / "tiny")
    ours, theirs = lm.load(path, dtype="float32"), served_by_transformers(path)
    image = {"type": "image", "image": Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 20, 3), np.uint8))}
    talks = [[{"role": "user", "content": [*more, {"type": "text", "text": text}]}] for more, text in (([image], "What?"), ([], "Why is it so?"))]
    jobs = [theirs.engine.add(theirs.request(talk, 12, 0.0, 1.0, 0, 0)) for talk in talks]
    while not all(job.is_finished for job in jobs):
        theirs.engine.advance()
    answers = ours.generate(talks, max_new_tokens=12)
    assert [job.tokens for job in jobs] == [answer.token_ids for answer in answers] and len({len(job.tokens) for job in jobs} | {12}) == 1
    gone = theirs.engine.add(theirs.request(talks[0], 12, 0.0, 1.0, 0, 0))
    theirs.engine.advance()
    gone.request.cancelled = True
    theirs.engine.advance()
    assert gone.is_finished and len(gone.tokens) == 1


def test_a_server_outlives_every_fault_and_closes_idle_connections():
    with running(tiny_model(), Limits(header_timeout=1.0, body_timeout=1.0, max_connections=20)) as server:
        assert {name: serving_faults.commit(server.address, name) for name in serving_faults.FAULTS} == dict.fromkeys(serving_faults.FAULTS, 0)
        body = {"messages": [{"role": "user", "content": "What?"}], "max_tokens": 2}
        found = serving_faults.idle(server.address, 60, body, wave=30)
        assert found["refused_at_once"] + found["closed_later"] == 60 and found["refused_at_once"] > 0 and found["closed_later"] > 0
        assert (found["left_open"], found["answered"], found["questions"]) == (0, 2, 2)
        assert serving_faults.leave(server.address, body, 3) == 200
        server.until(lambda service: service.scheduler.rows == 0 and service.under_way == 0)


@pytest.mark.parametrize("request_of", [lambda: serving_day.HEALTH, lambda: serving_faults.post(b"{}")])
def test_requests_name_a_host_that_a_server_on_loopback_takes(request_of):
    (host,) = [line.partition(b": ")[2].decode() for line in request_of().split(b"\r\n") if line.startswith(b"Host")]
    Hosts().check(Headers({"host": host}))


def test_a_server_that_refuses_the_question_for_its_health_ends_the_benchmark(monkeypatch):
    class Started:
        stdout, is_killed = ["serving served at http://127.0.0.1:1"], False

        def __init__(self, *_, **__):
            pass

        def poll(self):
            return None

        def kill(self):
            Started.is_killed = True

    monkeypatch.setattr(serving_day.subprocess, "Popen", Started)
    monkeypatch.setattr(serving_day.serving_faults, "ask", lambda *_: (421, b""))
    with pytest.raises(SystemExit, match="status 421"):
        serving_day.Process("model")
    assert Started.is_killed
