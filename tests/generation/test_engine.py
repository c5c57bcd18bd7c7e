"""The engine's rows: whatever order, sharing, cancelling and failing, each request gives what it gives alone."""

import copy
import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.image_features import Features
from llavamed_jax.generation.programs import Made, Programs, Prompts
from llavamed_jax.generation.requests import Job, Request
from llavamed_jax.generation.rows import Keys, Rows, batch_size, bucket
from llavamed_jax.generation.sampling import Sampling
from llavamed_jax.models.decoders.cache import cache_bytes
from llavamed_jax.models.llava import Llava
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.utils import private
from tests.support.random_params import random_params

CFG = LlavaConfig(
    VisionConfig(hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4, image_size=28, patch_size=4),
    DecoderConfig(vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16,
                  rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=256))
P = CFG.tokens_per_image
IMG = [-200] * P
NEW = 24


@pytest.fixture(scope="module")
def params():
    return jax.device_put(random_params(CFG, seed=3))


@pytest.fixture(scope="module")
def programs():
    """Of all engines here, so that a shape is compiled once."""
    return Programs(CFG, np.float32, None, steps=4)


@pytest.fixture
def fresh(params, programs):
    """Makes engines that know nothing yet."""
    return lambda batch_size=4, share=True: Engine(CFG, params, batch_size=batch_size, share=share, programs=programs)


@pytest.fixture
def engine(fresh):
    return fresh()


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
        ids = [1] + text(0, 3) * rng.integers(0, 2) + sum((IMG + text(1, 4) for _ in shown), []) + text(1, 20)
        out.append(Request(ids, shown, int(rng.integers(1, NEW)), temperature=float(rng.choice([0.0, 0.9])), seed=i))
    return out


def alone(params, request):
    """What a request gives by whole forward passes over an ever longer row: no cache, no batch, no engine."""
    forward, rows = _forwards[id(params)], list(request.ids)
    pixels = np.stack(request.images or [np.zeros_like(images(1)[0])])[None]  # one shape for all, compiled once
    tokens = []
    while len(tokens) < request.max_new_tokens and (not tokens or tokens[-1] not in CFG.decoder.eos_ids):
        padded = np.zeros((1, CFG.decoder.max_position_embeddings), np.int32)
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


def test_a_random_schedule_gives_what_single_requests_give(engine, fresh):
    requests = schedule(40, seed=1)
    together = engine.generate(requests)
    single = fresh(batch_size=1, share=False)
    assert together == [single.generate([request])[0] for request in requests]
    assert len({tuple(tokens) for tokens in together}) > 28
    shuffled = np.random.default_rng(2).permutation(len(requests))
    again = engine.generate([requests[i] for i in shuffled])
    assert [again[list(shuffled).index(i)] for i in range(len(requests))] == together


@pytest.mark.slow
def test_a_thousand_requests_compile_nothing_after_the_first_thousand(params):
    engine, single = Engine(CFG, params, batch_size=8, steps=4), Engine(CFG, params, batch_size=1, steps=7, share=False)
    compiled = []
    for seed in (4, 5):
        requests, rng, got = schedule(1000, seed), np.random.default_rng(seed), [[] for _ in range(1000)]
        at = {int(i): int(rng.integers(1, 10)) for i in rng.choice(1000, 100, replace=False)}  # cancelled after so many tokens
        for index, tokens in engine.stream(requests):
            got[index] += tokens
            requests[index].cancelled = len(got[index]) >= at.get(index, 10**9)
        compiled.append(engine.programs.count())
        expected = [single.generate([dataclasses.replace(request, cancelled=False)])[0] for request in requests]
        assert all(tokens == expected[i][: len(tokens)] for i, tokens in enumerate(got))
        assert all(tokens == expected[i] for i, tokens in enumerate(got) if i not in at)
    # The second thousand has the lengths of the first; what it begins with are the rows that the first one ended with.
    assert compiled[1] <= compiled[0] + 1 <= 32, compiled


