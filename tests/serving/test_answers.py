"""Answers that are left early, requests in the form of Responses, and shares of the queue, without a model."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from llavamed_jax.generation.text_stream import TextStream
from llavamed_jax.serving import chat_completions, responses
from llavamed_jax.serving.app import Noted
from llavamed_jax.serving.content import Message
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.scheduler import Piece, Scheduler, Ticket
from llavamed_jax.serving.schema import ChatRequest
from llavamed_jax.serving.service import Answer, Caller, Service

CHAT = ChatRequest([Message("user", ["why?"])], is_streamed=True)


def running():
    """An answer that has one piece so far, and the tickets that were cancelled."""
    cancelled, events = [], asyncio.Queue()
    ticket = SimpleNamespace(request=SimpleNamespace(ids=[1]), cached=0, text=SimpleNamespace(token_ids=[]), first_token=None, arrived=0.0)
    events.put_nowait(Piece("a"))
    return Answer(ticket, SimpleNamespace(cancel=cancelled.append), events, 0, "m", bytes), cancelled


@pytest.mark.parametrize("each", [chat_completions.chunks, chat_completions.events, responses.events])
@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_that_is_left_after_any_event_cancels_its_answer(each, number):
    async def leave():
        answer, cancelled = running()
        values = each(answer, CHAT)
        for _ in range(number):
            await anext(values)
        assert not cancelled
        await values.aclose()
        return cancelled

    assert asyncio.run(leave())


def test_an_answer_of_which_no_event_was_asked_for_is_cancelled_by_its_owner():
    async def leave():
        answer, cancelled = running()
        Noted(Service(["m"], log=SimpleNamespace(event=lambda *a, **k: None)), "/", Caller(), answer, CHAT)(200)
        return cancelled

    assert asyncio.run(leave())


SERVICE = SimpleNamespace(defaults={}, limits=Limits())


@pytest.mark.parametrize("given", [{"a": "\ud800"}, {"\udfff": "a"}, {"a": float("inf")}, {"a": 1}, {"a": None}, {"a": {}}, {"a": "b" * 513},
                                   {"b" * 65: "a"}, {str(i): "" for i in range(17)}, [], "a", 0, False])
def test_metadata_that_cannot_be_repeated_is_refused_before_anything_runs(given):
    with pytest.raises(ApiError, match="metadata is") as error:
        responses.read({"input": "why?", "metadata": given}, SERVICE)
    assert (error.value.status, error.value.param) == (400, "metadata") and json.dumps(error.value.body, ensure_ascii=False).encode()


def test_metadata_is_repeated_and_instructions_stand_before_the_inputs_own_system_message():
    whole = {"b" * 64: "日" * 512, **{str(i): "" for i in range(15)}}
    assert responses.read({"input": "why?", "metadata": whole}, SERVICE).echo["metadata"] == whole
    assert responses.read({"input": "why?", "metadata": None}, SERVICE).echo["metadata"] == {}
    with pytest.raises(ApiError, match="instructions are"):
        responses.read({"input": "why?", "instructions": "\ud800"}, SERVICE)
    user = {"role": "user", "content": "why?"}
    for role, content in (("system", "B"), ("developer", [{"type": "input_text", "text": "B"}])):
        read = responses.read({"instructions": "A", "input": [{"role": role, "content": content}, user]}, SERVICE)
        assert read.messages == [Message("system", ["A\n\nB"]), Message("user", ["why?"])] and read.echo["instructions"] == "A"
    assert responses.read({"instructions": "A", "input": [user]}, SERVICE).messages[0] == Message("system", ["A"])


def test_a_key_cannot_lock_another_one_out_of_the_queue():
    it = Scheduler(SimpleNamespace(batch_size=4), Limits(max_queue=8))

    def submit(key):
        it.submit(Ticket(None, None, None, key, 0.0, [].append))

    for _ in range(8):
        submit("a")
    for key in ("a", "b", "b", "a"):
        if key == "b" and not it._queues.get("b"):
            submit("b")  # the first one of a key has a place in a full queue
        else:
            with pytest.raises(ApiError, match="wait"):
                submit(key)
    submit("c")
    service = Service(["m"], Limits(max_requests=4), {"a": "1", "b": "2", "c": "3"})
    held = [service.counting(key) for key in "aabb"]
    [each.__enter__() for each in held]
    for key in "ab":
        with pytest.raises(ApiError), service.counting(key):
            pass
    with service.counting("c"), pytest.raises(ApiError), service.counting("c"):
        pass


@pytest.mark.parametrize("stop, text, whole", [("\n##", "\n##", ""), (" Hi", " Hi", ""), ("\n##", " \n#a", "#a"), (" Hi", "a Hi", "a"),
                                               ("\n\n", "\n\na", ""), (" \n", "  \nb", ""), (" a", "  b a", "b")])
def test_a_stream_with_white_space_in_its_stop_adds_up_to_the_whole_answer(stop, text, whole):
    for step in (1, 2, 9):
        stream = TextStream(lambda ids: "".join(map(chr, ids)), [stop])
        pieces = [stream.push(list(map(ord, text[i:i + step]))) for i in range(0, len(text), step)]
        assert "".join(pieces) + stream.finish() == whole == stream.text
