"""FP8 products of the decoder's projections (qwix): their arithmetic beside numpy's, which products are taken, runs, refusals.

Axis letters: B batch, T positions, D width of the input, F of the output.
"""

import re
import sys
from collections import Counter
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.config.decoders import decoder_from_hf
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.models.layers import Linear
from llavamed_jax.models.llava import Llava, abstract_params
from llavamed_jax.parallel.mesh import batch_sharding, make_mesh
from llavamed_jax.training import arithmetic, fp8
from llavamed_jax.training.program import Program, dtype_of
from llavamed_jax.training.step import llava_loss
from llavamed_jax.training.trainer import fit
from tests.adapters.test_lora import equations
from tests.support.training_runs import log_lines, set_back, shrunk

qwix = pytest.importorskip("qwix")
CFG = LlavaConfig(VisionConfig(32, 64, 3, 2, 8, 4), DecoderConfig(64, 32, 64, 3, 4, 2, 8, 1e-5, 1e4, 128, architecture="mistral"))
CONFIGS = {kind: CFG.replace(decoder=decoder_from_hf(dict(
    model_type=kind, vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128))) for kind in ("qwen2", "qwen3")}
PROJECTION = ("decoder", "layers", "mlp", "up_proj")
E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


# ---- one product

class Named(nn.Module):
    """A dense layer at a path."""

    names: tuple
    dtype: type

    @nn.compact
    def __call__(self, x):
        name, *rest = self.names
        return Named(tuple(rest), self.dtype, name=name)(x) if rest else Linear(48, (None, None), False, self.dtype, name=name)(x)


def drawn(rng, *shape):
    """Values within four powers of 2, so that every sum of products of their FP8 values is exact in float32."""
    return (rng.uniform(0.1, 1, shape) * rng.choice([-1, 1], shape)).astype(np.float32)


def product(x, w, g, dtype, path=PROJECTION, sharding=None):
    """The layer's output, and the gradients of x and w for the gradient g of the output."""
    layer = qwix.quantize_model(Named(path, dtype), fp8.provider(qwix)) if path else Named(PROJECTION, dtype)

    def each(w, x, g):
        params = unflatten_dict({(*(path or PROJECTION), "kernel"): w})
        y, pullback = jax.vjp(lambda params, x: layer.apply({"params": params}, x), params, x)
        by_w, by_x = pullback(g)
        return y, by_x, jax.tree.leaves(by_w)[0]

    x, g = (jax.device_put(jnp.asarray(a, dtype), sharding) for a in (x, g))
    return (each if sharding is None else jax.jit(each))(jnp.asarray(w), x, g)


def rounded(x, kind, axis=None):
    """FP8 values and their scale, the largest value's share of FP8's largest; in the dtype of x throughout."""
    scale = (np.abs(x).max(axis=axis, keepdims=True) / x.dtype.type(ml_dtypes.finfo(kind).max)).astype(x.dtype)
    return (x / scale).astype(kind).astype(np.float32), scale


def by_numpy(x, w, g, dtype, forward=E4M3, backward=E5M2, axis=None):
    """As `product`, of one operation after the other; `axis` gives each row of x and column of w a scale of its own."""
    x, w, g = (a.astype(dtype) for a in (x, w, g))
    (x8, sx), (w8, sw) = rounded(x, forward, axis), rounded(w, forward, None if axis is None else 0)
    out = lambda a, *scales: np.multiply.reduce([a.astype(dtype), *(np.broadcast_to(s, a.shape) for s in scales)], dtype=dtype)
    gw, sgw = rounded((g * sw).astype(dtype), backward)
    gx, sgx = rounded((g * sx).astype(dtype), backward)
    by_w = np.einsum("btd,btf->df", x8, gx)
    return out(x8 @ w8, sx, sw), out(gw @ w8.T, sgw.reshape(())), out(by_w, sgx.reshape(())).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_a_product_and_its_gradients_are_numpys_to_the_bit(dtype):
    rng = np.random.default_rng(0)
    x, w, g = drawn(rng, 4, 8, 32), 0.02 * drawn(rng, 32, 48), 3e-4 * drawn(rng, 4, 8, 48)
    here, wanted = product(x, w, g, dtype), by_numpy(x, w, g, dtype)
    for ours, numpys in zip(here, wanted):
        assert ours.dtype == numpys.dtype and np.array_equal(np.asarray(ours), numpys)
    exact = [np.asarray(a, np.float32) for a in product(x, w, g, dtype, path=None)]
    others = [by_numpy(x, w, g, dtype, **change) for change in (dict(axis=-1), dict(backward=E4M3), dict(forward=E5M2))]
    for wrong in (exact, *others):
        assert not all(np.array_equal(np.asarray(ours), a) for ours, a in zip(here, wrong))
    for ours, a in zip(here, exact):  # and the rounding is that of three and two bits
        error = np.linalg.norm(np.asarray(ours, np.float32) - a) / np.linalg.norm(a)
        assert 0.01 < error < 0.08


