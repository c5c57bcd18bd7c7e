"""The vision transformer of SigLIP and of SigLIP 2 of one resolution: its config, its tensors, and known towers.

Differences from CLIP's tower: it has no class token and no norm before the layers, its patches have a bias, its
activation is the tanh approximation of GELU, and images are squeezed to a square and normalised by 0.5. LLaVA reads
hidden states of the layers before `post_layernorm`, as transformers and LLaVA-NeXT do. None of them reads the attention
pooling. LLaVA-NeXT deletes the last layer before it trains, and takes the output of the last one that is left.

Source: transformers' SiglipVisionModel; LLaVA-NeXT's `llava/model/multimodal_encoder/siglip_encoder.py`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from llavamed_jax.config.images import ImageSettings
from llavamed_jax.config.towers.clip import TABLE, VisionConfig

HALVES = (0.5, 0.5, 0.5)
# Width, feed-forward width, layers and heads, by the name in `google/siglip-NAME-patch…`.
_SHAPES = {"base": (768, 3072, 12, 12), "large": (1024, 4096, 24, 16), "so400m": (1152, 4304, 27, 16),
           "giant-opt": (1536, 6144, 40, 16)}
_SIGLIP = ("base-patch16-224", "base-patch16-256", "base-patch16-256-multilingual", "base-patch16-384",
           "base-patch16-512", "large-patch16-256", "large-patch16-384", "so400m-patch14-224", "so400m-patch14-384",
           "so400m-patch16-256-i18n")
_SIGLIP2 = ("base-patch16-224", "base-patch16-256", "base-patch16-384", "base-patch16-512", "base-patch32-256",
            "large-patch16-256", "large-patch16-384", "large-patch16-512", "so400m-patch14-224", "so400m-patch14-384",
            "so400m-patch16-256", "so400m-patch16-384", "so400m-patch16-512", "giant-opt-patch16-256",
            "giant-opt-patch16-384")


@dataclass(frozen=True)
class SiglipConfig(VisionConfig):
    """A SigLIP tower; attributes as in `VisionConfig`."""

    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    image_mean: tuple[float, ...] = HALVES
    image_std: tuple[float, ...] = HALVES

    model_type = "siglip_vision_model"
    joint_type = "siglip"
    table = "\n".join(line for line in TABLE.splitlines() if not line.startswith(
        ("pre_layrnorm", "embeddings/class"))) + "\nembeddings/patch_embedding/bias embeddings.patch_embedding.bias D\n"
    defaults = {**VisionConfig.defaults, "patch_size": 16, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
    class_tokens = 0
    hf_class = "SiglipVisionModel"
    label = "SigLIP ViT"
    licence = "Apache-2.0, if it was made from Google's SigLIP or SigLIP 2"
    image_processor = "SiglipImageProcessor"
    original_deletes_last = True
    elsewhere = r"text_model\..*|logit_(scale|bias)"
    dropped = r"head\..*"

    @classmethod
    def known(cls) -> dict[str, VisionConfig]:
        """Returns Google's towers by name; those of SigLIP 2 resize with another filter."""
        out = {}
        for generation, names, resample in (("siglip", _SIGLIP, "bicubic"), ("siglip2", _SIGLIP2, "bilinear")):
            for name in names:
                size, patch, edge = name.split("-patch")[0], *map(int, name.split("-patch")[1].split("-")[:2])
                images = dataclasses.replace(cls.own_images(edge), resample=resample)
                out[f"google/{generation}-{name}"] = cls(*_SHAPES[size], edge, patch, images=images)
        return out

    @staticmethod
    def own_images(size: int) -> ImageSettings:
        """Returns the steps of `SiglipImageProcessor`: images become squares whatever their shape."""
        return ImageSettings((size, size), is_cropped=False)

    def to_hf(self) -> dict:
        """Returns the `config.json` dict of a `SiglipVisionModel` without its pooling head."""
        out = {**super().to_hf(), "vision_use_head": False}
        del out["projection_dim"]
        return out
