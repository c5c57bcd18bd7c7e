"""A key/value cache of int8: its rounding, attention over it, and an engine that has one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import llavamed_jax as lm
from llavamed_jax.config import KV_CACHES, DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.generation.beam import BeamSearch
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.programs import Programs
from llavamed_jax.generation.requests import Request
from llavamed_jax.models.attention.backend import AttentionMask, attention
from llavamed_jax.models.decoders.cache import cache_bytes, init_cache
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import make_mesh
from tests.support.random_params import random_params
from tests.support.training_runs import write_start

CFG = LlavaConfig(
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, image_size=28, patch_size=14),
    DecoderConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4,
                  max_position_embeddings=256))
DECODER = DecoderConfig(vocab_size=8, hidden_size=16, intermediate_size=16, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8, rms_norm_eps=1e-5,
                        rope_theta=1e4, max_position_embeddings=64)


attend = jax.jit(attention, static_argnames="backend")  # eagerly, each operation is compiled by itself


@functools.partial(jax.jit, static_argnames="length")
def _written(k, v, start, length):
    return init_cache(DECODER, len(k), length, jnp.int8)[0].write(k, v, start)


def written(k, v, start, length):
    """A cache of so many positions that holds keys and values from `start` on, as numpy's arrays."""
    return jax.device_get(_written(k, v, np.array(start, np.int32), length))


