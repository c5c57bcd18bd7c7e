"""Many requests at once: each gets its own answer, a client that hangs up frees its row, and a full server says so."""

import asyncio
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest

from llavamed_jax.generation.requests import Job, Request
from llavamed_jax.generation.text_stream import TextStream
from llavamed_jax.serving import app
from llavamed_jax.serving import server as http_server
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.scheduler import End, Scheduler, Ticket
from llavamed_jax.serving.service import Service
from tests.support.server import MOST, image_part, picture, plainly, running, tiny_model, user


@pytest.fixture
def second(model):
    """Another engine with the same weights and programs, for a server with limits of its own."""
    other = tiny_model()
    other.engine.programs, other.engine.batch_size = model.engine.programs, 4
    return other


def schedule(n):
    """n conversations of every kind: text, an image, the same image, two turns; short and longer answers."""
    rng, out = np.random.default_rng(5), []
    for i in range(n):
        text = " ".join(rng.choice(["what", "where", "lesion", "left", "normal", "liver", "is", "seen"], 3))
        kind = i % 4
        messages = [user(f"{text} {i}?")] if kind == 0 else [user(image_part(picture(i % 3)), f"{text}?")]
        if kind == 3:
            messages += [{"role": "assistant", "content": "Yes."}, user("Why?")]
        out.append((messages, int(rng.integers(2, MOST + 1)), 0.0 if i % 3 else 0.8, i))
    return out


def test_mixed_requests_equal_single_ones_while_others_hang_up(server, alone):
    """48 requests of 12 clients: a third streams, a sixth hangs up; none is lost and none is another one's."""
    requests = schedule(48)
    wanted = [alone.generate([plainly(m)], max_new_tokens=most, temperature=t, seed=seed)[0].text for m, most, t, seed in requests]
    assert len(set(wanted)) > 35
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)

    def ask(i):
        messages, most, temperature, seed = requests[i]
        settings = dict(model="served", messages=messages, temperature=temperature, seed=seed)
        if i % 6 == 5:
            with client.chat.completions.create(max_tokens=300, stream=True, **settings) as stream:
                for _, chunk in zip(range(3), stream):
                    assert chunk.object == "chat.completion.chunk"
            return wanted[i]
        if i % 3 == 0:
            chunks = client.chat.completions.create(max_tokens=most, stream=True, **settings)
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        return client.chat.completions.create(max_tokens=most, **settings).choices[0].message.content
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, range(len(requests)))) == wanted
    server.until(lambda service: service.scheduler.rows == 0 and service.under_way == 0)


def test_a_client_that_hangs_up_frees_its_row_long_before_the_end(server, monkeypatch):
    """Streams after their third piece, and a client that waits for a whole answer of a slow engine."""
    scheduler = server.service.scheduler
    client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0, timeout=60)
    for n in range(5):
        before = scheduler.tokens
        stream = client.chat.completions.create(model="served", messages=[user(f"Tell me {n}")], max_tokens=220, temperature=1.0, seed=n, stream=True)
        for _ in zip(range(3), stream):
            pass
        stream.close()
        server.until(lambda service: service.scheduler.rows == 0)
        assert scheduler.tokens - before <= 1 + 6 * scheduler.engine.steps
    gone, advance = server.service.metrics.gone._value.get(), scheduler.engine.advance
    monkeypatch.setattr(scheduler.engine, "advance", lambda: (time.sleep(0.1), advance()))
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.3).chat.completions.create(model="served", messages=[user("Tell me all")], max_tokens=220, temperature=1.0)
    server.until(lambda service: service.metrics.gone._value.get() > gone and service.scheduler.rows == 0)


class Tickets:
    """A scheduler without its thread, driven by hand."""

    def __init__(self, model, limits=Limits(), rows=4):  # noqa: B008
        model.engine.batch_size = rows
        self.model, self.scheduler, self.delivered = model, Scheduler(model.engine, limits), {}

    def submit(self, key="", most=200, text="why?", seconds=60.0):
        request = self.model.request([{"role": "user", "content": text}], most, temperature=1.0, seed=3)
        found = []
        ticket = Ticket(request, TextStream(self.model.processor.decode), None, key, time.monotonic() + seconds, found.append)
        self.delivered[ticket] = found
        self.scheduler.submit(ticket)
        return ticket

    def round(self):
        self.scheduler._expire()
        self.scheduler._admit()
        self.scheduler.engine.advance()
        self.scheduler._deliver()


def test_a_cancelled_ticket_leaves_its_row_at_the_next_loop(second):
    it = Tickets(second)
    tickets = [it.submit(text=f"why {i}?") for i in range(6)]
    it.round()
    it.round()
    assert it.scheduler.rows == 4
    it.scheduler.cancel(tickets[1])
    it.scheduler.cancel(tickets[5])  # which waits for a row
    it.round()
    assert tickets[1].job.is_finished and len(tickets[1].job.tokens) < 4 * second.engine.steps
    assert tickets[5].job is None or tickets[5].job.is_finished
    assert tickets[4].job.shared is not None  # it has the row now
    assert not any(isinstance(each, End) for each in it.delivered[tickets[1]])


