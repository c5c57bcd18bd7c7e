"""Cross-entropy in chunks beside the whole: same loss, same gradients, no array of all logits, nothing for what is frozen."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from llavamed_jax.config import IGNORE, DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.models.decoders.llama import head_kernel
from llavamed_jax.models.llava import Llava, abstract_params
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.training.losses import (
    LARGEST_CHUNK,
    SMALLEST_CHUNK,
    _chunk,
    chunked_cross_entropy,
    cross_entropy,
    num_samples,
    num_supervised,
)
from llavamed_jax.training.recipe import WEIGHTINGS
from llavamed_jax.training.step import llava_loss

B, T, D, V = 8, 40, 16, 48


@pytest.fixture(scope="module")
def drawn():
    """hidden, kernel, labels, segment_ids: packed rows, padded, one in three positions supervised, one row not at all."""
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((B, T)) < 1 / 3, rng.integers(0, V, (B, T)), IGNORE)
    labels[3] = IGNORE
    segments = np.ascontiguousarray(np.sort(rng.integers(0, 4, (B, T)))[:, ::-1])
    return (jnp.asarray(rng.standard_normal((B, T, D)), jnp.float32), jnp.asarray(rng.standard_normal((D, V)), jnp.float32),
            jnp.asarray(labels), jnp.asarray(segments))


@pytest.fixture(scope="module")
def whole(drawn):
    """By weighting, loss, count and gradients without chunks."""
    return {weighting: loss_and_gradients(lambda *a, w=weighting: whole_loss(*a, w), drawn) for weighting in WEIGHTINGS}


def tiny(vocab, is_tied):
    decoder = DecoderConfig(vocab, 16, 32, 1, 2, 2, 8, 1e-5, 1e4, 128, tie_word_embeddings=is_tied)
    return LlavaConfig(VisionConfig(16, 32, 2, 2, 16, 8), decoder)


def whole_loss(hidden, kernel, labels, segments, weighting="token"):
    return cross_entropy(hidden @ kernel, labels, segments, weighting)


def loss_and_gradients(loss, args):
    return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*args)


def assert_equal(found, wanted):
    """Loss, count and both gradients to 1e-6 of their size."""
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * float(np.abs(b).max()))


def equations(jaxpr):
    """Every equation of a program, those of inner programs included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, (core.Jaxpr, core.ClosedJaxpr))):
            if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
                yield from equations(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("chunk", [None, 7, 10**4])
def test_chunks_are_the_whole(drawn, whole, chunk, weighting):
    assert_equal(loss_and_gradients(lambda *a: chunked_cross_entropy(*a, chunk, weighting), drawn), whole[weighting])


def test_by_sample_each_sample_weighs_alike(drawn, whole):
    """The mean loss of each segment on its own, summed: samples that are packed weigh as those that are not."""
    hidden, kernel, labels, segments = drawn
    means, loss = [], jax.jit(whole_loss)
    for row, segment in np.ndindex(B, 3):
        only = np.zeros_like(segments)
        only[row] = segments[row] * (segments[row] == segment + 1)
        total, count = loss(hidden, kernel, labels, only)
        means += [float(total / count)] if count else []
    total, count = whole["sample"][0]
    assert float(count) == len(means) < int(num_samples(segments)), "some samples here have no supervised token"
    np.testing.assert_allclose(float(total), sum(means), rtol=1e-6)
    assert float(num_supervised(labels, segments)) == float(whole["token"][0][1])


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("mesh", ["data=2,fsdp=2,tp=2", "fsdp=8", "tp=8"])
def test_chunks_on_a_mesh_are_the_whole(drawn, whole, mesh, weighting):
    """Rows over data and fsdp, the vocabulary over tp, the kernel's gradient laid as the kernel."""
    mesh = make_mesh(mesh)
    with jax.set_mesh(mesh):
        found = loss_and_gradients(lambda *a: chunked_cross_entropy(*a, 7, weighting), drawn)
    assert_equal(found, whole[weighting])
    assert found[1][1].sharding.shard_shape((D, V)) == (D // mesh.shape["fsdp"], V // mesh.shape["tp"])


def test_the_heads_gradient_crosses_the_network_once():
    """In a loop over chunks nothing is summed over rows of other devices; after it the kernel's gradient is, once."""
    with jax.set_mesh(make_mesh("data=2,fsdp=4")):
        hidden, kernel = jax.ShapeDtypeStruct((B, T, D), jnp.float32), jax.ShapeDtypeStruct((D, V), jnp.float32)
        rows = jax.ShapeDtypeStruct((B, T), jnp.int32)
        program = jax.make_jaxpr(jax.grad(lambda *a: chunked_cross_entropy(*a, 7)[0], (0, 1)))(hidden, kernel, rows, rows)
    everywhere = list(equations(program.jaxpr))
    loops = [e for e in everywhere if e.primitive.name == "while"]
    assert len(loops) == 1 and sum(e.primitive.name == "reduce_scatter" for e in everywhere) == 1
    inside = {axis for e in equations(loops[0].params["body_jaxpr"].jaxpr) for axis in e.params.get("axes", ())}
    inside = {axis for axis in inside if isinstance(axis, str)}  # sums within an array name its axes by number
    assert inside == {"tp"}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_nothing_supervised_is_zero_over_zero_with_gradients_of_zero(drawn, weighting):
    hidden, kernel, labels, segments = drawn
    loss = lambda *a: chunked_cross_entropy(*a, weighting=weighting)
    (total, count), gradients = loss_and_gradients(loss, (hidden, kernel, jnp.full_like(labels, IGNORE), segments))
    assert (float(total), float(count)) == (0, 0) and not any(jnp.any(g) for g in gradients)


def test_bfloat16_gradients_are_near_those_of_float32(drawn, whole):
    """Hidden states and products in bfloat16, sums in float32: the gradient of a float32 head is not rounded on the way."""
    hidden, kernel, *rows = drawn
    found = loss_and_gradients(chunked_cross_entropy, (hidden.astype(jnp.bfloat16), kernel, *rows))
    assert found[1][0].dtype == jnp.bfloat16 and found[1][1].dtype == jnp.float32
    found = [np.asarray(x) for x in jax.tree.leaves(found)]
    assert (found[3] != found[3].astype(jnp.bfloat16)).any()
    for a, b in zip(found, jax.tree.leaves(whole["token"]), strict=True):
        assert np.linalg.norm(a.astype(np.float32) - b) <= 1e-2 * np.linalg.norm(b)


@pytest.mark.parametrize("wanted, products", [((), 1), ((0,), 2), ((1,), 2), ((0, 1), 3)])
def test_gradients_that_nobody_asks_for_are_not_computed(drawn, wanted, products):
    """One product with the head for the logits, one more for each gradient: a frozen head costs two."""
    loss = lambda *a: chunked_cross_entropy(*a)[0]
    program = jax.make_jaxpr(jax.grad(loss, wanted) if wanted else loss)(*drawn)
    assert str(program).count("dot_general[") == products


@pytest.mark.parametrize("is_tied", [False, True])
def test_training_never_has_the_logits_of_a_batch(is_tied):
    """No array in loss and gradient of the model is as large as [B,T,V]; the whole's has one, so the test can see it."""
    vocab, length = 4096, 32
    cfg = tiny(vocab, is_tied)
    model, params = Llava(cfg, scan=True), abstract_params(cfg, scan=True)
    row = jax.ShapeDtypeStruct((B, length), jnp.int32)
    batch = dict(input_ids=row, labels=row, positions=row, segment_ids=row)

    def whole(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["input_ids"]), batch["labels"], batch["segment_ids"])

    def largest(loss):
        program = jax.make_jaxpr(jax.value_and_grad(loss, has_aux=True))(params, batch)
        return max(var.aval.size for e in equations(program.jaxpr) for var in e.outvars if hasattr(var.aval, "size"))

    assert largest(whole) == B * length * vocab
    assert largest(llava_loss(model)) == SMALLEST_CHUNK * vocab < B * length * vocab


def test_compiled_memory_is_that_of_a_chunk():
    N, V = 4096, 2048
    kinds = [((1, N, 8), jnp.float32), ((8, V), jnp.float32), ((1, N), jnp.int32), ((1, N), jnp.int32)]
    args = [jax.ShapeDtypeStruct(*kind) for kind in kinds]
    memory = [jax.jit(jax.grad(lambda *a, f=f: f(*a)[0], (0, 1))).lower(*args).compile().memory_analysis().temp_size_in_bytes
              for f in (whole_loss, chunked_cross_entropy)]
    assert memory[0] >= 4 * N * V and memory[1] < 4 * 4 * _chunk(N) * V < memory[0]


@pytest.mark.parametrize("is_tied", [False, True])
def test_the_head_is_the_models(is_tied):
    """`head_kernel` is what `Llava.logits` multiplies with, and a tied table has the gradients of both its uses."""
    cfg = tiny(32, is_tied)
    model, rng = Llava(cfg, scan=True), np.random.default_rng(0)
    params = jax.tree.map(lambda x: np.float32(0.3) * rng.standard_normal(x.shape, np.float32), abstract_params(cfg, scan=True))
    ids = rng.integers(0, 32, (2, 12))
    batch = dict(input_ids=ids, labels=ids, positions=np.tile(np.arange(12), (2, 1)), segment_ids=np.ones_like(ids))

    def whole(params, batch):
        return cross_entropy(model.apply({"params": params}, batch["input_ids"]), batch["labels"], batch["segment_ids"])

    assert head_kernel(params).shape == (16, 32)
    found, wanted = (jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch) for loss in (llava_loss(model), whole))
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found[1]["decoder"]), jax.tree.leaves(wanted[1]["decoder"]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * float(np.abs(b).max()))


def test_chunks_are_an_eighth_within_bounds():
    assert [_chunk(n) for n in (40, 200, 1280, 8192, 65536)] == [40, SMALLEST_CHUNK, 256, 1024, LARGEST_CHUNK]
