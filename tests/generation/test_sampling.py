"""Draws: the distribution that transformers' own processors leave, and seeds that belong to a prompt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
import transformers

from llavamed_jax.generation.sampling import Sampling, next_token, row_seeds, warp
from tests.support import hf

torch = hf.torch
jitted_next_token, jitted_warp = jax.jit(next_token), jax.jit(warp)

SETTINGS = [(1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, 0, 0.8), (0.9, 7, 0.6), (2.0, 1, 0.1), (0.2, 50, 0.7), (0.7, 50, 1.0), (1.0, 0, 1e-6),
            (0.9, 10**12, 0.9)]


def settings(n, temperature=1.0, top_k=0, top_p=1.0, seeds=None):
    """n rows of one setting; rows draw by their number."""
    return Sampling.of([temperature] * n, [top_k] * n, [top_p] * n, np.arange(n) if seeds is None else seeds)


@pytest.fixture(scope="module")
def transformers_warped():
    """float32 [B,V] -> the same, as `generate(do_sample=True)` with these settings changes logits before it draws."""
    model, _ = hf.llava()

    def warped(logits, temperature, top_k, top_p):
        config = transformers.GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        processors = model._get_logits_processor(config, input_ids_seq_length=1)
        return processors(torch.ones(len(logits), 1, dtype=torch.long), torch.tensor(np.asarray(logits))).numpy()
    return warped


def in_vocabulary_order(logits, chosen):
    order, warped = jitted_warp(logits, chosen)
    out = np.full(logits.shape, np.nan, np.float32)
    np.put_along_axis(out, np.asarray(order), np.asarray(warped), axis=1)
    return out


def assert_warped_alike(got, expected):
    """The same tokens are left, and their logits differ by the last bit that dividing by the temperature may move."""
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected))
    np.testing.assert_array_max_ulp(np.where(np.isfinite(got), got, 0), np.where(np.isfinite(expected), expected, 0), maxulp=1)


@pytest.mark.parametrize("temperature,top_k,top_p", SETTINGS)
@pytest.mark.parametrize("kind", ["spread", "ties", "peaked"])
def test_warped_logits_equal_transformers(temperature, top_k, top_p, kind, transformers_warped):
    rng = np.random.default_rng(3)
    logits = {"spread": 2 * rng.standard_normal((64, 1000)), "ties": rng.integers(-2, 4, (64, 50)) / 2 + 0.1,
              "peaked": 12 * rng.standard_normal((64, 300))}[kind].astype(np.float32)
    got = in_vocabulary_order(logits, settings(64, temperature, top_k, top_p))
    expected = transformers_warped(logits, temperature, top_k, top_p)
    if kind == "ties":  # torch leaves open which of several equal logits its sort puts last
        got, expected = np.sort(got), np.sort(expected)
    assert_warped_alike(got, expected)


def test_equals_of_the_last_one_kept():
    """Top-k keeps all that tie with the k-th; top-p lets the lower ids of a tie go."""
    logits = jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0]])
    assert np.isfinite(in_vocabulary_order(logits, settings(1, top_k=2))).tolist() == [[False, True, True, True, True]]
    flat = jnp.zeros((1, 4))
    assert np.isfinite(in_vocabulary_order(flat, settings(1, top_p=0.5))).tolist() == [[False, False, True, True]]
    assert np.isfinite(in_vocabulary_order(flat, settings(1, top_p=1e-9))).tolist() == [[False, False, False, True]]


def likelihood(tokens, p):
    """The probability that draws from `p` are as far from it as these are (chi-square; rare tokens share a bin)."""
    counts, expected = np.bincount(np.asarray(tokens), minlength=len(p)), len(tokens) * p
    assert counts[p == 0].sum() == 0
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    return scipy.stats.chisquare(counts[expected > 0], expected[expected > 0]).pvalue


def draw(logits, chosen):
    return jitted_next_token(jnp.tile(logits, (len(chosen.top_k), 1)), chosen, jnp.zeros(len(chosen.top_k), jnp.int32))


@pytest.mark.parametrize("temperature,top_k,top_p", [(1.0, 0, 1.0), (1.3, 0, 0.8), (0.9, 7, 0.6)])
def test_draws_have_transformers_distribution(temperature, top_k, top_p, transformers_warped):
    logits = np.random.default_rng(7).permutation(np.linspace(0, 2, 60, dtype=np.float32))[None]
    p = torch.softmax(torch.tensor(transformers_warped(logits, temperature, top_k, top_p)[0]).double(), -1).numpy()
    assert (p > 0).sum() >= 4
    assert likelihood(draw(logits, settings(20_000, temperature, top_k, top_p)), p) > 1e-3


def test_a_wrong_distribution_is_noticed():
    """The test above would reject draws at a temperature of 1.1 in place of 1."""
    logits = np.random.default_rng(7).permutation(np.linspace(0, 2, 60, dtype=np.float32))[None]
    p = torch.softmax(torch.tensor(logits[0]).double(), -1).numpy()
    assert likelihood(draw(logits, settings(20_000, 1.1)), p) < 1e-3


@pytest.mark.parametrize("temperature", [1e-3, 1e-8, 1e-37, 2e-38, 1e-44, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    logits = (9 * np.random.default_rng(1).standard_normal((200, 97))).astype(np.float32)
    for top_k, top_p in ((0, 1.0), (50, 0.7)):
        tokens = jitted_next_token(logits, settings(200, temperature, top_k, top_p), jnp.zeros(200, jnp.int32))
        np.testing.assert_array_equal(tokens, logits.argmax(axis=1))


def test_rows_have_their_own_settings(transformers_warped):
    logits = np.random.default_rng(2).standard_normal((len(SETTINGS), 40)).astype(np.float32)
    temperatures, top_ks, top_ps = zip(*SETTINGS)
    got = in_vocabulary_order(logits, Sampling.of(temperatures, top_ks, top_ps, range(len(SETTINGS))))
    assert_warped_alike(got, np.concatenate([transformers_warped(x[None], *each) for x, each in zip(logits, SETTINGS)]))


def test_greedy_rows_stay_greedy_beside_others_that_draw():
    logits = np.random.default_rng(5).standard_normal((200, 97)).astype(np.float32)
    tokens = np.asarray(jitted_next_token(logits, Sampling.of([0.0, 5.0] * 100, [0] * 200, [1.0] * 200, range(200)),
                                          np.zeros(200, np.int32)))
    np.testing.assert_array_equal(tokens[::2], logits[::2].argmax(axis=1))
    assert (tokens[1::2] != logits[1::2].argmax(axis=1)).mean() > 0.8


def test_a_row_draws_anew_at_each_step():
    flat, each = np.zeros((200, 97), np.float32), settings(200)
    first, second = (np.asarray(jitted_next_token(flat, each, np.full(200, step, np.int32))) for step in (0, 1))
    assert (first != second).mean() > 0.9
    np.testing.assert_array_equal(first, jitted_next_token(flat, each, np.zeros(200, np.int32)))


def test_seeds_belong_to_a_prompt_and_not_to_its_place():
    a, b, image, other = [1, 5], [1, 6], hf.images(2)[:1], hf.images(2)[1:]
    one, two, three = row_seeds(0, [a, b, a], [[], [], []])
    assert row_seeds(0, [b], [[]]) == [two] and row_seeds(0, [a, a, b], [[], [], []]) == [one, three, two]
    found = [one, two, three, *row_seeds(1, [a], [[]]), *row_seeds(0, [a], [image]), *row_seeds(0, [a], [other])]
    assert len(set(found)) == len(found) and all(0 <= s < 2**32 for s in found)
    assert row_seeds(0, [a], [image.copy()]) == row_seeds(0, [a], [image])


def test_a_draw_is_an_ids_and_not_a_ranks():
    """Two logits that only rounding tells apart: whichever is sorted first, a row draws the same."""
    logits = np.random.default_rng(8).standard_normal(97).astype(np.float32)
    logits[[20, 70]] = 3.0
    other, each = logits.copy(), settings(500, temperature=0.9, top_k=50, top_p=0.95)
    other[20] -= 1e-6
    tokens = np.asarray(draw(logits[None], each))
    assert {20, 70} <= set(tokens.tolist())
    np.testing.assert_array_equal(draw(other[None], each), tokens)
