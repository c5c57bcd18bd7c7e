"""Beam search against transformers' `generate` on three random models, and beams against themselves."""

import dataclasses

import jax
import numpy as np
import pytest

from llavamed_jax.generation.beam import BeamSearch, advance, start
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.requests import Request
from llavamed_jax.parallel.mesh import make_mesh
from tests.support import hf

torch = hf.torch

P = 16
IMG = [-200] * P
SEEDS, K, EOS = (0, 2, 4), 3, (2, 7)  # of the models, which share their compiled programs; beams, and ids that end a sequence


def requests(seed):
    """Rows of several lengths and limits: one image, two images, none."""
    rng = np.random.default_rng(seed)
    text = lambda n: rng.integers(8, 90, n).tolist()
    images = hf.images(4, seed=seed)
    return [Request([1] + IMG + text(4), images[:1], 14), Request([1] + text(9) + IMG + text(2) + IMG + text(3), images[1:3], 14),
            Request([1] + text(7), [], 1), Request([1] + text(12), [], 5), Request([1] + IMG + text(30), images[3:], 14),
            Request([1] + text(3), [], 14)]


def torch_generate(model, rows, num_beams, eos):
    """transformers' tokens of each row; those of one limit in one batch, padded on the left. A greedy answer's limit cuts it."""
    out, limits = {}, [max(row.max_new_tokens for row in rows) if num_beams == 1 else row.max_new_tokens for row in rows]
    for limit in set(limits):
        chosen = [i for i, each in enumerate(limits) if each == limit]
        longest = max(len(rows[i].ids) for i in chosen)
        ids = np.array([[0] * (longest - len(rows[i].ids)) + list(rows[i].ids) for i in chosen])
        images = [image for i in chosen for image in rows[i].images]
        pixels = dict(pixel_values=torch.tensor(np.stack(images)).permute(0, 3, 1, 2)) if images else {}
        tokens = model.generate(input_ids=torch.tensor(np.where(ids == -200, hf.IMAGE_ID, ids)), attention_mask=torch.tensor(ids != 0),
                                max_new_tokens=limit, do_sample=False, num_beams=num_beams, eos_token_id=list(eos), **pixels)
        out |= zip(chosen, tokens[:, longest:].tolist())
    return [until_end(out[i][: row.max_new_tokens], eos) for i, row in enumerate(rows)]


def until_end(tokens, eos):
    """What is behind an end is padding."""
    return tokens[: next((n + 1 for n, t in enumerate(tokens) if t in eos), len(tokens))]


@torch.no_grad()
def make_endings_likely(model, eos, seed):
    """Sharper logits, and where the model would say one token of its greedy answer, an end of the sequence is likelier."""
    kernel = model.lm_head.weight
    kernel *= 1.5
    answer, = torch_generate(model, requests(seed)[:1], 1, [hf.IMAGE_ID])
    for n, end in enumerate(eos):
        other = answer[(4 + 5 * n + seed % 3) % len(answer)]
        kernel[end] = (1.5 + 0.1 * n) * kernel[other]  # equal rows would be ties


@pytest.fixture(scope="module")
def family():
    """For each model its seed, itself and its parameters; one engine, and one search."""
    models = []
    for seed in SEEDS:
        model, cfg = hf.llava(seed=seed)
        make_endings_likely(model, EOS, seed)
        models.append((seed, model, jax.device_put(hf.params_of(model))))
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, eos_token_id=EOS[0], more_eos_ids=EOS[1:]))
    engine = Engine(cfg, models[0][2], batch_size=32, steps=5)
    return models, engine, BeamSearch(engine)


def test_no_beam_ends_early_or_late(family):
    models, engine, search = family
    found, differ = [], 0
    for seed, model, engine.params in models:
        expected = torch_generate(model, requests(seed), K, EOS)
        assert search.generate(requests(seed), K) == expected, f"beams of model {seed}"
        found += expected
        differ += sum(a != b for a, b in zip(expected, torch_generate(model, requests(seed), 1, EOS)))
    assert_telling(found, EOS)
    assert differ >= 7  # or greedy answers would do for beams


def assert_telling(found, eos):
    """Answers end at many places by themselves, and at each limit; with less a comparison would show little."""
    ended = {len(tokens) for tokens in found if tokens[-1] in eos}
    assert len(ended) >= 4 and {14, 5, 1} <= {len(tokens) for tokens in found if tokens[-1] not in eos}


