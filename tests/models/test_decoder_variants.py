"""LLaMA decoders beyond the released ones: biases, scaled rotary embedding, other activations, on every way in and out."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import IMAGE_TOKEN, LlavaConfig, RopeScaling, VisionConfig
from llavamed_jax.config.hf import llava_from_hf, llava_to_hf
from llavamed_jax.errors import UserError
from llavamed_jax.models import layers, llava
from llavamed_jax.parallel.mesh import make_mesh, param_shardings
from tests.support import released, tiny
from tests.support.released import TINY, all_tensors, assert_same_bits

LINEAR = RopeScaling("linear", 4.0)
LLAMA3 = RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)
BIASED = dict(attention_bias=True, mlp_bias=True)
VARIANTS = {
    "biased attention": dict(attention_bias=True),
    "biased": BIASED,
    "linear": dict(rope_scaling=LINEAR),
    "llama3": dict(rope_scaling=LLAMA3, rope_theta=5e5),
    "everything": dict(**BIASED, rope_scaling=LLAMA3, hidden_act="gelu"),
}


def config(decoder, architecture="llama", **changes):
    base = dataclasses.replace(TINY.decoder, architecture=architecture, **decoder)
    return TINY.replace(decoder=base, source="llava_mistral" if architecture == "mistral" else "llava_llama", **changes)


def lively(cfg, seed=3):
    """Random weights whose biases are not 0."""
    checkpoint = random_checkpoint(cfg, seed)
    rng = np.random.default_rng(seed)
    drawn = {name: rng.standard_normal(t.shape).astype(np.float32) for name, t in checkpoint.tensors.items() if name.endswith("/bias")}
    biases = {name: dataclasses.replace(checkpoint.tensors[name], load=lambda value=value: value) for name, value in drawn.items()}
    return checkpoint.replace(tensors={**checkpoint.tensors, **biases})


def write(directory, content):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(content))
    return directory


# --- rotary frequencies --------------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "linear": [{"rope_scaling": {"type": "linear", "factor": 4}}, {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
               {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
               {"rope_theta": 1e6, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
               {"rope_scaling": {"type": "linear", "factor": 4.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 3e4}}],
    "llama3": [{"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4,
                                                    "original_max_position_embeddings": 8192}},
               {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", "rope_type": "llama3", "factor": 8, "low_freq_factor": 1,
                                                    "high_freq_factor": 4, "original_max_position_embeddings": 8192}},
               {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}},
               {"max_position_embeddings": 8192, "rope_theta": 5e5,
                "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}}],
    "plain": [{"rope_scaling": None}, {"rope_scaling": {"type": "default"}}, {"rope_scaling": {}}, {"rope_parameters": None},
              {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, {"partial_rotary_factor": 1.0}],
}
WANTED = {"linear": LINEAR, "llama3": LLAMA3, "plain": None}


@pytest.mark.parametrize(("kind", "spelling"), [(kind, i) for kind, several in SPELLINGS.items() for i in range(len(several))])
@pytest.mark.parametrize("layout", ["llama", "mistral", "transformers"])
def test_both_spellings_in_every_layout(kind, spelling, layout):
    keys = {**tiny.LLAMA, "num_key_value_heads": 2, **SPELLINGS[kind][spelling]}
    if layout == "transformers":
        cfg = llava_from_hf({"model_type": "llava", "text_config": keys, "vision_config": tiny.CLIP})
    else:
        source = {"llama": "llava_llama", "mistral": "llava_mistral"}[layout]
        cfg = llava_from_hf({**released.V15, **keys, "model_type": source, "rope_theta": keys.get("rope_theta")},
                                  VisionConfig.from_hf(released.TOWER))
    assert cfg.decoder.rope_scaling == WANTED[kind]
    assert cfg.decoder.rope_theta == (5e5 if kind == "llama3" else 1e4)
    for way in ("transformers", "llava"):
        assert llava_from_hf(llava_to_hf(cfg, way), cfg.vision).decoder == cfg.decoder
    assert LlavaConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize(("scaling", "theta"), [
    (LINEAR, 1e4), (RopeScaling("linear", 2.5), 1e6), (LLAMA3, 5e5), (RopeScaling("llama3", 32.0, 1.0, 4.0, 8192), 5e5),
    (RopeScaling("llama3", 3.0, 0.5, 6.5, 700), 1e4)])
def test_scaled_frequencies_are_torchs(scaling, theta, head_dim):
    """Bit for bit where the plain frequencies are: torch's own power is one last bit off in a few places."""
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    text = transformers.LlamaConfig(head_dim=head_dim, hidden_size=4 * head_dim, num_attention_heads=4, max_position_embeddings=131072,
                                    rope_parameters={**scaling.to_hf(), "rope_theta": theta})
    wanted, factor = ROPE_INIT_FUNCTIONS[scaling.rope_type](text, torch.device("cpu"))
    found, plain = layers.rope_frequencies(head_dim, theta, scaling), layers.rope_frequencies(head_dim, theta)
    assert factor == 1.0 and found.dtype == np.float32
    torchs = (1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim))).numpy()
    same = plain == torchs
    assert same.sum() >= head_dim // 2 - 2
    np.testing.assert_array_equal(found[same], wanted.numpy()[same])
    np.testing.assert_allclose(found, wanted.numpy(), rtol=3e-7)
    assert not np.array_equal(found, plain)