def count_positions(engine):
    """Counts the prompt positions that the engine runs, and the images that it encodes."""
    seen = dict(positions=0, images=0)
    fill, encode = engine.programs._programs["fill"], engine.programs._programs["encode"]

    def counted_fill(params, caches, features, prompts):
        seen["positions"] += int(prompts.length[prompts.target < len(engine._rows.rows)].sum())
        return fill(params, caches, features, prompts)

    def counted_encode(params, features, pixels, places):
        seen["images"] += int((places < len(features)).sum())
        return encode(params, features, pixels, places)

    engine.programs = engine._features._programs = copy.copy(engine.programs)  # which other engines use too
    engine.programs._programs = engine.programs._programs | {"fill": counted_fill, "encode": counted_encode}
    return seen


def test_an_image_is_run_once_for_all_its_questions(params, fresh):
    requests = [Request([1] + IMG + [4 + i, 5, 6], [image], 3) for image in images(3) for i in range(4)]
    shared, apart = fresh(), fresh(share=False)
    counts = [count_positions(shared), count_positions(apart)]
    assert shared.generate(requests) == apart.generate(requests)
    assert counts[0]["images"] == counts[1]["images"] == 3  # the tower's part is shared in any case
    assert counts[1]["positions"] == 12 * (P + 4)
    assert counts[0]["positions"] == 3 * (P + 4) + 9 * 3


def test_the_tower_takes_images_of_waiting_requests_along(fresh):
    engine, seen, batches = fresh(), [], []
    pool = images(16)
    requests = [Request([1] + IMG + [4, 5, 6], [image], 3) for image in pool]
    expected = fresh(batch_size=1).generate(requests)
    count_positions(engine)  # a copy of the programs, which other engines use too
    encode = engine.programs._programs["encode"]

    def counted(params, features, pixels, places):
        batches.append(int((places < len(features)).sum()))
        seen.extend(pixels[: batches[-1]])
        return encode(params, features, pixels, places)

    engine.programs._programs["encode"] = counted
    assert engine.generate(requests) == expected
    assert batches == [8, 8]  # four rows, and as many that wait
    assert all((image == other).all() for image, other in zip(seen, pool, strict=True))


def test_a_later_turn_runs_only_what_is_new(params, fresh):
    engine = fresh(batch_size=1)
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
    assert [job.boundaries[45 + i] for i in (0, 1, P - 1)] == [45] * 3 and job.boundaries[44] == 44
    assert engine.generate(ends_with_image) == [alone(params, ends_with_image[0])] * 2


def test_a_cancelled_request_leaves_its_row_and_the_others_go_on(fresh):
    engine, requests = fresh(), schedule(8, seed=7)
    for request in requests:
        request.max_new_tokens, request.temperature = 20, 0.0
    expected = engine.generate(requests)
    got = [[] for _ in requests]
    for index, tokens in engine.stream(requests):
        got[index] += tokens
        requests[index].cancelled = index in (0, 3)
    assert all(got[i] == expected[i] for i in (1, 2, 4, 5, 6, 7))
    assert all(got[i] == expected[i][: len(got[i])] and len(got[i]) <= 9 for i in (0, 3))
    assert not engine._rows.running


def test_closing_a_stream_cancels_what_is_left(fresh):
    engine, requests = fresh(), schedule(7, seed=8)
    stream = engine.stream(requests)
    next(stream)
    stream.close()
    engine.advance()
    assert not engine._rows.running and not engine._waiting and np.asarray(engine._slots.is_done).all()
    assert engine.generate(schedule(7, seed=8)) == fresh(batch_size=1).generate(schedule(7, seed=8))


def test_two_open_streams_share_the_rows(params, engine):
    a, b = schedule(4, seed=10), schedule(4, seed=11)
    expected = engine.generate(a), engine.generate(b)
    got, inner = [[] for _ in a], None
    for index, tokens in engine.stream(a):
        got[index] += tokens
        if inner is None:
            inner = engine.generate(b)
    assert (got, inner) == expected


