"""Tiny models under torch's own names, of numpy alone: plain decoders, plain CLIP towers, projectors.

The names are written here once more, apart from `checkpoints/names.py`.
"""

import json
import math

import numpy as np
from safetensors.numpy import save_file

LLAMA = dict(model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=70, hidden_size=48, intermediate_size=96,
             num_hidden_layers=2, num_attention_heads=4, rms_norm_eps=1e-6, hidden_act="silu", bos_token_id=1, eos_token_id=2,
             max_position_embeddings=2048, tie_word_embeddings=False)
MISTRAL = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"], "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
           "rope_theta": 1e6, "sliding_window": None}
CLIP = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
            image_size=28, patch_size=14)
# LLaVA-Med v1.0's own keys (its `llava/model/llava.py` and `train.py`).
V1 = {**LLAMA, "model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_vision_tower": "openai/tiny-tower",
      "use_mm_proj": True, "mm_hidden_size": 32, "mm_vision_select_layer": -2, "mm_use_im_start_end": True,
      "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False, "use_cache": False, "pad_token_id": 0}


def drawn(shapes, seed=0, dtype=np.float16):
    """Norm scales that are not 1, biases that are not 0, kernels that keep activations at about 1."""
    rng, tensors = np.random.default_rng(seed), {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape, np.float32)
        if len(shape) > 1:
            values /= math.prod(shape[1:]) ** 0.5
        else:
            values = 1 + 0.3 * values if "norm" in name and name.endswith("weight") else 0.2 * values
        tensors[name] = values.astype(dtype)
    return tensors


def decoder_shapes(config):
    V, D, F, N = (config[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads"))
    K = D // N * config.get("num_key_value_heads", N)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (D,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": s for p, s in dict(q=(D, D), k=(K, D), v=(K, D), o=(D, D)).items()}
        shapes |= {f"{layer}mlp.{p}_proj.weight": s for p, s in dict(gate=(F, D), up=(F, D), down=(D, F)).items()}
    return shapes


def buffers(config, value=1.0):
    """What transformers up to 4.30 saved beside the weights; zeros in a delta (quirk Q33)."""
    width = config["hidden_size"] // config["num_attention_heads"] // 2
    return {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.full(width, value, np.float16)
            for i in range(config["num_hidden_layers"])}


def projector_shapes(kind="linear", width=32, hidden=48, prefix="model.mm_projector."):
    layers = {"": (hidden, width)} if kind == "linear" else {"0.": (hidden, width), "2.": (hidden, hidden)}
    return {f"{prefix}{n}{leaf}": s[:1] if leaf == "bias" else s for n, s in layers.items() for leaf in ("weight", "bias")}


def clip_shapes(config=CLIP, prefix="vision_model."):
    D, F, p = config["hidden_size"], config["intermediate_size"], config["patch_size"]
    shapes = {"embeddings.class_embedding": (D,), "embeddings.patch_embedding.weight": (D, 3, p, p),
              "embeddings.position_embedding.weight": ((config["image_size"] // p) ** 2 + 1, D)}
    shapes |= {f"{norm}.{leaf}": (D,) for norm in ("pre_layrnorm", "post_layernorm") for leaf in ("weight", "bias")}
    for j in range(config["num_hidden_layers"]):
        layer = f"encoder.layers.{j}."
        modules = {**{f"self_attn.{p}_proj": (D, D) for p in ("q", "k", "v", "out")}, "mlp.fc1": (F, D), "mlp.fc2": (D, F)}
        shapes |= {f"{layer}{m}.weight": s for m, s in modules.items()} | {f"{layer}{m}.bias": s[:1] for m, s in modules.items()}
        shapes |= {f"{layer}layer_norm{n}.{leaf}": (D,) for n in (1, 2) for leaf in ("weight", "bias")}
    return {prefix + name: shape for name, shape in shapes.items()}


def save(directory, config, tensors=None, file="model.safetensors"):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, directory / file, {"format": "pt"})
    return directory


def save_clip(directory, seed=1):
    """A whole CLIPModel: the text half is there and is nobody's business."""
    rest = {"text_model.final_layer_norm.weight": np.ones(4, np.float16), "logit_scale": np.ones(1, np.float16),
            "visual_projection.weight": np.ones((4, 32), np.float16)}
    return save(directory, {"model_type": "clip", "vision_config": CLIP}, {**drawn(clip_shapes(), seed), **rest})


def v1_tensors(rows=73, dtype=np.float16):
    """LLaVA-Med v1.0: LLaMA with the image tokens' rows, and a linear projector."""
    return drawn(decoder_shapes({**LLAMA, "vocab_size": rows}) | projector_shapes(), dtype=dtype)


def save_v1(root):
    """Its directory, and the tower's own beside it, where alone the tower is."""
    save_clip(root / "tiny-tower")
    return save(root / "v1", {**V1, "vocab_size": 73}, v1_tensors() | buffers(LLAMA))
