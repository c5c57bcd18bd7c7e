"""Rematerialisation by name: what each policy keeps of a layer. (test_tower_kinds.py and test_lora.py compare gradients.)

L layers, B batch, T positions, N query heads, K key/value heads, H head width, D model width, F feed-forward width.
"""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from llavamed_jax.config import DecoderConfig, VisionConfig
from llavamed_jax.models.decoders.llama import Decoder
from llavamed_jax.models.decoders.olmo import Olmo2Decoder
from llavamed_jax.models.decoders.qwen import Qwen3Decoder
from llavamed_jax.models.towers.clip import VisionTower
from llavamed_jax.parallel.mesh import make_mesh

# Widths that tell one array from another.
L, B, T, N, K, H, D, F = 3, 4, 12, 4, 2, 8, 40, 56
CFG = DecoderConfig(64, D, F, L, N, K, H, 1e-5, 1e4, 128)
INPUT, QKVO = Counter({D: 1}), Counter({N * H: 2, K * H: 2})  # query and context, key and value


@pytest.fixture(scope="module")
def args():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((B, T, D), np.float32)
    segments = np.repeat([[1] * 5 + [2] * 6 + [0]], B, 0)
    positions = np.repeat([[*range(5), *range(6), 0]], B, 0)
    shapes = jax.eval_shape(Decoder(CFG, scan=True).init, jax.random.key(0), x, positions)["params"]
    return jax.tree.map(lambda s: np.float32(rng.standard_normal(s.shape) * 0.2), shapes), x, positions, segments


def loss(remat, backend, params, x, positions, segments):
    out, _ = Decoder(CFG, scan=True, remat=remat, attention=backend).apply({"params": params}, x, positions, segments)
    return jnp.sum(jnp.sin(out))


_KEPT = {}


def kept(args, remat):
    """Shapes of what the backward pass is handed of each layer: the arrays with a leading L that are no parameters."""
    if remat not in _KEPT:
        pullback = jax.eval_shape(lambda params: jax.vjp(functools.partial(loss, remat, "xla"), params, *args[1:])[1], args[0])
        parameters = {x.shape for x in jax.tree.leaves(args[0])}
        _KEPT[remat] = [x.shape for x in jax.tree.leaves(pullback) if x.shape[:1] == (L,) and x.shape not in parameters]
    return _KEPT[remat]


def widths(shapes):
    """Numbers a position, of each array."""
    return Counter(int(np.prod(shape)) // (L * B * T) for shape in shapes)


def test_full_keeps_the_input_alone(args):
    assert widths(kept(args, "full")) == INPUT


def test_qkvo_keeps_what_attention_takes_and_gives(args):
    assert widths(kept(args, "qkvo")) == INPUT + QKVO


def test_attention_keeps_the_sum_behind_it_too(args):
    """The backward pass computes no product of attention again: it has o's output in that sum."""
    assert widths(kept(args, "attention")) == INPUT + QKVO + Counter({D: 1})


def test_minimal_keeps_every_product(args):
    """Attention's and gate's, up's and o's outputs; what the backward pass has no use for is not kept (down's output)."""
    assert widths(kept(args, "minimal")) == INPUT + QKVO + Counter({F: 2, D: 1})


@pytest.mark.parametrize("kind, again", [(Decoder, 2), (Qwen3Decoder, 2), (Olmo2Decoder, 3), (VisionTower, 1)])
def test_attention_and_the_feed_forward_network_are_computed_again_by_name_in_every_kind(args, kind, again):
    """`qkvo` computes one product more than `attention`, o's, and that gate's and up's, or fc1's, more than `minimal`. OLMo-2's norm takes down's too."""
    if kind is VisionTower:
        make, inputs = functools.partial(VisionTower, VisionConfig(D, F, L, N, 8, 4), L, scan=True), (jnp.zeros((B, 8, 8, 3)),)
    else:
        make, inputs = functools.partial(kind, CFG, scan=True), args[1:]
    params = jax.eval_shape(make().init, jax.random.key(0), *inputs)["params"]

    def products(remat):
        def run(params):
            out = make(remat=remat).apply({"params": params}, *inputs)
            return jnp.sum(jnp.sin(out if kind is VisionTower else out[0]))
        return str(jax.make_jaxpr(jax.grad(run))(params)).count("dot_general")
    qkvo, attention, minimal = map(products, ("qkvo", "attention", "minimal"))
    assert qkvo - attention == 1 and attention - minimal == again


@pytest.mark.parametrize("remat", ["qkvo", "attention", "minimal"])
def test_queries_and_keys_are_kept_as_attention_takes_them(args, remat):
    """Rotated, heads before positions: the backward pass neither rotates nor transposes again."""
    assert Counter(kept(args, remat))[L, B, K, T, H] == 2 and (L, B, T, N, H) in kept(args, remat)
    pullback = jax.eval_shape(lambda *args: jax.vjp(functools.partial(loss, remat, "xla"), *args)[1], *args)
    backward = jax.make_jaxpr(lambda pullback, by_loss: pullback(by_loss))(pullback, jnp.float32(1))
    assert str(backward).count("concatenate") == 2, "one rotation back each of queries and keys"


def test_norms_of_queries_and_keys_are_given_what_they_took(args):
    """Their backward pass has no use for what is rotated."""
    decoder = Qwen3Decoder(CFG, scan=True, remat="qkvo")
    params = jax.eval_shape(decoder.init, jax.random.key(0), *args[1:3])["params"]
    pullback = jax.eval_shape(lambda params: jax.vjp(lambda p: decoder.apply({"params": p}, *args[1:])[0], params)[1], params)
    assert {(L, B, T, N, H), (L, B, T, K, H), (L, B, K, T, H)} <= {x.shape for x in jax.tree.leaves(pullback)}


def test_none_keeps_the_scores_too(args):
    """What the others leave out: weights [N,T,T], and much more than every product."""
    shapes = kept(args, "none")
    assert any(np.prod(s) == L * B * N * T * T for s in shapes)
    assert sum(widths(shapes).elements()) > sum(widths(kept(args, "minimal")).elements())


def kernels(jaxpr):
    """Pallas kernels of a program, without those that nobody takes anything from, which the compiler drops."""
    taken = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            if any(id(x) in taken for x in equation.outvars):
                yield equation.params["name"]
        elif equation.outvars:
            for value in equation.params.values():
                if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
                    yield from kernels(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("backend", ["splash", "flash"])
@pytest.mark.parametrize("remat, forward", [("full", 2), ("qkvo", 1), ("attention", 1), ("minimal", 1)])
def test_a_kernel_keeps_what_its_backward_kernels_need(args, backend, remat, forward):
    """`context` names the kernel's output and its log-sum-exp: with them kept, the forward kernel runs once."""
    found = list(kernels(jax.make_jaxpr(jax.grad(functools.partial(loss, remat, f"{backend}_interpreted")))(*args).jaxpr))
    assert sum("_fwd_" in name or "_forward" in name for name in found) == forward and len(found) == forward + 2


@pytest.mark.parametrize("remat", ["qkvo", "full"])
def test_on_a_mesh_gradients_are_those_of_one_device(args, remat):
    run = jax.jit(jax.grad(functools.partial(loss, remat, "xla"), (0, 1)))
    single = run(*args)
    with jax.set_mesh(make_mesh("data=2,fsdp=2,tp=2")):
        sharded = jax.jit(jax.grad(functools.partial(loss, remat, "xla"), (0, 1)))(*args)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * np.abs(b).max()), *jax.device_get((sharded, single)))
