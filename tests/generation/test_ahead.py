"""Programs that were compiled from shapes are the ones that an engine with weights takes from the cache on disk."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import monitoring

from llavamed_jax.adapters import peft_write
from llavamed_jax.adapters.lora import attach
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.export.few_bits import Rounding
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.config.adapter import AdapterConfig, AdapterRule, is_factor
from llavamed_jax.generation.ahead import compile_ahead, weights
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Request
from tests.support.random_params import random_params
from tests.support.training_runs import write_start

# Shapes of no other test, so that nothing of it is in the cache.
CFG = LlavaConfig(VisionConfig(24, 40, 2, 2, 16, 8), DecoderConfig(88, 40, 72, 1, 2, 1, 20, 1e-5, 1e4, 160, architecture="mistral"))
EVENTS = {"/jax/compilation_cache/cache_misses": "missed", "/jax/compilation_cache/cache_hits": "hit"}


@pytest.fixture
def cache(tmp_path):
    """A cache on disk of this test's own, and counts of what was found in it."""
    from jax.experimental.compilation_cache import compilation_cache
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_persistent_cache_min_entry_size_bytes")
    kept, counts = {name: getattr(jax.config, name) for name in names}, {"missed": 0, "hit": 0}

    def count(event, **_):
        if event in EVENTS and counts is not None:
            counts[EVENTS[event]] += 1
    for name, value in zip(names, (str(tmp_path), 0.0, 0)):
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    monitoring.register_event_listener(count)
    yield counts
    counts = None  # JAX has no public way to take one listener away
    for name, value in kept.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_shapes_are_those_of_the_weights(dtype):
    """Of a model with an adapter, whose scale and dropout are float32 in every dtype, and of one without."""
    adapter = AdapterConfig((AdapterRule(r"(decoder|vision_tower)/layers_\d+/.*", 3, 5.0),), dropout=0.1)
    base = random_checkpoint(CFG)
    for checkpoint in (base, attach(base, adapter, 0)):
        loaded = load_params(checkpoint, np.dtype(jnp.dtype(dtype)), as_stored=True)
        there = jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), weights(checkpoint.config, jnp.dtype(dtype)))
        assert there == jax.tree.map(lambda x: (x.shape, x.dtype), loaded)


def test_nothing_is_compiled_for_weights_of_other_shapes(tmp_path, monkeypatch):
    """An export of few bits, a run whose base is one, and the directory of an adapter."""
    from llavamed_jax.serving import warm_up
    compiled = []
    monkeypatch.setattr(warm_up, "compile_ahead", lambda *_: compiled.append(1))
    monkeypatch.setattr(warm_up, "first_requests", lambda *_: {})
    start = write_start(tmp_path / "start", (32, 64, 2, 2, 16, 8), (64, 128, 2, 4, 2, 16))
    base = open_checkpoint(start)
    export(base, tmp_path / "plain")
    export(base, tmp_path / "few", rounding=Rounding.of(base, "int4"))
    for number, (name, is_done) in enumerate((("plain", True), ("few", False))):
        checkpoint = attach(open_checkpoint(tmp_path / name), AdapterConfig((AdapterRule(r"decoder/layers_\d+/.*", 3, 5.0),)), 0)
        factors = [each for each in checkpoint.tensors if is_factor(each)]
        (tmp_path / f"run{number}").mkdir()
        write_model(tmp_path / f"run{number}", checkpoint, without=factors, stays=True)
        assert warm_up.compile_while_loading(str(tmp_path / name), 2) is is_done
        assert warm_up.compile_while_loading(str(tmp_path / f"run{number}"), 2) is is_done
    peft_write.write(checkpoint, tmp_path / "adapter", "llava")
    assert not warm_up.compile_while_loading(str(tmp_path / "adapter"), 2) and len(compiled) == 2


@pytest.mark.parametrize("has_image", [False, True])
def test_an_engine_finds_what_was_compiled_ahead(cache, has_image):
    P, size = CFG.tokens_per_image, CFG.vision.image_size
    image = np.zeros((size, size, 3), np.uint8)
    batches = [[Request([1, *[-200] * P, 5, 6], [image], 2) for _ in range(2)]] if has_image else [[Request([1, 5, 6], [], 2)]]
    compile_ahead(CFG, np.dtype(np.float32), batches, batch_size=2)
    assert cache["missed"] >= 5
    params = jax.device_put(random_params(CFG))
    engine = Engine(CFG, params, batch_size=2)
    before = dict(cache)
    for requests in batches:
        assert all(len(tokens) in (1, 2) for tokens in engine.generate(requests))
    found = {name: cache[name] - before[name] for name in cache}
    assert found["hit"] >= engine.programs.count() and found["missed"] <= 4, found  # small programs of numpy calls, outside of ours
