"""One table of tensor names, read in both directions: this project's canonical names <-> the PyTorch layouts.

Canonical names are the paths of the parameter tree with unstacked layers (`decoder/layers_0/mlp/up_proj/kernel`); on disk
the own tree has one array for each. The layouts are

  llava         LLaVA's own, of LLaVA-Med v1.0 and v1.5 and LLaVA-1.5 (spec 2.1, 2.3)
  transformers  `LlavaForConditionalGeneration`, every generation of its key names (spec 2.5)
  clip          a vision tower in a directory of its own (`CLIPVisionModel`, or `CLIPModel` with its text half)
  decoder       a language model in a directory of its own (`LlamaForCausalLM`, `MistralForCausalLM`)

Torch keeps a linear layer as [out, in] and a convolution as [out, in, height, width]; here `kernel`s are [in, out] and
[height, width, in, out]. Every other tensor is the same array.

Letters of the table: D width of its part, F feed-forward width, V vocabulary, N query heads x
head width, K key/value heads x head width, C colours, p patch edge, T patches + 1, # layer.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from llavamed_jax.config import LlavaConfig, projector_depth

_VISION_TOWER = """
embeddings/class_embedding                embeddings.class_embedding                 D
embeddings/patch_embedding/kernel         embeddings.patch_embedding.weight          p p C D
embeddings/position_embedding/embedding   embeddings.position_embedding.weight       T D
pre_layrnorm/scale                        pre_layrnorm.weight                        D
pre_layrnorm/bias                         pre_layrnorm.bias                          D
layers_#/layer_norm1/scale                encoder.layers.#.layer_norm1.weight        D
layers_#/layer_norm1/bias                 encoder.layers.#.layer_norm1.bias          D
layers_#/self_attn/q_proj/kernel          encoder.layers.#.self_attn.q_proj.weight   D D
layers_#/self_attn/q_proj/bias            encoder.layers.#.self_attn.q_proj.bias     D
layers_#/self_attn/k_proj/kernel          encoder.layers.#.self_attn.k_proj.weight   D D
layers_#/self_attn/k_proj/bias            encoder.layers.#.self_attn.k_proj.bias     D
layers_#/self_attn/v_proj/kernel          encoder.layers.#.self_attn.v_proj.weight   D D
layers_#/self_attn/v_proj/bias            encoder.layers.#.self_attn.v_proj.bias     D
layers_#/self_attn/out_proj/kernel        encoder.layers.#.self_attn.out_proj.weight D D
layers_#/self_attn/out_proj/bias          encoder.layers.#.self_attn.out_proj.bias   D
layers_#/layer_norm2/scale                encoder.layers.#.layer_norm2.weight        D
layers_#/layer_norm2/bias                 encoder.layers.#.layer_norm2.bias          D
layers_#/mlp/fc1/kernel                   encoder.layers.#.mlp.fc1.weight            D F
layers_#/mlp/fc1/bias                     encoder.layers.#.mlp.fc1.bias              F
layers_#/mlp/fc2/kernel                   encoder.layers.#.mlp.fc2.weight            F D
layers_#/mlp/fc2/bias                     encoder.layers.#.mlp.fc2.bias              D
post_layernorm/scale                      post_layernorm.weight                      D
post_layernorm/bias                       post_layernorm.bias                        D
"""
_DECODER = """
embed_tokens/embedding                    embed_tokens.weight                        V D
layers_#/input_layernorm/scale            layers.#.input_layernorm.weight            D
layers_#/self_attn/q_proj/kernel          layers.#.self_attn.q_proj.weight           D N
layers_#/self_attn/k_proj/kernel          layers.#.self_attn.k_proj.weight           D K
layers_#/self_attn/v_proj/kernel          layers.#.self_attn.v_proj.weight           D K
layers_#/self_attn/o_proj/kernel          layers.#.self_attn.o_proj.weight           N D
layers_#/self_attn/q_proj/bias            layers.#.self_attn.q_proj.bias             N
layers_#/self_attn/k_proj/bias            layers.#.self_attn.k_proj.bias             K
layers_#/self_attn/v_proj/bias            layers.#.self_attn.v_proj.bias             K
layers_#/self_attn/o_proj/bias            layers.#.self_attn.o_proj.bias             D
layers_#/post_attention_layernorm/scale   layers.#.post_attention_layernorm.weight   D
layers_#/mlp/gate_proj/kernel             layers.#.mlp.gate_proj.weight              D F
layers_#/mlp/up_proj/kernel               layers.#.mlp.up_proj.weight                D F
layers_#/mlp/down_proj/kernel             layers.#.mlp.down_proj.weight              F D
layers_#/mlp/gate_proj/bias               layers.#.mlp.gate_proj.bias                F
layers_#/mlp/up_proj/bias                 layers.#.mlp.up_proj.bias                  F
layers_#/mlp/down_proj/bias               layers.#.mlp.down_proj.bias                D
norm/scale                                norm.weight                                D
"""

# What stands before the torch name of a part. The first spelling is written; all are read. transformers wrote
# `language_model.model.` until 4.51, `model.language_model.` in memory since, and 5.x knows no `vision_model.`: neither in its own
# layout nor in what LLaVA's code saves with it.
_PREFIXES = {
    "llava": {
        "vision_tower": ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower."),
        "projector": ("model.mm_projector.",),
        "decoder": ("model.",),
        "lm_head": ("lm_head.",),
    },
    "transformers": {
        "vision_tower": ("vision_tower.vision_model.", "vision_tower.", "model.vision_tower.vision_model.", "model.vision_tower."),
        "projector": ("multi_modal_projector.", "model.multi_modal_projector."),
        "decoder": ("language_model.model.", "model.language_model.", "model.language_model.model."),
        "lm_head": ("language_model.lm_head.", "lm_head.", "model.language_model.lm_head."),
    },
    "clip": {"vision_tower": ("vision_model.", "")},
    "decoder": {"decoder": ("model.", ""), "lm_head": ("lm_head.",)},
}

# Buffers that old versions of transformers saved and every version computes anew. In a v1.0 delta they are zeros (spec Q33).
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")


class Spec(NamedTuple):
    """What the table says of a canonical tensor."""

    shape: tuple[int, ...]  # in this project's orientation
    part: str  # vision_tower, projector, decoder or lm_head
    torch: str  # the torch name below the part's prefix; of a projector's layer, its number


def specs(cfg: LlavaConfig) -> dict[str, Spec]:
    """Every tensor of a complete checkpoint by canonical name, the unused ones of the tower included."""
    v, d = cfg.vision, cfg.decoder
    vision_sizes = dict(D=v.hidden_size, F=v.intermediate_size, C=v.num_channels, p=v.patch_size, T=v.num_patches + 1)
    decoder_sizes = dict(D=d.hidden_size, F=d.intermediate_size, V=d.vocab_size, N=d.num_heads * d.head_dim,
                         K=d.num_kv_heads * d.head_dim)
    out = dict(_rows(_VISION_TOWER, "vision_tower", v.num_layers, vision_sizes))
    for n in range(projector_depth(cfg.projector_type)):
        fan_in = v.hidden_size if n == 0 else d.hidden_size
        out[f"projector/linear_{n}/kernel"] = Spec((fan_in, d.hidden_size), "projector", f"{n}.weight")
        if cfg.projector_bias:
            out[f"projector/linear_{n}/bias"] = Spec((d.hidden_size,), "projector", f"{n}.bias")
    without = tuple(module for module, has_bias in (("/self_attn/", d.attention_bias), ("/mlp/", d.mlp_bias)) if not has_bias)
    out.update((name, spec) for name, spec in _rows(_DECODER, "decoder", d.num_layers, decoder_sizes)
               if not (name.endswith("/bias") and any(module in name for module in without)))
    if not d.tie_word_embeddings:
        out["decoder/lm_head/kernel"] = Spec((d.hidden_size, d.vocab_size), "lm_head", "weight")
    return out


def _rows(table: str, part: str, num_layers: int, sizes: dict[str, int]):
    for line in table.strip().splitlines():
        name, torch, *letters = line.split()
        spec = Spec(tuple(sizes[letter] for letter in letters), part, torch)
        for layer in range(num_layers) if "#" in name else [0]:
            yield f"{part}/{name}".replace("#", str(layer)), spec._replace(torch=torch.replace("#", str(layer)))


def unused_names(cfg: LlavaConfig) -> list[str]:
    """Tensors of the tower beyond the feature layer: they travel with a checkpoint and are never computed with."""
    def is_unused(name):
        layer = re.match(r"vision_tower/layers_(\d+)/", name)
        return name.startswith("vision_tower/post_layernorm/") or (layer and int(layer[1]) >= cfg.num_vision_layers_used)
    return [name for name in specs(cfg) if is_unused(name)]


def expected_shapes(cfg: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that the model computes with, from the config alone."""
    unused = set(unused_names(cfg))
    return {name: spec.shape for name, spec in specs(cfg).items() if name not in unused}


