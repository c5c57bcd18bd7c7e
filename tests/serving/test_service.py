"""What the service does with a request before the engine has it, on a model that only notes what it is given."""

import asyncio
import functools
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from llavamed_jax.serving import app, http_io, images
from llavamed_jax.serving.content import read_messages
from llavamed_jax.serving.errors import ApiError
from llavamed_jax.serving.http_io import parse
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.schema import ChatRequest, Settings
from llavamed_jax.serving.service import Service


class Model:
    """Stands for a LlavaMed."""

    engine = SimpleNamespace(max_prompt=99)
    processor = SimpleNamespace(images_uint8=lambda whole: np.stack([np.full((2, 2, 3), image.number, np.uint8) for image in whole]))

    def __init__(self):
        self.asked = []

    def request(self, messages, max_new_tokens, temperature, top_p, top_k, seed, logprobs=False, pixels=None):
        self.asked.append((messages, top_p, pixels))
        return SimpleNamespace(ids=[1], images=[])

    def text_stream(self, stop):
        return None


def service_of(**limits):
    service = Service(["m"], Limits(**limits))
    service.model = Model()
    return service


@pytest.mark.parametrize("limit, most", [(None, 100), (50, 51), (99, 100), (1000, 100)])
def test_the_length_of_the_model_follows_the_limit_of_prompts(limit, most):
    assert app._model(service_of(max_prompt_tokens=limit), "m")["max_model_len"] == most


def test_top_p_0_is_the_smallest_that_the_engine_takes():
    service = service_of()
    for top_p in (0.0, 0.5):
        service._request(read_messages([{"role": "user", "content": "Q"}]), Settings(top_p=top_p), [])
    assert [top_p for _, top_p, _ in service.model.asked] == [1e-9, 0.5]


def test_one_whole_image_is_in_memory_at_a_time(monkeypatch):
    class Whole:
        def __init__(self, number):
            self.number = number

    made = []

    def decode(data, where, limits):
        assert all(each() is None for each in made), "an earlier image is still whole"
        image = Whole(len(made))
        made.append(weakref.ref(image))
        return image
    monkeypatch.setattr(images, "decode", decode)
    monkeypatch.setattr(images, "pixels_of", lambda data, where, limits: 1)
    service, url = service_of(), "data:image/png;base64,AAAA"
    service._request(read_messages([{"role": "user", "content": [{"image_url": url}, "and", {"image_url": url}]}, {"role": "assistant", "content": "A"},
                                    {"role": "user", "content": [{"image_url": url}, "so?"]}]), Settings(), [url, url, b"x"])
    (messages, _, pixels), = service.model.asked
    assert [pixel[0, 0, 0] for pixel in pixels] == [0, 1, 2] and len(made) == 3
    assert [[part["type"] for part in m["content"]] for m in messages] == [["image", "text", "image"], ["text"], ["image", "text"]]


def test_a_text_that_no_context_holds_is_refused_before_any_work():
    service = service_of(max_prompt_tokens=10)
    service.scheduler = SimpleNamespace(is_alive=True, check_room=lambda key: None)
    ask = lambda *texts: asyncio.run(service.ask(ChatRequest(read_messages([{"role": "user", "content": list(texts)}]))))
    with pytest.raises(ApiError, match="the messages have 2561 characters; at most 2560 were expected; .* context length is 10 tokens") as caught:
        ask("x" * 2000, "y" * 561)
    assert (caught.value.status, caught.value.code) == (400, "context_length_exceeded") and not service.model.asked
    with pytest.raises(AttributeError, match="submit"):  # what fits goes on
        ask("x" * 2560)
    assert len(service.model.asked) == 1


@pytest.mark.parametrize("value", [b"{},", b"[],", b"0,", b'"a",'])
def test_a_body_of_very_many_values_is_refused_without_parsing_it(value):
    with pytest.raises(ApiError, match="commas and brackets; at most 1048576 were expected") as caught:
        parse(b'{"messages": [' + value * 1_050_000 + b"0]}")
    assert (caught.value.status, caught.value.code) == (400, "invalid_json")
    assert len(parse(b'{"messages": [' + value * 1000 + b"0]}")["messages"]) == 1001


def test_a_large_body_is_parsed_beside_the_loop(monkeypatch):
    threads = []
    monkeypatch.setattr(http_io, "parse", lambda data: threads.append(threading.current_thread()))

    async def stream_of(body):
        yield body
    for body in (bytes(10), bytes(2**18 + 1)):
        asyncio.run(http_io.read_json(SimpleNamespace(headers={}, stream=functools.partial(stream_of, body)), Limits()))
    assert threads[0] is threading.main_thread() is not threads[1]
