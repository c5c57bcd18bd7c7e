"""What the service does with a request before the engine has it, on a model that only notes what it is given."""

from types import SimpleNamespace

import pytest

from llavamed_jax.serving import app
from llavamed_jax.serving.content import read_messages
from llavamed_jax.serving.limits import Limits
from llavamed_jax.serving.schema import Settings
from llavamed_jax.serving.service import Service


class Model:
    """Stands for a LlavaMed."""

    engine = SimpleNamespace(max_prompt=99)

    def __init__(self):
        self.asked = []

    def request(self, messages, max_new_tokens, temperature, top_p, top_k, seed, logprobs=False):
        self.asked.append((messages, top_p))
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
    assert [top_p for _, top_p in service.model.asked] == [1e-9, 0.5]
