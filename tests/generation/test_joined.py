"""An engine as on a GPU: kernels joined, attention over the cache by our kernels (interpreted), beside one of a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.config.decoders.olmo import Olmo2Config
from llavamed_jax.config.decoders.qwen import Qwen3Config
from llavamed_jax.generation import weights
from llavamed_jax.generation.beam import BeamSearch
from llavamed_jax.generation.engine import Engine
from llavamed_jax.generation.programs import Programs
from llavamed_jax.generation.requests import Request
from llavamed_jax.models import joined
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.stacking import is_layer
from llavamed_jax.parallel import xla
from llavamed_jax.parallel.mesh import make_mesh
from llavamed_jax.preflight.serving import Serving
from llavamed_jax.quantized.rounding import ROUNDED, ROUNDINGS
from tests.support.random_params import random_params

VISION = VisionConfig(hidden_size=32, intermediate_size=64, num_layers=1, num_heads=4, image_size=28, patch_size=14)
SHAPES = dict(vocab_size=96, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5, rope_theta=1e4,
              max_position_embeddings=256)
ONE_LAYER = {**SHAPES, "num_layers": 1}
CFG = LlavaConfig(VISION, DecoderConfig(**SHAPES))
IDS = np.array([[1, 7, 9, 30, 41]])


def logits(cfg, params):
    return np.asarray(jax.jit(Llava(cfg).apply)({"params": params}, IDS))


def with_joined_layers(params):
    decoder = {name: joined.join(part) if is_layer(name) else part for name, part in params["decoder"].items()}
    return {**params, "decoder": decoder}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """An engine whose kernels are joined, with the attention of GPUs."""
    def make(cfg, params, mesh=None, **more):
        programs = Programs(cfg, np.float32, mesh, 4, attention="flash_interpreted", **more)
        return Engine(cfg, params, mesh=mesh, batch_size=4, programs=programs)
    monkeypatch.setattr(weights, "joins", lambda mesh: mesh is None or mesh.shape["tp"] == 1)
    return make


def asked(new=9, **more):
    rng = np.random.default_rng(3)
    images = rng.standard_normal((3, 28, 28, 3)).astype(np.float32)
    image = [-200] * 4
    rows = [[1, *image, *rng.integers(3, 90, 5)], [1, *image, *rng.integers(3, 90, 20)], [1, *rng.integers(3, 90, 30)],
            [1, *image, 5, 6, 7, *image, 8]]
    return [Request([int(i) for i in row], list(given), new, **more) for row, given in
            zip(rows, (images[:1], images[:1], [], images[1:]), strict=True)]


@pytest.mark.parametrize("cfg", [
    CFG.replace(decoder=DecoderConfig(**ONE_LAYER, attention_bias=True, mlp_bias=True)),
    CFG.replace(decoder=Qwen3Config(**ONE_LAYER)), CFG.replace(decoder=Olmo2Config(**ONE_LAYER))], ids=["biases", "qwen3", "olmo2"])
def test_joined_kernels_give_the_same_logits(cfg):
    """Without biases: the next test."""
    params = random_params(cfg, seed=1)
    together = with_joined_layers(params)
    layer = together["decoder"]["layers_0"]
    assert layer["self_attn"]["qkv_proj"]["kernel"].shape == (64, 128) and layer["mlp"]["gate_up_proj"]["kernel"].shape == (64, 256)
    assert not {"q_proj", "k_proj", "v_proj"} & set(layer["self_attn"]) and "o_proj" in layer["self_attn"]
    np.testing.assert_allclose(logits(cfg, together), logits(cfg, params), rtol=0, atol=2e-6)


def test_rounded_kernels_are_joined_with_their_scales():
    """Of every rounding, value by value; and the model multiplies by them as by those of numpy's arrays."""
    params, rounded = random_params(CFG, seed=1), {}
    for name in ROUNDINGS:
        layer = params["decoder"]["layers_0"]
        for block, (_, parts) in joined.PARTS.items():
            assert all(ROUNDED.fullmatch(f"decoder/layers_0/{block}/{part}/kernel") for part in parts)
            layer = layer | {block: layer[block] | {part: {"kernel": ROUNDINGS[name](layer[block][part]["kernel"])} for part in parts}}
        rounded[name], together = layer, joined.join(layer)
        for block, (one, parts) in joined.PARTS.items():
            assert set(together[block]) == {*layer[block], one} - {*parts}
            wide = np.concatenate([np.asarray(layer[block][part]["kernel"].widened(jnp.float32)) for part in parts], axis=1)
            np.testing.assert_array_equal(together[block][one]["kernel"].widened(jnp.float32), wide)
    params["decoder"]["layers_0"], params["decoder"]["layers_1"] = rounded["int8"], rounded["nf4"]
    np.testing.assert_allclose(logits(CFG, with_joined_layers(params)), logits(CFG, params), rtol=0, atol=2e-6)


