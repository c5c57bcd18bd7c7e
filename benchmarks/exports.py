"""Whether another version of transformers loads our exports, offline, and answers with our tokens.

    python benchmarks/exports.py make DIR         # two tiny random models, prompts, images and our answers
    OTHER/python benchmarks/exports.py check DIR  # in an environment that has that transformers, torch and pillow

`check` prints a line a model: what was loaded, and how many of the prompts, ids and greedy answers are equal.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PIECES = 1024  # of the sample's tokenizer; <image> is the next id
MODELS = {"mistral, padded images": ("llava_mistral", "mistral", "v1.5:mistral_instruct", "pad"),
          "llama, cropped images": ("llava_llama", "llama", "up:vicuna_v1", "square")}
QUESTION = [{"type": "image"}, {"type": "text", "text": "What is shown?"}]
CHATS = [((28, 28, 3), [("user", QUESTION)]), ((40, 61, 3), [("user", QUESTION), ("assistant", "A nodule."), ("user", "Where?")]),
         (None, [("user", "Is it normal?")])]


def make(out: Path) -> None:
    """Writes `out/MODEL/` and `out/MODEL.json`."""
    sys.path.insert(0, str(ROOT))
    import llavamed_jax as lm
    for name, (source, architecture, template, mode) in MODELS.items():
        export_tiny(out / name, source, architecture, template, mode)
        model, rng, cases = lm.load(out / name, dtype="float32"), np.random.default_rng(0), []
        for shape, turns in CHATS:
            pixels = None if shape is None else rng.integers(0, 256, shape, np.uint8)
            picture = None if pixels is None else Image.fromarray(pixels)
            filled = [{"role": role, "content": content if isinstance(content, str) else
                       [part | {"image": picture} if part["type"] == "image" else part for part in content]} for role, content in turns]
            prompt = model.processor.prompt(filled)
            ids = model.processor.encode(prompt)
            images = [] if picture is None else list(model.processor.images([picture]))
            answer = model.generate_tokens([ids], [images], max_new_tokens=10)[0]
            cases.append(dict(prompt=prompt, ids=[PIECES if i == lm.IMAGE_TOKEN else int(i) for i in ids], answer=list(map(int, answer)),
                              messages=[{"role": role, "content": content} for role, content in turns],
                              pixels=None if pixels is None else pixels.tolist()))
        (out / f"{name}.json").write_text(json.dumps(cases), encoding="utf-8")


def export_tiny(out: Path, source: str, architecture: str, template: str, mode: str, positions: int = 512) -> None:
    """A random model whose answers change with the image and from token to token."""
    from llavamed_jax.checkpoints.export.directory import export
    from llavamed_jax.checkpoints.random import random_checkpoint
    from llavamed_jax.checkpoints.tensor import Tensor
    from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
    decoder = DecoderConfig(PIECES, 48, 96, 2, 4, 2, 12, 1e-5, 1e4, positions, architecture=architecture)
    checkpoint = random_checkpoint(LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14), decoder, template=template, source=source,
                                               image_aspect_ratio=mode), seed=3)
    scale = {"decoder/embed_tokens/embedding": 3.0, "projector/linear_1/kernel": 6.0}
    tensors = {name: Tensor(t.shape, t.dtype, lambda t=t, name=name: t.load() * np.float32(scale.get(name, 1)))
               for name, t in checkpoint.tensors.items()}
    with tempfile.TemporaryDirectory() as directory:
        tokenizer = Path(directory) / "tokenizer.model"
        tokenizer.write_bytes((ROOT / "samples" / "vqa_rad" / "tokenizer.model").read_bytes())
        export(checkpoint.replace(tensors=tensors, files={tokenizer.name: tokenizer}), out)


def check(directory: Path) -> None:
    """Prints what this environment's transformers makes of what `make` wrote."""
    import transformers
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    for name in MODELS:
        print(f"transformers {transformers.__version__}, {name}: ", end="")
        try:
            processor = transformers.AutoProcessor.from_pretrained(directory / name, backend="pil")
        except (ValueError, TypeError, OSError) as error:
            print(f"no processor: {str(error).splitlines()[0][:100]}")
            continue
        model, info = transformers.LlavaForConditionalGeneration.from_pretrained(directory / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"], info
        equal = [same(processor, model.eval(), case) for case in json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))]
        counts = [f"{sum(one[what] is True for one in equal)}/{sum(one[what] is not None for one in equal)} {what}" for what in equal[0]]
        print(f"{type(processor.image_processor).__name__}, {', '.join(counts)}")


def same(processor, model, case: dict) -> dict[str, bool | None]:
    """Whether prompt, ids (a run of `<image>` as one) and answer are ours; None for what this version cannot be asked."""
    import torch
    images = None if case["pixels"] is None else [Image.fromarray(np.array(case["pixels"], np.uint8))]
    prompt = None
    if getattr(processor, "chat_template", None):  # processors have one since 4.44
        prompt = processor.apply_chat_template(case["messages"], add_generation_prompt=True) == case["prompt"]
    batch = {key: value for key, value in processor(text=case["prompt"], images=images, return_tensors="pt").items() if value is not None}
    ids = batch["input_ids"][0].tolist()
    short = [token for i, token in enumerate(ids) if not (i and token == PIECES == ids[i - 1])]
    with torch.no_grad():
        answer = model.generate(**batch, max_new_tokens=10, do_sample=False)[0].tolist()
    return dict(prompts=prompt, ids=short == case["ids"], answers=answer[-len(case["answer"]):] == case["answer"])


if __name__ == "__main__":
    command, path = sys.argv[1:]
    {"make": make, "check": check}[command](Path(path))