def test_a_scale_is_that_of_the_whole_array_on_every_mesh():
    rng = np.random.default_rng(1)
    x, w, g = drawn(rng, 8, 4, 32), drawn(rng, 32, 48), drawn(rng, 8, 4, 48)
    many, one = (product(x, w, g, np.float32, sharding=batch_sharding(make_mesh(spec, jax.devices()[:size])))
                 for spec, size in (("data=4,fsdp=2", 8), ("data=1", 1)))
    assert all(np.array_equal(np.asarray(ours), np.asarray(its)) for ours, its in zip(many, one))


@pytest.mark.parametrize("path", [("decoder", "lm_head"), ("projector", "linear_0"), ("vision_tower", "layers", "mlp", "up_proj"),
                                  ("decoder", "layers", "mlp", "up_projection")])
def test_other_layers_are_left_alone(path):
    rng = np.random.default_rng(2)
    x, w, g = drawn(rng, 4, 8, 32), drawn(rng, 32, 48), drawn(rng, 4, 8, 48)
    for ours, exact in zip(product(x, w, g, np.float32, path), product(x, w, g, np.float32, path=None)):
        assert np.array_equal(np.asarray(ours), np.asarray(exact))


def test_zeros_stay_zeros_and_nan_is_seen():
    x, w, g = np.zeros((4, 8, 32), np.float32), np.ones((32, 48), np.float32), np.zeros((4, 8, 48), np.float32)
    assert all((np.asarray(a) == 0).all() for a in product(x, w, g, np.float32))
    for value in (np.nan, np.inf):
        x[0, 0, 0] = value
        assert np.isnan(np.asarray(product(x, w, g, np.float32)[0])).any()


# ---- which products of a model

def dots(model, pixels=True):
    """Products of a loss and its gradients, by the types of their operands."""
    cfg = model.cfg
    size = cfg.vision.image_size
    args = [jax.ShapeDtypeStruct((2, 8), jnp.int32)] + [jax.ShapeDtypeStruct((2, 1, size, size, 3), jnp.float32)] * pixels
    loss = lambda params, *args: model.apply({"params": params}, *args, method="hidden").astype(jnp.float32).sum()
    jaxpr = jax.make_jaxpr(jax.grad(loss))(abstract_params(cfg, model.scan), *args)
    found = Counter()
    for equation, times in equations(jaxpr.jaxpr):
        if equation.primitive.name == "dot_general":
            found[tuple(str(var.aval.dtype) for var in equation.invars)] += times
    return found


@pytest.mark.parametrize("kind, scan, remat", [("qwen3", True, "full"), ("qwen2", False, "none")])
def test_the_seven_projections_of_every_layer_and_no_other(kind, scan, remat):
    """Of layers that are not scanned the tower is left out: its names are no others, and it has many layers to trace."""
    model = Llava(CONFIGS[kind], jnp.bfloat16, scan=scan, remat=remat)
    narrow, wide = dots(fp8.multiplied(model), pixels=scan), dots(model, pixels=scan)
    layers, again = CONFIGS[kind].decoder.num_layers, 6 * (remat != "none")  # no backward pass reads the last one's output
    assert narrow["float8_e4m3fn", "float8_e4m3fn"] == (7 + again) * layers
    assert narrow["float8_e5m2", "float8_e4m3fn"] == 14 * layers
    others = {types: count for types, count in narrow.items() if "float8" not in "".join(types)}
    assert sum(others.values()) + (21 + again) * layers == sum(wide.values())
    names = [name.removesuffix("/kernel") for name in flatten_dict(abstract_params(CONFIGS[kind], scan), sep="/") if fp8.is_multiplied(name)]
    assert len(names) == 7 * (1 if scan else layers) and all(re.fullmatch(fp8.MODULES, name) for name in names)


