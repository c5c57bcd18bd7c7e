"""Each module by itself against torch, float32, and the rules that only show in bfloat16 or at long range."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers

from llavamed_jax.config import LlavaConfig, VisionConfig, preset
from llavamed_jax.errors import UserError
from llavamed_jax.models import layers, llava
from llavamed_jax.models.attention.backend import AttentionMask, attention
from llavamed_jax.models.decoders import llama, olmo
from llavamed_jax.models.decoders.llama import Decoder
from llavamed_jax.models.projector import Projector
from llavamed_jax.models.stacking import stack
from llavamed_jax.models.towers.clip import VisionTower
from llavamed_jax.parallel.mesh import make_mesh
from tests.support import hf
from tests.support.programs import apply

torch = hf.torch

TOLERANCE = 2e-5
rng = np.random.default_rng(0)


def largest(a, b):
    return np.abs(np.asarray(a) - np.asarray(b)).max()


@pytest.mark.parametrize("act, num_layers", [*(("quick_gelu", n) for n in range(4)), ("gelu", 3)])
def test_every_hidden_state_of_the_tower(act, num_layers, measured):
    config = transformers.CLIPVisionConfig(**{**hf.VISION, "hidden_act": act})
    model = transformers.CLIPVisionModel(config).eval()
    hf.randomise(model, seed=num_layers)
    pixels = hf.images(2)
    with torch.no_grad():
        states = model(torch.tensor(pixels).permute(0, 3, 1, 2), output_hidden_states=True).hidden_states
    params = {}
    for name, value in model.state_dict().items():
        hf_name = hf.our_name(name)
        if hf_name is not None:
            params[hf_name] = value.numpy()
    tower = VisionTower(VisionConfig.from_hf(config.to_dict()), num_layers)
    tree = jax.eval_shape(tower.init, jax.random.key(0), pixels)["params"]
    def take(path, leaf):
        value = params["/".join(p.key for p in path)]
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T if path[-1].key == "kernel" else value
        assert value.shape == leaf.shape
        return value
    tree = jax.tree_util.tree_map_with_path(take, tree)
    got = tower.apply({"params": tree}, pixels)
    measured(got, states[num_layers].numpy(), TOLERANCE)


def torch_projector(kind, inner, outer, bias):
    """The original's `multimodal_projector/builder.py`, written for this test."""
    if kind == "identity":
        return torch.nn.Identity()
    if kind == "linear":
        return torch.nn.Linear(inner, outer, bias=bias)
    modules = [torch.nn.Linear(inner, outer, bias=bias)]
    for _ in range(1, int(kind[3])):
        modules += [torch.nn.GELU(), torch.nn.Linear(outer, outer, bias=bias)]
    return torch.nn.Sequential(*modules)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "identity"])
def test_projector(kind, bias, measured):
    module = torch_projector(kind, 48, 64, bias)
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = rng.standard_normal((2, 5, 48)).astype(np.float32)
    cfg = LlavaConfig(preset("small").vision, preset("small").decoder, projector_type=kind, projector_bias=bias)
    cfg = cfg.replace(decoder=hf.llava()[1].decoder)
    params = {}
    for name, value in module.state_dict().items():
        index = int(name.split(".")[0]) // 2 if "." in name else 0
        leaf = {"weight": "kernel", "bias": "bias"}[name.split(".")[-1]]
        params.setdefault(f"linear_{index}", {})[leaf] = value.numpy().T
    with torch.no_grad():
        expected = module(torch.tensor(x)).numpy()
    measured(Projector(cfg).apply({"params": params}, x), expected, TOLERANCE)


@pytest.mark.parametrize("kind", ["mlp", "mlp0x_gelu", "mlp2x", "resampler", "mlpxx_gelu"])
def test_an_unknown_projector_is_refused(kind):
    with pytest.raises(UserError, match="linear, mlpNx_gelu or identity was expected"):
        preset("small").replace(projector_type=kind)