def test_a_request_that_is_no_number_fails_alone_and_leaves_nothing_behind(engine):
    good = schedule(7, seed=12)
    expected = engine.generate(schedule(7, seed=12))
    broken = Request([1] + IMG + [5, 6, 7], [np.full_like(images(1)[0], np.nan)], 8)
    requests = [*good[:3], broken, *good[3:]]
    got = [[] for _ in requests]
    with pytest.raises(UserError, match="request 3: the model computed NaN or infinite values"):
        for index, tokens in engine.stream(requests):
            got[index] += tokens
    assert got[:3] + got[4:] == expected and got[3] == []
    assert engine.generate(schedule(7, seed=12)) == expected  # in the row that the broken one had, too


@pytest.fixture(scope="module")
def on_mesh(params):
    """Of four shards, which make four rows of three."""
    return Engine(CFG, params, mesh=make_mesh("data=2,fsdp=2,tp=2"), batch_size=3, steps=4)


def test_on_a_mesh_the_tokens_are_the_same(engine, on_mesh):
    requests = [Request([1] + IMG + [4 + i, 5, 6], [image], 4 + i) for image in images(2) for i in range(5)]
    seen, tokens, outside = count_positions(on_mesh), [[] for _ in requests], []
    for index, new in on_mesh.stream(requests):
        tokens[index] += new
        outside.append(jax.sharding.get_abstract_mesh().empty)
    assert tokens == engine.generate(requests)
    assert seen["positions"] == 2 * (P + 4) + 8 * 3
    assert all(outside)  # whoever consumes the stream is not inside the engine's mesh
    # What a program returns lies where the next one takes it: rows of one shape have one loop.
    assert private.compilations(on_mesh.programs._programs["decode"]) == 1


def test_rows_and_heads_lie_on_the_mesh(on_mesh):
    on_mesh.generate([Request([1] + IMG + [4, 5, 6], images(1), 4)])
    rows, kernels = ("data", "fsdp"), on_mesh.params["decoder"]["layers_0"]["self_attn"]
    cache = NamedSharding(on_mesh.mesh, PartitionSpec(rows, "tp"))
    assert all(leaf.sharding.is_equivalent_to(cache, leaf.ndim) for leaf in jax.tree.leaves(on_mesh._slots.caches))
    assert on_mesh._slots.token.sharding.spec == PartitionSpec(rows)
    assert [kernels[f"{p}_proj"]["kernel"].sharding.spec for p in "qkvo"] == [
        PartitionSpec("fsdp", "tp")] * 3 + [PartitionSpec("tp", "fsdp")]
    assert on_mesh.params["decoder"]["lm_head"]["kernel"].sharding.spec == PartitionSpec("fsdp", "tp")


def test_the_cache_takes_what_the_formula_says(engine):
    engine.generate([Request([1, 5, 6 + i], [], 4) for i in range(3)])
    assert len(engine._rows.rows) == 4 and np.asarray(engine._slots.is_done).all(), "a row that nobody had is done, too"
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(engine._slots.caches))
    assert held == cache_bytes(CFG.decoder, len(engine._rows.rows), engine._length, np.float32) > 0


def test_rows_and_cache_follow_the_demand(params, engine):
    engine.generate([Request([1, 5, 6], [], 4)])
    assert len(engine._rows.rows) == 1 and engine._length == 128
    engine.generate([Request([1, 5, 6], [], 4) for _ in range(20)])
    assert len(engine._rows.rows) == 4
    long = Request([1] * 60 + [5, 6], [], 150)
    assert engine.generate([long])[0] == alone(params, long)
    assert len(engine._rows.rows) == 1 and engine._length == 256, "no longer than the answer became"
    engine.generate([Request([1, 5, 6], [], 4)])
    assert engine._length == 128


def test_buckets_and_batches():
    assert [bucket(n) for n in (1, 32, 33, 65, 512, 513, 640, 1025)] == [32, 32, 64, 128, 512, 640, 640, 1280]
    assert [batch_size(n) for n in (1, 2, 3, 4, 7, 15, 16, 63, 64)] == [1, 4, 4, 4, 4, 4, 16, 16, 64]
    assert [batch_size(n, length=300) for n in (1, 2, 3, 4, 7)] == [1, 1, 1, 4, 4], "a long one is not filled up"
    assert [batch_size(n, shards=8) for n in (1, 4, 16)] == [8, 8, 16]


