"""The benchmark for one large GPU: `make h200 [PYTHON=python3] [OUT=DIR] [COMMIT=SHA] [CASES=a,b] [SMALL=1]`.

Each case runs in a process of its own, so that its memory is its own and one that would overrun can be ended; the cases
share nine minutes. A row a case, one JSON line, is printed and appended to OUT/h200.jsonl when it is measured. With
SMALL=1 everything runs at small shapes on a CPU, which shows that the script works and says nothing about speed.
Axis letters: B rows, T positions, P positions an image.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.utils.paths import local

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.95")  # JAX's 75 % reads as out of memory

BUDGET_SECONDS = 540
RESULT = "result: "  # how a case's own process marks its row

# GB/s of device memory by how device_kind begins (vendors' data sheets).
BANDWIDTH = {"NVIDIA H200": 4.8e12, "NVIDIA H100": 3.35e12, "NVIDIA A100": 2.04e12}


@dataclasses.dataclass(frozen=True)
class Size:
    """Shapes of a run: the model's preset and the batch of each case."""

    preset: str
    parity_layers: int
    train_rows: int
    train_length: int
    train_images: int
    prefill: tuple[tuple[int, int], ...]  # (B, T)
    decode: tuple[tuple[int, int], ...]  # (B, cache length)
    decode_tokens: int
    evaluate: tuple[int, int, int]  # questions, batch size, and how many of them are asked one by one
    repeats: int
    dtype: str


LARGE = Size("v15-7b", 2, 4, 2048, 3, ((1, 640), (8, 640)), ((1, 1024), (8, 1024), (32, 1024), (64, 1024)), 64,
             (128, 32, 24), 5, "bfloat16")
SMALL = Size("small", 2, 2, 128, 2, ((1, 64),), ((2, 128),), 8, (6, 4, 2), 2, "float32")


