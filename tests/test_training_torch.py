"""Twenty updates of the whole model beside torch: LlavaForConditionalGeneration, AdamW, clipping, HF's cosine."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llavamed_jax.config import IGNORE, IMAGE_TOKEN  # noqa: E402
from llavamed_jax.models.llava import Llava, stack  # noqa: E402
from llavamed_jax.parallel.mesh import make_mesh  # noqa: E402
from llavamed_jax.training import optimizer as optimizers  # noqa: E402
from llavamed_jax.training import state as states  # noqa: E402
from llavamed_jax.training.step import llava_loss, make_train_step, place  # noqa: E402
from tests import hf  # noqa: E402

STEPS, ROWS, LENGTH, RATE, DECAY, WARMUP = 20, 4, 30, 1e-3, 0.1, 0.1
TRAINABLE = ("projector/.*", "decoder/.*")


def batch(seed, cfg):
    """Rows with and without an image, padded, with uneven numbers of supervised tokens."""
    rng, P = np.random.default_rng(seed), cfg.tokens_per_image
    ids = rng.integers(3, 90, (ROWS, LENGTH)).astype(np.int32)
    ids[::2, 1:1 + P] = IMAGE_TOKEN
    ends = rng.integers(P + 6, LENGTH + 1, ROWS)
    starts = ends - rng.integers(2, 6, ROWS)
    at = np.arange(LENGTH)
    is_answer = (at >= starts[:, None]) & (at < ends[:, None])
    segments = (at < ends[:, None]).astype(np.int32)
    return dict(input_ids=np.where(segments, ids, 0), labels=np.where(is_answer, ids, IGNORE).astype(np.int32),
                positions=np.tile(at.astype(np.int32), (ROWS, 1)), segment_ids=segments,
                pixel_values=hf.images(ROWS, seed=seed)[:, None])


def torch_losses(model, batches):
    model.model.vision_tower.requires_grad_(False)
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    is_plain = lambda name: "norm" in name or name.endswith("bias")
    optimizer = torch.optim.AdamW([dict(params=[p for n, p in trained if not is_plain(n)], weight_decay=DECAY),
                                   dict(params=[p for n, p in trained if is_plain(n)], weight_decay=0.0)], lr=RATE)
    scheduler = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(WARMUP * STEPS), STEPS)
    losses = []
    for rows in batches:
        ids = torch.tensor(np.where(rows["input_ids"] == IMAGE_TOKEN, hf.IMAGE_ID, rows["input_ids"])).long()
        pixels = torch.tensor(rows["pixel_values"][::2, 0]).permute(0, 3, 1, 2)
        logits = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.tensor(rows["segment_ids"])).logits
        labels = torch.tensor(rows["labels"]).long()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trained], 1.0)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


def our_losses(params, cfg, batches):
    mesh = make_mesh("data=1", jax.devices()[:1])
    params = stack(params)
    recipe = ConfigDict(dict(learning_rate=RATE, warmup_ratio=WARMUP, weight_decay=DECAY, clip_norm=1.0, b1=0.9, b2=0.999,
                             eps=1e-8, mu_dtype="float32", overrides=()))
    optimizer, schedule = optimizers.build(recipe, STEPS, list(states.partition(params, TRAINABLE)[0]))
    state = states.create(params, TRAINABLE, optimizer, mesh, jnp.float32)
    step = make_train_step(llava_loss(Llava(cfg, scan=True, remat="full")), optimizer, schedule, mesh,
                           states.state_shardings(params, TRAINABLE, optimizer, mesh))
    losses = []
    for rows in batches:
        state, metrics = step(state, place(rows, mesh))
        losses.append(float(metrics["loss"]))
    return losses, state


def test_twenty_updates_are_torchs(measured):
    model, cfg = hf.llava()
    batches = [batch(seed, cfg) for seed in range(STEPS)]
    losses, state = our_losses(hf.params_of(model), cfg, batches)
    expected = torch_losses(model, batches)
    assert max(expected) - min(expected) > 0.1, "the losses must move for their agreement to say something"
    measured(np.array(losses) / expected, np.ones(STEPS), 2e-6)
    after = stack(hf.params_of(model))
    for name, value in states.partition(after, TRAINABLE)[0].items():
        measured(state.trainable[name], value, 2e-5)