def test_rows_in_use_are_not_taken_away(fresh, monkeypatch):
    engine = fresh(batch_size=16)
    engine._rows.resize(16, 128)
    engine._length, engine._rows.rows[9].job = 128, Job(Request([1, 5]))
    engine.add(Request([1, 6]))
    monkeypatch.setattr(engine, "_resize", lambda *shape: pytest.fail(f"resized to {shape}"))
    engine._make_room()


def test_a_request_waits_for_another_that_begins_alike():
    rows = Rows(share=True)
    rows.resize(4, 1024)
    jobs = [Job(Request([1] + IMG * 4 + [5 + i], [image] * 4, 4)) for i, image in enumerate([*images(1) * 3, images(2)[1]])]
    first = rows.choose(jobs)
    assert [placed.job for placed in first] == [jobs[0], jobs[3]][: len(first)] and all(placed.start == 0 for placed in first)
    rest = [job for job in jobs if job not in [placed.job for placed in first]]
    second = rows.choose(rest)
    assert second[0].job is jobs[1] and second[0].start == 1 + 4 * P and second[0].source == first[0].target
    rows = Rows(share=True)
    rows.resize(2, 1024)
    assert [placed.job for placed in rows.choose([jobs[0], jobs[1], jobs[3]])] == [jobs[0]], "the other row is kept for who waits"


def test_other_weights_take_nothing_over(engine, programs):
    first = engine.generate(schedule(4, seed=14))
    engine.params = jax.device_put(random_params(CFG, seed=4))
    other = Engine(CFG, engine.params, batch_size=4, programs=programs)
    assert engine.generate(schedule(4, seed=14)) == other.generate(schedule(4, seed=14)) != first


def test_nothing_is_compiled_for_what_has_the_shapes_of_before(engine, programs):
    requests = lambda seed: [Request([1] + IMG + [seed, i], [image], 6) for image in images(2) for i in range(5)]
    engine.generate(requests(20))
    compiled, events = programs.count(), []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: events.append(event) if event.endswith("backend_compile_duration") else None)
    engine.generate(requests(30))
    assert programs.count() == compiled and not events


def test_a_beginning_is_taken_over_before_its_row_is_known_to_have_failed(params, engine):
    """The second waits for the first, and is run from its row before anyone has looked at what the first made: NaN all over."""
    text, broken = [1] + [5, 6, 7] * 20, np.full_like(images(1)[0], np.nan)
    requests = [Request(text + IMG, [broken], 4), Request(text + [8], [], 6), Request([1] + [9] * 70, [], 6)]
    seen, got = count_positions(engine), [[] for _ in requests]
    with pytest.raises(UserError, match="request 0: the model computed NaN or infinite values"):
        for index, tokens in engine.stream(requests):
            got[index] += tokens
    assert got == [[]] + [alone(params, request) for request in requests[1:]]
    assert seen["positions"] == len(text) + P + 1 + 71 + len(text) + 1, "and once more alone"


def test_a_row_that_failed_unread_is_no_trouble_to_the_next_prefill(params, engine):
    """Which takes nothing from it, but looks there: a weight of 0 does not hide a NaN."""
    jobs = [engine.add(Request([1] + IMG + [5], [np.full_like(images(1)[0], np.nan)], 4)), engine.add(Request([1, 5, 6], [], 6))]
    while not all(job.is_finished for job in jobs):
        engine.advance()
    assert jobs[0].error is not None and jobs[1].tokens == alone(params, jobs[1].request)


def test_what_fails_behind_a_good_beginning_is_run_once_more_and_no_oftener(engine):
    text = [1] + [5, 6, 7] * 20
    engine.generate([Request(text + [8], [], 2), Request([1, 9, 9], [], 2)])
    job = engine.add(Request(text + IMG, [np.full_like(images(1)[0], np.nan)], 4))
    seen = count_positions(engine)
    for _ in range(6):
        engine.advance()
    assert job.error is not None and job.is_finished and seen["positions"] == P + len(text) + P