def test_keys_share_the_rows_and_one_alone_has_them_all(second):
    it = Tickets(second, rows=4)
    first = [it.submit("a", text=f"a {i}?") for i in range(8)]
    it.scheduler._admit()
    assert sum(ticket.job is not None for ticket in first) == 5  # four rows, and one that waits beside them
    it.scheduler._active.clear()
    late = [it.submit("b", text=f"b {i}?") for i in range(3)]
    it.scheduler._admit()
    active = [ticket.key for ticket in it.scheduler._active]
    assert active == ["a", "a", "b", "b", "a"]  # each up to its half, in order; the last when both have theirs
    assert late[2].job is None


def test_a_full_queue_is_429_with_the_seconds_to_wait_for_one_key_and_for_all(second):
    it = Tickets(second, Limits(max_queue=8, key_share=0.5))
    for _ in range(4):
        it.submit("a")
    it.submit("b")
    with pytest.raises(ApiError, match="5 requests wait, 4 of them with this key") as caught:
        it.submit("a")  # which has its half of the queue
    assert (caught.value.status, caught.value.code) == (429, "queue_full") and int(caught.value.headers["Retry-After"]) >= 1
    for key in "bbc":
        it.submit(key)
    for key in "abcd":
        with pytest.raises(ApiError, match="8 requests wait"):
            it.submit(key)


def test_deadlines_end_tickets_in_the_queue_and_in_a_row(second):
    it = Tickets(second)
    slow, *others = [it.submit(text=f"why {i}?") for i in range(6)]
    late = it.submit(seconds=0.0)
    it.round()
    (end,) = it.delivered[late]
    assert (end.error.status, end.error.code) == (503, "queue_timeout")
    slow.deadline = 0.0
    it.round()
    assert it.delivered[slow][-1].error.status == 504 and not any(ticket.is_over for ticket in others)
    it.round()
    assert slow.job.is_finished


def test_logprobs_end_with_the_stop_text(second):
    """Tokens behind a stop text have no log probabilities either."""
    ticket = Ticket(Request([1]), TextStream(lambda ids: "".join(map(chr, ids)), ["c"]), 1, "", 0.0, [].append)
    found = []
    ticket.deliver = found.append
    ticket.job = Job(Request([1]))
    ticket.job.tokens = [97, 98, 99, 100]
    ticket.job.logprobs = [(-1.0, np.array([5, 6]), np.array([-0.5, -0.7]))] * 4
    ticket.push((2,), lambda i: False)
    piece, end = found
    assert piece.text == "ab" and [each.id for each in piece.logprobs] == [97, 98, 99] and piece.logprobs[0].top == [(5, -0.5)]
    assert end.completion.text == "ab" and end.completion.finish_reason == "stop"


def test_the_engine_fails_once_and_goes_on(second, monkeypatch):
    with running(second) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        decode = second.engine.programs._programs["decode"]

        def broken(*args, **kwargs):
            monkeypatch.undo()
            raise RuntimeError("RESOURCE_EXHAUSTED")
        monkeypatch.setitem(second.engine.programs._programs, "decode", broken)
        with pytest.raises(openai.InternalServerError, match="could not be generated"):
            client.chat.completions.create(model="served", messages=[user("why?")], max_tokens=MOST)
        assert second.engine.programs._programs["decode"] is decode
        assert client.chat.completions.create(model="served", messages=[user("why?")], max_tokens=MOST).choices[0].message.content
        assert '"engine_error", "error": "RuntimeError"' in server.lines.getvalue()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_leaves_nobody_waiting(second, monkeypatch):
    with running(second) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        monkeypatch.setattr(server.service.scheduler, "_deliver", lambda: 1 / 0)
        with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
            client.chat.completions.create(model="served", messages=[user("why?")], max_tokens=MOST)
        server.until(lambda service: not service.is_ready)
        with pytest.raises(openai.InternalServerError) as caught:
            client.with_options(base_url=server.origin).get("/health", cast_to=dict)
        assert caught.value.response.json()["status"] == "failed"
        with pytest.raises(openai.InternalServerError, match="must be started again"):
            client.chat.completions.create(model="served", messages=[user("why?")])


def test_one_key_does_not_take_all_places(second):
    service = Service(["served"], Limits(max_requests=4, key_share=0.5), keys={"a": "1", "b": "2"})
    with service.counting("a"), service.counting("a"):
        with pytest.raises(ApiError, match="2 requests are under way, 2 of them with this key"), service.counting("a"):
            pass
        with service.counting("b"), service.counting("b"):
            assert service.under_way == 4
    assert service.under_way == 0


