"""Maps tensor names in both directions: this project's canonical names <-> the PyTorch layouts.

Canonical names are the paths of the parameter tree with unstacked layers (`decoder/layers_0/mlp/up_proj/kernel`); on
disk the own tree has one array for each. The layouts are

  llava         LLaVA's own, of LLaVA-Med v1.0 and v1.5 and LLaVA-1.5
  transformers  `LlavaForConditionalGeneration`, every generation of its key names
  tower         a vision tower in its own directory (`CLIPVisionModel`, `CLIPModel` with its text half, …)
  decoder       a language model in its own directory (`LlamaForCausalLM`, `MistralForCausalLM`)

Torch stores a linear layer as [out, in] and a convolution as [out, in, height, width]; here `kernel`s are [in, out] and
[height, width, in, out]. Every other tensor is the same array. The tables of tower and decoder stand with their configs
(`config/towers`, `config/decoders`).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig, projector_depth

# Prefixes of the torch names of each part. The first spelling is written; all are read. transformers wrote
# `language_model.model.` until 4.51 and uses `model.language_model.` in memory since; 5.x has no `vision_model.`,
# neither in its own layout nor in files that LLaVA's code saves with it. A tower's own prefixes
# (`VisionConfig.torch_prefixes`) follow these.
_PREFIXES = {
    "llava": {
        "vision_tower": ("model.vision_tower.vision_tower.",),
        "projector": ("model.mm_projector.",),
        "decoder": ("model.",),
        "lm_head": ("lm_head.",),
    },
    "transformers": {
        "vision_tower": ("vision_tower.", "model.vision_tower."),
        "projector": ("multi_modal_projector.", "model.multi_modal_projector."),
        "decoder": ("language_model.model.", "model.language_model.", "model.language_model.model."),
        "lm_head": ("language_model.lm_head.", "lm_head.", "model.language_model.lm_head."),
    },
    "tower": {"vision_tower": ("",)},
    "decoder": {"decoder": ("model.", ""), "lm_head": ("lm_head.",)},
}

# Buffers that old versions of transformers saved and every version recomputes. In a v1.0 delta they are zeros
# (quirk Q33 in docs/fidelity.md).
_BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|embeddings\.position_ids)")


ADAPTER = "adapter"  # the part of the factors, which no layout of a whole model has


class Spec(NamedTuple):
    """Shape and torch name of a canonical tensor.

    Attributes:
      shape: the shape in this project's orientation.
      part: vision_tower, projector, decoder, lm_head or adapter.
      torch: the torch name without the part's prefix; for a projector's layer, `N.weight` or `N.bias` with its number.
    """

    shape: tuple[int, ...]
    part: str
    torch: str


def specs(cfg: LlavaConfig) -> dict[str, Spec]:
    """Returns every tensor of a complete checkpoint by canonical name, including the tower's unused ones."""
    v, d = cfg.vision, cfg.decoder
    out = dict(_specs("vision_tower", v))
    for n in range(projector_depth(cfg.projector_type)):
        fan_in = v.hidden_size if n == 0 else d.hidden_size
        out[f"projector/linear_{n}/kernel"] = Spec((fan_in, d.hidden_size), "projector", f"{n}.weight")
        if cfg.projector_bias:
            out[f"projector/linear_{n}/bias"] = Spec((d.hidden_size,), "projector", f"{n}.bias")
    out |= decoder_specs(d)
    if cfg.adapter is not None:
        factors = cfg.adapter.factors({name: spec.shape for name, spec in out.items()})
        out |= {name: Spec(shape, ADAPTER, "") for name, shape in factors.items()}
    return out


def decoder_specs(decoder: DecoderConfig) -> dict[str, Spec]:
    """Returns every tensor of a decoder by canonical name, its head included."""
    out = dict(_specs("decoder", decoder))
    if not decoder.tie_word_embeddings:
        out["decoder/lm_head/kernel"] = Spec((decoder.hidden_size, decoder.vocab_size), "lm_head", "weight")
    return out


def decoder_torch_name(spec: Spec) -> str:
    """Returns the name of a decoder's tensor in a language model's own directory."""
    return _PREFIXES["decoder"][spec.part][0] + spec.torch


def _specs(part: str, config: VisionConfig | DecoderConfig):
    sizes = config.sizes
    for row in config.tensors():
        spec = Spec(tuple(sizes[letter] for letter in row.letters), part, row.torch)
        for layer in range(config.num_layers) if "#" in row.name else [0]:
            yield f"{part}/{row.name}".replace("#", str(layer)), spec._replace(torch=row.torch.replace("#", str(layer)))