def test_a_row_that_failed_and_was_cancelled_holds_nothing(params, engine):
    requests = [Request([1, 5 + i, 6], [], 20) for i in range(2)]
    jobs = [engine.add(request, i) for i, request in enumerate(requests)]
    engine.advance()
    row = next(r for r, job in engine._rows.running.items() if job is jobs[0])
    engine._slots = engine._slots.replace(caches=jax.tree.map(lambda c: c.at[row].set(np.nan), engine._slots.caches))
    engine.advance()
    jobs[0].request.cancelled = True  # that it failed has not been read
    while not jobs[1].is_finished:
        engine.advance()
    assert jobs[0].is_finished and jobs[1].error is None and jobs[1].tokens == alone(params, requests[1])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(engine._slots.caches))
    assert engine.generate([Request([1, 9, 9], [], 9) for _ in range(2)]) == [alone(params, Request([1, 9, 9], [], 9))] * 2


def test_an_engine_outlives_an_interrupt(engine, programs, monkeypatch):
    """As Ctrl-C in a chat: a program has taken the rows and not given them back."""
    expected, decode = engine.generate(schedule(3, seed=15)), programs._programs["decode"]

    def interrupted(*args):
        decode(*args)
        raise KeyboardInterrupt

    other = engine.stream(schedule(3, seed=16))
    next(other)
    with monkeypatch.context() as patch:
        patch.setitem(programs._programs, "decode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(schedule(3, seed=15))
    with pytest.raises(UserError, match="the engine was stopped by KeyboardInterrupt"):
        list(other)
    assert engine.generate(schedule(3, seed=15)) == expected


def test_up_to_the_last_position(params, engine):
    """The longest prompt leaves room for one token; an answer ends where the positions end."""
    last, near = Request([1] + [5, 6] * 127, [], 9), Request([1] + [7, 8] * 124, [], 50)
    assert len(last.ids) == engine.max_prompt == 255
    expected = [alone(params, Request(last.ids, [], 1)), alone(params, Request(near.ids, [], 7))]
    assert engine.generate([last, near]) == expected and len(expected[1]) == 7
    assert engine.generate([near]) == expected[1:]
    with pytest.raises(UserError, match="the prompt has 256 positions, images included; at most 255"):
        engine.generate([Request([1] * 256)])


def test_equal_prompts_run_once(params, engine):
    requests = [Request([1] + IMG + [5, 6] * 9, images(1), 8) for _ in range(7)]
    seen = count_positions(engine)
    assert engine.generate(requests) == [alone(params, requests[0])] * 7
    assert seen == dict(positions=len(requests[0].ids) + 6, images=1)


def test_one_row_is_its_own_source(params, fresh):
    engine = fresh(batch_size=1)
    requests = [Request([1] + IMG + [9, i, 7], images(1), 5) for i in range(3)]
    seen = count_positions(engine)
    assert engine.generate(requests) == [alone(params, request) for request in requests]
    assert seen == dict(positions=P + 4 + 2 * 2, images=1)


def test_sharing_with_a_sliding_window(params):
    cfg = CFG.replace(decoder=dataclasses.replace(CFG.decoder, sliding_window=20))
    programs = Programs(cfg, np.float32, None, steps=8)
    requests = [Request([1, *range(20, 69)] + [9, i] * 8, [], 8) for i in range(3)]
    shared, apart = (Engine(cfg, params, batch_size=1, share=share, programs=programs) for share in (True, False))
    seen, found = count_positions(shared), shared.generate(requests)
    assert found == apart.generate(requests) and len(set(map(tuple, found))) > 1
    assert found != [alone(params, request) for request in requests], "the window must matter"
    assert seen["positions"] < 2 * len(requests[0].ids)


def test_what_saves_no_bucket_is_not_shared():
    rows = Rows(share=True)
    rows.resize(2, 256)
    first = rows.choose([Job(Request([1, 2, 3, 4], [], 4))])
    rows.finish(first[0].target)
    placed, = rows.choose([Job(Request([1, 2, 3, 5], [], 4))])
    assert placed.start == 0 and placed.target != first[0].target


def test_a_prefill_on_a_mesh_moves_its_prompts_and_not_the_cache(params):
    """What is exchanged between devices grows with the prompts of the prefill, whatever rows there are."""
    mesh, B, T, R, S = make_mesh("data=4,tp=2"), 4, 32, 64, 256
    engine = Engine(CFG, params, mesh=mesh, batch_size=R, steps=4)
    slots = engine.programs.resize(engine.programs.empty_slots(), rows=R, length=S)
    some = np.zeros(B, np.int32)
    greedy = Sampling.of([0] * B, [0] * B, [1] * B, [0] * B)
    prompts = Prompts(np.zeros((B, T), np.int32), None, some, some + 1, some, some, some + 1, greedy)
    with engine.programs.on_mesh():
        compile_ = lambda name, *args, **kwargs: engine.programs._programs[name].lower(*args, **kwargs).compile().as_text()
        part = engine.programs.take(slots, some, some, width=128)
        made = Made(np.zeros((B, 1), np.int32), some > 0, some > 0)
        texts = [compile_("take", slots, some, some, width=128), compile_("put", slots, prompts.replace(ids=None), made, part)]
    d = CFG.decoder
    for text in texts:
        moved = [line.split(" = ")[1] for line in text.splitlines() if re.search(r" (all|reduce)-[a-z-]+\(", line)]
        shapes = re.findall(r"f32\[([\d,]+)\]", " ".join(line[: line.index("(", 1)] for line in moved))
        sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
        assert max(sizes) == B * d.num_kv_heads * 128 * d.head_dim // 2, "keys or values of the prompts, a half of the heads each"


def walk(engine, expected, rng, rounds):
    """A random life of an engine: calls inside calls, images that are NaN, requests given up, other numbers of rows, images
    that have no place for long. Returns how many requests were answered, failed, and were given up."""
    pool, known, open_feeds, counts = images(6) + [np.full_like(images(1)[0], np.nan)], [], [], dict(answered=0, failed=0, left=0)
    engine._features._places = 2

    def new():
        request = schedule(1, int(rng.integers(200)))[0]
        shown = [pool[k] for k in rng.choice(7, len(request.images), replace=False, p=[0.16] * 6 + [0.04])]
        request = dataclasses.replace(request, images=shown, seed=int(rng.integers(3)), top_k=int(rng.choice([0, 5])))
        if known and rng.random() < 0.3:  # a later turn
            before = known[rng.integers(len(known))]
            ids = [*before.ids, *expected(before)[: rng.integers(9)], *request.ids[-3:]]
            if -200 not in request.ids[-3:] and len(ids) < 180:
                request = dataclasses.replace(request, ids=ids, images=before.images)
        known.append(request)
        return request

    def look(job):
        request = job.request
        wanted = expected(request)
        assert job.tokens == wanted[: len(job.tokens)], request
        job.take()
        if job.is_finished:
            assert request.cancelled or (job.tokens == wanted and (job.error is None) == bool(wanted)), request
            counts["left" if request.cancelled else "answered" if wanted else "failed"] += 1
        elif rng.random() < 0.1:
            request.cancelled = True

    for _ in range(rounds):
        kind = rng.random()
        if kind < 0.25 and len(open_feeds) < 3:
            open_feeds.append(engine.feed([new() for _ in range(rng.integers(1, 12))]))
        elif kind < 0.3 and open_feeds:
            open_feeds.pop(rng.integers(len(open_feeds))).close()
        elif kind < 0.35:
            engine.batch_size = int(rng.choice([1, 2, 4]))
        elif open_feeds:
            feed = open_feeds[rng.integers(len(open_feeds))]
            job = next(feed, None)
            if job is None:
                open_feeds.remove(feed)
            else:
                look(job)
        assert len(engine._waiting) <= 2 * 4 and engine._features._places <= 8
    for feed in open_feeds:
        for job in feed:
            look(job)
    engine.advance()
    assert not engine._rows.running and not engine._waiting and not engine._unread
    assert np.asarray(engine._slots.is_done).all() and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(engine._slots.caches))
    return counts