def test_products_that_qwix_misses_or_takes_besides_are_counted(monkeypatch):
    model = Llava(CFG, jnp.bfloat16, scan=True)
    monkeypatch.setattr(fp8, "MODULES", r"decoder/layers(_\d+)?/(self_attn/[qkv]|mlp/(gate|up|down))_proj")
    with pytest.raises(UserError, match="qwix .* took 18 of the 21 products of the decoder's layers"):
        fp8.multiplied(model)
    monkeypatch.setattr(fp8, "MODULES", r"decoder/layers/(self_attn|mlp)(/.*)?")
    with pytest.raises(UserError, match="qwix .* took 27 of the 21 products"):  # attention's too
        fp8.multiplied(model)


# ---- learning

def test_a_small_model_learns_and_begins_near_bfloat16():
    rng = np.random.default_rng(3)
    draw = lambda path, x: jnp.asarray(0.05 * rng.standard_normal(x.shape, np.float32) + np.float32(path[-1].key == "scale"))
    params = first = jax.tree_util.tree_map_with_path(draw, abstract_params(CFG, scan=True))
    ids = jnp.asarray(rng.integers(3, 64, (2, 12)), jnp.int32)
    batch = dict(input_ids=ids, labels=ids, positions=jnp.tile(jnp.arange(12), (2, 1)), segment_ids=jnp.ones((2, 12), jnp.int32))
    wide = Llava(CFG, jnp.bfloat16, scan=True, remat="full")
    mean = lambda total, count: total / count
    step = jax.jit(jax.value_and_grad(lambda params: mean(*llava_loss(fp8.multiplied(wide))(params, batch))))
    found = []
    for _ in range(8):
        loss, by_params = step(params)
        found.append(float(loss))
        params = jax.tree.map(lambda x, g: x - 0.3 * g, params, by_params)
        if len(found) == 1:
            assert all(x.dtype == jnp.float32 and np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(by_params))
            kernels = [x for name, x in flatten_dict(by_params, sep="/").items() if fp8.is_multiplied(name)]
            assert len(kernels) == 7 and all((np.abs(np.asarray(x)).max(axis=(1, 2)) > 0).all() for x in kernels)
    assert found[-1] < 0.9 * found[0]
    start = float(jax.jit(lambda params: mean(*llava_loss(wide)(params, batch)))(first))
    assert found[0] != start and found[0] == pytest.approx(start, rel=5e-3)


# ---- runs

FP8 = {"compute": "fp8", "total_steps": 6, "samples_every": 0, "micro_batches": 2, "mesh.data": 1, "mesh.fsdp": 1, "remat": "full",
       "optimizer.learning_rate": 3e-3}


@pytest.fixture(scope="module")
def runs(start, data, tmp_path_factory):
    """A run in FP8, and the same one in bfloat16."""
    folder = tmp_path_factory.mktemp("runs")
    for compute in ("fp8", "bfloat16"):
        assert fit(shrunk(start, data, **{**FP8, "compute": compute}), folder / compute)
    return folder


def losses(workdir):
    return [line["loss"] for line in log_lines(workdir) if "loss" in line]


def test_a_run_learns_near_bfloat16_and_stores_the_same_tree(runs):
    narrow, wide = losses(runs / "fp8"), losses(runs / "bfloat16")
    assert len(narrow) == 6 and narrow[-1] < 0.9 * narrow[0]
    assert narrow != wide and np.allclose(narrow, wide, rtol=0.02)
    kinds = lambda checkpoint: {name: (x.shape, x.dtype) for name, x in checkpoint.tensors.items()}
    assert kinds(open_checkpoint(runs / "fp8")) == kinds(open_checkpoint(runs / "bfloat16"))


def test_a_run_resumes_to_the_same_bits_and_keeps_its_arithmetic(runs, start, data, tmp_path):
    again = set_back(runs / "fp8", tmp_path / "run", last=6, to=3)
    assert fit(shrunk(start, data, **FP8), again)
    one, two = open_checkpoint(runs / "fp8"), open_checkpoint(again)
    assert all(one.read(name).tobytes() == two.read(name).tobytes() for name in one.tensors)
    assert losses(again) == losses(runs / "fp8")
    with pytest.raises(UsageError, match="'compute' is 'bfloat16', but .* with 'fp8'"):
        fit(shrunk(start, data, **{**FP8, "compute": "bfloat16"}), again)


