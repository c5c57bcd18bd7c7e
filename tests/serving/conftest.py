"""One server and one tiny model for all tests of the room, so that each program is compiled once."""

import openai
import pytest

from tests.support.server import running, tiny_model


@pytest.fixture(scope="session")
def model():
    model = tiny_model()
    model.engine.batch_size = 4
    return model


@pytest.fixture(scope="session")
def alone(model):
    """A second engine with the same weights: what each request gives without a server."""
    other = tiny_model()
    other.engine.programs = model.engine.programs
    return other


@pytest.fixture(scope="session")
def server(model):
    with running(model) as it:
        yield it


@pytest.fixture(scope="session")
def client(server):
    return openai.OpenAI(base_url=server.url, api_key="any", max_retries=0)
