"""transformers behind the same routes, one request at a time: the baseline of `benchmarks/serving.py --baseline transformers`.

Only the engine is another one: the requests are read, prepared, queued, streamed and logged by the same code. The engine feeds a
request's prompt to `LlavaForConditionalGeneration`, and then one token after the other with the cache of keys and values, and takes
the likeliest token each time: what `generate` does, without what `generate` does around it.
"""

from __future__ import annotations

import collections

import numpy as np

from llavamed_jax.config import IMAGE_TOKEN
from llavamed_jax.generation.requests import Job, Request, check


class TransformersEngine:
    """What the server's scheduler needs of an engine.

    Args:
      engine: our engine of the same checkpoint, for its shapes and checks.
      model: the `LlavaForConditionalGeneration`.
    """

    batch_size = steps = 1

    def __init__(self, engine, model):
        self.cfg, self.eos, self.max_prompt, self._limit, self.model = engine.cfg, engine.eos, engine.max_prompt, engine.limit, model
        self._mean, self._std = np.array(engine.cfg.vision.image_mean, np.float32), np.array(engine.cfg.vision.image_std, np.float32)
        self._waiting: collections.deque[Job] = collections.deque()
        self._job: Job | None = None
        self._cache = None

    def check(self, request: Request, name: str) -> None:
        """Raises UserError for a request that cannot be run."""
        check(request, self.cfg, self.max_prompt, name)

    def add(self, request: Request, index: int = 0) -> Job:
        """Queues a checked request."""
        job = Job(request, index)
        self._waiting.append(job)
        return job

    def advance(self) -> None:
        """Generates the next token of the request that runs; the next request begins when it has ended."""
        import torch

        for job in [job for job in self._waiting if job.request.cancelled]:
            self._waiting.remove(job)
            job.is_finished = True
        if self._job is not None and self._job.request.cancelled:
            self._end()
        if self._job is None and not self._waiting:
            return
        with torch.no_grad():
            if self._job is None:
                self._job = self._waiting.popleft()
                self._job.shared = 0
                out = self.model(**self._prompt(self._job.request), use_cache=True, logits_to_keep=1)
            else:
                out = self.model(input_ids=torch.tensor([[self._job.tokens[-1]]]), past_key_values=self._cache, use_cache=True)
        job, self._cache = self._job, out.past_key_values
        job.tokens.append(int(out.logits[0, -1, :self.cfg.decoder.vocab_size].argmax()))
        if job.tokens[-1] in self.eos or len(job.tokens) >= self._limit(job.request):
            self._end()

    def _end(self) -> None:
        self._job.is_finished, self._job, self._cache = True, None, None

    def _prompt(self, request: Request) -> dict:
        import torch

        ids = torch.tensor([[self.model.config.image_token_id if i == IMAGE_TOKEN else int(i) for i in request.ids]])
        if not request.images:
            return {"input_ids": ids}
        pixels = np.stack([self._normalised(np.asarray(image)) for image in request.images])
        return {"input_ids": ids, "pixel_values": torch.tensor(pixels).permute(0, 3, 1, 2).contiguous()}

    def _normalised(self, image: np.ndarray) -> np.ndarray:
        return image if image.dtype != np.uint8 else (image.astype(np.float32) / 255 - self._mean) / self._std


def served_by_transformers(checkpoint: str):
    """Loads a checkpoint in transformers' layout for the server: our model's words and pictures, transformers' tokens.

    Args:
      checkpoint: the directory.

    Returns:
      A LlavaMed whose engine is transformers, in float32.
    """
    import warnings

    import transformers

    import llavamed_jax as lm

    warnings.filterwarnings("ignore", "`past_key_values` is deprecated", FutureWarning)  # `cache` is newer than 5.0

    model = lm.load(checkpoint, dtype="float32")
    theirs, info = transformers.LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype="float32", output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(f"transformers did not load {checkpoint} whole: {info}")
    model.engine = TransformersEngine(model.engine, theirs.eval())
    return model