def parity(size: Size) -> dict:
    """Logits of one image and a text against transformers on the CPU, at the layers' true widths and a few layers.

    The model goes through a checkpoint in transformers' layout on disk, as a user's does.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    import torch
    import transformers

    from llavamed_jax.checkpoints.load import load_params
    from llavamed_jax.checkpoints.open import open_checkpoint
    from llavamed_jax.config import IMAGE_TOKEN, OURS, preset
    from llavamed_jax.models.llava import Llava

    cfg = preset(size.preset)
    cfg = cfg.replace(vision=dataclasses.replace(cfg.vision, num_layers=size.parity_layers + 1),
                      decoder=dataclasses.replace(cfg.decoder, num_layers=size.parity_layers))
    shapes = llava_to_hf(cfg, "transformers")
    del shapes[OURS]  # which would have the rows that an export adds taken off again
    hf = transformers.LlavaConfig(**shapes)
    torch.manual_seed(0)
    reference = transformers.LlavaForConditionalGeneration(hf).float().eval()
    with torch.no_grad():
        for p in reference.parameters():
            p.copy_(torch.randn_like(p) * p[0].numel() ** -0.5 if p.ndim > 1 else 1 + 0.2 * torch.randn_like(p))
    P, image_id = cfg.tokens_per_image, hf.image_token_id
    rng = np.random.default_rng(0)
    ids = np.concatenate([[1], np.full(P, IMAGE_TOKEN), rng.integers(3, cfg.decoder.vocab_size - 1, 40)])[None]
    pixels = rng.standard_normal((1, cfg.vision.image_size, cfg.vision.image_size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = reference(input_ids=torch.tensor(np.where(ids == IMAGE_TOKEN, image_id, ids)),
                             pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits.numpy()
    with tempfile.TemporaryDirectory() as directory:
        reference.save_pretrained(directory)
        checkpoint = open_checkpoint(directory)
        params = jax.device_put(load_params(checkpoint))

    def differences(dtype, precision):
        with jax.default_matmul_precision(precision):
            got = np.asarray(jax.jit(Llava(checkpoint.config, dtype).apply)({"params": params}, ids, pixels[None]))
        got, wanted = got[..., : expected.shape[-1]], expected[..., : got.shape[-1]]
        p, q = (jax.nn.log_softmax(x) for x in (wanted, got))
        divergence, agreement = (jnp.exp(p) * (p - q)).sum(-1).mean(), (got.argmax(-1) == wanted.argmax(-1)).mean()
        return float(np.abs(got - wanted).max()), float(divergence), float(agreement)

    float32, kl32, _ = differences(jnp.float32, "highest")
    low, kl16, agreement = differences(jnp.bfloat16, "default")
    return dict(shapes=f"T {ids.shape[1]}, {size.parity_layers} layers", dtype="float32", logits_std=float(expected.std()),
                max_difference_float32=float32, kl_float32=kl32, max_difference_bfloat16=low, kl_bfloat16=kl16,
                argmax_agreement_bfloat16=agreement)


def _train(size: Size, trainable: list[str]) -> dict:
    """Updates on one fixed batch: AdamW in float32, everything else in the compute dtype, full rematerialisation."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from ml_collections import ConfigDict

    from benchmarks.measure import median_seconds, peak_memory, random_params
    from llavamed_jax.config import IGNORE, IMAGE_TOKEN, preset
    from llavamed_jax.models import llava
    from llavamed_jax.parallel.mesh import make_mesh
    from llavamed_jax.training import optimizer, state, throughput
    from llavamed_jax.training.step import llava_loss, make_train_step, put_batch

    cfg, mesh, dtype = preset(size.preset), make_mesh("data=1", jax.devices()[:1]), jnp.dtype(size.dtype)
    B, T, I, P = size.train_rows, size.train_length, size.train_images, cfg.tokens_per_image
    rng = np.random.default_rng(0)
    ids = rng.integers(3, cfg.decoder.vocab_size, (B, T)).astype(np.int32)
    ids[:, 1 : 1 + I * P] = IMAGE_TOKEN
    S = cfg.vision.image_size
    batch = dict(input_ids=ids, labels=np.where(ids == IMAGE_TOKEN, IGNORE, ids), segment_ids=np.ones((B, T), np.int32),
                 positions=np.tile(np.arange(T, dtype=np.int32), (B, 1)), num_images=np.full(B, I),
                 pixel_values=rng.standard_normal((B, I, S, S, 3)).astype(np.float32))
    params = random_params(cfg, jnp.float32 if len(trainable) > 1 else dtype, scan=True)
    names, _ = state.partition(params, trainable)
    adamw = ConfigDict(dict(learning_rate=2e-5, warmup_ratio=0.03, weight_decay=0.0, clip_norm=1.0, b1=0.9, b2=0.999, eps=1e-8,
                            mu_dtype=None, overrides=()))
    update, schedule = optimizer.build(adamw, 100, list(names))
    shardings = state.state_shardings(cfg, params, trainable, update, mesh)
    train_state = state.create(params, shardings, update, dtype)
    del params
    loss = llava_loss(llava.Llava(cfg, dtype, scan=True, remat="full"))
    step = make_train_step(loss, update, schedule, mesh, shardings)
    rows, losses = put_batch(batch, mesh), []

    def run():
        nonlocal train_state
        train_state, out = step(train_state, rows)
        losses.append(out["loss"])
        return out

    seconds = median_seconds(run, size.repeats, warmup=2)
    trained, abstract = {name: int(x.size) for name, x in train_state.trainable.items()}, jax.eval_shape(lambda x: x, train_state)
    measured = peak_memory()
    flops = throughput.training_flops(cfg, trained, B * T, B * T * (T + 1) // 2, B * I)
    peak = throughput.peak_flops(jax.devices()[0].device_kind)
    return dict(shapes=f"B {B}, T {T}, images a row {I}", dtype=size.dtype, remat="full", seconds=seconds,
                tokens_per_second=B * T / seconds, mfu=flops / seconds / peak if peak else None,
                trained_parameters=sum(trained.values()), first_loss=float(losses[0]), last_loss=float(losses[-1]), **measured,
                **_preflight(seconds, lambda mesh: make_train_step(loss, update, schedule, mesh, state.state_shardings(
                    cfg, llava.abstract_params(cfg, scan=True), trainable, update, mesh)), abstract, rows))


def _preflight(seconds: float, step_on, abstract, batch) -> dict:
    """What preflight says of a step, compiled for a description of this device: its peak and its floor.

    Args:
      seconds: that the step took. step_on: a mesh -> the step.
      abstract, batch: state and rows, its arguments, of which only shapes are looked at.
    """
    import jax

    from benchmarks.measure import beside_floor, this_machine
    from llavamed_jax.parallel.mesh import batch_sharding, make_mesh, replicated
    from llavamed_jax.preflight.compile import compiled
    from llavamed_jax.training.losses import most_rounds

    machine = this_machine()
    if machine is None:
        return dict(preflight_error=f"preflight has no description of {jax.devices()[0].device_kind!r}")
    try:
        mesh = make_mesh("data=1", machine.devices()[:1])
        like = lambda where: lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
        rows = jax.tree.map(like(batch_sharding(mesh)), batch)
        found = compiled(step_on(mesh).lower(jax.tree.map(like(replicated(mesh)), abstract), rows), machine)
    except Exception as error:  # what was measured is worth more than what could be said of it
        return dict(preflight_error=str(error)[:300])
    B, T = batch["input_ids"].shape
    return dict(preflight_peak_bytes=found.peak, preflight_argument_bytes=found.arguments, preflight_temporary_bytes=found.temporaries,
                **beside_floor(seconds, lambda read: [read(found.text, most_rounds(B * T), (T + 1) / 2)]))


def train_projector(size: Size) -> dict:
    """Stage 1: the projector alone is trained."""
    return _train(size, ["projector/.*"])


def train_full(size: Size) -> dict:
    """Stage 2: decoder and projector are trained, all of AdamW in float32."""
    return _train(size, ["projector/.*", "decoder/.*"])


def _prefill(size: Size, B: int, T: int) -> dict:
    import jax

    from benchmarks.measure import beside_floor, median_seconds, peak_memory
    from benchmarks.prompted import Prompted
    from llavamed_jax.training.throughput import peak_flops

    prompted = Prompted(size.preset, size.dtype, B, T, 1)
    cfg, seconds = prompted.cfg, median_seconds(prompted.prefill, 2 * size.repeats)
    head = 2 * cfg.decoder.hidden_size * cfg.decoder.vocab_size  # of a token; only the last goes through it
    flops = B * (T * (cfg.decoder.forward_flops_per_token(T) - head) + head + cfg.vision_flops_per_image())
    peak = peak_flops(jax.devices()[0].device_kind)
    return dict(shapes=f"B {B}, T {T}", dtype=size.dtype, seconds=seconds, tokens_per_second=B * T / seconds,
                mfu=flops / seconds / peak if peak else None, **peak_memory(), **beside_floor(seconds, prompted.prefill_floors))


def prefill(size: Size) -> list[dict]:
    """Image and prompt to the first token, tower included, from arrays on the device."""
    return [_prefill(size, B, T) for B, T in size.prefill]


def _decode(size: Size, B: int, S: int) -> dict:
    import jax

    from benchmarks.measure import beside_floor, median_seconds, peak_memory
    from benchmarks.prompted import Prompted
    from llavamed_jax.models.decoders.cache import cache_bytes

    length = S - size.decode_tokens - 2
    prompted = Prompted(size.preset, size.dtype, B, length, size.decode_tokens)
    prompted.prefill()
    step = median_seconds(prompted.decode, size.repeats) / size.decode_tokens
    decoder = prompted.params["decoder"]
    weights = sum(x.nbytes for x in jax.tree.leaves(decoder)) - decoder["embed_tokens"]["embedding"].nbytes
    moved = weights + cache_bytes(prompted.cfg.decoder, B, length + size.decode_tokens // 2, size.dtype)
    kind = jax.devices()[0].device_kind
    bandwidth = next((b for name, b in BANDWIDTH.items() if kind.startswith(name)), None)
    return dict(shapes=f"B {B}, cache {prompted.cache_length}, {size.decode_tokens} tokens", dtype=size.dtype, seconds_per_step=step,
                tokens_per_second=B / step, bandwidth_fraction=moved / step / bandwidth if bandwidth else None, **peak_memory(),
                **beside_floor(step, lambda read: prompted.decode_floor(read, length + size.decode_tokens / 2)))


def decode(size: Size) -> list[dict]:
    """Tokens after the first, on the device; bytes are the weights once and the filled cache once a step."""
    return [_decode(size, B, S) for B, S in size.decode]


def decode_split(size: Size) -> list[dict]:
    """The same where XLA may split the sums of a product of few rows (`llavamed_jax/parallel/xla.py` keeps them whole)."""
    from llavamed_jax.parallel import xla

    flag = "xla_gpu_experimental_force_split_k"
    if flag in xla.options("gpu", xla.ENGINE):  # else this jaxlib has no such flag, and splits
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}=0".strip()
    return decode(size)


def evaluate(size: Size) -> dict:
    """Questions a second of a whole evaluation: 2.2 questions an image, answers of 1 to 32 tokens, in turn for each side.

    The weights are random and each side's own, and nothing but an answer's length ends it, so both make as many tokens.
    """
    from benchmarks import evaluate as beside
    from llavamed_jax.config import preset

    questions, batch_size, alone = size.evaluate
    cfg = preset(size.preset)
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, eos_token_id=-5))
    load = beside.random_questions(cfg, questions)
    theirs = beside.theirs_at(cfg, load, batch_size, alone, size.dtype)  # first, and gone before JAX takes the memory
    return dict(shapes=f"{questions} questions, {len({id(q.pixels) for q in load})} images, batch {batch_size}", dtype=size.dtype,
                new_tokens=sum(q.limit for q in load), **beside.ours_at(cfg, load, batch_size, size.dtype), transformers=theirs)


