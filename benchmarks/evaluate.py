"""Questions a second: this engine beside transformers' `generate`, batched and one by one as the original asks.

    python benchmarks/evaluate.py --vqa_rad DIR [--checkpoint RUN] [--questions N] [--batch_size B] [--out DIR]

Two loads on a CPU in float32: all test questions of VQA-RAD, and the same questions at eleven an image, as SLAKE has them.
All sides generate from prompts and pixels in memory; reading the files is measured by itself, and once more as part of the
whole way through `evaluation.answering.ask.ask`. `cold` is the first pass over a load, compilation included; `warm` is the median of
the passes after it, between which what the engine remembers of images and prompts is thrown away.
Tokens are compared with those of one by one. They may differ only where the two best logits lie within 1e-4.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np

from llavamed_jax.config import IMAGE_TOKEN
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.utils.paths import local

ROOT = Path(__file__).resolve().parent.parent
SLAKE = 11  # questions an image
CLOSE = 1e-4


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt with one image: ids with the image as P times IMAGE_TOKEN, uint8 [H,W,3], and the most new tokens."""

    ids: list[int]
    pixels: np.ndarray
    limit: int


# --- the two sides ---


def ours(engine, questions: Sequence[Question]) -> list[list[int]]:
    """Tokens of each question."""
    from llavamed_jax.generation.requests import Request

    requests = (Request(q.ids, [q.pixels], q.limit) for q in questions)
    tokens: list[list[int]] = [[] for _ in questions]
    for job in engine.feed(requests):
        if job.error is not None:
            raise job.error
        tokens[job.index] += job.take()
    return tokens


def forget(engine) -> None:
    """Throws away what the engine remembers of images and prompts."""
    engine.params = engine.params


class Theirs:
    """A `LlavaForConditionalGeneration`, asked with the same ids and pixels.

    Args:
      normalize: uint8 [H,W,3] -> float32, as its processor does it.
    """

    def __init__(self, model, normalize: Callable[[np.ndarray], np.ndarray]):
        self.model, self._normalize = model, normalize

    def one_by_one(self, questions: Sequence[Question]) -> list[list[int]]:
        """As the original's `model_vqa.py`."""
        return [self._generate([q])[0] for q in questions]

    def batched(self, questions: Sequence[Question], batch_size: int) -> list[list[int]]:
        """Batches in the order of the questions, padded on the left."""
        batches = (questions[first : first + batch_size] for first in range(0, len(questions), batch_size))
        return [tokens for batch in batches for tokens in self._generate(batch)]

    def _generate(self, batch: Sequence[Question]) -> list[list[int]]:
        import torch

        device, dtype = self.model.device, self.model.dtype
        T, pad = max(len(q.ids) for q in batch), self.model.generation_config.pad_token_id
        ids = np.full((len(batch), T), pad)
        mask = np.zeros((len(batch), T), np.int64)
        for b, q in enumerate(batch):
            row = np.array(q.ids)
            ids[b, T - len(row) :], mask[b, T - len(row) :] = np.where(row == IMAGE_TOKEN, self.model.config.image_token_id, row), 1
        pixels = np.stack([self._normalize(q.pixels) for q in batch]).transpose(0, 3, 1, 2)
        with torch.inference_mode():
            out = self.model.generate(
                input_ids=torch.tensor(ids, device=device), attention_mask=torch.tensor(mask, device=device), do_sample=False,
                pixel_values=torch.tensor(pixels, device=device, dtype=dtype), max_new_tokens=max(q.limit for q in batch))
        return [self._until_end(row, q.limit) for row, q in zip(out[:, T:].tolist(), batch)]

    def _until_end(self, row: list[int], limit: int) -> list[int]:
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]  # [None] where nothing but the limit ends an answer
        return row[: next((n + 1 for n, token in enumerate(row) if token in ends), limit)][:limit]