def test_decoder_with_left_padding(measured):
    """Positions count over the padded length, as the original's do (quirk Q7); padding is a segment of its own."""
    model, cfg = hf.llava(text=dict(rope_theta=1e6))
    ids = np.array([[0, 0, 0, 1, 7, 9, 11], [1, 5, 6, 7, 8, 9, 10]])
    mask = (ids != 0).astype(np.int64)
    with torch.no_grad():
        expected = model.model.language_model(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask),
                                              position_ids=torch.arange(7)[None].expand(2, 7)).last_hidden_state.numpy()
    params = hf.params_of(model)["decoder"]
    decode = lambda decoder, ids, *where: decoder(decoder.embed(ids), *where)[0]
    got = apply(Decoder(cfg.decoder), params, ids, jnp.broadcast_to(jnp.arange(7), (2, 7)), jnp.asarray(mask), method=decode)
    measured(np.asarray(got)[mask == 1], expected[mask == 1], TOLERANCE)


def test_segments_of_a_row_do_not_see_each_other():
    """Two samples in one row give what each gives alone, whatever lies in front of it."""
    model, cfg = hf.llava(seed=2)
    a, b = rng.integers(3, 90, 7), rng.integers(3, 90, 9)
    positions = np.concatenate([np.arange(7), np.arange(9)]), np.arange(16), np.arange(16)
    segments = np.repeat([1, 2], [7, 9]), np.repeat([1, 0], [7, 9]), np.repeat([1, 0], [9, 7])
    rows = np.stack([np.concatenate(row) for row in ((a, b), (a, 0 * b), (b, 0 * a))])
    together, of_a, of_b = apply(llava.Llava(cfg), hf.params_of(model), rows, None, np.stack(positions), np.stack(segments))
    assert largest(together[:7], of_a[:7]) <= TOLERANCE
    assert largest(together[7:], of_b[:9]) <= TOLERANCE


def test_one_row_of_images_does_not_depend_on_another_row():
    """A batch with a text-only row and rows of different image counts equals its rows alone, without ids and images in the others."""
    model, cfg = hf.llava(seed=4)
    params = hf.params_of(model)
    image = [-200] * 16
    rows = [[1, 5, 6] + [0] * 33, [1] + image + [7, 8] + [0] * 17, [1] + image + [9] + image + [4, 5]]
    pixels, is_empty = np.zeros((3, 2, 28, 28, 3), np.float32), np.array([[True, True], [False, True], [False, False]])
    pixels[~is_empty] = hf.images(3)
    pixels[is_empty] = 1e3  # an empty slot may hold anything
    together = apply(llava.Llava(cfg), params, np.array(rows), pixels)
    pixels[is_empty] = 0
    for row in range(3):
        is_row = np.arange(3) == row
        alone = apply(llava.Llava(cfg), params, rows * is_row[:, None], pixels * is_row[:, None, None, None, None].astype(np.float32))
        assert largest(together[row], alone[row]) <= TOLERANCE


def test_grouped_heads_equal_repeated_keys():
    q, k, v = (rng.standard_normal(s).astype(np.float32) for s in ((2, 6, 8, 16), (2, 2, 6, 16), (2, 2, 6, 16)))
    positions = jnp.broadcast_to(jnp.arange(6), (2, 6))
    mask = AttentionMask(positions, positions)
    grouped = jax.jit(attention)(q, k, v, mask)
    expected = torch.nn.functional.scaled_dot_product_attention(
        torch.tensor(q).transpose(1, 2), torch.tensor(k).repeat_interleave(4, 1), torch.tensor(v).repeat_interleave(4, 1), is_causal=True)
    assert largest(grouped, expected.transpose(1, 2).numpy()) <= TOLERANCE


