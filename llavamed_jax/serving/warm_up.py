"""Compiles, or loads from the cache on disk, what the first clients need, so that they do not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from llavamed_jax.assistant import computation_dtype
from llavamed_jax.checkpoints import hub
from llavamed_jax.checkpoints.model_config import tree_root
from llavamed_jax.checkpoints.torch.files import ADAPTER_CONFIG
from llavamed_jax.checkpoints.tree import reference
from llavamed_jax.config.hf import is_packed
from llavamed_jax.errors import UserError
from llavamed_jax.generation.ahead import compile_ahead
from llavamed_jax.generation.requests import Request
from llavamed_jax.processor import Processor
from llavamed_jax.utils.files import read_json

NEW_TOKENS = 2
_TEXT, _IMAGE = {"type": "text", "text": "?"}, {"type": "image", "image": Image.new("RGB", (64, 64))}


def first_requests(processor: Processor, batch_size: int) -> dict[str, list[Request]]:
    """Makes one request of each kind, and a full batch: words about them -> requests that run together.

    Raises:
      UserError: the model cannot hold a chat, for example because it has no tokenizer.
    """
    def request(*parts) -> Request:
        messages = [{"role": "user", "content": list(parts)}]
        ids = processor.expand(processor.encode(processor.prompt(messages)))
        return Request(ids, list(processor.images_uint8([part["image"] for part in parts if "image" in part])),
                       NEW_TOKENS)

    kinds = {"a text": [request(_TEXT)], "an image": [request(_IMAGE, _TEXT)]}
    if batch_size > 1:
        kinds[f"{batch_size} images"] = [request(_IMAGE, _TEXT) for _ in range(batch_size)]
    return kinds


def warm_up(model, stage: Callable[[str], None] = lambda words: None) -> None:
    """Runs the first requests on a model.

    Args:
      model: the LlavaMed.
      stage: takes what is being compiled, in words.

    Raises:
      UserError: the model cannot hold a chat.
    """
    for words, requests in first_requests(model.processor, model.engine.batch_size).items():
        stage(f"compiling the programs: {words}")
        model.engine.generate(requests)


def _has_other_weights(path: str) -> bool:
    """Returns whether a PATH is an adapter in another layout, or has kernels of few bits, as a run's base may have."""
    directory = hub.local(path, weights=False, may_be_bucket=True)
    root = tree_root(directory)
    base = Path(reference.path(root) or root)
    file = base / "config.json"
    return ((directory / ADAPTER_CONFIG).is_file() and not (root / "model").is_dir()
            or file.is_file() and is_packed(read_json(file)))


def compile_while_loading(path: str, batch_size: int, dtype=None, tokenizer=None, template=None, kv_cache=None) -> bool:
    """Compiles the programs of the first requests from a checkpoint's config, while its weights are loaded elsewhere.

    The programs go to JAX's cache on disk, from which `warm_up` takes them.

    Args:
      path: the checkpoint.
      batch_size: the most rows that are decoded together.
      dtype: as of `load`.
      tokenizer: as of `load`.
      template: as of `load`.
      kv_cache: as of `load`.

    Returns:
      Whether it was done; False if the config does not tell the shapes of the weights, and if the checkpoint cannot be
      read, about which `load` says more.
    """
    try:
        processor = Processor.load(path, template=template, tokenizer=tokenizer)
        if processor.config is None or _has_other_weights(path):
            return False
        batches = list(first_requests(processor, batch_size).values())
    except UserError:
        return False
    cfg = processor.config.ending_with(processor.eos_ids)
    compile_ahead(cfg, computation_dtype(dtype), batches, batch_size, None if kv_cache is None else np.dtype(kv_cache))
    return True
