"""The three stages trained here and by torch, update for update: `python benchmarks/yardstick.py`.

The same tiny LLaVA from the same weights, on eight fixed batches repeated, 50 updates: the recipe's optimizer here;
torch's AdamW, clipping and the cosine of HF's Trainer there. At the learning rate of the stage and at 1e-3, for
at a small one much that is wrong would pass. Each stage starts where torch's stage before ended.
A row passes if every loss agrees to 2e-6 of it, if each trained tensor's change agrees to 1 % of it (norms over all
updates), and if what is frozen has kept its bits. Then stage 2 of v1.0, whose `loss_weighting` is `sample`, beside the rule
of HF's Trainer with one sample a micro-batch, and the same with mistakes put in on purpose: each must fail.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import transformers
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from llavamed_jax.cli.common import load_config
from llavamed_jax.config import IGNORE, IMAGE_TOKEN, LlavaConfig
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.stacking import stack, unstack
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training import optimizer as optimizers
from llavamed_jax.training import state as states
from llavamed_jax.training.step import llava_loss, make_train_step, put_batch
from tests.support import hf

UPDATES, BATCHES, ROWS, LENGTH, HIGH_RATE = 50, 8, 4, 30, 1e-3
LOSS_TOLERANCE, CHANGE_TOLERANCE = 2e-6, 0.01
ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Stage:
    """A recipe, and what its rows are like: the share of them that has an image, the fewest and the most supervised tokens."""

    recipe: str
    images: float
    answers: tuple[int, int]


STAGES = {"1": Stage("configs/pretrain.py:v1", 1.0, (8, 12)), "2": Stage("configs/finetune.py", 0.5, (2, 9)),
          "3": Stage("configs/vqa_rad.py", 1.0, (1, 3))}
# v1.0's stage 2, one sample a micro-batch: answers of very different lengths, which `token` and `sample` weigh differently.
BY_SAMPLE = Stage("configs/finetune.py:v1", 0.5, (1, 12))
# v1.0's stage 1 also trains rows of the embedding for its start and end tokens, which the tiny model has not.
TRAINABLE = {"1": ("projector/.*",), "2": ("projector/.*", "decoder/.*"), "3": ("projector/.*", "decoder/.*")}


@dataclasses.dataclass
class Training:
    """Losses by update, and parameters by their names on disk before and after."""

    losses: np.ndarray
    before: dict[str, np.ndarray]
    after: dict[str, np.ndarray]


def recipe_of(stage: str) -> ConfigDict:
    return load_config(str(ROOT / STAGES[stage].recipe), []).optimizer


def batches_of(stage: str, cfg: LlavaConfig) -> list[dict]:
    """Padded rows with uneven numbers of supervised tokens; every row of its own length."""
    return [_batch(np.random.default_rng([int(stage), i]), STAGES[stage], cfg) for i in range(BATCHES)]


def _batch(rng, stage: Stage, cfg: LlavaConfig) -> dict:
    P, at = cfg.tokens_per_image, np.arange(LENGTH, dtype=np.int32)
    ids = rng.integers(3, 90, (ROWS, LENGTH)).astype(np.int32)
    with_image = np.arange(ROWS) < round(ROWS * stage.images)
    ids[with_image, 1:1 + P] = IMAGE_TOKEN
    ends = rng.integers(P + 1 + stage.answers[1], LENGTH + 1, ROWS)[:, None]
    starts = ends - rng.integers(stage.answers[0], stage.answers[1] + 1, ROWS)[:, None]
    segments = (at < ends).astype(np.int32)
    S = cfg.vision.image_size
    pixels = rng.standard_normal((ROWS, 1, S, S, 3), np.float32) * with_image[:, None, None, None, None]
    return dict(input_ids=np.where(segments, ids, 0), labels=np.where((at >= starts) & (at < ends), ids, IGNORE).astype(np.int32),
                positions=np.tile(at, (ROWS, 1)), segment_ids=segments, pixel_values=pixels)


def train_torch(model, recipe: ConfigDict, trainable: tuple[str, ...], batches: list[dict], weighting: str = "token") -> Training:
    """What HF's Trainer does with the original's settings. The model is changed."""
    before = {n: x.copy() for n, x in flatten_dict(hf.params_of(model), sep="/").items()}
    names = set(states.partition(before, trainable)[0])
    for name, p in model.named_parameters():
        p.requires_grad_(hf.our_name(name) in names)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    is_plain = lambda name: "norm" in name or name.endswith("bias")
    optimizer = torch.optim.AdamW(
        [dict(params=[p for n, p in trained if is_plain(n) == plain], weight_decay=0.0 if plain else recipe.weight_decay)
         for plain in (False, True)], lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * UPDATES), UPDATES)
    losses = []
    for update in range(UPDATES):
        optimizer.zero_grad()
        losses.append(_backward(model, batches[update % len(batches)], weighting))
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        scheduler.step()
    return Training(np.array(losses), before, {n: x.copy() for n, x in flatten_dict(hf.params_of(model), sep="/").items()})


def by_sample_batches(cfg: LlavaConfig) -> list[dict]:
    """Rows for `loss_weighting=sample`. One sample of each second batch has no supervised token."""
    batches = [_batch(np.random.default_rng([4, i]), BY_SAMPLE, cfg) for i in range(BATCHES)]
    for i in range(0, BATCHES, 2):
        batches[i]["labels"][i // 2] = IGNORE
    return batches


def packed(rows: dict) -> dict:
    """The same samples, several in a row: without padding one after another, the last row filled up."""
    lengths = rows["segment_ids"].sum(1)
    places = [(0, 0, 1), (0, lengths[0], 2), (1, 0, 1), (1, lengths[2], 2)]
    out = {name: np.full((2, 2 * LENGTH), IGNORE if name == "labels" else 0, np.int32) for name in rows if name != "pixel_values"}
    images = [[], []]
    for sample, (row, start, segment) in enumerate(places):
        here, there = (sample, slice(lengths[sample])), (row, slice(start, start + lengths[sample]))
        for name in out:
            out[name][there] = segment if name == "segment_ids" else rows[name][here]
        if (rows["input_ids"][sample] == IMAGE_TOKEN).any():
            images[row].append(rows["pixel_values"][sample, 0])
    size = rows["pixel_values"].shape[2:]
    out["pixel_values"] = np.stack([np.stack([*row, *[np.zeros(size, np.float32)] * (2 - len(row))]) for row in images])
    return out


def _backward(model, rows: dict, weighting: str) -> float:
    """Adds up gradients as HF's Trainer does, over one micro-batch (`token`) or one a sample (`sample`); returns the loss.

    The mean over no token is NaN with a gradient of 0: it moves nothing and is one of the micro-batches that are averaged. The
    log of HF's Trainer leaves it out, and so does the loss here.
    """
    parts = [rows] if weighting == "token" else [{name: x[i:i + 1] for name, x in rows.items()} for i in range(len(rows["labels"]))]
    losses = []
    for part in parts:
        loss = _torch_loss(model, part)
        (loss / len(parts)).backward()
        losses.append(loss.item())
    return float(np.nanmean(losses))


def _torch_loss(model, rows: dict):
    ids = torch.tensor(np.where(rows["input_ids"] == IMAGE_TOKEN, hf.IMAGE_ID, rows["input_ids"])).long()
    has_image = (rows["input_ids"] == IMAGE_TOKEN).any(1)
    pixels = torch.tensor(rows["pixel_values"][has_image, 0]).permute(0, 3, 1, 2) if has_image.any() else None
    logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.tensor(rows["segment_ids"])).logits
    labels = torch.tensor(rows["labels"]).long()
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)


def train_here(before: dict[str, np.ndarray], cfg: LlavaConfig, recipe: ConfigDict, trainable: tuple[str, ...],
               batches: list[dict], weighting: str = "token", micro_batches: int = 1, mesh: str = "data=1") -> Training:
    """The same with this project's training step, from parameters by their names on disk."""
    mesh = make_mesh(mesh, jax.devices()[:math.prod(int(size[-1]) for size in mesh.split(","))])
    params = stack(states.merge(before, {}))
    optimizer, schedule = optimizers.build(recipe, UPDATES, list(states.partition(params, trainable)[0]))
    shardings = states.state_shardings(cfg, params, trainable, optimizer, mesh)
    state = states.create(params, shardings, optimizer, jnp.float32)
    step = make_train_step(llava_loss(Llava(cfg, scan=True), weighting), optimizer, schedule, mesh, shardings, micro_batches,
                           weighting)
    placed, losses = [put_batch(rows, mesh) for rows in batches], []
    for update in range(UPDATES):
        state, metrics = step(state, placed[update % len(batches)])
        losses.append(metrics["loss"])
    after = unstack(jax.device_get({**state.trainable, **state.frozen}))
    return Training(np.array(jax.device_get(losses)), before, after)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """`loss`: largest difference of a loss over the loss. `change`: largest of a trained tensor's change over the change."""

    loss: float
    change: float
    worst: str
    frozen_is_identical: bool
    smallest_change: float

    @property
    def passes(self) -> bool:
        return self.loss <= LOSS_TOLERANCE and self.change <= CHANGE_TOLERANCE and self.frozen_is_identical


