"""One server and one tiny model for all tests of the room, so that each program is compiled once."""

import openai
import pytest

from llavamed_jax.generation import engine
from tests.support.server import ROWS, running, tiny_model


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    """The engine compiles one shape of each program: tests/generation looks at the others."""
    monkeypatch.setattr(engine, "bucket", lambda length: 256)
    monkeypatch.setattr(engine, "cache_length", lambda length: 512)
    monkeypatch.setattr(engine, "batch_size", lambda number, length=1, shards=1: ROWS)
    monkeypatch.setattr(engine, "power_of_two", lambda n: ROWS)


@pytest.fixture(scope="session")
def model():
    model = tiny_model()
    model.engine.batch_size = ROWS
    return model


@pytest.fixture(scope="session")
def alone(model):
    """A second engine with the same weights: what each request gives without a server."""
    other = tiny_model()
    other.engine.programs, other.engine.batch_size = model.engine.programs, ROWS
    return other


@pytest.fixture(scope="session")
def server(model):
    with running(model) as it:
        yield it


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
