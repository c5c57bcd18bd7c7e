"""The engine's rows: whatever order, sharing, cancelling and failing, each request gives what it gives alone."""

import jax
import numpy as np
import pytest

from benchmarks.measure import random_params
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.generation.cache import cache_bytes
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Job, Request
from llavamed_jax.generation.rows import Keys, Rows, batch_size, bucket
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import make_mesh

CFG = LlavaConfig(
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, image_size=28, patch_size=4),
    DecoderConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                  rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=1024))
P = CFG.tokens_per_image
IMG = [-200] * P
NEW = 24


@pytest.fixture(scope="module")
def params():
    return random_params(CFG, seed=3)


@pytest.fixture(scope="module")
def engine(params):
    return Engine(CFG, params, batch_size=8, steps=4)


def images(n):
    size = CFG.vision.image_size
    return list(np.random.default_rng(9).standard_normal((n, size, size, 3)).astype(np.float32))


def schedule(n, seed):
    """n requests of every kind: about one of six images, about two, about none; short, long, sampled, greedy."""
    rng, pool = np.random.default_rng(seed), images(6)
    text = lambda low, high: rng.integers(3, CFG.decoder.vocab_size, rng.integers(low, high)).tolist()
    out = []
    for i in range(n):
        shown = [pool[k] for k in rng.choice(6, rng.choice([0, 1, 1, 1, 2]), replace=False)]
        ids = [1] + text(0, 3) * rng.integers(0, 2) + sum((IMG + text(1, 4) for _ in shown), []) + text(1, 40)
        out.append(Request(ids, shown, int(rng.integers(1, NEW)), temperature=float(rng.choice([0.0, 0.9])), seed=i))
    return out