def compare(ours: Training, theirs: Training, trainable: tuple[str, ...]) -> Comparison:
    """`theirs` says what moved how far. Norms are taken in float64."""
    names, frozen = states.partition(theirs.before, trainable)
    assert ours.after.keys() == theirs.after.keys()
    norm = lambda x: float(np.linalg.norm(np.asarray(x, np.float64)))
    moved = {n: norm(theirs.after[n] - theirs.before[n]) for n in names}
    apart = {n: norm(ours.after[n] - theirs.after[n]) / moved[n] for n in names}
    worst = max(apart, key=lambda n: np.nan_to_num(apart[n], nan=np.inf))
    return Comparison(
        loss=float(np.abs(ours.losses / theirs.losses - 1).max()), change=apart[worst], worst=worst,
        frozen_is_identical=all(np.array_equal(x.after[n], theirs.before[n]) for n in frozen for x in (ours, theirs)),
        smallest_change=float(np.min([moved[n] / norm(theirs.before[n]) for n in names])))


def yardstick(stages=tuple(STAGES), rates=("stage", HIGH_RATE)) -> Iterator[tuple[str, float, Comparison, Training]]:
    """(stage, learning rate, how far apart, torch's training) for each stage, each from where torch's stage before ended."""
    model, cfg = hf.llava()
    start = flatten_dict(hf.params_of(model), sep="/")
    for stage in stages:
        start, batches, ended = {n: x.copy() for n, x in start.items()}, batches_of(stage, cfg), None
        for rate in rates:
            recipe = recipe_of(stage).copy_and_resolve_references()
            recipe.learning_rate = recipe.learning_rate if rate == "stage" else rate
            put(model, start)
            theirs = train_torch(model, recipe, TRAINABLE[stage], batches)
            ended = ended or theirs.after
            ours = train_here(theirs.before, cfg, recipe, TRAINABLE[stage], batches)
            yield stage, recipe.learning_rate, compare(ours, theirs, TRAINABLE[stage]), theirs
        start = ended