@pytest.fixture
def expected(fresh):
    """What a request gives by itself; nothing where the model fails."""
    single, seen = fresh(batch_size=1, share=False), {}

    def of(request):
        settings = request.max_new_tokens, request.temperature, request.top_k, request.seed
        key = tuple(request.ids), *settings, *(image.tobytes() for image in request.images)
        if key not in seen:
            job = list(single.feed([dataclasses.replace(request, cancelled=False)]))[-1]
            seen[key] = job.tokens
        return seen[key]
    return of


def test_a_random_life(fresh, expected):
    counts = walk(fresh(), expected, np.random.default_rng(21), rounds=120)
    assert min(counts.values()) >= 1 and counts["answered"] > 20, counts


@pytest.mark.slow
def test_random_lives(fresh, expected):
    found = [walk(fresh(), expected, np.random.default_rng(seed), rounds=400) for seed in range(25)]
    assert sum(counts["failed"] for counts in found) > 25


def test_a_call_inside_another_that_fills_the_queue(params, engine):
    """Of which nothing was answered, without a word."""
    got, inner = [[] for _ in range(20)], []
    for n, (index, tokens) in enumerate(engine.stream([Request([1, 5, i], [], NEW) for i in range(20)])):
        got[index] += tokens
        if n == 12:
            assert len(engine._waiting) == 2 * engine.batch_size
            inner = engine.generate([Request([1, 7, 7], [], 5)])
    assert inner == [alone(params, Request([1, 7, 7], [], 5))] and all(len(tokens) == NEW or tokens[-1] == 2 for tokens in got)