def test_mask_is_causal_windowed_and_segmented():
    positions, segments = jnp.array([[0, 1, 2, 0, 1]]), jnp.array([[1, 1, 1, 2, 2]])
    mask = AttentionMask(positions, positions, segments, segments, window=2)
    assert np.asarray(mask.dense())[0].astype(int).tolist() == [
        [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [8, 16, 32, 64, 128])
def test_rope_frequencies_against_torch(head_dim, theta):
    """Bit for bit, but where torch's own float32 power is not the nearest number: there one last bit, in two at most."""
    expected = (1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))).numpy()
    got = layers.rope_frequencies(head_dim, theta)
    apart = np.abs(got.view(np.int32) - expected.view(np.int32))
    assert got.dtype == np.float32 and apart.max() <= 1 and (apart > 0).sum() <= 2


def test_rope_tables_at_long_range():
    positions = np.array([[0, 1, 1500, 4095, 32767]])
    cos, sin = layers.rope_tables(jnp.asarray(positions), 16, 1e6)
    angles = positions[..., None].astype(np.float32) * layers.rope_frequencies(16, 1e6)
    assert largest(cos, np.cos(angles.astype(np.float64))) <= 1e-6
    assert largest(sin, np.sin(angles.astype(np.float64))) <= 1e-6