def test_a_batch_gives_each_prompt_what_it_gives_alone(family):
    models, engine, search = family
    seed, _, engine.params = models[0]
    together = search.generate(requests(seed), K)
    assert search.generate(requests(seed)[1:2], K) == together[1:2]
    engine.params = models[1][2]
    assert search.generate(requests(seed), K) != together  # it is the model that decides


def test_a_mesh_gives_the_same_tokens(family):
    models, engine, search = family
    seed, _, engine.params = models[0]
    sharded = Engine(engine.cfg, engine.params, mesh=make_mesh("data=2,fsdp=2,tp=2"), batch_size=32, steps=5)
    assert BeamSearch(sharded).generate(requests(seed), K) == search.generate(requests(seed), K)


def test_bad_requests_are_one_sentence(family):
    search = family[2]
    with pytest.raises(ValueError, match="request 1 asks for 0 new tokens"):
        search.generate([Request([1, 5]), Request([1, 5], max_new_tokens=0)], 2)


def test_a_model_that_fails_is_said_and_room_is_made_for_what_can_come(family, monkeypatch):
    models, engine, search = family
    seed, _, engine.params = models[0]
    broken = requests(seed)
    broken[4] = dataclasses.replace(broken[4], images=[np.full_like(broken[4].images[0], np.nan)])
    with pytest.raises(ValueError, match="request 4: the model computed NaN or infinite values"):
        search.generate(broken, K)

    def stopped(*_, room, **__):
        raise InterruptedError(room)

    monkeypatch.setattr(search, "_prefill", stopped)
    with pytest.raises(InterruptedError) as room:
        search.generate([Request([1] * 9, [], 10**9)], K)
    assert room.value.args[0] <= 2 * engine.cfg.decoder.max_position_embeddings


jitted_advance = jax.jit(advance, static_argnames="eos")  # as in a search: eagerly, each operation is compiled by itself


def step(beams, probabilities, eos):
    """One token more for the one prompt of a search, whose running hypotheses have these next tokens."""
    return jitted_advance(beams, np.log(np.array([probabilities], np.float32)), eos)


def search_of(num_beams):
    return start(np.array([5]), np.array([9]), num_beams, room=9)


def test_what_ends_behind_the_k_best_continuations_is_not_finished():
    first = [0.15, 0.5, 0.3, 0.05]
    beams, parents = step(search_of(2), [first, first], eos=(0,))
    assert not beams.is_finished.any() and beams.running.tokens[0, :, 0].tolist() == [1, 2] and parents.tolist() == [[0, 0]]
    beams, _ = step(search_of(2), [[0.3, 0.5, 0.15, 0.05]] * 2, eos=(0,))
    assert beams.is_finished.tolist() == [[True, False]] and beams.finished.tokens[0, 0, :2].tolist() == [0, -1]
    np.testing.assert_allclose(beams.finished.scores[0, 0], np.log(0.3), rtol=1e-6)
    assert beams.running.tokens[0, :, 0].tolist() == [1, 2] and not beams.is_done.any()


def test_a_running_hypothesis_that_is_only_as_good_as_the_finished_ones_ends_the_search():
    beams, _ = step(search_of(1), [[0.45, 0.45, 0.05, 0.05]], eos=(0,))
    assert beams.is_finished.all() and beams.finished.scores[0, 0] == beams.running.scores[0, 0] and beams.is_done.all()


def test_k_hypotheses_run_on_however_many_end_at_once():
    """Two ids that end, each likelier than what goes on: the 2k best continuations all end."""
    beams, _ = step(search_of(2), [[0.01, 0.01, 0.58, 0.4]] * 2, eos=(0, 1))
    beams, parents = step(beams, [[0.4, 0.4, 0.15, 0.05], [0.4, 0.4, 0.05, 0.15]], eos=(0, 1))
    assert beams.is_finished.all() and beams.is_done.all()  # both are better than what runs on
    assert beams.finished.tokens[0, :, :2].tolist() == [[2, 0], [2, 1]]
    assert beams.running.tokens[0, :, :2].tolist() == [[2, 2], [3, 3]] and parents.tolist() == [[0, 1]]
    np.testing.assert_allclose(beams.running.scores[0], np.log([0.58 * 0.15, 0.4 * 0.15]), rtol=1e-6)
    np.testing.assert_allclose(beams.finished.scores[0], np.log([0.58 * 0.4] * 2) / 2, rtol=1e-6)
