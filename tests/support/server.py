"""A server of ours in a thread of the test, on a port of its own, and the tiny model behind it."""

from __future__ import annotations

import base64
import contextlib
import io
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from llavamed_jax.assistant import LlavaMed
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.processor import Processor
from llavamed_jax.serving import app, server
from llavamed_jax.serving.limits import DEFAULTS, Limits
from llavamed_jax.serving.log import Log
from llavamed_jax.serving.service import Service
from llavamed_jax.text.tokenizer import Tokenizer

MOST = 12  # new tokens of an answer
ROWS = 4
TOKENIZER = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"


def tiny_model(max_positions: int = 256) -> LlavaMed:
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
        self.lines, page = io.StringIO(), more.pop("page", None)
        self.service = Service(["served", "alias"], limits, log=Log(more.pop("log_content", False), self.lines), version="0", **more)
        self._listener = server.listen("127.0.0.1", 0)
        self.address = self._listener.getsockname()
        self.origin = f"http://127.0.0.1:{self.address[1]}"
        self.url = f"{self.origin}/v1"
        self._is_asked = threading.Event()
        self._thread = threading.Thread(target=server.run, daemon=True,
                                        args=(app.create(self.service, page), self.service, self._listener, self._is_asked.is_set))
        if model is not None:
            self.service.serve(model)
        self._thread.start()
        self._wait()

    def _wait(self) -> None:
        until = time.monotonic() + 120
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self.origin}/version", timeout=5).read()
                return
            assert time.monotonic() < until, "the server does not answer"
            time.sleep(0.02)

    def until(self, condition, seconds: float = 120.0) -> None:
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


def picture(seed=0, kind="PNG"):
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def data_url(data, label="image/png"):
    return f"data:{label};base64,{base64.b64encode(data).decode()}"


def image_part(data):
    return {"type": "image_url", "image_url": {"url": data_url(data), "detail": "auto"}}


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS = {
    "text": [{"role": "user", "content": "What is shown?"}],
    "image": [user("What is shown?", image_part(picture(1)))],
    "image first": [user(image_part(picture(1)), "What is shown?")],
    "two images": [user(image_part(picture(1)), image_part(picture(2, "JPEG")), "Which one is abnormal?")],
    "turns": [{"role": "system", "content": "You are terse."}, user(image_part(picture(3)), "Where?"), {"role": "assistant", "content": "Left."},
              user("Sure?")],
}


def plainly(messages):
    """The same messages for `generate`, which takes images as bytes."""
    def part(p):
        return p if p["type"] == "text" else {"type": "image", "image": base64.b64decode(p["image_url"]["url"].partition(",")[2])}
    return [{**m, "content": m["content"] if isinstance(m["content"], str) else [part(p) for p in m["content"]]} for m in messages]