def torch_names(cfg: LlavaConfig, layout: str) -> dict[str, tuple[str, ...]]:
    """Canonical name -> its spellings in a layout, the one to write first. `clip` and `decoder` have their part's alone."""
    prefixes = _PREFIXES[layout]
    names = {}
    for name, spec in specs(cfg).items():
        if spec.part in prefixes:
            suffix = _projector_suffix(cfg, layout, spec.torch) if spec.part == "projector" else spec.torch
            names[name] = tuple(prefix + suffix for prefix in prefixes[spec.part])
    return names


def head_names(layout: str) -> list[str]:
    """The spellings of the head in a layout, whether or not a model has one of its own."""
    return [f"{prefix}weight" for prefix in _PREFIXES[layout].get("lm_head", ())]


def _projector_suffix(cfg: LlavaConfig, layout: str, torch: str) -> str:
    """`n.weight` as LLaVA's `nn.Sequential` counts it (GELUs have the odd places; `linear` is no Sequential), or as
    transformers does."""
    n, leaf = torch.split(".")
    if layout == "transformers":
        return f"linear_{int(n) + 1}.{leaf}"
    return leaf if cfg.projector_type == "linear" else f"{2 * int(n)}.{leaf}"


def is_buffer(torch_name: str) -> bool:
    """Whether a tensor of a PyTorch file is a buffer that is no weight."""
    return _BUFFERS.fullmatch(torch_name) is not None


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that torch gives to a canonical tensor."""
    return tuple(shape[axis] for axis in _torch_axes(name, len(shape)))


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """A canonical tensor in torch's orientation."""
    return _permuted(array, _torch_axes(name, array.ndim))


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """The reverse of `to_torch`."""
    return _permuted(array, tuple(np.argsort(_torch_axes(name, array.ndim))))


def _torch_axes(name: str, ndim: int) -> tuple[int, ...]:
    if name.endswith("/kernel"):
        return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]
    return tuple(range(ndim))


def _permuted(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    if axes != (1, 0):
        return array.transpose(axes)
    # Row blocks: numpy's own copy of a large transpose misses the cache at every element and takes ten times as long. As bits:
    # numpy copies its own types without the interpreter lock and bfloat16, which is not one, element by element.
    bits = array.view(f"u{array.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for row in range(0, len(bits), 16):
        out[:, row:row + 16] = bits[row:row + 16].T
    return out.view(array.dtype)
