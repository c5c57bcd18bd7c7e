"""Tiny transformers models with random weights that make wrong code show, and their weights under our names.

Default initialisations hide mistakes (norm scales of 1, biases of 0, activations far above every eps), so all
parameters are drawn anew: scales around 1 but not 1, biases not 0, the head scaled so that logits have a standard
deviation of 1. The renaming is written here once more, apart from `checkpoints/names.py`, so that each checks the other.
"""

import re

import numpy as np
import pytest
import transformers

from llavamed_jax.config.hf import llava_from_hf

torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")

VISION = dict(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, image_size=28,
              patch_size=7, layer_norm_eps=1e-5, hidden_act="quick_gelu")
TEXT = dict(vocab_size=96, hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, max_position_embeddings=4096, rope_theta=1e4,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False)
IMAGE_ID = 95
DECODERS = transformers.CONFIG_MAPPING  # config classes by `model_type`


def llava(architecture="mistral", vision=None, text=None, seed=0, activation_scale=1.0, projection_scale=1.0, **top):
    """A LlavaForConditionalGeneration (eager attention, float32, eval) and our LlavaConfig of it."""
    text = {**TEXT, **(text or {})}
    theta, scaling = text.pop("rope_theta"), text.pop("rope_scaling", {})
    if architecture == "mistral":
        text.setdefault("sliding_window", None)
    text_config = DECODERS[architecture](
        **text, rope_parameters={"rope_type": "default", "rope_theta": theta, **scaling})
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**{**VISION, **(vision or {})}), text_config=text_config,
        image_token_index=IMAGE_ID, tie_word_embeddings=text["tie_word_embeddings"],
        **{"vision_feature_layer": -2, "vision_feature_select_strategy": "default", **top})
    config._attn_implementation = "eager"
    model = transformers.LlavaForConditionalGeneration(config).float().eval()
    randomise(model, seed, activation_scale, projection_scale)
    return model, llava_from_hf(config.to_dict())


@torch.no_grad()
def randomise(model, seed, activation_scale=1.0, projection_scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        draw = torch.randn(p.shape, generator=generator)
        if name.endswith("weight") and "norm" in name:
            p.copy_(1 + 0.3 * draw)
        elif p.ndim == 1:
            p.copy_(0.2 * draw)
        elif "embed" in name:
            p.copy_(activation_scale * draw)
        else:
            p.copy_(draw / p[0].numel() ** 0.5)
        if re.search("language_model.*[qk]_proj", name):
            p.mul_(projection_scale)


def params_of(model):
    """The model's weights as our nested, unrolled tree of numpy arrays, without what the feature layer does not need."""
    tree, vision = {}, model.config.vision_config
    layer = model.config.vision_feature_layer
    used = vision.num_hidden_layers + 1 + (layer[0] if isinstance(layer, list) else layer)
    unused = ["vision_tower/post_layernorm"] + [f"vision_tower/layers_{i}/" for i in range(used, vision.num_hidden_layers)]
    for name, tensor in model.state_dict().items():
        path = our_name(name)
        if path is None or path.startswith(tuple(unused)):
            continue
        value = tensor.detach().numpy()
        if path.endswith("patch_embedding/kernel"):
            value = value.transpose(2, 3, 1, 0)
        elif path.endswith("kernel"):
            value = value.T
        node = tree
        *parents, leaf = path.split("/")
        for key in parents:
            node = node.setdefault(key, {})
        node[leaf] = np.ascontiguousarray(value)
    return tree


def our_name(name):
    name = name.removeprefix("model.").replace("language_model.model.", "language_model.").replace("language_model.lm_head", "lm_head")
    name = name.replace("language_model.", "decoder.").replace("vision_model.", "").replace("lm_head", "decoder.lm_head")
    name = name.replace("multi_modal_projector.linear_1", "projector.linear_0")
    name = name.replace("multi_modal_projector.linear_2", "projector.linear_1")
    name = re.sub(r"(encoder\.)?layers\.(\d+)", r"layers_\2", name)
    if "position_ids" in name or "inv_freq" in name:
        return None
    module, _, leaf = name.rpartition(".")
    if leaf == "weight":
        leaf = "scale" if "norm" in module else "embedding" if module.endswith(("embed_tokens", "position_embedding")) else "kernel"
    return f"{module}.{leaf}".replace(".", "/")


def images(n, size=28, seed=0, scale=1.0):
    """float32 [n,size,size,3]."""
    return (scale * np.random.default_rng(seed).standard_normal((n, size, size, 3))).astype(np.float32)


@torch.no_grad()
def torch_logits(model, ids, pixels=None, mask=None, positions=None):
    """ids int [B,T] with IMAGE_TOKEN, pixels [I,H,W,3] in order over the rows -> float32 numpy [B,T,V].

    Positions need a mask: without one transformers takes a gap for the beginning of another sequence.
    """
    ids = torch.tensor(np.where(np.asarray(ids) == -200, IMAGE_ID, np.asarray(ids)))
    pixels = None if pixels is None else torch.tensor(pixels).permute(0, 3, 1, 2)
    mask, positions = (None if x is None else torch.tensor(x) for x in (mask, positions))
    return model(input_ids=ids, pixel_values=pixels, attention_mask=mask, position_ids=positions).logits.numpy()
