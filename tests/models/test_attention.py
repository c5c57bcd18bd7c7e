"""Attention that knows segments: each backend beside a softmax written out, and packed samples beside samples apart.

B batch, T positions, N query heads, K key/value heads, H head width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from llavamed_jax.config import IGNORE, IMAGE_TOKEN, DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UsageError
from llavamed_jax.generation.programs import cached_backend
from llavamed_jax.models.attention.backend import AttentionMask, attention, backend_of
from llavamed_jax.models.llava import Llava, abstract_params
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training.step import llava_loss

BACKENDS = ("xla", "splash_interpreted", "flash_interpreted")
B, N, K, H = 2, 4, 2, 8


def draw(T, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32) for shape in ((B, T, N, H), (B, K, T, H), (B, K, T, H))]


def layout(T):
    """Positions and segments of rows of three and two samples, padded at the end (segment 0)."""
    lengths = [(T // 3, T // 4, T // 5), (T // 2, T - T // 2 - 1)]
    positions, segments = np.zeros((B, T), np.int32), np.zeros((B, T), np.int32)
    for row, samples in enumerate(lengths):
        start = 0
        for i, n in enumerate(samples):
            positions[row, start:start + n], segments[row, start:start + n] = np.arange(n), i + 1
            start += n
        positions[row, start:] = np.arange(T - start)
    return positions, segments


def written_out(q, k, v, positions, segments, window):
    """One head at a time, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    at = np.arange(q.shape[1])
    seen = (at[None, :] <= at[:, None])[None].repeat(B, 0)
    for b in range(B):
        if segments is not None:
            seen[b] &= np.equal.outer(segments[b], segments[b])
        if window is not None:
            seen[b] &= np.subtract.outer(positions[b], positions[b]) < window
    out = np.zeros_like(q)
    for b, n in np.ndindex(B, N):
        scores = np.where(seen[b], q[b, :, n] @ k[b, n // (N // K)].T / H**0.5, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out[b, :, n] = weights / weights.sum(-1, keepdims=True) @ v[b, n // (N // K)]
    return out


@pytest.mark.parametrize("T, is_packed, window", [(30, True, None), (130, True, 40), (20, False, 5)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_are_the_softmax_written_out(backend, T, is_packed, window):
    q, k, v = draw(T)
    positions, segments = layout(T) if is_packed else (np.tile(np.arange(T, dtype=np.int32), (B, 1)), None)
    mask = AttentionMask(positions, positions, segments, segments, window)
    found = jax.jit(attention, static_argnames="backend")(q, k, v, mask, backend=backend)
    np.testing.assert_allclose(found, written_out(q, k, v, positions, segments, window), rtol=0, atol=2e-6)


@functools.cache
def gradients(backend):
    T = 140
    positions, segments = layout(T)
    mask, weigh = AttentionMask(positions, positions, segments, segments, 50), draw(T, seed=1)[0] * (segments != 0)[..., None, None]
    return jax.jit(jax.grad(lambda q, k, v: jnp.sum(attention(q, k, v, mask, backend) * weigh), (0, 1, 2)))(*draw(T))


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=1,tp=2"])
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_kernels_have_the_gradients_of_xla(backend, mesh):
    """With blocks that lie across the borders of samples, queries that share keys, a window, and on a mesh that cuts rows and heads."""
    wanted = gradients("xla")
    if mesh is None:
        found = gradients(backend)
    else:
        with jax.set_mesh(make_mesh(mesh, jax.devices()[:4])):
            found = gradients.__wrapped__(backend)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max())


@pytest.mark.parametrize("choice, platform, backend", [("auto", "cpu", "xla"), ("auto", "gpu", "flash"), ("auto", "tpu", "splash"),
                                                       ("flash", "cpu", "flash_interpreted"), ("xla", "gpu", "xla"),
                                                       ("splash", "cpu", "splash_interpreted"), ("xla", "tpu", "xla")])
def test_backend_is_chosen_by_platform(choice, platform, backend):
    assert backend_of(choice, platform) == backend


def test_heads_that_a_kernel_does_not_take():
    assert backend_of("auto", "gpu", 80) == backend_of("auto", "gpu", 8) == "xla" and backend_of("auto", "gpu", 32) == "flash"
    with pytest.raises(UsageError, match="'attention' is 'flash', .* the decoder's have width 80; auto or xla was expected"):
        backend_of("flash", "gpu", 80)


@pytest.mark.parametrize("platform, head_dim, cache, backend", [
    ("gpu", 128, "bfloat16", "flash"), ("gpu", 128, "int8", "xla"), ("gpu", 80, "bfloat16", "xla"), ("tpu", 128, "bfloat16", "xla"),
    ("cpu", 128, "float32", "xla")])
def test_backend_over_a_cache(platform, head_dim, cache, backend):
    assert cached_backend(platform, head_dim, cache) == backend


@pytest.mark.parametrize("choice, platform, there", [("cudnn", "gpu", "auto or xla or flash"), ("splash", "gpu", "auto or xla or flash"),
                                                     ("flash", "tpu", "auto or xla or splash")])
def test_backend_that_is_not_there_is_one_sentence(choice, platform, there):
    with pytest.raises(UsageError, match=f"'attention' is '{choice}', .* {there} was expected"):
        backend_of(choice, platform)


# ---- packed samples

CFG = LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), DecoderConfig(64, 32, 48, 2, 4, 2, 8, 1e-5, 1e4, 128, architecture="mistral"))
P = CFG.tokens_per_image
# Two rows: length and images of each sample; the second row is padded.
PACKED = [[(14, 1), (9, 0), (17, 2)], [(11, 1), (20, 1)]]
ROW, SLOTS = 42, 3


def samples():
    """Rows of one sample each, exactly as long as it: ids, labels (uneven numbers of them), pixels [I,height,width,3]."""
    rng = np.random.default_rng(0)
    for row in PACKED:
        for length, images in row:
            ids = rng.integers(3, 64, length)
            for i in range(images):
                ids[1 + i * (P + 1):1 + i * (P + 1) + P] = IMAGE_TOKEN
            labels = np.where(np.arange(length) >= length - rng.integers(2, 5), ids, IGNORE)
            labels[0] = ids[0]  # predicted by nothing: where samples meet, the one before must not learn it
            yield ids, labels, rng.standard_normal((images, 16, 16, 3))


def together(parts, row_length=ROW, slots=SLOTS):
    """Samples side by side in one row of a batch."""
    at = 0
    out = dict(input_ids=np.zeros(row_length), labels=np.full(row_length, IGNORE), positions=np.zeros(row_length),
               segment_ids=np.zeros(row_length), pixel_values=np.zeros((slots, 16, 16, 3)))
    filled = 0
    for segment, (ids, labels, pixels) in enumerate(parts, 1):
        here = slice(at, at + len(ids))
        out["input_ids"][here], out["labels"][here], out["positions"][here] = ids, labels, np.arange(len(ids))
        out["segment_ids"][here] = segment
        out["pixel_values"][filled:filled + len(pixels)] = pixels
        at, filled = at + len(ids), filled + len(pixels)
    out["positions"][at:] = np.arange(row_length - at)
    return out


def batch(rows):
    """Five rows, the last ones empty: one shape for all, compiled once."""
    rows = rows + [together([])] * (5 - len(rows))
    return {n: np.stack([r[n] for r in rows]).astype(np.float32 if n == "pixel_values" else np.int32) for n in rows[0]}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)

    def one(path, x):
        value = rng.standard_normal(x.shape)
        if any(part.key in ("q_proj", "k_proj") for part in path):  # splash keeps scores' log-sum-exp, which rounds with their size
            return np.float32(0.2 * value)
        return np.float32(1 + 0.3 * value if path[-1].key == "scale" else 0.4 * value)

    return jax.tree_util.tree_map_with_path(one, abstract_params(CFG, scan=True))


