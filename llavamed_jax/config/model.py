"""Shapes and constants of a model, as frozen (hashable) dataclasses, read from and written to checkpoints' `config.json`.

Nothing here has a default that a checkpoint could contradict: what `config.json` says is what is used, and the few
defaults that a published config may lean on stand in `_TEXT_DEFAULTS` and `_VISION_DEFAULTS` with their source.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llavamed_jax.config.checks import as_object, channels, check_counts, check_fields, number, token_ids
from llavamed_jax.config.images import ImageSettings
from llavamed_jax.config.rope import RopeScaling, read_rope
from llavamed_jax.errors import UserError, short

IMAGE_TOKEN = -200  # stands for an image in token ids (LLaVA's IMAGE_TOKEN_INDEX)
IGNORE = -100  # a label that is not supervised
MOST_BEAMS = 128  # of a beam search, which keeps a cache for each
PAD_TOKEN = -1  # pads short rows of `logits` on the right
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue between 0 and 1 (spec 3.3)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# The key of an exported config.json under which stands what the layout itself has no place for.
OURS = "llavamed_jax"

# Names of transformers' activations that `models.layers` has; some are one function under several names.
ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu", "relu")

# What transformers' LlamaConfig and MistralConfig fill in when a key of `text_config` is absent (published
# llava-hf configs lean on this).
_TEXT_DEFAULTS = {
    "llama": dict(vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                  num_attention_heads=32, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=2048),
    "mistral": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                    num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-6, rope_theta=1e4,
                    max_position_embeddings=131072, sliding_window=4096),
}
# transformers' CLIPVisionConfig; the LLaVA towers by name are stock CLIP-L/14 (spec 1.1).
_VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                        image_size=224, patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu", num_channels=3)
_CLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, patch_size=14)
KNOWN_TOWERS = {
    "openai/clip-vit-large-patch14": {**_CLIP_LARGE, "image_size": 224},
    "openai/clip-vit-large-patch14-336": {**_CLIP_LARGE, "image_size": 336},
}


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP ViT. Field names follow this project; `from_hf` maps them from a `CLIPVisionConfig`.

    `image_mean`, `image_std` and `images` are what its preprocessor does (`config/images.py`).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    num_channels: int = 3
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    images: ImageSettings = ImageSettings()

    def __post_init__(self):
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, channels("the vision config", name, getattr(self, name)))
        object.__setattr__(self, "images", ImageSettings.of(self.images))
        check_fields(self, "vision ")
        check_activation("vision hidden_act", self.hidden_act)
        if self.hidden_size % self.num_heads:
            raise UserError(f"vision hidden_size {self.hidden_size} is not divisible by its {self.num_heads} heads")
        if self.patch_size > self.image_size:
            raise UserError(f"vision patch_size {self.patch_size} is larger than its image_size {self.image_size}")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        """Mean, standard deviation and scale: pixels are (x * scale - mean) / std of values x from 0 to 255."""
        mean, std = (self.image_mean, self.image_std) if self.images.is_normalized else ((0.0,) * 3, (1.0,) * 3)
        return mean, std, self.images.scale

    @property
    def pad_color(self) -> tuple[int, ...]:
        """Red, green and blue that images are padded to a square with, as the originals and transformers take it from the mean,
        whether that is applied or not. Raises UserError for a mean that is no colour."""
        color = tuple(int(255 * mean) for mean in self.image_mean)
        if not all(0 <= value <= 255 for value in color):
            raise UserError(f"the image_mean {list(self.image_mean)} is no colour to pad images with; numbers from 0 to 1 were expected")
        return color

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """From a `CLIPVisionConfig` dict, or a whole `CLIPConfig` that holds one under `vision_config`."""
        config = as_object(config.get("vision_config", config), "vision_config")
        model_type = config.get("model_type", "clip_vision_model")
        if model_type not in ("clip_vision_model", "clip"):
            raise UserError(f"the vision tower's model_type is {short(model_type)}; clip_vision_model was expected")
        c = {**_VISION_DEFAULTS, **{k: v for k, v in config.items() if v is not None}}
        check_counts(c, [key for key in _VISION_DEFAULTS if key not in ("layer_norm_eps", "hidden_act")])
        return cls(c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["num_attention_heads"],
                   c["image_size"], c["patch_size"], c["layer_norm_eps"], c["hidden_act"], c["num_channels"])

    def to_hf(self) -> dict:
        return dict(model_type="clip_vision_model", hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
                    num_hidden_layers=self.num_layers, num_attention_heads=self.num_heads, image_size=self.image_size,
                    patch_size=self.patch_size, layer_norm_eps=self.layer_norm_eps, hidden_act=self.hidden_act,
                    num_channels=self.num_channels, projection_dim=768)


@dataclass(frozen=True)
class DecoderConfig:
    """A LLaMA-family decoder: LLaMA, Vicuna or Mistral."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    architecture: str = "llama"
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    pad_token_id: int | None = None
    more_eos_ids: tuple[int, ...] = ()  # a config may name several ids that end a sequence
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False  # of query, key, value and output (LLaMA alone)
    mlp_bias: bool = False
    hidden_act: str = "silu"

    def __post_init__(self):
        check_fields(self, "decoder ")
        if self.num_heads % self.num_kv_heads:
            raise UserError(f"{self.num_heads} query heads are not a multiple of {self.num_kv_heads} key/value heads")
        if self.head_dim % 2:
            raise UserError(f"head_dim {self.head_dim} is odd; rotary embedding needs an even width")
        check_activation("the decoder's hidden_act", self.hidden_act)

    @property
    def max_positions(self) -> int:
        """Positions that a text may have: a linear scaling stretches those that the config counts."""
        stretched = self.rope_scaling is not None and self.rope_scaling.rope_type == "linear"
        return int(self.max_position_embeddings * (self.rope_scaling.factor if stretched else 1))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], architecture: str | None = None) -> "DecoderConfig":
        """From a `LlamaConfig` or `MistralConfig` dict; both spellings of the RoPE settings are read.

        Raises:
          UserError: another architecture, or a scaling of RoPE or an activation that this model does not have.
        """
        arch = architecture or config.get("model_type", "llama")
        if not isinstance(arch, str) or arch not in _TEXT_DEFAULTS:
            raise UserError(f"the decoder's model_type is {short(arch)}; llama or mistral was expected")
        defaults = _TEXT_DEFAULTS[arch]
        # null is a value of its own for a window and for key/value heads; elsewhere it stands for the default.
        c = {**defaults, **{k: v for k, v in config.items()
                            if v is not None or k not in defaults or k in ("sliding_window", "num_key_value_heads")}}
        check_counts(c, ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "max_position_embeddings", *(["num_key_value_heads"] if c.get("num_key_value_heads") else [])])
        theta, scaling = read_rope(config, defaults["rope_theta"], c["max_position_embeddings"])
        biases = {key: c.get(key) or False for key in ("attention_bias", "mlp_bias")} if arch == "llama" else {}
        heads = c["num_attention_heads"]
        return cls(
            vocab_size=c["vocab_size"], hidden_size=c["hidden_size"], intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"], num_heads=heads, num_kv_heads=c.get("num_key_value_heads") or heads,
            head_dim=c.get("head_dim") or c["hidden_size"] // heads, rms_norm_eps=number(c["rms_norm_eps"], "rms_norm_eps"),
            rope_theta=theta, rope_scaling=scaling, hidden_act=c.get("hidden_act") or "silu", **biases,
            max_position_embeddings=c["max_position_embeddings"],
            sliding_window=c.get("sliding_window") if arch == "mistral" else None,
            tie_word_embeddings=bool(c.get("tie_word_embeddings", False)), architecture=arch,
            bos_token_id=c.get("bos_token_id", 1), pad_token_id=c.get("pad_token_id"),
            **cls.ends_with(token_ids(c.get("eos_token_id", 2), "eos_token_id")))

    def to_hf(self) -> dict:
        """Every field explicit, and both spellings of the RoPE settings, so that any transformers reads the same model."""
        scaling = self.rope_scaling.to_hf() if self.rope_scaling else {}
        out = dict(model_type=self.architecture, vocab_size=self.vocab_size, hidden_size=self.hidden_size,
                   intermediate_size=self.intermediate_size, num_hidden_layers=self.num_layers,
                   num_attention_heads=self.num_heads, num_key_value_heads=self.num_kv_heads, head_dim=self.head_dim,
                   hidden_act=self.hidden_act, rms_norm_eps=self.rms_norm_eps, rope_theta=self.rope_theta,
                   rope_parameters={"rope_type": "default", **scaling, "rope_theta": self.rope_theta},
                   max_position_embeddings=self.max_position_embeddings, tie_word_embeddings=self.tie_word_embeddings,
                   attention_bias=self.attention_bias, mlp_bias=self.mlp_bias, bos_token_id=self.bos_token_id,
                   eos_token_id=self.eos_value, pad_token_id=self.pad_token_id)
        if self.architecture == "mistral":
            out["sliding_window"] = self.sliding_window
        if scaling.get("rope_type") == "linear":  # as versions before 4.43 want it: these two keys and no other
            out["rope_scaling"] = {"type": "linear", "factor": scaling["factor"]}
        elif scaling:
            out["rope_scaling"] = scaling
        return out

    @staticmethod
    def ends_with(ids: tuple[int, ...]) -> dict[str, Any]:
        """The fields of a decoder whose sequences end with any of these ids."""
        return dict(eos_token_id=ids[0] if ids else None, more_eos_ids=ids[1:])

    @property
    def eos_value(self) -> int | list[int] | None:
        """`eos_token_id` as transformers' files have it."""
        return list(self.eos_ids) if self.more_eos_ids else self.eos_token_id

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """All ids that end a sequence; none for a decoder that never ends one."""
        return (() if self.eos_token_id is None else (self.eos_token_id,)) + self.more_eos_ids

    @property
    def matmul_parameters(self) -> int:
        """Weights that a token is multiplied with: layers and head; the embedding lookup is no matmul."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        attention = 2 * d * self.num_heads * h + 2 * d * self.num_kv_heads * h
        return self.num_layers * (attention + 3 * d * f) + d * self.vocab_size

    def forward_flops_per_token(self, length: int) -> float:
        """FLOPs of one token's forward pass in a row of `length` tokens: 2 N + causal attention (half the square)."""
        span = min(length, self.sliding_window or length)
        return 2 * self.matmul_parameters + 2 * self.num_layers * self.num_heads * self.head_dim * span