def test_parts_that_differ_stay_apart():
    layer = random_params(CFG, seed=1)["decoder"]["layers_0"]
    kernel = layer["mlp"]["up_proj"]["kernel"]
    for other in (dict(kernel=ROUNDINGS["int8"](kernel)), dict(kernel=kernel.astype(jnp.bfloat16)),
                  dict(kernel=kernel, bias=np.zeros(128, np.float32)), dict(kernel=kernel, kernel_lora_a=kernel[:, :2])):
        found = joined.join({**layer, "mlp": {**layer["mlp"], "up_proj": other}})
        assert set(found["mlp"]) == {"gate_proj", "up_proj", "down_proj"} and "qkv_proj" in found["self_attn"]


@pytest.mark.parametrize("more", [{}, dict(cache_dtype=np.dtype(np.int8))], ids=["cache", "int8 cache"])
def test_tokens_equal_those_of_a_cpu(as_on_a_gpu, more):
    """Also with images, with a request that is sampled, and in rows that held others."""
    params = random_params(CFG, seed=4)
    requests = [*asked(5, temperature=0.8, seed=3)[:1], *asked()[1:]]
    wanted = Engine(CFG, jax.device_put(params), batch_size=4, steps=4, **more).generate(requests)
    engine = as_on_a_gpu(CFG, params, **more)
    assert "qkv_proj" in engine.params["decoder"]["layers_0"]["self_attn"]
    assert engine.generate(requests[::-1]) == wanted[::-1] and engine.generate(requests) == wanted and max(len(set(row)) for row in wanted) >= 5


def test_beams_equal_those_of_a_cpu(as_on_a_gpu):
    params = random_params(CFG, seed=4)
    wanted = BeamSearch(Engine(CFG, jax.device_put(params), batch_size=4)).generate(asked(4)[:2], 2)
    assert BeamSearch(as_on_a_gpu(CFG, params)).generate(asked(4)[:2], 2) == wanted


def test_on_a_mesh_only_tensor_parallelism_keeps_parts_apart(as_on_a_gpu):
    params = random_params(CFG, seed=4)
    wanted = Engine(CFG, jax.device_put(params), batch_size=4, steps=4).generate(asked())
    for mesh, name in (("data=2,fsdp=2", "qkv_proj"), ("fsdp=2,tp=2", "q_proj")):
        engine = as_on_a_gpu(CFG, params, make_mesh(mesh, jax.devices()[:4]))
        assert name in engine.params["decoder"]["layers_0"]["self_attn"] and engine.generate(asked()) == wanted


def test_where_kernels_are_joined():
    """On GPUs, from files; not what lies on a device already, which both would have to fit on."""
    assert not weights.joins(None) and not weights.joins(make_mesh("data=1", jax.devices()[:1]))
    assert "q_proj" in Engine(CFG, random_params(CFG, seed=1)).params["decoder"]["layers_0"]["self_attn"]
    serving = Serving.of(CFG, jax.devices(), None, "float32", 2, 8)
    assert "q_proj" in serving.params()["decoder"]["layers_0"]["self_attn"]


def test_what_lies_on_a_device_is_not_joined(as_on_a_gpu):
    assert "q_proj" in as_on_a_gpu(CFG, jax.device_put(random_params(CFG, seed=1))).params["decoder"]["layers_0"]["self_attn"]
    shapes = Serving.of(CFG, jax.devices(), None, "float32", 2, 8).params()["decoder"]["layers_0"]["self_attn"]
    assert shapes["qkv_proj"]["kernel"].shape == (64, 128)


def test_all_programs_of_generation_have_the_engines_flags(monkeypatch):
    params, flags, jit, seen = jax.device_put(random_params(CFG, seed=1)), {"xla_cpu_enable_fast_math": True}, jax.jit, {}
    monkeypatch.setattr(xla, "FLAGS", {"cpu": {xla.ENGINE: flags}})
    monkeypatch.setattr(jax, "jit", lambda f, **given: seen.update({f.__name__: given.get("compiler_options")}) or jit(f, **given))
    BeamSearch(Engine(CFG, params, batch_size=4))
    assert seen == dict.fromkeys(["_encode", "_take", "_fill", "_put", "_decode", "_resize", "_release", "_scrub", "_prefill_batch",
                                  "_decode_steps"], flags)


@pytest.mark.parametrize("users", [1, 2, 3])
def test_the_gradients_of_an_input_that_is_shared_are_summed_each_to_those_of_the_later_users(users):
    """In this order XLA for GPUs makes each sum a part of a product; its value is that of any order, to the rounding of a sum."""
    rng = np.random.default_rng(0)
    x, *kernels = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in [(5, 8), *[(8, 4)] * users])
    ours = lambda x: sum(jnp.sin(y @ kernel).sum() for y, kernel in zip(joined.shared(x, users), kernels, strict=True))
    wanted = jax.grad(lambda x: sum(jnp.sin(x @ kernel).sum() for kernel in kernels))(x)
    np.testing.assert_allclose(jax.grad(ours)(x), wanted, rtol=0, atol=1e-6)
    equations = jax.make_jaxpr(jax.grad(ours))(x).eqns
    made = {id(out): e for e in equations for out in e.outvars}
    sums = [e for e in equations if e.primitive.name in ("add", "add_any") and e.outvars[0].aval.shape == x.shape]
    assert len(sums) == users - 1
    for i, each in enumerate(sums):
        product, before = (made[id(operand)] for operand in each.invars)
        assert product.primitive.name == "dot_general" and (before is sums[i - 1] if i else before.primitive.name == "dot_general")
