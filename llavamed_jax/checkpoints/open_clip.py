"""Reads the vision tower of a model that open_clip saved: `open_clip_config.json` and its file of weights.

The tower is a ViT of timm. Its config, image settings and tensors are translated into transformers' (`ViTConfig`,
`CLIPImageProcessor`, `ViTModel`), which all else reads. timm has query, key and value in one tensor, `attn.qkv`.

open_clip cuts the centre with torchvision, which rounds half a pixel to the even number, and transformers rounds it
down: where the resized edge exceeds the input by 3, 7, 11 … pixels, open_clip's square begins one pixel later.
LLaVA-Med prepares BiomedCLIP's images by CLIP's processor, as is done here.

Source: open_clip's `transform.py` and `timm_model.py`; `llava/model/llava.py` of LLaVA-Med v1.0; the files of
`microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config import CLIP_MEAN, CLIP_STD, RESAMPLE
from llavamed_jax.config.checks import as_object
from llavamed_jax.config.towers import TOWERS
from llavamed_jax.config.towers.vit import VitConfig
from llavamed_jax.errors import UserError, short
from llavamed_jax.utils.files import read_json

FILE = "open_clip_config.json"
_TRUNK = "visual.trunk."
# timm's names below the trunk, and transformers'.
_NAMES = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    r"patch_embed\.proj\.(\w+)": r"embeddings.patch_embeddings.projection.\1",
    r"blocks\.(\d+)\.norm1\.(\w+)": r"encoder.layer.\1.layernorm_before.\2",
    r"blocks\.(\d+)\.norm2\.(\w+)": r"encoder.layer.\1.layernorm_after.\2",
    r"blocks\.(\d+)\.attn\.proj\.(\w+)": r"encoder.layer.\1.attention.output.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc1\.(\w+)": r"encoder.layer.\1.intermediate.dense.\2",
    r"blocks\.(\d+)\.mlp\.fc2\.(\w+)": r"encoder.layer.\1.output.dense.\2",
    r"norm\.(\w+)": r"layernorm.\1",
}
_QKV = re.compile(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)")


def is_open_clip(directory: Path) -> bool:
    """Returns whether a directory holds a model that open_clip saved, and no tower of transformers beside it."""
    if not (directory / FILE).is_file():
        return False
    kind = read_json(directory / "config.json").get("model_type") if (directory / "config.json").is_file() else None
    return not isinstance(kind, str) or kind not in TOWERS


def tower_json(directory: Path) -> dict:
    """Returns the tower's config as transformers' `ViTConfig` dict.

    Raises:
      UserError: the model's tower is not a ViT of timm.
    """
    vision = _part(directory, "model_cfg", "vision_cfg")
    name = vision.get("timm_model_name")
    config = VitConfig.of_timm(name) if isinstance(name, str) else None
    if config is None:
        raise UserError(f"{directory / FILE} has timm_model_name {short(name)}; vit_base_patch16_224 (BiomedCLIP's) or "
                        "another plain ViT of timm was expected")
    return {**config.to_hf(), "image_size": vision.get("image_size", config.image_size)}


def preprocessor_json(directory: Path) -> dict:
    """Returns the image settings as the dict of a `CLIPImageProcessor`.

    Raises:
      UserError: a setting that this project does not have.
    """
    given, size = _part(directory, "preprocess_cfg"), tower_json(directory)["image_size"]
    mode, interpolation = given.get("resize_mode") or "shortest", given.get("interpolation") or "bicubic"
    for key, value, known in (("resize_mode", mode, ("shortest", "squash")),
                              ("interpolation", interpolation, ("bicubic", "bilinear"))):
        if value not in known:
            raise UserError(f"{directory / FILE} has {key} {short(value)}; {' or '.join(known)} was expected")
    edges = given.get("size") or size
    if edges not in (size, [size, size], [3, size, size]):
        raise UserError(f"{directory / FILE} has size {short(edges)} in preprocess_cfg; {short(size)}, the vision "
                        "tower's, was expected")
    square = {"height": size, "width": size}
    return dict(image_processor_type="CLIPImageProcessor",
                size={"shortest_edge": size} if mode == "shortest" else square, do_center_crop=mode == "shortest",
                crop_size=square, resample=RESAMPLE.index(interpolation),
                image_mean=given.get("mean") or list(CLIP_MEAN), image_std=given.get("std") or list(CLIP_STD))


def tower_tensors(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tower's tensors under transformers' names; those of the text half and of the projection are left out.

    Args:
      found: the tensors of open_clip's file by their names there.
    """
    out = {}
    for key, tensor in found.items():
        if not key.startswith(_TRUNK):
            if key.startswith("visual.") and not key.startswith("visual.head."):
                out[key] = tensor  # an unexpected part of the tower, which is named
            continue
        name = key.removeprefix(_TRUNK)
        if fused := _QKV.fullmatch(name):
            for i, part in enumerate(("query", "key", "value")):
                out[f"encoder.layer.{fused[1]}.attention.attention.{part}.{fused[2]}"] = _third(tensor, i)
        else:
            new = next((re.sub(old, new, name) for old, new in _NAMES.items() if re.fullmatch(old, name)), key)
            out[new] = tensor
    return out


def _third(tensor: Tensor, i: int) -> Tensor:
    rows = tensor.shape[0] // 3
    return dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]),
                               load=lambda: tensor.load()[i * rows:(i + 1) * rows])


def _part(directory: Path, *keys: str) -> dict[str, Any]:
    value = read_json(directory / FILE)
    try:
        for key in keys:
            value = as_object(value.get(key, {}), key)
    except UserError as error:
        raise UserError(f"{directory / FILE}: {error}") from None
    return value