def test_what_a_free_row_keeps_is_not_written_to_when_rows_become_shorter(params, fresh):
    """A free row is fed with the others; where its own position is cut off, its token lands on the last one that is left."""
    engine, rng = fresh(batch_size=2), np.random.default_rng(5)
    first = [Request([1] + rng.integers(3, 90, 200).tolist(), [], 4) for _ in range(2)]
    engine.generate(first)
    engine.generate([Request([1, 5, 6], [], 4)])
    place, kept = next((r, row.key) for r, row in enumerate(engine._rows.rows) if len(row.key) > 9)
    request = next(request for request in first if request.ids[:100] == kept[:100].tolist())
    caches = jax.tree.map(np.asarray, engine._slots.caches)
    single = fresh(batch_size=1)
    single.generate([request])
    for a, b in zip(jax.tree.leaves(caches), jax.tree.leaves(single._slots.caches)):
        np.testing.assert_allclose(a[place, :, : len(kept)], b[0, :, : len(kept)], atol=1e-5)
    assert engine._length == 128 and len(kept) > 100


def test_threads_share_the_rows(engine, expected):
    wanted = [[expected(request) for request in schedule(8, seed)] for seed in (30, 31)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(lambda seed: engine.generate(schedule(8, seed)), (30, 31))) == wanted


def test_other_weights_end_what_is_under_way(engine):
    stream = engine.stream([Request([1, 5, 6], [], NEW)])
    next(stream)
    engine.params = engine.params
    with pytest.raises(UserError, match="the engine was stopped by a change of its weights"):
        list(stream)


