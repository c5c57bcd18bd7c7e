"""What every test file shares: eight virtual CPU devices, modest threads, and the material that only some machines have."""

import gc
import os
import shutil
import signal
import tempfile
import time
from pathlib import Path

from tests.support import xla

# Before jax is imported anywhere: the platform and the number of devices are read once.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla.flags(8, os.environ.get("XLA_FLAGS", ""))
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # two workers on two cores: threads that wait for work take it from XLA's
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and the loader's forks do not mix
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test never asks a hub
# Where an operation of a program comes from, which is walked and written for each of them; no test reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# The tests of a run, and the commands that they start, compile each program once: in a folder of this run, not in the home
# of whoever runs it. The processes of pytest-xdist inherit it.
_PROGRAMS = None
if "PYTEST_XDIST_WORKER" not in os.environ:
    _PROGRAMS = tempfile.mkdtemp(prefix="llavamed-programs-")
    os.environ |= {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_COMPILATION_CACHE_DIR": _PROGRAMS,
                   "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.05", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}

# The tests' servers are on this machine, whatever proxy leads out of it.
for variable in ("NO_PROXY", "no_proxy"):
    os.environ[variable] = ",".join(filter(None, [os.environ.get(variable), "127.0.0.1", "localhost"]))

# Every HTTP client reads the system's certificates, which takes as long as several requests, and no server here has one: they are
# sought in a folder without any.
os.environ.pop("SSL_CERT_FILE", None)
os.environ["SSL_CERT_DIR"] = str(Path(__file__).parent)

# A shell that runs a job in the background has it ignore Ctrl-C, and `nohup` has it ignore SIGHUP. Children inherit that, and some
# tests send them these signals.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items):
    for item in items:
        if "parity" in item.path.relative_to(ROOT).parts:
            item.add_marker(pytest.mark.torch)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """What imports and collection make stays until the end: Python's collector need not walk through a million objects."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.set_threshold(50_000, 20, 20)
        gc.enable()


def pytest_unconfigure(config):
    if _PROGRAMS is not None:
        shutil.rmtree(_PROGRAMS, ignore_errors=True)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder beside the project with reference data and tokenizers that are not part of it."""
    path = ROOT.parent / "shared"
    if not path.is_dir():
        pytest.skip("the folder shared/ with reference data is not beside the project")
    return path


@pytest.fixture(scope="session")
def mistral_tokenizer() -> Path:
    """Mistral's first SentencePiece model (32,000 pieces), as the package mistral-common carries it."""
    mistral_common = pytest.importorskip("mistral_common")
    path = Path(mistral_common.__file__).parent / "data" / "tokenizer.model.v1"
    if not path.is_file():
        pytest.skip(f"this mistral-common carries no {path.name}")
    return path


@pytest.fixture(scope="module")
def processor(mistral_tokenizer):
    """The processor of `preset:small` with Mistral's tokenizer."""
    from llavamed_jax.config import preset
    from llavamed_jax.processor import Processor
    from llavamed_jax.text.tokenizer import Tokenizer
    return Processor(preset("small"), Tokenizer.load(mistral_tokenizer))


@pytest.fixture(scope="session")
def llama_tokenizer(shared) -> Path:
    """LLaMA's SentencePiece model (32,000 pieces); its licence keeps it out of the project."""
    return shared / "tokenizers" / "llama2.tokenizer.model"


@pytest.fixture
def slow_signal():
    """A signal soon, in the middle of a wait of 0.2 s, with a handler that outlasts the wait: as on a busy machine."""
    earlier = signal.signal(signal.SIGALRM, lambda *_: time.sleep(0.3))
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, earlier)


@pytest.fixture
def measured(record_property):
    """Asserts that arrays agree to a tolerance, and records how far apart they are: docs/fidelity.md prints it."""
    import numpy as np

    def check(found, wanted, tolerance: float, scale: float = 1.0):
        """`scale` divides the difference, for quantities that are judged by their size."""
        found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
        assert found.shape == wanted.shape
        difference = float(np.abs(found - wanted).max() / scale)
        record_property("difference", difference)
        record_property("tolerance", float(tolerance))  # workers send properties as plain numbers
        assert difference <= tolerance, f"{difference:.3g} apart; {tolerance:g} was allowed"
    return check