@functools.cache
def program(backend, window):
    """(params, batch) -> loss and the gradients of decoder and projector, through which an image reaches the tower."""
    cfg = CFG.replace(decoder=dataclasses.replace(CFG.decoder, sliding_window=window))
    loss = llava_loss(Llava(cfg, scan=True, remat="qkvo", attention=backend))
    run = jax.jit(jax.value_and_grad(lambda trained, rest, batch: loss({**trained, **rest}, batch), has_aux=True))
    split = lambda params, is_tower: {part: x for part, x in params.items() if (part == "vision_tower") == is_tower}
    return lambda params, batch: run(split(params, False), split(params, True), batch)


@pytest.mark.parametrize("backend, window", [("xla", 6), ("splash_interpreted", 6), ("flash_interpreted", 6), ("xla", None),
                                             ("splash_interpreted", None)])
def test_packed_is_apart(params, backend, window):
    """Several samples with images in a row teach what they teach alone: the sums of losses, and the gradients.

    Positions restart with each sample, images are taken in order, the window counts within a sample, queries share keys.
    """
    singles = list(samples())
    apart = batch([together([s]) for s in singles])
    rows, start = [], 0
    for row in PACKED:
        rows.append(together(singles[start:start + len(row)]))
        start += len(row)
    packed, whole = jax.device_get((program(backend, window)(params, batch(rows)), program("xla", window)(params, apart)))
    assert float(packed[0][1]) == float(whole[0][1]) == sum(int((labels[1:] != IGNORE).sum()) for _, labels, _ in singles)
    np.testing.assert_allclose(packed[0][0], whole[0][0], rtol=1e-6)
    found, wanted = (flatten_dict(x[1], sep="/") for x in (packed, whole))
    for name in wanted:
        # The bias of keys has no influence on a softmax: its gradient is the rounding of what the queries' has the size of.
        size = np.abs(wanted[name.replace("k_proj/bias", "q_proj/bias")]).max()
        assert size > 0
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=5e-6 * size, err_msg=name)


@pytest.mark.parametrize("change", ["segment_ids", "positions", "pixel_values"])
def test_packed_wrongly_is_not_apart(params, change):
    """What the test above must see: one segment for all, positions that run on, images exchanged."""
    row = together(list(samples())[:3])
    right = program("xla", 6)(params, batch([row]))
    if change == "segment_ids":  # labels that open a sample are taken out, so that the loss differs by attention alone
        starts = (row["positions"] == 0) & (row["segment_ids"] > 0)
        row = {**row, "labels": np.where(starts, IGNORE, row["labels"]), "segment_ids": np.minimum(row["segment_ids"], 1)}
    else:
        row = {**row, change: np.arange(ROW) if change == "positions" else row[change][::-1]}
    wrong = program("xla", 6)(params, batch([row]))
    assert float(wrong[0][1]) == float(right[0][1])
    difference = abs(float(wrong[0][0] / right[0][0]) - 1)
    # Rotary attention sees differences of positions alone: running on changes nothing but rounding.
    assert difference < 1e-5 if change == "positions" else difference > 1e-3