def random(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def rounded(x):
    """What int8 with a scale for each vector keeps of float32 [...,H]."""
    scale = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    return np.rint(x / np.where(scale == 0, 1, scale)), scale


def test_each_key_and_value_is_rounded_to_255_values_of_its_own_scale():
    k, v = random(0, 2, 2, 3, 8) * 10.0 ** np.arange(-1, 2)[:, None].astype(np.float32), random(1, 2, 2, 3, 8)
    k[0, 0, 0] = 0
    cache = written(k, v, [4, 13], 16)
    assert cache.k.dtype == cache.v.dtype == jnp.int8 and cache.k_scale.dtype == jnp.float32
    for row, start in enumerate((4, 13)):
        here = slice(start, start + 3)
        for ours, scale, exact in ((cache.k, cache.k_scale, k), (cache.v, cache.v_scale, v)):
            values, scales = rounded(exact[row])
            np.testing.assert_array_equal(ours[row, :, here], values)
            np.testing.assert_allclose(scale[row, :, here], scales, rtol=2e-7)  # XLA multiplies by 1/127
            assert np.abs(ours[row].astype(int)).sum() == np.abs(values).sum()  # nothing is written elsewhere


def test_what_is_no_number_stays_none():
    k = random(0, 4, 2, 1, 8)
    k[:3, 1, 0, 3] = np.nan, np.inf, -np.inf
    cache = written(k, k, [0] * 4, 4)
    assert np.isnan(cache.k_scale[:3, 1, 0]).all() and np.isfinite(cache.k_scale[:, 0]).all() and np.isfinite(cache.k_scale[3]).all()


@pytest.mark.parametrize("T, window", [(1, None), (5, 3)])
def test_attention_over_it_is_attention_over_what_it_stands_for(T, window):
    q, k, v = random(2, 2, T, 4, 8), random(3, 2, 2, 8, 8), random(4, 2, 2, 8, 8)
    cache = written(k, v, [0, 0], 8)
    positions = np.broadcast_to(np.arange(8 - T, 8), (2, T))
    mask = AttentionMask(positions, np.broadcast_to(np.arange(8), (2, 8)), window=window)
    (k8, k_scale), (v8, v_scale) = rounded(k), rounded(v)
    expected = attend(q, k8 * k_scale, v8 * v_scale, mask)
    got = attend(q, cache.k, cache.v, mask, "xla", cache.k_scale, cache.v_scale)
    np.testing.assert_allclose(got, expected, atol=2e-6)
    assert got.dtype == jnp.float32 and np.abs(np.asarray(got) - np.asarray(attend(q, k, v, mask))).max() > 1e-4
    half = [x.astype(jnp.bfloat16) for x in (q, k8, v8)]
    assert attend(*half, mask, "xla", k_scale, v_scale).dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype, most", [(jnp.float16, 1e-3), (jnp.bfloat16, 8e-3)])
def test_small_values_are_as_exact_as_their_dtype(dtype, most):
    """A weight times the scale of small values is below float16's normal numbers."""
    q, k, v = random(2, 2, 1, 4, 8), random(3, 2, 2, 64, 8), 0.01 * random(4, 2, 2, 64, 8)
    mask = AttentionMask(np.full((2, 1), 63), np.broadcast_to(np.arange(64), (2, 64)))
    (k8, k_scale), (v8, v_scale) = rounded(k), rounded(v)
    q = np.asarray(jnp.asarray(q, dtype), np.float32)
    expected = attend(q, k8 * k_scale, v8 * v_scale, mask)
    got = attend(jnp.asarray(q, dtype), k8.astype(np.int8), v8.astype(np.int8), mask, "xla", k_scale, v_scale)
    assert got.dtype == dtype
    assert np.abs(np.asarray(got, np.float32) - expected).max() < most * np.abs(expected).max()


@pytest.fixture(scope="module")
def params():
    return jax.device_put(random_params(CFG, seed=3))


@pytest.fixture(scope="module")
def programs():
    return Programs(CFG, np.float32, None, steps=4, cache_dtype=np.dtype("int8"))


def requests(count=3, **settings):
    start = list(range(5, 45))  # a prefix that all share, and without which a prompt is in a smaller bucket
    return [Request([*start, *range(20 + 3 * i, 26 + 4 * i)], [], max_new_tokens=9, **settings) for i in range(count)]


@jax.jit
def last_logits(params, ids, length):
    """Those of a model that runs a whole row, [1,64] with padding, through an empty int8 cache."""
    run = lambda *args, method: Llava(CFG).apply({"params": params}, *args, method=method)
    x, _ = run(run(ids, None, method="embed"), jnp.arange(64)[None], init_cache(CFG.decoder, 1, 64, jnp.int8), method="step")
    return run(x[0, length - 1][None], method="logits")


def one_by_one(params, request):
    """Greedy tokens of whole rows."""
    ids = list(request.ids)
    while len(ids) < len(request.ids) + request.max_new_tokens:
        ids.append(int(np.argmax(last_logits(params, np.array([ids + [0] * (64 - len(ids))], np.int32), len(ids)))))
    return ids[len(request.ids):]


def test_an_engine_decodes_with_shared_prefixes_what_whole_rows_give(params, programs):
    engine = Engine(CFG, params, batch_size=4, programs=programs)
    together = engine.generate(requests())
    assert together == [one_by_one(params, request) for request in requests()]
    assert sorted(row.start for row in engine._rows.rows)[-2:] == [40, 40], "two took over what the first had"
    assert max(len(set(tokens)) for tokens in together) >= 4
    assert {x.dtype.name for x in jax.tree.leaves(engine._slots.caches)} == {"int8", "float32"}


def test_on_a_mesh_it_is_the_same(params, programs):
    mesh = make_mesh("data=2,fsdp=2,tp=2")
    sharded = Engine(CFG, params, mesh=mesh, batch_size=4, steps=4, share=False, cache_dtype=np.dtype("int8"))
    assert sharded.generate(requests(3)) == Engine(CFG, params, batch_size=4, programs=programs).generate(requests(3))


def test_the_decode_program_is_given_int8_and_its_bytes_are_counted(programs):
    caches = jax.eval_shape(lambda: programs.empty_caches(3, 128))
    H, K, L = CFG.decoder.head_dim, CFG.decoder.num_kv_heads, CFG.decoder.num_layers
    arrays = jax.tree.leaves(caches)
    assert sum(x.size * x.dtype.itemsize for x in arrays) == cache_bytes(CFG.decoder, 3, 128, jnp.int8) == 2 * L * 3 * K * 128 * (H + 4)
    assert all(x.dtype == jnp.int8 for x in arrays if x.shape[-1] == H) and len(arrays) == 4 * L


def test_a_loaded_model_says_it(tmp_path):
    path = write_start(tmp_path / "start")
    model = lm.load(path, kv_cache="int8")
    assert model.describe()["kv_cache"] == "int8" and "kv_cache int8" in repr(model)
    assert {x.dtype.name for x in jax.tree.leaves(model.engine._slots.caches)} == {"int8", "float32"}
    for bad in ("int4", 8, ["int8"]):
        with pytest.raises(UserError, match="int8 or None was expected"):
            lm.load(path, kv_cache=bad)
    assert KV_CACHES == ("int8",)


def test_one_beam_and_many_decode_over_it(params, programs):
    engine = Engine(CFG, params, batch_size=4, programs=programs)
    search = BeamSearch(engine)
    greedy = engine.generate(requests(2))
    rows = [Request(list(request.ids), [], 9) for request in requests(2)]
    assert search.generate(rows, num_beams=1) == greedy
    assert [len(tokens) for tokens in search.generate(rows, num_beams=3)] == [9, 9]