@pytest.mark.parametrize(("scaling", "positions"), [(None, 512), (LINEAR, 2048), (RopeScaling("linear", 2.5), 1280), (LLAMA3, 512)])
def test_a_linear_scaling_makes_room(scaling, positions):
    assert dataclasses.replace(TINY.decoder, rope_scaling=scaling).max_positions == positions


# --- in and out ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["llava", "transformers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_to_the_bit(variant, layout, tmp_path):
    checkpoint = lively(config(VARIANTS[variant]))
    export(checkpoint, tmp_path / "out", layout)
    write_model(tmp_path / "tree", open_checkpoint(tmp_path / "out"))
    export(open_checkpoint(tmp_path / "tree"), tmp_path / "again", layout)
    for directory in ("out", "tree", "again"):
        found = open_checkpoint(tmp_path / directory)
        assert found.config.decoder == checkpoint.config.decoder
        assert_same_bits(all_tensors(found), all_tensors(checkpoint))


@pytest.mark.parametrize("variant", ["biased attention", "linear", "everything"])
def test_exports_give_our_logits_in_transformers(variant, tmp_path):
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    transformers = pytest.importorskip("transformers")
    checkpoint = lively(config(VARIANTS[variant]))
    cfg = checkpoint.config
    export(checkpoint, tmp_path / "hf", "transformers")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    ids = np.array([[1, 5] + [IMAGE_TOKEN] * cfg.tokens_per_image + [7, 9, 69, 2]], np.int32)
    pixels = np.random.default_rng(0).standard_normal((1, 28, 28, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(np.where(ids == IMAGE_TOKEN, 70, ids)),
                              pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits.numpy()
    ours = np.asarray(jax.jit(llava.Llava(cfg).apply)({"params": load_params(checkpoint)}, ids, pixels[None]))
    np.testing.assert_allclose(theirs[..., :70], ours, atol=2e-5, rtol=0)


def test_a_projector_of_another_activation_fits_one_layout_alone(tmp_path):
    checkpoint = lively(config({}, projector_act="relu"))
    export(checkpoint, tmp_path / "hf", "transformers")
    assert open_checkpoint(tmp_path / "hf").config.projector_act == "relu"
    with pytest.raises(UserError, match="has the activation relu, but the original's code applies GELU; use --layout transformers"):
        export(checkpoint, tmp_path / "original", "llava")


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("has_biases", [True, False])
def test_biases_are_there_where_transformers_has_them(architecture, has_biases, tmp_path):
    """LLaMA goes by `attention_bias`; Mistral never has any, whatever its config says."""
    text = {**(tiny.LLAMA if architecture == "llama" else tiny.MISTRAL), "num_key_value_heads": 2, "attention_bias": True}
    shapes = tiny.decoder_shapes(text) | tiny.projector_shapes("mlp2x_gelu", 32)
    if has_biases:
        shapes |= {name.replace(".weight", ".bias"): shape[:1] for name, shape in shapes.items() if "self_attn" in name}
    tiny.save_clip(tmp_path / "tiny-tower")
    kind = {"llama": "llava_llama", "mistral": "llava_mistral"}[architecture]
    keys = {**released.V15, **text, "model_type": kind}
    directory = tiny.save(tmp_path / "model", keys, tiny.drawn(shapes))
    if has_biases == (architecture == "llama"):
        assert open_checkpoint(directory).config.decoder.attention_bias == has_biases
    else:
        with pytest.raises(UserError, match="8 tensors (missing|unexpected): model.layers.0.self_attn.[qkvo]_proj.bias"):
            open_checkpoint(directory)


def test_a_config_without_eps_has_that_of_transformers(tmp_path):
    directory = tiny.save_v1(tmp_path)
    keys = json.loads((directory / "config.json").read_text())
    keys.pop("rms_norm_eps")
    write(directory, keys)
    assert open_checkpoint(directory).config.decoder.rms_norm_eps == 1e-6
    keys.pop("hidden_size")
    write(directory, keys)
    with pytest.raises(UserError, match="config.json lacks hidden_size, rms_norm_eps"):
        open_checkpoint(directory)


@pytest.mark.parametrize(("layer", "found"), [([-2], -2), ([1], 1), (-1, -1)])
def test_one_feature_layer_in_a_list(layer, found):
    raw = {"model_type": "llava", "text_config": tiny.LLAMA, "vision_config": tiny.CLIP, "vision_feature_layer": layer}
    assert llava_from_hf(raw).feature_layer == found


def test_several_feature_layers_are_named(tmp_path):
    raw = {"model_type": "llava", "text_config": tiny.LLAMA, "vision_config": tiny.CLIP, "vision_feature_layer": [-2, -1]}
    with pytest.raises(UserError, match=r"vision_feature_layer is \[-2, -1\], which concatenates the features of several layers; one layer was expected"):
        read_config(write(tmp_path, raw))


# --- computing -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("variant", ["biased attention", "biased"])  # the others have no leaves of their own
def test_every_leaf_has_one_rule_and_its_place_in_the_file(variant, scan):
    cfg = config(VARIANTS[variant])
    abstract = llava.abstract_params(cfg, scan)
    param_shardings(abstract, llava.param_axes(cfg), make_mesh("data=2,fsdp=2,tp=2"))  # raises for a leaf of no rule or of two
    params = load_params(lively(cfg), scan=scan)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)


def test_a_biased_model_on_a_mesh_gives_the_same(tmp_path):
    import llavamed_jax as lm
    small = config(dict(**BIASED, num_layers=1), vision=dataclasses.replace(TINY.vision, num_layers=1))
    export(lively(small), tmp_path / "model", "llava")
    images = np.random.default_rng(0).standard_normal((1, 28, 28, 3)).astype(np.float32)
    one, many = (lm.load(tmp_path / "model", dtype="float32", mesh=mesh) for mesh in (None, "data=2,fsdp=2,tp=2"))
    ids = np.array([[1, 5] + [IMAGE_TOKEN] * 4 + [9, 11]])
    np.testing.assert_allclose(many.logits(ids, images), one.logits(ids, images), atol=2e-5)


def test_cached_decoding_equals_transformers():
    """Biases and scaled positions in the engine: prefill, and a step at a time."""
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    from llavamed_jax.generation.engine import Engine
    from llavamed_jax.generation.requests import Request
    from tests.support import hf
    model, cfg = hf.llava("llama", seed=8, text=dict(attention_bias=True, mlp_bias=True, rope_theta=5e5, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)))
    row = np.random.default_rng(1).integers(3, 90, 40).tolist()
    with torch.no_grad():
        wanted = model.generate(torch.tensor([row]), max_new_tokens=16, do_sample=False, pad_token_id=0)[0, 40:].tolist()
    assert Engine(cfg, hf.params_of(model)).generate([Request(row, [], 16)]) == [wanted]
    assert len(set(wanted)) >= 6