def by_sample(rate: float = HIGH_RATE) -> tuple[Training, LlavaConfig, ConfigDict]:
    """Stage 2 of v1.0 as HF's Trainer weighs it: torch's training, our config, the recipe's optimizer at a learning rate."""
    model, cfg = hf.llava()
    recipe = load_config(str(ROOT / BY_SAMPLE.recipe), []).optimizer.copy_and_resolve_references()
    recipe.learning_rate = rate
    return train_torch(model, recipe, TRAINABLE["2"], by_sample_batches(cfg), "sample"), cfg, recipe


def weighted_here(theirs: Training, cfg: LlavaConfig, recipe: ConfigDict, *, is_packed: bool = False, weighting: str = "sample",
                  micro_batches: int = 1, mesh: str = "data=1") -> Comparison:
    """The same updates here, packed or not, beside torch's."""
    batches = by_sample_batches(cfg)
    batches = [packed(rows) for rows in batches] if is_packed else batches
    ours = train_here(theirs.before, cfg, recipe, TRAINABLE["2"], batches, weighting, micro_batches, mesh)
    return compare(ours, theirs, TRAINABLE["2"])


@torch.no_grad()
def put(model, params: dict[str, np.ndarray]) -> None:
    """Writes parameters by our names into a torch model."""
    for name, p in model.named_parameters():
        ours = hf.our_name(name)
        if ours not in params:
            continue  # what the feature layer does not need
        value = params[ours]
        if ours.endswith("patch_embedding/kernel"):
            value = value.transpose(3, 2, 0, 1)
        elif ours.endswith("kernel"):
            value = value.T
        p.copy_(torch.tensor(np.ascontiguousarray(value)))