def cold_and_warm(run: Callable[[], list], repeats: int, between: Callable[[], None] = lambda: None) -> tuple[dict, list]:
    """Seconds of the first pass and the median of the others, also in processor seconds; and what the first one returned."""
    seconds, processor, first = [], [], None
    for _ in range(1 + repeats):
        between()
        begun = time.perf_counter(), time.process_time()
        found = run()
        seconds.append(time.perf_counter() - begun[0])
        processor.append(time.process_time() - begun[1])
        first = found if first is None else first
    warm = dict(seconds_warm=statistics.median(seconds[1:]), processor_seconds_warm=statistics.median(processor[1:])) if repeats else {}
    return dict(seconds_cold=seconds[0], **warm), first


def differences(model, questions: Sequence[Question], found: list[list[int]], wanted: list[list[int]]) -> dict:
    """How many answers are equal, and how far apart the two best logits lie at the first token that differs."""
    gaps = []
    for q, a, b in zip(questions, found, wanted, strict=True):
        if a != b:
            same = next((n for n, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            best = np.sort(model.logits([[*q.ids, *a[:same]]], q.pixels[None])[0, -1])
            gaps.append(float(best[-1] - best[-2]))
    return dict(equal=len(questions) - len(gaps), differ_within_1e_4=sum(gap <= CLOSE for gap in gaps),
                differ_otherwise=sum(gap > CLOSE for gap in gaps), gaps=sorted(gaps)[-8:])


# --- at shapes of any size, with random weights: a case of benchmarks/h200.py ---


def random_questions(cfg, number: int) -> list[Question]:
    """Eleven of 5 images as VQA-RAD's 2.2 an image, with text of 8 to 48 tokens and answers of 1 to 32."""
    rng, size = np.random.default_rng(0), cfg.vision.image_size
    images = [rng.integers(0, 256, (size, size, 3)).astype(np.uint8) for _ in range(-(-number * 5 // 11))]
    text = lambda: rng.integers(3, cfg.decoder.vocab_size - 1, rng.integers(8, 49)).tolist()
    return [Question([1] + [IMAGE_TOKEN] * cfg.tokens_per_image + text(), images[i * 5 // 11], int(np.clip(rng.geometric(0.12), 1, 32)))
            for i in range(number)]


def ours_at(cfg, questions: Sequence[Question], batch_size: int, dtype: str) -> dict:
    """The engine with and without sharing; and from a question to its first token, its image a new one each time."""
    import jax.numpy as jnp

    from benchmarks.measure import as_loaded, peak_memory, random_params
    from llavamed_jax.generation.engine import Engine
    from llavamed_jax.generation.requests import Request

    params, out = as_loaded(random_params(cfg, jnp.dtype(dtype))), {}
    for name, share in (("shared", True), ("apart", False)):
        engine = Engine(cfg, params, jnp.dtype(dtype), batch_size=batch_size, share=share)
        seconds, found = cold_and_warm(partial(ours, engine, questions), 1, partial(forget, engine))
        assert [len(tokens) for tokens in found] == [q.limit for q in questions]
        out[name] = seconds | dict(questions_per_second=len(questions) / seconds["seconds_warm"], programs=engine.programs.count())
        out[name]["answers"] = found
    apart = out["apart"].pop("answers")
    equal = sum(a == b for a, b in zip(out["shared"].pop("answers"), apart))

    def first_token():
        forget(engine)
        next(engine.stream([Request(questions[0].ids, [questions[0].pixels], 1)]))

    first, _ = cold_and_warm(first_token, 5)
    return dict(**out, equal_with_and_without_sharing=equal, seconds_to_first_token=first["seconds_warm"], **peak_memory())


def theirs_at(cfg, questions: Sequence[Question], batch_size: int, alone: int, dtype: str) -> dict | str:
    """transformers on torch's GPU (or beside JAX on a CPU), in batches and, of the first few, one by one; or why not."""
    try:
        import torch
        import transformers
    except ImportError as error:
        return f"not measured: {error.name} is not installed"
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    if not on_cpu and not torch.cuda.is_available():
        return "not measured: torch sees no GPU here"
    from llavamed_jax.config import OURS
    from llavamed_jax.images.load import normalize

    shapes = llava_to_hf(cfg, "transformers")
    del shapes[OURS]  # which would have the rows that an export adds taken off again
    torch.set_default_dtype(getattr(torch, dtype))
    with torch.device("cpu" if on_cpu else "cuda"):
        model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(**shapes)).eval()
    torch.set_default_dtype(torch.float32)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    vision = cfg.vision
    theirs = Theirs(model, lambda image: normalize(image, vision.image_mean, vision.image_std))
    batched, _ = cold_and_warm(partial(theirs.batched, questions, batch_size), 1)
    single, _ = cold_and_warm(partial(theirs.one_by_one, questions[:alone]), 1)
    first, _ = cold_and_warm(partial(theirs.one_by_one, [dataclasses.replace(questions[0], limit=1)]), 5)
    del model, theirs
    if not on_cpu:
        torch.cuda.empty_cache()
    return dict(batched=batched | dict(questions_per_second=len(questions) / batched["seconds_warm"]),
                one_by_one=single | dict(questions=alone, questions_per_second=alone / single["seconds_warm"]),
                seconds_to_first_token=first["seconds_warm"], versions=dict(torch=torch.__version__, transformers=transformers.__version__))


# --- the loads ---


def checkpoint_of(path: str | None):
    """An open checkpoint: the one named, or the small model with random weights whose answers end at various lengths."""
    from llavamed_jax.checkpoints.open import open_checkpoint
    from llavamed_jax.checkpoints.random import random_checkpoint
    from llavamed_jax.config import preset

    if path is not None:
        return open_checkpoint(path)
    cfg = preset("small")
    # One token of eight ends an answer: so lengths vary, where greedy random weights would soon turn in circles.
    ends = dataclasses.replace(cfg.decoder, more_eos_ids=tuple(range(5, cfg.decoder.vocab_size, 8)))
    checkpoint = random_checkpoint(cfg.replace(decoder=ends), seed=1)
    return checkpoint.replace(files={"tokenizer.model": ROOT / "samples" / "vqa_rad" / "tokenizer.model"})


def read_questions(processor, root: str, number: int | None, limit: int) -> tuple[list[tuple[str, str]], list[Question], dict]:
    """(question, path) pairs of VQA-RAD's test split, the same as prompts, and how long their images take to be read."""
    from llavamed_jax.datasets.vqa_rad import read_vqa_rad

    pairs = [(s.question.replace("<image>", "").strip(), str(s.image)) for s in read_vqa_rad(root, "test", "clean")][:number]
    begun, pixels = time.perf_counter(), {}
    for _, path in pairs:
        if path not in pixels:
            pixels[path] = processor.images_uint8([path])[0]
    seconds = time.perf_counter() - begun
    ids = [processor.expand(processor.encode(processor.question(text, [path]))) for text, path in pairs]
    questions = [Question(row, pixels[path], limit) for row, (_, path) in zip(ids, pairs, strict=True)]
    return pairs, questions, dict(images=len(pixels), seconds_to_read_each_image_once=seconds)


def as_slake(pairs, questions):
    """The same questions, each eleven that follow each other about the image of their first."""
    firsts = [SLAKE * (i // SLAKE) for i in range(len(pairs))]
    return ([(text, pairs[first][1]) for (text, _), first in zip(pairs, firsts)],
            [Question(q.ids, questions[first].pixels, q.limit) for q, first in zip(questions, firsts)])


def measure(model, theirs: Theirs, pairs, questions, args) -> dict:
    """One load through every side."""
    from llavamed_jax.evaluation.answering.answerer import Generation
    from llavamed_jax.evaluation.answering.ask import ask
    from llavamed_jax.evaluation.answering.local import LocalModel
    from llavamed_jax.generation.engine import Engine

    n, out = len(questions), {}
    seconds, wanted = cold_and_warm(lambda: theirs.one_by_one(questions), args.repeats)
    out["one_by_one"] = seconds
    seconds, found = cold_and_warm(lambda: theirs.batched(questions, args.batch_size), args.repeats)
    out["batched"] = seconds | differences(model, questions, found, wanted)
    for name, share in (("shared", True), ("apart", False)):
        engine = Engine(model.config, model.engine.params, batch_size=args.batch_size, share=share)
        seconds, found = cold_and_warm(partial(ours, engine, questions), args.repeats, partial(forget, engine))
        out[name] = seconds | differences(model, questions, found, wanted) | dict(programs=engine.programs.count())
    settings = Generation(max_new_tokens=args.max_new_tokens, batch_size=args.batch_size)
    answerer = LocalModel(model, "small")
    shown = [(text, (path,)) for text, path in pairs]
    seconds, _ = cold_and_warm(lambda: ask(answerer, shown, settings), args.repeats, partial(forget, model.engine))
    out["ask"] = seconds
    for row in out.values():
        row["questions_per_second"] = n / row.get("seconds_warm", row["seconds_cold"])
    speed = {name: row["questions_per_second"] for name, row in out.items()}
    return dict(questions=n, new_tokens=sum(map(len, wanted)), longest=max(map(len, wanted)),
                prompt_positions=sum(len(q.ids) for q in questions),
                times_one_by_one=speed["shared"] / speed["one_by_one"], times_batched=speed["shared"] / speed["batched"],
                times_apart=speed["shared"] / speed["apart"], **out)


def agreement(model, questions: Sequence[Question], batch_size: int) -> dict:
    """In bfloat16, where rounding depends on a program's shapes: how many answers are those of one row at a time, unshared."""
    import jax
    import jax.numpy as jnp

    from llavamed_jax.generation.engine import Engine

    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.engine.params)
    found, wanted = (ours(Engine(model.config, params, jnp.bfloat16, batch_size=size, share=size > 1), questions)
                     for size in (batch_size, 1))
    return dict(bfloat16_equal_to_one_by_one=sum(a == b for a, b in zip(found, wanted)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vqa_rad", type=local, required=True, metavar="DIR", help="VQA-RAD in its official layout")
    parser.add_argument("--checkpoint", metavar="PATH", help="of a small model; default: random weights")
    parser.add_argument("--questions", type=int, metavar="N", help="only the first N")
    parser.add_argument("--batch_size", type=int, default=16, metavar="B", help="of every side")
    parser.add_argument("--max_new_tokens", type=int, default=64, metavar="N")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="warm passes")
    parser.add_argument("--out", type=local, default="benchmarks/results", metavar="DIR", help="directory of evaluate.jsonl, to which rows are appended")
    parser.add_argument("--commit", metavar="SHA", help="commit to record in the rows; default: the one of git")
    args = parser.parse_args()

    import torch
    import transformers

    from benchmarks.measure import append_row, circumstances
    from llavamed_jax.assistant import load
    from llavamed_jax.checkpoints.export.directory import export
    from llavamed_jax.images.load import normalize

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as directory:
        exported = Path(directory) / "hf"
        export(checkpoint_of(args.checkpoint), exported)
        model = load(exported)
        hf = transformers.LlavaForConditionalGeneration.from_pretrained(exported, dtype=torch.float32).eval()
    hf.generation_config.eos_token_id = list(model.engine.eos)
    vision = model.config.vision
    theirs = Theirs(hf, lambda image: normalize(image, vision.image_mean, vision.image_std))
    pairs, questions, reading = read_questions(model.processor, args.vqa_rad, args.questions, args.max_new_tokens)
    for name, load_ in (("VQA-RAD test", (pairs, questions)), (f"{SLAKE} questions an image", as_slake(pairs, questions))):
        row = measure(model, theirs, *load_, args) | agreement(model, load_[1], args.batch_size)
        append_row(Path(args.out) / "evaluate.jsonl", {
            "case": name, "weights": args.checkpoint or "random", "dtype": "float32", "batch_size": args.batch_size,
            "max_new_tokens": args.max_new_tokens, "cores": len(os.sched_getaffinity(0)), **row, **reading, **circumstances(args.commit)})


if __name__ == "__main__":
    main()
