"""The engine against transformers' generate, and against itself: alone and in a batch (on a mesh: `test_engine.py`)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Request
from llavamed_jax.models.decoders.cache import cache_bytes, init_cache
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import make_mesh
from tests.support import hf

torch = hf.torch

P = 16
IMG = [-200] * P
NEW = 12


def prompts(seed=1):
    """Rows of several lengths in one bucket: one image, two images, none; and their images."""
    rng = np.random.default_rng(seed)
    text = lambda n: rng.integers(3, 90, n).tolist()
    rows = [[1] + IMG + text(20), [1] + text(9) + IMG + text(2) + IMG + text(3), [1] + text(35), [1] + IMG + text(30)]
    images = iter(hf.images(4, seed=seed))
    return rows, [[next(images) for _ in range(row.count(-200) // P)] for row in rows]


def requests(**settings):
    return [Request(r, i, **{"max_new_tokens": NEW, **settings}) for r, i in zip(*prompts())]


def torch_generate(model, row, images, **kwargs):
    ids = torch.tensor([[hf.IMAGE_ID if i == -200 else i for i in row]])
    if images:
        kwargs["pixel_values"] = torch.tensor(np.stack(images)).permute(0, 3, 1, 2)
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, **kwargs)
    return out[0, len(row):].tolist()


@pytest.fixture(scope="module")
def tiny():
    model, cfg = hf.llava(seed=5)
    return model, cfg, jax.device_put(hf.params_of(model))


@pytest.fixture(scope="module")
def engine(tiny):
    """One engine for most tests, so that its programs are compiled once."""
    return Engine(*tiny[1:], batch_size=4, steps=4)


@pytest.fixture(scope="module")
def compilations():
    """A list that grows by one with each program that XLA compiles."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if event.endswith("backend_compile_duration") else None)
    return events


def test_greedy_tokens_equal_transformers(tiny, engine):
    """Of a Mistral; and of one with a window, as many key heads as query heads, and features of the tower's last layer."""
    other, cfg = hf.llava(seed=10, text=dict(sliding_window=9, rope_theta=1e6, num_key_value_heads=4), vision_feature_layer=-1)
    for model, ours, part in ((tiny[0], engine, slice(4)), (other, Engine(cfg, hf.params_of(other), batch_size=4, steps=5), slice(1, 4, 2))):
        expected = [torch_generate(model, *row) for row in list(zip(*prompts()))[part]]
        assert ours.generate(requests()[part]) == expected
        assert max(len(set(tokens)) for tokens in expected) >= 6  # a constant answer would prove nothing
        assert sum(len(set(tokens)) >= 6 for tokens in expected) >= 2


def test_any_of_several_ends_ends_a_row(tiny, engine):
    """At different steps, and at its first token; as in transformers."""
    model, cfg, params = tiny
    free = engine.generate(requests())
    ends = free[0][3], next(t for t in free[1][4:] if t not in free[0]), free[3][0]
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, eos_token_id=ends[0], more_eos_ids=ends[1:]))
    asked = requests()
    asked[2].max_new_tokens = 5
    got = Engine(cfg, params, batch_size=4, steps=3).generate(asked)
    expected = [torch_generate(model, *row, eos_token_id=list(ends)) for row in zip(*prompts())]
    assert got == [row[: request.max_new_tokens] for row, request in zip(expected, asked)]
    assert {row[-1] for row in got} >= set(ends) and cfg.decoder.eos_ids == ends
    assert got[3] == [ends[2]] and len({len(row) for row in got}) > 2


def test_a_batch_gives_each_row_what_it_gives_alone(engine):
    assert engine.generate(requests()) == [engine.generate([request])[0] for request in requests()]


def test_cached_equals_uncached(tiny, engine):
    """Every generated token is the argmax of one whole forward pass over prompt and answer."""
    _, cfg, params = tiny
    rows = [list(r.ids) + tokens for r, tokens in zip(requests(), engine.generate(requests()))]
    length = max(map(len, rows))
    ids = np.array([row + [0] * (length - len(row)) for row in rows])
    pixels = np.zeros((4, 2, 28, 28, 3), np.float32)
    for row, request in enumerate(requests()):
        for slot, image in enumerate(request.images):
            pixels[row, slot] = image
    logits = jax.jit(Llava(cfg).apply)({"params": params}, ids, pixels)
    for row, ids in enumerate(rows):
        assert np.argmax(logits[row, len(ids) - NEW - 1 : len(ids) - 1], axis=-1).tolist() == ids[-NEW:]