def test_the_first_that_waits_is_never_passed_over():
    """Whatever begins like what, and however long it is: with a free row the first request gets one."""
    rng = np.random.default_rng(6)
    for _ in range(100):
        rows = Rows(share=True)
        rows.resize(4, 256)
        waiting = [Job(request) for request in schedule(9, int(rng.integers(1000)))]
        while waiting:
            placed = rows.choose(waiting)
            assert placed and placed[0].job is waiting[0] and len({each.target for each in placed}) == len(placed)
            assert len({bucket(each.length) for each in placed}) == 1
            waiting = [job for job in waiting if job not in [each.job for each in placed]]
            for r in rng.permutation(list(rows.running))[: 1 + len(rows.running) // 2]:
                rows.finish(r)


@pytest.mark.parametrize("image, sentence", [
    (np.zeros((28, 28, 3), bool), "an image of bool"), (np.zeros((28, 28, 3), complex), "an image of complex128"),
    (np.full((28, 28, 3), "x", object), "an image of object"), (None, r"an image of shape \(\)")])
def test_images_that_are_none_reach_no_row(engine, image, sentence):
    """What breaks while it is put on the device would end all that is under way."""
    with pytest.raises(UserError, match=sentence):
        engine.generate([Request([1] + IMG, [image])])


@pytest.mark.parametrize("ids, sentence", [
    ([[1, 5]], r"ids of the shape \(1, 2\)"), ([1, 5.5], r"the ids \[1, 5.5\]; whole numbers"), (["a"], "whole numbers"),
    ([1, None], "whole numbers"), ([1, 2**70], "whole numbers"), ([[1], [1, 2]], "whole numbers"), (5, "the ids 5; whole numbers")])
def test_ids_that_are_none_reach_no_row(engine, ids, sentence):
    with pytest.raises(UserError, match=f"the prompt has .*{sentence}"):
        engine.generate([Request(ids)])


def test_features_stay_where_they_are_and_the_least_recently_used_make_room(params, programs):
    """Pixels of both kinds, batches that are filled up, images that come back."""
    features, pool = Features(CFG, programs, 1, places=4), [*images(3), *(np.arange(28 * 28 * 9, dtype=np.uint8).reshape(3, 28, 28, 3))]
    encode = jax.jit(lambda pixels: programs.apply(params, pixels[None, None], method="encode_images")[0, 0])
    wanted, held, rng = [np.asarray(encode(pixels)) for pixels in pool], [], np.random.default_rng(3)
    for _ in range(25):
        chosen = rng.choice(6, rng.integers(1, 4), replace=False).tolist()
        new = [k for k in chosen if k not in held]
        held = ([k for k in held if k not in chosen] + [k for k in chosen if k in held] + new)[-4:]
        places = features.places(params, chosen, [pool[k] for k in chosen])
        assert list(places) == chosen and set(features._place_of) == set(held)
        for k, place in features._place_of.items():
            np.testing.assert_allclose(features.array[place], wanted[k], atol=1e-5)
    features = Features(CFG, programs, 1, places=4)
    places = features.places(params, [0], pool[:1]) | features.places(params, [3, 4, 5], pool[3:])  # three, filled up to four
    for k, place in places.items():
        np.testing.assert_allclose(features.array[place], wanted[k], atol=1e-5)
    assert len(features.places(params, range(6), pool)) == 6 == len(set(features._place_of.values())) and len(features.array) == 8


def test_the_row_that_is_given_away_is_the_one_that_is_missed_least():
    """Not one that somebody who waits begins like; of the others the one that was given out, or taken from, longest ago."""
    rows, pool = Rows(share=True), images(5)
    rows.resize(3, 1024)
    job = lambda k, text: Job(Request([1] + IMG * 4 + [text], [pool[k]] * 4, 4))
    for k in range(3):
        assert rows.choose([job(k, 5)])[0].target == k
        rows.finish(k)
    placed, = rows.choose([job(3, 5), job(0, 6)])
    assert placed.target == 1
    rows.finish(1)
    placed, = rows.choose([job(0, 6)])
    assert (placed.source, placed.target) == (0, 2)
    rows.finish(2)
    assert rows.choose([job(4, 5)])[0].target == 1


def test_rows_are_left_for_those_that_wait_as_soon_as_a_quarter_is_free(engine):
    jobs = [engine.add(Request([1, 5, 6 + i], [], 2 if i == 1 else NEW), i) for i in range(5)]
    engine.advance()
    assert [len(job.tokens) for job in jobs] == [2, 2, 2, 2, 0] and jobs[1].is_finished
    engine.advance()
    assert len(jobs[4].tokens) > 0 and not engine._waiting
    for _ in range(2):
        engine.advance()
        assert len(engine._unread) == 1, "with nobody waiting, the device is a round ahead of the host, and no more"


def test_a_row_is_longer_than_what_the_device_may_have_written(engine):
    job = engine.add(Request([1] * 60 + [5, 6], [], 150))
    while not job.is_finished:
        engine.advance()
        assert np.asarray(engine._slots.position).max() < engine._length
    assert len(job.tokens) == 150