# What a case needs at least, in seconds on a large GPU: with less left of the budget it is not begun.
CASES = {"parity": (parity, 60), "prefill": (prefill, 45), "decode": (decode, 60), "evaluate": (evaluate, 120),
         "train_projector": (train_projector, 60), "train_full": (train_full, 75), "decode_split": (decode_split, 60)}


def run_case(name: str, size: Size, commit: str | None) -> None:
    """In a case's own process: prints its rows."""
    from benchmarks.measure import circumstances

    found = CASES[name][0](size)
    for row in found if isinstance(found, list) else [found]:
        print(RESULT + json.dumps({"case": name, "preset": size.preset, **row, **circumstances(commit)}), flush=True)


def run_all(names: list[str], args) -> int:
    """Runs each case in its own process within what is left of the budget; returns 1 if one failed."""
    from benchmarks.measure import append_row

    out, start, failed = Path(args.out) / "h200.jsonl", time.monotonic(), False
    for name in names:
        left = BUDGET_SECONDS - (time.monotonic() - start)
        if left < CASES[name][1] and not args.small:
            append_row(out, {"case": name, "skipped": f"{left:.0f} of {BUDGET_SECONDS} s were left", "commit": args.commit})
            continue
        command = [sys.executable, __file__, "--case", name] + ["--small"] * args.small + (["--commit", args.commit] if args.commit else [])
        try:
            done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=left)
        except subprocess.TimeoutExpired:
            append_row(out, {"case": name, "skipped": f"did not end within {left:.0f} s", "commit": args.commit})
            continue
        rows = [line.removeprefix(RESULT) for line in done.stdout.splitlines() if line.startswith(RESULT)]
        for row in rows:
            append_row(out, json.loads(row))
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error" in line or "RESOURCE" in line]
            reason = errors[-1] if errors else done.stderr.strip()[-300:]
            append_row(out, {"case": name, "failed": reason[:600], "commit": args.commit})
            print(done.stderr[-3000:], file=sys.stderr)
            failed = True
    return int(failed)


def main() -> int:
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=local, default="benchmarks/results", metavar="DIR", help="directory of h200.jsonl, to which rows are appended")
    parser.add_argument("--commit", metavar="SHA", help="commit to record in the rows; default: the one of git")
    parser.add_argument("--cases", metavar="A,B", help=f"default: {','.join(CASES)}")
    parser.add_argument("--small", action="store_true", help="small shapes, on a CPU")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.small:
        os.environ["JAX_PLATFORMS"] = "cpu"
    if args.case:
        run_case(args.case, SMALL if args.small else LARGE, args.commit)
        return 0
    names = args.cases.split(",") if args.cases else list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        parser.error(f"the case {unknown[0]!r} does not exist; {', '.join(CASES)} were expected")
    return run_all(names, args)


if __name__ == "__main__":
    sys.exit(main())