@pytest.mark.parametrize("drain, is_whole", [(30.0, True), (0.01, False)])
def test_a_stop_lets_running_answers_finish_within_the_limit(second, drain, is_whole, monkeypatch):
    advance = second.engine.advance
    monkeypatch.setattr(second.engine, "advance", lambda: (time.sleep(0.05), advance()))
    with running(second, Limits(drain_timeout=drain)) as server:
        async def ask():
            async with openai.AsyncOpenAI(base_url=server.url, api_key="any", max_retries=0) as client:
                stream = await client.chat.completions.create(model="served", messages=[user("why?")], max_tokens=200, temperature=1.0, seed=1,
                                                              stream=True, stream_options={"include_usage": True})
                out = []
                try:
                    async for chunk in stream:
                        out.append(chunk)
                        if len(out) == 2:
                            threading.Thread(target=server.stop).start()
                            while not server.service.is_stopping:
                                await asyncio.sleep(0.01)
                            if is_whole:
                                with pytest.raises(openai.InternalServerError, match="stopping"):
                                    await client.chat.completions.create(model="served", messages=[user("late?")])
                except openai.APIError as error:
                    return out, str(error)
                return out, ""
        out, error = asyncio.run(ask())
    if is_whole:
        assert not error and out[-1].usage.completion_tokens > 20 and out[-2].choices[0].finish_reason
    else:
        assert "stopped before the answer was complete" in error
    events = [json.loads(line) for line in server.lines.getvalue().splitlines()]
    assert {"event": "stopped", "all_answered": is_whole}.items() <= events[-1].items()


def test_health_says_how_far_loading_is_and_requests_wait(second):
    """The HTTP server answers while the weights are loaded, and after that could not be done."""
    go = threading.Event()

    def load(stage):
        stage("loading the weights")
        assert go.wait(300)
        return second
    with running(None) as server:
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
        server.service.start(load)
        server.until(lambda service: service.loading.stage == "loading the weights")
        health = client.with_options(base_url=server.origin).get("/health/live", cast_to=dict)
        assert health == {"status": "alive"}
        with pytest.raises(openai.InternalServerError) as caught:
            client.with_options(base_url=server.origin).get("/health", cast_to=dict)
        assert caught.value.response.json().items() >= {"status": "loading", "stage": "loading the weights"}.items()
        with pytest.raises(openai.InternalServerError, match="not loaded yet: loading the weights") as caught:
            client.chat.completions.create(model="served", messages=[user("why?")])
        assert caught.value.response.headers["Retry-After"] == "5"
        go.set()
        server.until(lambda service: service.is_ready)
        assert client.with_options(base_url=server.origin).get("/health", cast_to=dict)["status"] == "ready"
        assert client.models.retrieve("tiny").max_model_len == 256


def test_a_client_that_comes_before_the_application_runs_waits(second):
    """The command prints its address before the event loop runs: a connection in between is not refused."""
    with http_server.listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=60) as early:
        service, is_asked = Service(["served"], version="0"), threading.Event()
        service.serve(second)
        early.sendall(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        thread = threading.Thread(target=http_server.run, args=(app.create(service), service, listener, is_asked.is_set), daemon=True)
        thread.start()
        assert early.makefile("rb").read().startswith(b"HTTP/1.1 200")
        is_asked.set()
        thread.join(60)


def test_the_log_has_content_only_if_it_is_asked_for(second):
    for has in (False, True):
        with running(second, log_content=has) as server:
            client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
            client.chat.completions.create(model="served", messages=[user("the patient Zebulon", image_part(picture(1)))], max_tokens=2)
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(model="served", messages=[{"role": "user", "content": {"Zebulon": 1}}], max_tokens=2)
        log = server.lines.getvalue()
        assert ("Zebulon" in log) is has and '"completion_tokens": 2' in log and "base64" not in log and "iVBOR" not in log


def test_metrics_count_what_happened(server, client):
    import urllib.request

    def read():
        text = urllib.request.urlopen(f"{server.origin}/metrics").read().decode()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in text.splitlines() if line[0] != "#"}
    before = read()
    messages = [user(image_part(picture(4)), "what is " * 30)]
    for _ in range(2):
        client.chat.completions.create(model="served", messages=messages, max_tokens=3)
    after = read()
    gained = {name: after[name] - before.get(name, 0.0) for name in after}
    assert gained["llavamed_generated_tokens_total"] == 6 and gained["llavamed_time_to_first_token_seconds_count"] == 2
    assert gained['llavamed_requests_total{route="/v1/chat/completions",status="200"}'] == 2
    assert gained["llavamed_prefix_hits_total"] == 1 and gained["llavamed_prefix_hit_tokens_total"] > 40
    assert (after["llavamed_ready"], after["llavamed_rows_in_use"], after["llavamed_queue_requests"], after["llavamed_rows"]) == (1, 0, 0, 4)
