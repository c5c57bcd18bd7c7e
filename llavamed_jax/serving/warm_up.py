"""Runs one request of each kind before the first client comes, so that no client waits for these compilations."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image

NEW_TOKENS = 2


def warm_up(model, stage: Callable[[str], None] = lambda words: None) -> None:
    """Compiles, or loads from the cache of compiled programs, what a text and an image need, alone and in a full batch.

    Args:
      model: the LlavaMed.
      stage: takes what is being compiled, in words.

    Raises:
      UserError: the model cannot hold a chat, for example because it has no tokenizer.
    """
    text, image = {"type": "text", "text": "?"}, {"type": "image", "image": Image.new("RGB", (64, 64))}
    full = model.engine.batch_size
    kinds = [("text", [text], 1), ("an image", [image, text], 1)]
    kinds += [(f"{full} images", [image, text], full)] if full > 1 else []
    for words, parts, count in kinds:
        stage(f"compiling the programs: {words}")
        request = [model.request([{"role": "user", "content": parts}], NEW_TOKENS) for _ in range(count)]
        model.engine.generate(request)
