"""Fifty updates of factors and projector beside PEFT and torch's AdamW, as the whole model's in `parity/test_training_torch.py`."""

import math

import numpy as np
import pytest

peft = pytest.importorskip("peft")
torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")

from flax.traverse_util import flatten_dict  # noqa: E402

from benchmarks import yardstick  # noqa: E402
from llavamed_jax.adapters.open import open_model  # noqa: E402
from llavamed_jax.checkpoints.load import load_params  # noqa: E402
from llavamed_jax.config.adapter import is_derived, is_factor  # noqa: E402
from tests.support import hf  # noqa: E402

pytestmark = pytest.mark.torch
RATE = 3e-3
TRAINABLE = ("decoder/.*_lora_[ab]", "projector/.*")


def their_training(root, **settings):
    """(PEFT's start and base, losses, tensors by our names after the updates) of a tiny LLaVA."""
    model, _ = hf.llava()
    model.save_pretrained(root / "base")
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=r".*language_model.*_proj", modules_to_save=["multi_modal_projector"],
                             r=4, lora_alpha=8, lora_dropout=0.0, **settings)
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(root / "before", save_embedding_layers=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    recipe = yardstick.recipe_of("2").copy_and_resolve_references()
    recipe.learning_rate = RATE
    optimizer = torch.optim.AdamW(trained, lr=recipe.learning_rate, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    schedule = yardstick.transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(0.03 * yardstick.UPDATES), yardstick.UPDATES)
    losses, cfg = [], open_model(root / "base").config
    batches = yardstick.batches_of("2", cfg)
    for update in range(yardstick.UPDATES):
        optimizer.zero_grad()
        losses.append(yardstick._backward(model, batches[update % len(batches)], "token"))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
    model.save_pretrained(root / "after", save_embedding_layers=False)
    return recipe, batches, np.array(losses)


def params_of(root, name):
    checkpoint = open_model(root / "base", adapter=root / name)
    flat = flatten_dict(load_params(checkpoint, np.float32), sep="/")
    return checkpoint.config, flat


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Of rsLoRA, whose scale is twice the other's here; which scale an adapter has `test_peft.py` compares."""
    root = tmp_path_factory.mktemp("peft")
    return root, *their_training(root, use_rslora=True)


def test_fifty_updates_are_pefts(trained, measured):
    root, recipe, batches, losses = trained
    (cfg, before), (_, after) = params_of(root, "before"), params_of(root, "after")
    assert all(not x.any() for name, x in before.items() if name.endswith("lora_b"))
    ours = yardstick.train_here(before, cfg, recipe, TRAINABLE, batches)
    theirs = yardstick.Training(losses, before, after)
    # B begins at 0, so its change is all of it.
    found = {name: np.linalg.norm(ours.after[name] - after[name]) / np.linalg.norm(after[name] - before[name])
             for name in before if is_factor(name) or name.startswith("projector/")}
    assert max(found.values()) <= yardstick.CHANGE_TOLERANCE and len(found) == 2 * 14 + 4
    assert max(theirs.losses) - min(theirs.losses) > 1, "the losses must move for their agreement to say something"
    for name in before:
        if name not in found:
            np.testing.assert_array_equal(ours.after[name], before[name], err_msg=name)
            assert is_derived(name) or np.array_equal(after[name], before[name])
    measured(float(np.abs(ours.losses / losses - 1).max()), 0, yardstick.LOSS_TOLERANCE)
