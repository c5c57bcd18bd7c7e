"""Programs that were compiled from shapes are the ones that an engine with weights takes from the cache on disk."""

import jax
import numpy as np
import pytest
from jax import monitoring

from benchmarks.measure import random_params
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.generation.ahead import compile_ahead
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Request

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


@pytest.mark.parametrize("has_image", [False, pytest.param(True, marks=pytest.mark.slow)])
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