def unused_names(cfg: LlavaConfig) -> list[str]:
    """Returns the tower's tensors beyond the feature layer: checkpoints keep them, but no model computes with them."""
    after, num_used = tuple(f"vision_tower/{start}" for start in cfg.vision.unused), cfg.num_vision_layers_used

    def is_unused(name):
        layer = re.match(r"vision_tower/layers_(\d+)/", name)
        return name.startswith(after) or (layer and int(layer[1]) >= num_used)

    return [name for name in specs(cfg) if is_unused(name)]


def expected_shapes(cfg: LlavaConfig) -> dict[str, tuple[int, ...]]:
    """Returns canonical name -> shape of every tensor that the model computes with, from the config alone."""
    unused = set(unused_names(cfg))
    return {name: spec.shape for name, spec in specs(cfg).items() if name not in unused}


def torch_names(cfg: LlavaConfig, layout: str) -> dict[str, tuple[str, ...]]:
    """Maps canonical name -> its spellings in a layout, the one to write first; `tower` and `decoder` are one part."""
    prefixes = dict(_PREFIXES[layout])
    if "vision_tower" in prefixes:
        prefixes["vision_tower"] = tuple(before + own for before in prefixes["vision_tower"]
                                         for own in cfg.vision.torch_prefixes)
    names = {}
    for name, spec in specs(cfg).items():
        if spec.part in prefixes:
            suffix = _projector_suffix(cfg, layout, spec.torch) if spec.part == "projector" else spec.torch
            spelled = [suffix, cfg.vision.in_memory(suffix)] if spec.part == "vision_tower" else [suffix]
            names[name] = tuple(prefix + each for each in dict.fromkeys(spelled) for prefix in prefixes[spec.part])
    return names


def dropped(cfg: LlavaConfig, layout: str) -> Callable[[str], bool]:
    """Returns a function that tells whether a layout's torch name is of a tower's part that LLaVA does not read."""
    prefixes = _PREFIXES[layout].get("vision_tower", ())
    if not cfg.vision.dropped or not prefixes:
        return lambda name: False
    starts = "|".join(re.escape(before + own) for before in prefixes for own in cfg.vision.torch_prefixes)
    pattern = re.compile(f"(?:{starts})(?:{cfg.vision.dropped})")
    return lambda name: pattern.fullmatch(name) is not None


def head_names(layout: str) -> list[str]:
    """Returns the spellings of the head in a layout, whether or not a model has its own head."""
    return [f"{prefix}weight" for prefix in _PREFIXES[layout].get("lm_head", ())]


def _projector_suffix(cfg: LlavaConfig, layout: str, torch: str) -> str:
    """Returns a projector layer's torch name below its prefix, from its number `n.weight`.

    LLaVA's `nn.Sequential` counts the GELUs in the odd places, and `linear` is not a Sequential.
    """
    n, leaf = torch.split(".")
    if layout == "transformers":
        return f"linear_{int(n) + 1}.{leaf}"
    return leaf if cfg.projector_type == "linear" else f"{2 * int(n)}.{leaf}"


def is_buffer(torch_name: str) -> bool:
    """Returns whether a tensor of a PyTorch file is a buffer and not a weight."""
    return _BUFFERS.fullmatch(torch_name) is not None


def torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of a canonical tensor in torch's orientation."""
    return tuple(shape[axis] for axis in _torch_axes(name, len(shape)))


def to_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Returns a canonical tensor in torch's orientation."""
    return _permuted(array, _torch_axes(name, array.ndim))


def from_torch(name: str, array: np.ndarray) -> np.ndarray:
    """Reverses `to_torch`."""
    return _permuted(array, tuple(np.argsort(_torch_axes(name, array.ndim))))


def _torch_axes(name: str, ndim: int) -> tuple[int, ...]:
    if name.endswith("/kernel"):
        return {2: (1, 0), 4: (3, 2, 0, 1)}[ndim]
    return tuple(range(ndim))


def _permuted(array: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    if axes != (1, 0):
        return array.transpose(axes)
    # In blocks of rows: numpy's own copy of a large transpose misses the cache at every element and takes ten times as
    # long. As integers: numpy copies its own types without the interpreter lock, but bfloat16 element by element.
    bits = array.view(f"u{array.itemsize}")
    out = np.empty(bits.shape[::-1], bits.dtype)
    for row in range(0, len(bits), 16):
        out[:, row:row + 16] = bits[row:row + 16].T
    return out.view(array.dtype)
