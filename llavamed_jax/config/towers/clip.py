"""CLIP's vision transformer: its config, its tensors, and the towers of OpenAI by name.

`VisionConfig` is CLIP's and the base of every other kind of tower.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from llavamed_jax.config.checks import as_object, channels, check_activation, check_counts, check_fields
from llavamed_jax.config.images import ImageSettings
from llavamed_jax.config.tensors import Row, kernel_axes, rows
from llavamed_jax.errors import UserError, short

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue between 0 and 1 (OpenAI's CLIP)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
# The defaults of transformers' CLIPVisionConfig; the named LLaVA towers are stock CLIP-L/14.
_VISION_DEFAULTS = dict(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                        image_size=224, patch_size=32, layer_norm_eps=1e-5, hidden_act="quick_gelu", num_channels=3)
_CLIP_LARGE = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                   patch_size=14)
TABLE = """
embeddings/class_embedding                embeddings.class_embedding                 D
embeddings/patch_embedding/kernel         embeddings.patch_embedding.weight          p p C D
embeddings/position_embedding/embedding   embeddings.position_embedding.weight       T D
pre_layrnorm/scale                        pre_layrnorm.weight                        D
pre_layrnorm/bias                         pre_layrnorm.bias                          D
layers_#/layer_norm1/scale                encoder.layers.#.layer_norm1.weight        D
layers_#/layer_norm1/bias                 encoder.layers.#.layer_norm1.bias          D
layers_#/self_attn/q_proj/kernel          encoder.layers.#.self_attn.q_proj.weight   D N
layers_#/self_attn/q_proj/bias            encoder.layers.#.self_attn.q_proj.bias     N
layers_#/self_attn/k_proj/kernel          encoder.layers.#.self_attn.k_proj.weight   D N
layers_#/self_attn/k_proj/bias            encoder.layers.#.self_attn.k_proj.bias     N
layers_#/self_attn/v_proj/kernel          encoder.layers.#.self_attn.v_proj.weight   D N
layers_#/self_attn/v_proj/bias            encoder.layers.#.self_attn.v_proj.bias     N
layers_#/self_attn/out_proj/kernel        encoder.layers.#.self_attn.out_proj.weight N D
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


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP ViT. Field names follow this project; `from_hf` maps them from a `CLIPVisionConfig`.

    A subclass for another kind of tower sets its own class attributes, from `model_type` on.

    Attributes:
      hidden_size: D.
      intermediate_size: F.
      num_layers: L, all blocks of the tower.
      num_heads: attention heads.
      image_size: edge of the input in pixels.
      patch_size: edge of a patch in pixels.
      layer_norm_eps: eps of the norms.
      hidden_act: the activation, by its name in transformers.
      num_channels: colours of a pixel.
      image_mean: the preprocessor's mean of each colour.
      image_std: the preprocessor's standard deviation of each colour.
      images: the preprocessor's other steps (`config/images.py`); None for those of the kind (`own_images`).
      model_type: `model_type` of `to_hf`, and in this project's own files for a kind other than CLIP.
      joint_type: `model_type` of the model of images and texts that has the tower inside, under `vision_config`.
      table: the tensors (`config/tensors.py`), including those that the model does not use.
      defaults: transformers' values for absent keys.
      class_tokens: positions before the patches, which `feature_select` `patch` leaves out.
      hf_class: transformers' class of the tower, for the config of its own directory.
      label: the kind's name for readers, as in a model card.
      licence: under which the kind's weights were released, for a model card.
      image_processor: transformers' image processor for a tower's directory whose files name none.
      torch_prefixes: prefixes of the torch names in the tower's own directory; the first is written.
      unused: prefixes of the names of tensors after the layers, which the model does not use.
      elsewhere: pattern of torch names in the tower's directory that do not belong to the tower.
      original_deletes_last: whether LLaVA's own code deletes the last layer and reads the output of the layer before,
        whatever the config's feature layer is; checkpoints with such a tower inside have one layer fewer.
      dropped: pattern of torch names, below the tower's prefix, of parts that no layer of LLaVA reads; they are left
        out with a warning. "" for none.
      modules: parts of torch names -> parts of the names that transformers 5 has for them in memory, and PEFT in an
        adapter, where they differ from those of files; applied in order.
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
    images: ImageSettings | None = None

    model_type = "clip_vision_model"
    joint_type = "clip"
    table = TABLE
    defaults = _VISION_DEFAULTS
    class_tokens = 1
    hf_class = "CLIPVisionModel"
    label = "CLIP ViT"
    licence = "MIT, if it was made from OpenAI's CLIP"
    image_processor = "CLIPImageProcessor"
    torch_prefixes = ("vision_model.", "")
    unused = ("post_layernorm/",)
    original_deletes_last = False
    elsewhere = r"text_model\..*|(text|visual)_projection\.weight|logit_scale"
    dropped = ""
    modules: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self):
        for name in ("image_mean", "image_std"):
            object.__setattr__(self, name, channels("the vision config", name, getattr(self, name)))
        images = self.own_images(self.image_size) if self.images is None else ImageSettings.of(self.images)
        object.__setattr__(self, "images", images)
        check_fields(self, "vision ")
        check_activation("vision hidden_act", self.hidden_act)
        if self.hidden_size % self.num_heads:
            raise UserError(f"vision hidden_size {self.hidden_size} is not divisible by its {self.num_heads} heads")
        if self.patch_size > self.image_size:
            raise UserError(f"vision patch_size {self.patch_size} is larger than its image_size {self.image_size}")

    @classmethod
    def known(cls) -> dict[str, "VisionConfig"]:
        """Returns the towers of this kind that an original's `mm_vision_tower` may name without giving their config."""
        return {f"openai/clip-vit-large-patch14{suffix}": cls.from_hf({**_CLIP_LARGE, "image_size": size})
                for suffix, size in (("", 224), ("-336", 336))}

    @staticmethod
    def own_images(size: int) -> ImageSettings:
        """Returns the preprocessor's steps where no file states them, for an input of `size` x `size` pixels."""
        return ImageSettings()

    def in_memory(self, torch: str) -> str:
        """Returns the name in transformers 5's memory of a tensor's torch name below the tower's prefix."""
        for old, new in self.modules.items():
            torch = torch.replace(old, new)
        return torch

    def plain(self) -> "VisionConfig":
        """Returns this tower with the image settings of its kind, for directories whose files state none."""
        kind = {f.name: f.default for f in dataclasses.fields(self) if f.name in ("image_mean", "image_std", "images")}
        return dataclasses.replace(self, **kind)

    @property
    def num_patches(self) -> int:
        """The number of patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def num_positions(self) -> int:
        """The number of positions that the tower computes for an image: its class token and the patches."""
        return self.num_patches + self.class_tokens

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter of the table."""
        return dict(D=self.hidden_size, N=self.hidden_size, F=self.intermediate_size, C=self.num_channels,
                    p=self.patch_size,
                    T=self.num_positions)

    def axes(self, module: str) -> tuple[str | None, ...]:
        """Returns the logical axes of the kernel of a layer's module, by its name inside the layer."""
        return kernel_axes(self.table, module)

    def tensors(self) -> tuple[Row, ...]:
        """Returns the lines of the table that this tower has."""
        return rows(self.table)

    @property
    def head_dim(self) -> int:
        """The head width H."""
        return self.hidden_size // self.num_heads

    @property
    def normalization(self) -> tuple[tuple[float, ...], tuple[float, ...], float]:
        """Mean, standard deviation and scale: pixels are (x * scale - mean) / std of values x from 0 to 255."""
        mean, std = (self.image_mean, self.image_std) if self.images.is_normalized else ((0.0,) * 3, (1.0,) * 3)
        return mean, std, self.images.scale

    @functools.cached_property
    def pad_color(self) -> tuple[int, ...]:
        """The red, green and blue with which images are padded to a square.

        As in the originals and in transformers it follows from the mean, even if the mean is not applied. Raises
        UserError for a mean that is not a colour.
        """
        color = tuple(int(255 * mean) for mean in self.image_mean)
        if not all(0 <= value <= 255 for value in color):
            raise UserError(f"the image_mean {list(self.image_mean)} cannot be the colour of padding; numbers from 0 "
                            "to 1 were expected")
        return color

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """Reads a kind's own dict, as `CLIPVisionConfig`, or that of a joint model with one under `vision_config`.

        Raises:
          UserError: another kind of tower, or an invalid value.
        """
        config = as_object(config.get("vision_config", config), "vision_config")
        model_type = config.get("model_type", cls.model_type)
        if model_type not in (cls.model_type, cls.joint_type):
            raise UserError(f"the vision tower's model_type is {short(model_type)}; {cls.model_type} was expected")
        c = {**cls.defaults, **{k: v for k, v in config.items() if v is not None}}
        check_counts(c, [key for key in cls.defaults if key not in ("layer_norm_eps", "hidden_act")])
        return cls(c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"], c["num_attention_heads"],
                   c["image_size"], c["patch_size"], c["layer_norm_eps"], c["hidden_act"], c["num_channels"])

    def to_hf(self) -> dict:
        """Returns the `config.json` dict of a `CLIPVisionModel`."""
        return dict(model_type=self.model_type, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
                    num_hidden_layers=self.num_layers, num_attention_heads=self.num_heads, image_size=self.image_size,
                    patch_size=self.patch_size, layer_norm_eps=self.layer_norm_eps, hidden_act=self.hidden_act,
                    num_channels=self.num_channels, projection_dim=768)
