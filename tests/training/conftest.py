"""What the tests of training share: a tiny start, little data, the demo's recipe on both, and runs that compile little or nothing."""

import os
import shutil

import jax
import pytest

from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import program, trainer
from llavamed_jax.utils import buckets
from tests.support import stores
from tests.support import training_runs as runs


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    return runs.write_start(tmp_path_factory.mktemp("start") / "start")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return runs.write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def recipe(start, data):
    """The demo's recipe, shrunk: `recipe(**{"key": value})`. It trains one array alone: a save has few."""
    return lambda **changes: runs.shrunk(start, data, **{"trainable": '["projector/linear_0/kernel"]', **changes})


@pytest.fixture(scope="module")
def one_device():
    """Compiling for eight devices takes most of the time; that sharded is single is tested with the step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(program, "make_mesh", lambda spec, *_: make_mesh(spec, jax.devices()[:1]))
        yield


@pytest.fixture
def without_compiling(monkeypatch):
    """A step that computes nothing."""
    monkeypatch.setattr(trainer, "make_train_step", runs.FakeStep())


@pytest.fixture(scope="module")
def memory(tmp_path_factory):
    """The scheme of a store in memory."""
    with stores.running("memory", tmp_path_factory.mktemp("cache")) as scheme:
        yield scheme


@pytest.fixture
def url(memory):
    """A new address there."""
    return stores.address(memory)


@pytest.fixture
def copies():
    """The local copies of runs that are left; the next test finds none."""
    yield lambda: sorted(os.listdir(buckets.local_copies() / "runs"))
    shutil.rmtree(buckets.local_copies() / "runs")
