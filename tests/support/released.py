"""LLaVA-Med v1.5's release at a tiny shape, of numpy alone: config, tensor names and files as published.

The names are written here once more, apart from the table under test.
"""

import json
import math

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig

TINY = LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14),
                   DecoderConfig(70, 48, 96, 2, 4, 2, 12, 1e-5, 1e6, 512, architecture="mistral"), source="llava_mistral")
# As the release: the keys of LLaVA-Med v1.5's config.json at a tiny shape, its leftovers included.
V15 = dict(
    model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=70, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768,
    sliding_window=None, hidden_act="silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
    mm_vision_tower="openai/tiny-tower", mm_hidden_size=32, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
    mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_use_im_patch_token=False, image_aspect_ratio="pad",
    tokenizer_padding_side="right", tokenizer_model_max_length=2048, use_mm_proj=True, mm_projector_lr=2e-5,
    mm_patch_merge_type="flat", feature_outs="encoder+decoder", segtok_posembed="sincos", torch_dtype="bfloat16")
TOWER = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             image_size=28, patch_size=14)


def v15_tensors(seed=0, dtype=ml_dtypes.bfloat16, tower="model.vision_tower.vision_tower.vision_model."):
    """Tensors under the release's own names, which are written here once more, apart from the table under test."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (70, 48), "lm_head.weight": (70, 48), "model.norm.weight": (48,),
              "model.mm_projector.0.weight": (48, 32), "model.mm_projector.0.bias": (48,),
              "model.mm_projector.2.weight": (48, 48), "model.mm_projector.2.bias": (48,),
              **{f"{tower}{norm}.{leaf}": (32,) for norm in ("pre_layrnorm", "post_layernorm") for leaf in ("weight", "bias")},
              f"{tower}embeddings.class_embedding": (32,), f"{tower}embeddings.patch_embedding.weight": (32, 3, 14, 14),
              f"{tower}embeddings.position_embedding.weight": (5, 32)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (48,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": s for p, s in dict(q=(48, 48), k=(24, 48), v=(24, 48), o=(48, 48)).items()}
        shapes |= {f"{layer}mlp.{p}_proj.weight": s for p, s in dict(gate=(96, 48), up=(96, 48), down=(48, 96)).items()}
    for j in range(3):
        layer = f"{tower}encoder.layers.{j}."
        modules = {**{f"self_attn.{p}_proj": (32, 32) for p in ("q", "k", "v", "out")}, "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}
        shapes |= {f"{layer}{m}.weight": s for m, s in modules.items()} | {f"{layer}{m}.bias": s[:1] for m, s in modules.items()}
        shapes |= {f"{layer}layer_norm{n}.{leaf}": (32,) for n in (1, 2) for leaf in ("weight", "bias")}
    return {name: draw(rng, name, shape).astype(dtype) for name, shape in shapes.items()}


def draw(rng, name, shape):
    """Norm scales that are not 1, biases that are not 0, and kernels that keep activations, hence logits, at about 1."""
    values = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        return values / math.prod(shape[1:]) ** 0.5
    return 1 + 0.3 * values if "norm" in name and name.endswith("weight") else 0.2 * values


def save(directory, config, tensors):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert found[name].shape == wanted[name].shape and found[name].tobytes() == wanted[name].tobytes(), name


def all_tensors(checkpoint):
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def shard_tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def save_v15(root):
    """A directory in the release's layout, with the tower's own directory beside it for its shape."""
    save(root / "tiny-tower", TOWER, {})
    return save(root / "v15", V15, v15_tensors())