def alone(params, request):
    """What a request gives by whole forward passes over an ever longer row: no cache, no batch, no engine."""
    forward, rows = _forwards[id(params)], list(request.ids)
    pixels = np.stack(request.images)[None] if request.images else None
    tokens = []
    while len(tokens) < request.max_new_tokens and (not tokens or tokens[-1] not in CFG.decoder.eos_ids):
        padded = np.zeros((1, -(-len(rows) // 128) * 128), np.int32)
        padded[0, : len(rows)] = rows
        logits = forward({"params": params}, padded, pixels)[0, len(rows) - 1]
        tokens.append(int(np.argmax(logits)))
        rows.append(tokens[-1])
    return tokens


_forwards = {}


@pytest.fixture(scope="module", autouse=True)
def forward(params):
    _forwards[id(params)] = jax.jit(Llava(CFG).apply)


def test_requests_of_one_image_give_what_each_gives_by_whole_forward_passes(params, engine):
    requests = [Request([1] + IMG + [5, 6, 7 + i] * 4, images(1), 6) for i in range(5)]
    assert engine.generate(requests) == [alone(params, request) for request in requests]


def test_a_random_schedule_gives_what_single_requests_give(params, engine):
    requests = schedule(60, seed=1)
    together = engine.generate(requests)
    single = Engine(CFG, params, batch_size=1, steps=7, share=False)
    assert together == [single.generate([request])[0] for request in requests]
    assert len({tuple(tokens) for tokens in together}) > 40
    shuffled = np.random.default_rng(2).permutation(len(requests))
    again = engine.generate([requests[i] for i in shuffled])
    assert [again[list(shuffled).index(i)] for i in range(len(requests))] == together


@pytest.mark.slow
def test_a_thousand_requests_compile_nothing_after_the_first_thousand(params):
    engine, single = Engine(CFG, params, batch_size=8, steps=4), Engine(CFG, params, batch_size=1, steps=7, share=False)
    requests = schedule(1000, seed=4)
    together = engine.generate(requests)
    assert together == [single.generate([request])[0] for request in requests]
    for index, _ in engine.stream(requests[:9]):
        requests[index].cancelled = True  # which has a program of its own
    compiled = engine.programs.count()
    requests = schedule(1000, seed=5)
    rng = np.random.default_rng(6)
    at = {int(i): int(rng.integers(1, 10)) for i in rng.choice(1000, 100, replace=False)}  # cancelled after so many tokens
    got = [[] for _ in requests]
    for index, tokens in engine.stream(requests):
        got[index] += tokens
        requests[index].cancelled = len(got[index]) >= at.get(index, 10**9)
    expected = [single.generate([Request(**{**vars(request), "cancelled": False})])[0] for request in requests]
    assert all(tokens == expected[i][: len(tokens)] for i, tokens in enumerate(got))
    assert all(tokens == expected[i] for i, tokens in enumerate(got) if i not in at)
    assert engine.programs.count() == compiled, "the second thousand has the lengths of the first"


def count_positions(engine):
    """Counts the prompt positions that the engine runs, and the images that it encodes."""
    seen = dict(positions=0, images=0)
    prefill, encode = engine.programs._programs["prefill"], engine.programs._programs["encode"]

    def counted_prefill(params, slots, features, prompts, width):
        seen["positions"] += int(prompts.length[prompts.target < len(engine._rows)].sum())
        return prefill(params, slots, features, prompts, width=width)

    def counted_encode(params, features, pixels, places):
        seen["images"] += int((places < len(features)).sum())
        return encode(params, features, pixels, places)

    engine.programs._programs |= {"prefill": counted_prefill, "encode": counted_encode}
    return seen


def test_an_image_is_run_once_for_all_its_questions(params):
    requests = [Request([1] + IMG + [4 + i, 5, 6], [image], 3) for image in images(3) for i in range(4)]
    shared, apart = Engine(CFG, params, batch_size=8), Engine(CFG, params, batch_size=8, share=False)
    counts = [count_positions(shared), count_positions(apart)]
    assert shared.generate(requests) == apart.generate(requests)
    assert counts[0]["images"] == counts[1]["images"] == 3  # the tower's part is shared in any case
    assert counts[1]["positions"] == 12 * (P + 4)
    assert counts[0]["positions"] == 3 * (P + 4) + 9 * 3


def test_a_later_turn_runs_only_what_is_new(params):
    engine = Engine(CFG, params, batch_size=4)
    first = Request([1] + IMG + [5, 6, 7] * 20, images(1), 8)
    answer = engine.generate([first])[0]
    second = Request([*first.ids, *answer, 9, 10, 11], images(1), 8)
    seen = count_positions(engine)
    tokens = engine.generate([second])[0]
    assert seen == dict(positions=1 + 3, images=0)  # the last token of an answer is never fed while it is made
    assert tokens == alone(params, second)


def test_images_that_differ_in_one_value_share_nothing_behind_them(params, engine):
    a, b = images(1)[0], images(1)[0].copy()
    b[-1, -1, -1] += 1.0
    prompts = [Request([1] + IMG + [5, 6, 7] * 9, [image], NEW) for image in (a, b)]
    assert engine.generate(prompts) == [alone(params, request) for request in prompts]
    a, b = (Job(request).key for request in prompts)
    assert Keys([a, b, a[:5], a[:0]]).common_prefixes(a).tolist() == [len(a), 1, 5, 0]


def test_nothing_is_taken_over_from_the_middle_of_an_image(params, engine):
    ends_with_image = [Request([1, 2, 3] * 15 + IMG, images(1), NEW) for _ in range(2)]
    job = Job(ends_with_image[0])
    assert [job.boundary(45 + i) for i in (0, 1, P - 1)] == [45] * 3 and job.boundary(44) == 44
    assert engine.generate(ends_with_image) == [alone(params, ends_with_image[0])] * 2


def test_a_cancelled_request_leaves_its_row_and_the_others_go_on(params):
    engine, requests = Engine(CFG, params, batch_size=2, steps=2), schedule(6, seed=7)
    for request in requests:
        request.max_new_tokens, request.temperature = 20, 0.0
    expected = engine.generate(requests)
    got = [[] for _ in requests]
    for index, tokens in engine.stream(requests):
        got[index] += tokens
        requests[index].cancelled = index in (0, 3)
    assert all(got[i] == expected[i] for i in (1, 2, 4, 5))
    assert all(got[i] == expected[i][: len(got[i])] and len(got[i]) <= 5 for i in (0, 3))
    assert not engine._rows.running


def test_closing_a_stream_cancels_what_is_left(params):
    engine, requests = Engine(CFG, params, batch_size=2, steps=2), schedule(5, seed=8)
    stream = engine.stream(requests)
    next(stream)
    stream.close()
    engine.advance()
    assert not engine._rows.running and not engine._waiting
    fresh = schedule(5, seed=8)
    assert engine.generate(fresh) == Engine(CFG, params, batch_size=1).generate(schedule(5, seed=8))


def test_two_open_streams_share_the_rows(params, engine):
    a, b = schedule(4, seed=10), schedule(4, seed=11)
    expected = engine.generate(a), engine.generate(b)
    got, inner = [[] for _ in a], None
    for index, tokens in engine.stream(a):
        got[index] += tokens
        if inner is None:
            inner = engine.generate(b)
    assert (got, inner) == expected


def test_a_request_that_is_no_number_fails_alone_and_leaves_nothing_behind(params):
    engine, good = Engine(CFG, params, batch_size=4, steps=4), schedule(7, seed=12)
    expected = engine.generate(schedule(7, seed=12))
    broken = Request([1] + IMG + [5, 6, 7], [np.full_like(images(1)[0], np.nan)], 8)
    requests = [*good[:3], broken, *good[3:]]
    got = [[] for _ in requests]
    with pytest.raises(UserError, match="request 3: the model computed something that is no number"):
        for index, tokens in engine.stream(requests):
            got[index] += tokens
    assert got[:3] + got[4:] == expected and got[3] == []
    assert engine.generate(schedule(7, seed=12)) == expected  # in the row that the broken one had, too


def test_on_a_mesh_the_tokens_are_the_same(params, engine):
    requests = schedule(20, seed=13)
    on_mesh = Engine(CFG, params, mesh=make_mesh("data=2,fsdp=2,tp=2"), batch_size=8, steps=4)
    assert on_mesh.generate(requests) == engine.generate(schedule(20, seed=13))


def test_the_cache_takes_what_the_formula_says(params):
    engine = Engine(CFG, params, batch_size=4)
    engine.generate([Request([1, 5, 6], [], 4) for _ in range(4)])
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._slots.caches))
    assert held == cache_bytes(CFG.decoder, len(engine._rows), engine._length, np.float32) > 0


def test_rows_and_cache_follow_the_demand(params):
    engine = Engine(CFG, params, batch_size=8)
    engine.generate([Request([1, 5, 6], [], 4)])
    assert len(engine._rows) == 1 and engine._length == 256
    engine.generate([Request([1, 5, 6], [], 4) for _ in range(20)])
    assert len(engine._rows) == 8
    engine.generate([Request([1] * 60 + [5, 6], [], 300)])
    assert len(engine._rows) == 1 and engine._length == 512


def test_buckets_and_batches():
    assert [bucket(n) for n in (1, 32, 33, 65, 512, 513, 640, 1025)] == [32, 32, 64, 128, 512, 640, 640, 1280]
    assert [batch_size(n) for n in (1, 2, 3, 4, 7, 15, 16, 63, 64)] == [1, 4, 4, 4, 4, 4, 16, 16, 64]
    assert [batch_size(n, shards=8) for n in (1, 4, 16)] == [8, 8, 16]


def test_a_request_waits_for_another_that_begins_alike():
    rows = Rows(share=True)
    rows.resize(4)
    jobs = [Job(Request([1] + IMG * 4 + [5 + i], [image] * 4, 4)) for i, image in enumerate([*images(1) * 3, images(2)[1]])]
    first = rows.choose(jobs)
    assert [placed.job for placed in first] == [jobs[0], jobs[3]][: len(first)] and all(placed.start == 0 for placed in first)
    rest = [job for job in jobs if job not in [placed.job for placed in first]]
    second = rows.choose(rest)
    assert second[0].job is jobs[1] and second[0].start == 1 + 4 * P and second[0].source == first[0].target


def test_other_weights_take_nothing_over(params):
    engine, requests = Engine(CFG, params, batch_size=4), lambda: schedule(4, seed=14)
    first = engine.generate(requests())
    engine.params = random_params(CFG, seed=4)
    assert engine.generate(requests()) == Engine(CFG, engine.params, batch_size=4).generate(requests()) != first
