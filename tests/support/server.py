"""A server of ours in a thread of the test, on a port of its own, and the tiny model behind it."""

from __future__ import annotations

import contextlib
import io
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from llavamed_jax.assistant import LlavaMed
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.processor import Processor
from llavamed_jax.serving import app, server
from llavamed_jax.serving.limits import DEFAULTS, Limits
from llavamed_jax.serving.log import Log
from llavamed_jax.serving.service import Service
from llavamed_jax.text.tokenizer import Tokenizer

TOKENIZER = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"


def tiny_model(max_positions: int = 512) -> LlavaMed:
    """A model of random weights with the sample's tokenizer; its image has four positions."""
    from llavamed_jax.checkpoints.load import load_params

    tokenizer = Tokenizer.load(TOKENIZER)
    cfg = LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), DecoderConfig(tokenizer.vocab_size, 24, 48, 1, 2, 1, 8, 1e-5, 1e4, max_positions,
                                                                       architecture="mistral"), template="v1.5:mistral_instruct")
    params = load_params(random_checkpoint(cfg), np.dtype(np.float32))
    return LlavaMed(cfg, jax.device_get(params), Processor(cfg, tokenizer), np.dtype(np.float32), name="tiny")


class Running:
    """A server under test: its address, its service and what it logged."""

    def __init__(self, model, limits: Limits = DEFAULTS, **more):
        self.lines = io.StringIO()
        self.service = Service(["served", "alias"], limits, log=Log(more.pop("log_content", False), self.lines), version="0", **more)
        self._listener = server.listen("127.0.0.1", 0)
        self.address = self._listener.getsockname()
        self.origin = f"http://127.0.0.1:{self.address[1]}"
        self.url = f"{self.origin}/v1"
        self._is_asked = threading.Event()
        self._thread = threading.Thread(target=server.run, daemon=True,
                                        args=(app.create(self.service), self.service, self._listener, self._is_asked.is_set))
        if model is not None:
            self.service.serve(model)
        self._thread.start()
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.origin}/version", timeout=5).read()
                return
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.02)

    def until(self, condition, seconds: float = 10.0) -> None:
        """Waits for a condition of the service."""
        end = time.monotonic() + seconds
        while not condition(self.service):
            assert time.monotonic() < end, "the condition did not come true"
            time.sleep(0.01)

    def stop(self) -> None:
        self._is_asked.set()
        self._thread.join(30)


@contextlib.contextmanager
def running(model, limits: Limits = DEFAULTS, **more) -> Iterator[Running]:
    """Runs a server while the block is open."""
    it = Running(model, limits, **more)
    try:
        yield it
    finally:
        it.stop()