# ---- what is refused

def program(start, data, device=None, **changes):
    cfg = shrunk(start, data, **{**FP8, **changes})
    mesh = make_mesh("data=1", jax.devices()[:1])
    if device is not None:
        mesh = SimpleNamespace(devices=np.array([device], object), shape=mesh.shape)
    return Program.of(cfg, open_checkpoint(start).config, mesh, 5, tuple(cfg.trainable))


def test_a_program_says_what_it_computes_with(start, data):
    narrow, wide = program(start, data), program(start, data, compute="none")
    assert narrow.is_fp8 and not wide.is_fp8
    assert arithmetic.used(narrow)["dtype"] == "bfloat16" and arithmetic.used(narrow)["qwix"] == qwix.__version__
    assert "qwix" not in arithmetic.used(wide)
    kinds = {(None, "cpu"): "float32", (None, "gpu"): "bfloat16", ("float32", "gpu"): "float32", ("bfloat16", "cpu"): "bfloat16",
             ("fp8", "cpu"): "bfloat16", ("fp8", "gpu"): "bfloat16", (None, "tpu"): "bfloat16"}
    assert {key: np.dtype(dtype_of(SimpleNamespace(compute=key[0]), key[1])).name for key in kinds} == kinds


@pytest.mark.parametrize("changes, sentence", [
    ({"trainable": '["projector/.*"]'}, "'trainable' leaves decoder/layers/.*_proj/kernel frozen; .* bfloat16 was expected"),
    ({"trainable": r'["decoder/layers/mlp/.*"]'}, "'trainable' leaves decoder/layers/self_attn/.*_proj/kernel frozen")])
def test_a_frozen_decoder_is_refused(start, data, changes, sentence):
    with pytest.raises(UsageError, match=f"'compute' is 'fp8', and {sentence}"):
        program(start, data, **changes)


@pytest.mark.parametrize("changes, sentence", [
    ({"lora.rank": 4}, "'compute' is 'fp8' and lora.rank is 4; 0 was expected"),
    ({"lora.rank": 4, "quantize": "nf4"}, "'compute' is 'fp8' and lora.rank is 4"), ({"quantize": "nf4"}, "'quantize' is 'nf4' and lora.rank is 0"),
    ({"compute": "int8"}, "'compute' is 'int8'; bfloat16 or float32 or fp8 or None was expected")])
def test_keys_that_contradict_are_refused(start, data, tmp_path, changes, sentence):
    with pytest.raises(UsageError, match=sentence):
        fit(shrunk(start, data, **{**FP8, **changes}), tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()


@pytest.mark.parametrize("platform, kind, capability, has_units", [
    ("gpu", "NVIDIA A100-SXM4-40GB", "8.0", False), ("gpu", "NVIDIA L4", "8.9", True), ("gpu", "NVIDIA H200", "9.0", True),
    ("gpu", "NVIDIA B200", "10.0", True), ("tpu", "TPU v5 lite", None, False), ("tpu", "TPU v6 lite", None, False),
    ("tpu", "TPU7x", None, True), ("cpu", "cpu", None, True)])
def test_a_device_without_fp8_units_is_refused(platform, kind, capability, has_units):
    device = SimpleNamespace(platform=platform, device_kind=kind, **({} if capability is None else {"compute_capability": capability}))
    names = {name: None for name in flatten_dict(abstract_params(CFG, scan=True), sep="/")}
    if has_units:
        fp8.check(names, names, device)
        return
    with pytest.raises(UsageError, match=f"{kind} has no FP8 units, so the products would lose digits and be no faster"):
        fp8.check(names, names, device)


def test_factors_in_the_start_are_refused():
    names = {name: None for name in flatten_dict(abstract_params(CFG, scan=True), sep="/")}
    name = "decoder/layers/mlp/up_proj/kernel_lora_a"
    with pytest.raises(UsageError, match=f"has the factors of an adapter \\({name}\\)"):
        fp8.check({**names, name: None}, names, jax.devices()[0])


def test_a_missing_extra_is_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r"qwix computes, and it is not installed: pip install 'llavamed-jax\[quantize\]'"):
        fp8.multiplied(Llava(CFG, jnp.bfloat16, scan=True))
