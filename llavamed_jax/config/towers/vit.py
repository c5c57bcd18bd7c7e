"""The plain vision transformer: its config and its tensors. BiomedCLIP's tower is one, ViT-B/16 at 224 pixels.

It differs from CLIP's in what follows: it has no norm before the layers, its patches have a bias, and its activation is
the exact GELU. The torch names are those of transformers' ViTModel; `checkpoints/open_clip.py` maps timm's names in
open_clip's files to them. Those are the names of files; since transformers 5 its modules have others (`modules`).

Source: transformers' ViTModel; of BiomedCLIP, its repository's `open_clip_config.json`, timm's
`vit_base_patch16_224` (`timm/models/vision_transformer.py`), and `llava/model/llava.py` of LLaVA-Med v1.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from llavamed_jax.config.images import ImageSettings
from llavamed_jax.config.towers.clip import CLIP_MEAN, CLIP_STD, VisionConfig
from llavamed_jax.errors import UserError, short

BIOMEDCLIP = "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
# Width, feed-forward width, layers and heads of timm's `vit_NAME_patchP_SIZE`.
_TIMM = {"tiny": (192, 768, 12, 3), "small": (384, 1536, 12, 6), "base": (768, 3072, 12, 12),
         "large": (1024, 4096, 24, 16)}
TABLE = """
embeddings/cls_token                     embeddings.cls_token                             1 1 D
embeddings/patch_embedding/kernel        embeddings.patch_embeddings.projection.weight    p p C D
embeddings/patch_embedding/bias          embeddings.patch_embeddings.projection.bias      D
embeddings/position_embeddings           embeddings.position_embeddings                   1 T D
layers_#/layer_norm1/scale               encoder.layer.#.layernorm_before.weight          D
layers_#/layer_norm1/bias                encoder.layer.#.layernorm_before.bias            D
layers_#/self_attn/q_proj/kernel         encoder.layer.#.attention.attention.query.weight D N
layers_#/self_attn/q_proj/bias           encoder.layer.#.attention.attention.query.bias   N
layers_#/self_attn/k_proj/kernel         encoder.layer.#.attention.attention.key.weight   D N
layers_#/self_attn/k_proj/bias           encoder.layer.#.attention.attention.key.bias     N
layers_#/self_attn/v_proj/kernel         encoder.layer.#.attention.attention.value.weight D N
layers_#/self_attn/v_proj/bias           encoder.layer.#.attention.attention.value.bias   N
layers_#/self_attn/out_proj/kernel       encoder.layer.#.attention.output.dense.weight    N D
layers_#/self_attn/out_proj/bias         encoder.layer.#.attention.output.dense.bias      D
layers_#/layer_norm2/scale               encoder.layer.#.layernorm_after.weight           D
layers_#/layer_norm2/bias                encoder.layer.#.layernorm_after.bias             D
layers_#/mlp/fc1/kernel                  encoder.layer.#.intermediate.dense.weight        D F
layers_#/mlp/fc1/bias                    encoder.layer.#.intermediate.dense.bias          F
layers_#/mlp/fc2/kernel                  encoder.layer.#.output.dense.weight              F D
layers_#/mlp/fc2/bias                    encoder.layer.#.output.dense.bias                D
layernorm/scale                          layernorm.weight                                 D
layernorm/bias                           layernorm.bias                                   D
"""


@dataclass(frozen=True)
class VitConfig(VisionConfig):
    """A plain ViT; attributes as in `VisionConfig`."""

    layer_norm_eps: float = 1e-12
    hidden_act: str = "gelu"
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    model_type = "vit"
    joint_type = "vit"
    table = TABLE
    defaults = {**VisionConfig.defaults, "patch_size": 16, "layer_norm_eps": 1e-12, "hidden_act": "gelu"}
    hf_class = "ViTModel"
    label = "ViT"
    licence = "MIT, if it was made from Microsoft's BiomedCLIP; Apache-2.0, if it was made from Google's ViT"
    image_processor = "ViTImageProcessor"
    torch_prefixes = ("", "vit.")
    unused = ("layernorm/",)
    elsewhere = r"classifier\..*"
    dropped = r"pooler\..*"
    modules = {"encoder.layer.": "layers.", "attention.attention.query.": "attention.q_proj.",
               "attention.attention.key.": "attention.k_proj.", "attention.attention.value.": "attention.v_proj.",
               "attention.output.dense.": "attention.o_proj.", "intermediate.dense.": "mlp.fc1.",
               "output.dense.": "mlp.fc2."}

    @classmethod
    def from_hf(cls, config) -> VisionConfig:
        """Reads a `ViTConfig` dict. Raises UserError as `VisionConfig.from_hf`, and for projections without biases."""
        if config.get("qkv_bias", True) is not True:
            raise UserError(f"the vision tower's qkv_bias is {short(config['qkv_bias'])}; true was expected")
        return super().from_hf(config)

    @classmethod
    def known(cls) -> dict[str, VisionConfig]:
        """Returns BiomedCLIP's tower, with LLaVA-Med's image settings for it, which are CLIP's."""
        return {BIOMEDCLIP: cls.of_timm("vit_base_patch16_224")}

    @classmethod
    def of_timm(cls, name: str) -> "VitConfig | None":
        """Returns the tower of a timm model with the image settings of CLIP; None for another kind of model."""
        found = re.fullmatch(r"vit_([a-z]+)_patch(\d+)_(\d+)", name)
        if found is None or found[1] not in _TIMM:
            return None
        return cls(*_TIMM[found[1]], int(found[3]), int(found[2]), 1e-6, image_mean=CLIP_MEAN, image_std=CLIP_STD,
                   images=ImageSettings())

    @staticmethod
    def own_images(size: int) -> ImageSettings:
        """Returns the steps of `ViTImageProcessor`: images become squares whatever their shape."""
        return ImageSettings((size, size), is_cropped=False, resample="bilinear")

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter of the table."""
        return {**super().sizes, "1": 1}

    def to_hf(self) -> dict:
        """Returns the `config.json` dict of a `ViTModel`."""
        out = {**super().to_hf(), "qkv_bias": True}
        del out["projection_dim"]
        return out


def is_biomedclip(name: str | None) -> bool:
    """Returns whether an original's `mm_vision_tower` names BiomedCLIP, by LLaVA-Med v1.0's own rule."""
    return name is not None and ("BiomedCLIP" in name or "biomed_clip" in name)