def optax_adam():
    """Adam's bias corrections in float32, as optax has them."""
    plain = lambda b1, b2, eps, mu_dtype: optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    return mock.patch.object(optimizers, "_scale_by_adam", plain)


@contextlib.contextmanager
def one_update_ahead():
    """The schedule read at n + 1 in place of n."""
    right = optimizers.warmup_cosine
    with mock.patch.object(optimizers, "warmup_cosine", lambda *a: (lambda step: right(*a)(step + 1))):
        yield


# Mistake -> (what it changes of the recipe's optimizer, what it trains, what else is wrong).
MISTAKES = {
    "b2 of 0.99": (dict(b2=0.99), TRAINABLE["2"], contextlib.nullcontext),
    "b2 of 0.95": (dict(b2=0.95), TRAINABLE["2"], contextlib.nullcontext),
    "weight decay of 0.01": (dict(weight_decay=0.01), TRAINABLE["2"], contextlib.nullcontext),
    "norms frozen": ({}, ("projector/.*", r"decoder/(?!.*norm).*"), contextlib.nullcontext),
    "no clipping": (dict(clip_norm=0.0), TRAINABLE["2"], contextlib.nullcontext),
    "schedule one update ahead": ({}, TRAINABLE["2"], one_update_ahead),
    "bias corrections in float32": ({}, TRAINABLE["2"], optax_adam),
}


def with_mistake(mistake: str, theirs: Training, rate: float, cfg: LlavaConfig) -> Comparison:
    """Stage 2 once more, done wrong here, beside torch's training at this rate."""
    changes, trainable, context = MISTAKES[mistake]
    recipe = recipe_of("2").copy_and_resolve_references()
    recipe.update(learning_rate=rate, **changes)
    with context():
        ours = train_here(theirs.before, cfg, recipe, trainable, batches_of("2", cfg))
    return compare(ours, theirs, TRAINABLE["2"])


# Rows of the table of `loss_weighting`: the name, and the settings of `weighted_here`.
WEIGHTED = {
    "a sample a row": {},
    "packed": dict(is_packed=True),
    "packed, in two micro-batches": dict(is_packed=True, micro_batches=2),
    "weighed by token": dict(weighting="token"),
    "packed, weighed by token": dict(is_packed=True, weighting="token"),
}


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    row = "| {:<55} | {:>9} | {:>9} | {:>9} | {:<5} | {}".format
    print(row("differences from torch", "loss", "change", "moved", "bits", ""))
    verdicts, references = [], {}

    def show(title, found, should_pass):
        verdicts.append(found.passes == should_pass)
        verdict = ("passes" if found.passes else "fails") + ("" if verdicts[-1] else f", which was not expected; worst: {found.worst}")
        print(row(title, f"{found.loss:.2e}", f"{found.change:.2e}", f"{found.smallest_change:.1e}",
                  "same" if found.frozen_is_identical else "MOVED", verdict), flush=True)

    for stage, rate, found, theirs in yardstick():
        show(f"stage {stage} at {rate:g}", found, True)
        references[stage, rate] = theirs
    cfg = hf.llava()[1]
    for rate in (2e-5, HIGH_RATE):
        theirs, *given = by_sample(rate)
        for name, settings in WEIGHTED.items():
            show(f"stage 2 of v1.0 at {rate:g}, {name}", weighted_here(theirs, *given, **settings), settings.get("weighting") != "token")
    for mistake in MISTAKES:
        show(f"stage 2 at {HIGH_RATE:g}, {mistake}", with_mistake(mistake, references["2", HIGH_RATE], HIGH_RATE, cfg), False)
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