@dataclass(frozen=True)
class LlavaConfig:
    """A vision tower, a projector and a decoder, and how the three are joined.

    `feature_layer` indexes CLIP's hidden states (0 is the embedding after `pre_layrnorm`, k the output of block k,
    negative from the end; spec 1.2). `extra` is the JSON text of the keys of the source `config.json` that this
    class does not model: they travel, so that an export gives back what an import read.
    """

    vision: VisionConfig
    decoder: DecoderConfig
    projector_type: str = "mlp2x_gelu"
    projector_bias: bool = True
    feature_layer: int = -2
    feature_select: str = "patch"
    image_aspect_ratio: str = "pad"
    max_length: int | None = 2048
    use_start_end: bool = False
    template: str | None = None
    source: str = "llava_mistral"
    image_token_id: int | None = None
    extra: str = "{}"
    projector_act: str = "gelu"

    def __post_init__(self):
        check_fields(self, "")
        if self.feature_select not in ("patch", "cls_patch"):
            raise UserError(f"the vision feature selection is {short(self.feature_select)}; patch or cls_patch was expected")
        if self.image_aspect_ratio not in ("pad", "square"):
            raise UserError(f"the config has image_aspect_ratio {short(self.image_aspect_ratio)}; pad or square was expected")
        if not -self.vision.num_layers - 1 <= self.feature_layer <= self.vision.num_layers:
            raise UserError(f"feature layer {self.feature_layer} does not exist in a tower of {self.vision.num_layers} layers")
        projector_depth(self.projector_type)
        check_activation("projector_hidden_act", self.projector_act)

    @property
    def num_vision_layers_used(self) -> int:
        """Blocks that the selected hidden state needs: 23 of CLIP-L's 24 for layer -2."""
        layer = self.feature_layer
        return layer if layer >= 0 else self.vision.num_layers + 1 + layer

    @property
    def tokens_per_image(self) -> int:
        return self.vision.num_patches + (self.feature_select == "cls_patch")

    @property
    def transformers_vocab_size(self) -> int:
        """Rows of the embedding table in transformers' layout, where the first two behind it are <image> and <pad>."""
        return self.rows_in_transformers((self.decoder.vocab_size, self.decoder.vocab_size + 1))

    def rows_in_transformers(self, ids: tuple[int, int]) -> int:
        """Rows of the embedding table in transformers' layout.

        A table that has an <image> of its own, or unused rows for <image> and <pad>, stays as it is. Else it is filled up to a
        multiple of 64, as the published conversions are (spec 2.5).

        Args:
          ids: of <image> and <pad>.
        """
        rows, needed = self.decoder.vocab_size, 1 + max(ids)
        return rows if self.image_token_id is not None or needed <= rows else -(-needed // 64) * 64

    def vision_flops_per_image(self) -> float:
        """FLOPs of one image's forward pass through the blocks that are used, attention over the full square."""
        v, n = self.vision, self.vision.num_patches + 1
        block = 4 * v.hidden_size**2 + 2 * v.hidden_size * v.intermediate_size
        return self.num_vision_layers_used * (2 * n * block + 4 * n * n * v.hidden_size)

    def replace(self, **changes) -> "LlavaConfig":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """The content of this project's own `model/config.json`."""
        return {"model_type": "llavamed_jax", **dataclasses.asdict(self), "extra": json.loads(self.extra)}

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> "LlavaConfig":
        d = {k: v for k, v in d.items() if k != "model_type"}
        d |= {part: as_object(d.get(part), part) for part in ("vision", "decoder")}
        if d["decoder"].get("rope_scaling") is not None:
            d["decoder"] = {**d["decoder"], "rope_scaling": RopeScaling(**as_object(d["decoder"]["rope_scaling"], "rope_scaling"))}
        if isinstance(d["decoder"].get("more_eos_ids"), list):  # JSON has no tuples
            d["decoder"] = {**d["decoder"], "more_eos_ids": tuple(d["decoder"]["more_eos_ids"])}
        known = {f.name for f in dataclasses.fields(cls)}
        if set(d) - known:
            raise UserError(f"config.json has the unknown keys {sorted(set(d) - known)}")
        return cls(**{**d, "vision": VisionConfig(**d["vision"]), "decoder": DecoderConfig(**d["decoder"]),
                      "extra": json.dumps(as_object(d.get("extra", {}), "extra"), sort_keys=True)})


def check_activation(what: str, name: str) -> None:
    """Raises UserError for an activation that `models.layers.ACTIVATIONS` has not."""
    if name not in ACTIVATIONS:
        raise UserError(f"{what} is {short(name)}; one of {', '.join(ACTIVATIONS)} was expected")


def projector_depth(projector_type: str) -> int:
    """Number of linear layers of `linear` (1), `mlpNx_gelu` (N) or `identity` (0); spec 1.4."""
    if projector_type == "identity":
        return 0
    if projector_type == "linear":
        return 1
    found = re.fullmatch(r"mlp0*([1-9][0-9]?)x_gelu", projector_type)
    if found:
        return int(found[1])
    raise UserError(f"the projector type is {short(projector_type)}; linear, mlpNx_gelu or identity was expected")