@pytest.mark.parametrize("norm", [layers.RMSNorm, layers.LayerNorm])
def test_norms_in_bfloat16_are_the_float32_norm_rounded(norm):
    x = jnp.asarray(rng.standard_normal((4, 512)) * 3 + 2, jnp.bfloat16)
    width = 512
    params = {"scale": jnp.ones(width)} if norm is layers.RMSNorm else {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
    exact = norm(1e-5).apply({"params": params}, x.astype(jnp.float32))
    got = norm(1e-5, jnp.bfloat16).apply({"params": params}, x)
    assert got.dtype == jnp.bfloat16
    ulp = 2.0 ** (np.floor(np.log2(np.abs(np.asarray(exact)) + 1e-30)) - 7)
    assert (np.abs(np.asarray(got, np.float32) - np.asarray(exact)) <= ulp).all()


def test_olmos_norm_in_bfloat16_is_transformers_to_the_bit():
    """It rounds once, after the scale. LLaMA's rounds before it, which gives other numbers, and before and after in transformers too."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
    # Integers: the mean of their squares is exact in every order of the sum. XLA's and torch's 1/sqrt in float32 differ in a
    # third of all numbers by their last bit, so only rows are compared of which they agree.
    x = rng.integers(-8, 9, (256, 512))
    mean = np.mean(np.float32(x) ** 2, axis=-1, dtype=np.float32) + np.float32(1e-5)
    x = torch.tensor(x[np.asarray(jax.lax.rsqrt(mean)) == torch.rsqrt(torch.tensor(mean)).numpy()]).bfloat16()
    assert len(x) > 100
    scale = torch.tensor(1 + 0.3 * rng.standard_normal(512)).bfloat16()
    bits, results = lambda x: np.asarray(x).view(np.uint16), []
    for ours, theirs in ((layers.RMSNorm, LlamaRMSNorm(512, 1e-5)), (olmo.RMSNorm, Olmo2RMSNorm(512, 1e-5))):
        theirs.weight = torch.nn.Parameter(scale)
        params = {"scale": jnp.asarray(scale.float().numpy(), jnp.bfloat16)}
        got = ours(1e-5, jnp.bfloat16).apply({"params": params}, jnp.asarray(x.float().numpy(), jnp.bfloat16))
        with torch.no_grad():
            np.testing.assert_array_equal(bits(got), theirs(x).view(torch.uint16).numpy())
        results.append(bits(got))
    assert np.mean(results[0] != results[1]) > 0.1


def test_layer_norm_far_from_zero():
    """A mean of 300 at a deviation of 1: the variance as E[x^2] - E[x]^2 would lose most of its digits."""
    x = (300 + rng.standard_normal((4, 256))).astype(np.float32)
    expected = torch.nn.functional.layer_norm(torch.tensor(x).double(), (256,), eps=1e-5).numpy()
    params = {"params": {"scale": jnp.ones(256), "bias": jnp.zeros(256)}}
    assert largest(layers.LayerNorm(1e-5).apply(params, x), expected) <= 1e-4


def test_scores_and_rope_are_float32_in_bfloat16():
    """Only inputs and outputs are rounded: float32 on the same rounded inputs gives the same."""
    q, k, v = (jnp.asarray(rng.standard_normal(s) * 3, jnp.bfloat16) for s in ((1, 64, 4, 32), (1, 4, 64, 32), (1, 4, 64, 32)))
    wide = [np.asarray(x, np.float32) for x in (q, k, v)]
    scores = np.einsum("BTNH,BNSH->BNTS", *wide[:2]) * np.float32(32**-0.5)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    expected = np.einsum("BNTS,BNSH->BTNH", weights.astype(jnp.bfloat16).astype(np.float32), wide[2])
    # One rounding of the output; scores of about 50 rounded to bfloat16 would be off by a tenth and more.
    assert (np.abs(np.asarray(attention(q, k, v), np.float32) - expected) <= 2.0**-7 * np.abs(expected) + 1e-3).all()
    tables = layers.rope_tables(jnp.arange(64)[None] + 2000, 32, 1e4)
    rotated = layers.apply_rope(q, tables)
    assert tables[0].dtype == jnp.float32 and rotated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rotated, layers.apply_rope(jnp.asarray(wide[0]), tables).astype(jnp.bfloat16))


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_keeps_float32_logits(tied):
    model, cfg = hf.llava(text=dict(tie_word_embeddings=tied))
    decoder = hf.params_of(model)["decoder"]
    hidden = jnp.asarray(rng.standard_normal((1, 5, 64)), jnp.bfloat16)
    got = Decoder(cfg.decoder, jnp.bfloat16).apply({"params": decoder}, hidden, method="logits")
    kernel = decoder["embed_tokens"]["embedding"].T if tied else decoder["lm_head"]["kernel"]
    expected = hidden.astype(jnp.float32) @ jnp.asarray(kernel, jnp.bfloat16).astype(jnp.float32)
    assert got.dtype == jnp.float32 and largest(got, expected) <= 1e-5 * np.abs(expected).max()


def test_stack_puts_layers_in_their_order():
    params = hf.params_of(hf.llava()[0])
    stacked = stack(params)
    for part in ("vision_tower", "decoder"):
        for i in range(2):
            layer = jax.tree.map(operator.itemgetter(i), stacked[part]["layers"])
            jax.tree.map(np.testing.assert_array_equal, layer, params[part][f"layers_{i}"])
    cfg = hf.llava()[1]
    shapes = lambda tree: jax.tree.map(lambda x: tuple(x.shape), tree)
    assert shapes(llava.abstract_params(cfg)) == shapes(params)
    assert shapes(llava.abstract_params(cfg, scan=True)) == shapes(stack(params))


@pytest.mark.parametrize("mesh", [None, "data=2,fsdp=2,tp=2"])
def test_the_gradient_of_a_row_that_is_looked_up_often_is_its_count(mesh):
    """In bfloat16 a sum of ones stays at 256; on a mesh each device sums its own rows of the batch for its part of the table."""
    ids = jnp.asarray(np.random.default_rng(0).choice(16, (8, 600), p=np.r_[0.5, 1 / 30 * np.ones(15)]), jnp.int32)
    table = jnp.zeros((16, 4), jnp.float32)
    work = jax.jit(jax.grad(lambda table: jnp.sum(llama._lookup(jnp.bfloat16, table, ids).astype(jnp.float32))))
    if mesh is None:
        found = work(table)
    else:
        with jax.set_mesh(make_mesh(mesh)):
            found = work(table)
    assert found.dtype == jnp.float32 and np.array_equal(found, np.bincount(ids.ravel(), minlength=16)[:, None].repeat(4, 1))