def test_nothing_is_compiled_after_warm_up(engine, compilations):
    for _ in range(3):  # what is shared, and with that the lengths that are run, settles with the first calls
        engine.generate(requests())
    before = len(compilations)
    assert engine.generate(requests(seed=3, temperature=0.7)) and len(compilations) == before


def test_a_head_is_never_cut(tiny):
    _, cfg, params = tiny
    with pytest.raises(ValueError, match="decoder's key/value 2 heads are not divisible by the mesh axis tp of 4"):
        Engine(cfg, params, mesh=make_mesh("data=2,tp=4"))


def test_sampled_tokens_depend_on_the_seed_and_on_nothing_beside_them(engine):
    hot = dict(temperature=1.0, top_p=0.95)
    together = engine.generate(requests(**hot))
    assert together == [engine.generate([r])[0] for r in requests(**hot)]
    assert together != engine.generate(requests(**hot, seed=1))
    mixed = requests()
    mixed[1] = dataclasses.replace(mixed[1], **hot)
    greedy = engine.generate(requests())
    assert engine.generate(mixed) == [greedy[0], together[1], greedy[2], greedy[3]]


def test_requests_of_a_batch_have_their_own_settings(engine):
    settings = [dict(), dict(temperature=1.0, top_k=3, seed=5), dict(temperature=0.7, top_p=0.6, max_new_tokens=7),
                dict(temperature=2.0, max_new_tokens=1)]
    mixed = [dataclasses.replace(r, **each) for r, each in zip(requests(), settings)]
    together = engine.generate(mixed)
    assert together == [engine.generate([r])[0] for r in mixed]
    assert [len(tokens) for tokens in together] == [NEW, NEW, 7, 1] and together[1] != engine.generate(requests())[1]


def test_a_cancelled_request_stops_and_the_others_go_on(engine):
    expected, batch = engine.generate(requests()), requests()
    got = [[] for _ in batch]
    for index, tokens in engine.stream(batch):
        got[index] += tokens
        batch[2].cancelled = len(got[2]) >= 5  # the first token, then four a look
    assert len(got[2]) == 5 and got[2] == expected[2][:5]
    assert [got[i] for i in (0, 1, 3)] == [expected[i] for i in (0, 1, 3)]


def test_the_length_limit(tiny, engine):
    _, cfg, params = tiny
    full = engine.generate(requests())
    assert engine.generate(requests(max_new_tokens=1)) == [row[:1] for row in full]
    short = cfg.replace(decoder=dataclasses.replace(cfg.decoder, max_position_embeddings=50))
    tokens = Engine(short, params, batch_size=4, programs=engine.programs).generate([requests()[3]])[0]
    assert len(requests()[3].ids) == 47 and tokens == full[3][:3]


def test_cache_memory_is_its_formula(tiny):
    cfg = tiny[1].decoder
    caches = init_cache(cfg, 3, 128, jnp.bfloat16)
    assert sum(x.nbytes for x in jax.tree.leaves(caches)) == cache_bytes(cfg, 3, 128, jnp.bfloat16) == 2 * 2 * 3 * 2 * 128 * 16 * 2


def test_bad_requests_are_one_sentence(tiny):
    _, cfg, params = tiny
    engine, good = Engine(cfg.replace(max_length=64), params), requests()[0]
    bad = [
        (dataclasses.replace(good, images=[]), "16 image positions and 0 images; 16 positions per image were expected"),
        (dataclasses.replace(good, ids=[], images=[]), "empty"),
        (dataclasses.replace(good, ids=[5] * 65, images=[]), "65 positions, images included; at most 64"),
        (dataclasses.replace(good, max_new_tokens=0), "0 new tokens"),
        (dataclasses.replace(good, ids=[1, 96], images=[]), "holds the id 96; ids from 0 to 95, or -200"),
        (dataclasses.replace(good, ids=[1, -7], images=[]), "holds the id -7"),
        (dataclasses.replace(good, images=[np.zeros((5, 5, 3))]), r"image of shape \(5, 5, 3\); \(28, 28, 3\)"),
    ]
    for request, sentence in bad:
        with pytest.raises(ValueError, match=sentence):
            engine.generate([request])
