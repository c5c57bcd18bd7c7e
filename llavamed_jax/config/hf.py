"""Converts LlavaConfig from and to the `config.json` of each PyTorch layout.

Settings that a layout has no key for are stored under one key of this project's own (`OURS`).
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamed_jax.config.checks import as_object, token_ids
from llavamed_jax.config.decoders import DECODERS, decoder_from_hf, kind_of_original
from llavamed_jax.config.decoders.llama import DecoderConfig
from llavamed_jax.config.model import OURS, LlavaConfig, projector_depth
from llavamed_jax.config.towers import KNOWN_TOWERS, known_name, tower_from_hf
from llavamed_jax.config.towers.clip import VisionConfig
from llavamed_jax.config.towers.vit import is_biomedclip
from llavamed_jax.errors import UserError, short

# Keys of a source's config.json that LlavaConfig models; all others are kept in `extra`.
_ORIGINAL_KEYS = {
    "model_type", "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature", "image_aspect_ratio",
    "tokenizer_model_max_length", "mm_use_im_start_end", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
        "rope_parameters", "rope_scaling", "max_position_embeddings", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "tie_word_embeddings", "hidden_act", "attention_bias", "mlp_bias",
    "bos_token_id", "eos_token_id", "pad_token_id", "mm_hidden_size", "dtype", "torch_dtype", "quantization_config",
    OURS,
}
_TRANSFORMERS_KEYS = {
    "model_type", "text_config", "vision_config", "projector_hidden_act", "multimodal_projector_bias",
    "vision_feature_layer", "vision_feature_select_strategy", "image_token_index", "image_token_id", "image_seq_length",
    "tie_word_embeddings", "eos_token_id", "dtype", "torch_dtype", "quantization_config", OURS,
}
# Keys besides the model's shape that the original's loader reads, for models from other layouts.
_ORIGINAL_DEFAULTS = {
    "use_mm_proj": True, "use_cache": True,
    "mm_use_im_patch_token": False, "mm_patch_merge_type": "flat", "tokenizer_padding_side": "right",
}
# `llava/eval/model_vqa.py` of LLaVA-Med v1.0 writes these into a v0 config, which has no vision keys. It does not write
# the feature layer, which therefore has the code's default of -1.
_V0_DEFAULTS = {"use_mm_proj": True, "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_hidden_size": 1024}
# Values of `image_aspect_ratio` that split an image into several inputs of the tower (LLaVA-NeXT's `process_images`,
# `anyres_max_9` among them).
_TILES = re.compile("anyres|highres|crop_split")
# What joins a plain decoder with a tower, for errors.
BUILD = "`convert build --decoder PATH --vision TOWER` joins it with a tower"
# An original's file always states these keys; for transformers' own class, published configs rely on its defaults.
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "rms_norm_eps")


def llava_from_hf(config: Mapping[str, Any], vision: VisionConfig | None = None) -> LlavaConfig:
    """Reads the `config.json` of a released checkpoint.

    Args:
      config: has `model_type` `llava_mistral`, `llava_llama`, `llava` with or `llama` without `mm_*` keys (v0), or is
        transformers' own `llava`.
      vision: the tower's shape, which the originals store in the tower's own directory; None for transformers' layout,
        which has it inside.

    Raises:
      UserError: another architecture, or an original layout with a tower that is neither given nor known by name.
    """
    if is_transformers(config):
        return from_transformers(config)
    if is_original(config):
        return from_original(config, vision)
    kind = config.get("model_type")
    if isinstance(kind, str) and kind in DECODERS:
        raise UserError(f"config.json has model_type {short(kind)}, so it is a plain decoder: {BUILD}")
    raise UserError(f"config.json has model_type {short(kind)}; llava_mistral, llava_llama, llava_qwen or llava was "
                    "expected")


def llava_to_hf(cfg: LlavaConfig, layout: str, ids: tuple[int, int] | None = None) -> dict[str, Any]:
    """Makes the `config.json` of an export.

    Args:
      cfg: the model's config.
      layout: `transformers` or `llava` (the original's own).
      ids: ids of `<image>` and `<pad>` in transformers' layout, for a model without these tokens; None uses the first
        two ids after its table.

    Raises:
      UserError: another layout.
    """
    if layout == "transformers":
        return to_transformers(cfg, ids)
    if layout == "llava":
        return to_original(cfg)
    raise UserError(f"the layout {short(layout)} does not exist; transformers or llava was expected")


def _extra(config: Mapping[str, Any], modelled: set[str]) -> str:
    return json.dumps({k: v for k, v in config.items() if k not in modelled}, sort_keys=True)


def is_transformers(config: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` is transformers' own `llava`, whose `model_type` the first originals share."""
    return config.get("model_type") == "llava" and any(
        key in config for key in ("text_config", "vision_config", "image_token_index", "image_token_id"))


def is_original(config: Mapping[str, Any]) -> bool:
    """Returns whether a config has an original's layout; with `llama` only the tensors tell v0 from a plain decoder."""
    kind = config.get("model_type")
    is_of_a_kind = kind_of_original(kind) is not None and kind not in DECODERS
    return (kind in ("llava", "llama") or is_of_a_kind) and not is_transformers(config)


def not_obeyed(config: Mapping[str, Any]) -> list[str]:
    """Returns sentences about settings of a `config.json` that its own code applies and this project does not."""
    parts = [(key, config[key]) for key in ("text_config", "vision_config") if isinstance(config.get(key), Mapping)]
    out = []
    for where, part in [("", config), *((f"{key}.", part) for key, part in parts)]:
        for key in ("attention_dropout", "dropout"):
            if part.get(key):
                out.append(f"config.json has {where}{key} {short(part[key])}; this project trains without "
                           "dropout")
        if part.get("quantization_config") and not (part is config and is_packed(config)):
            out.append(f"config.json has {where}quantization_config, which is not applied: the weights are taken as "
                       "they are in the files")
    return out


def is_packed(config: Mapping[str, Any]) -> bool:
    """Returns whether a `config.json` describes kernels of compressed-tensors' `pack-quantized`."""
    found = config.get("quantization_config")
    return (isinstance(found, Mapping) and found.get("quant_method") == "compressed-tensors"
            and found.get("format") == "pack-quantized")


def tower_name(config: Mapping[str, Any]) -> str | None:
    """Returns the vision tower that an original's `config.json` names; UserError if the name is not text."""
    name = config.get("mm_vision_tower") or config.get("vision_tower") or (
        _V0_DEFAULTS["mm_vision_tower"] if config.get("model_type") in ("llava", "llama") else None)
    if not isinstance(name, str | None):
        raise UserError(f"config.json has mm_vision_tower {short(name)}; a model's name or a directory was expected")
    return name


def own_tower_name(cfg: LlavaConfig) -> str | None:
    """Returns the tower's name in a model's source, else the stock tower of its shape; None if there is neither."""
    said = json.loads(cfg.extra) if cfg.source != "transformers" else {}
    return tower_name(said) or _known_by_shape(cfg.vision)


def _writable_tower(name: str | None) -> str:
    """Returns the tower's name in a v1.0 export, which puts the tower into a directory of the name's last part."""
    return name if name and re.fullmatch(r"(?!\.{1,2}$)[\w.()+@ -]{1,200}", Path(name).name) else "vision_tower"


def _stock_tower(vision: VisionConfig) -> str:
    """Names a tower that came without a name after the stock tower of its shape, which the original can fetch."""
    return _known_by_shape(vision) or "vision_tower"


def _known_by_shape(vision: VisionConfig) -> str | None:
    return next((name for name, known in KNOWN_TOWERS.items() if known == vision), None)


def plain_decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Reads a decoder's config from the `config.json` of LLaMA, Vicuna or Mistral, or from its keys in an original's.

    Raises:
      UserError: another architecture, missing keys, or settings that this model does not have.
    """
    kind = config.get("model_type")
    architecture = "llama" if kind == "llava" else kind_of_original(kind)
    if architecture is None:
        raise UserError(f"config.json has model_type {short(kind)}; one of {', '.join(DECODERS)} was expected")
    required = (*_REQUIRED, "num_key_value_heads") if architecture == "mistral" else _REQUIRED
    lacking = [key for key in required if config.get(key) is None]
    if lacking not in ([], ["rms_norm_eps"]):  # for eps the first LLaVAs relied on transformers' default
        raise UserError(f"config.json lacks {', '.join(lacking)}")
    config = mended_ids(architecture, config)
    if isinstance(config.get("pad_token_id"), int) and config["pad_token_id"] < 0:
        config["pad_token_id"] = None
    return decoder_from_hf(config, architecture)


def mended_ids(architecture: str, config: Mapping[str, Any]) -> dict:
    """Returns the keys of a config or generation_config, with the ids of LLaMA's tokenizer corrected.

    The first conversions of LLaMA wrote other ids, with which no answer would end.
    """
    is_wrong = architecture == "llama" and (config.get("bos_token_id"), config.get("eos_token_id")) == (0, 1)
    return {**config, **({"bos_token_id": 1, "eos_token_id": 2} if is_wrong else {})}


def joined(decoder: DecoderConfig, vision: VisionConfig, projector_type: str, tower: str,
           uses_image_tokens: bool, feature_layer: int = -2, feature_select: str = "patch") -> LlavaConfig:
    """Joins the configs of a plain decoder and a tower as the original's scripts do.

    Mistral gives LLaVA-Med v1.5; LLaMA gives v1.0 with image tokens, and LLaVA-1.5 without.

    Args:
      decoder: the decoder's config.
      vision: the tower's config.
      projector_type: `linear`, `mlpNx_gelu` or `identity`.
      tower: the tower's name in an export.
      uses_image_tokens: whether images stand between `<im_start>` and `<im_end>`.
      feature_layer: the tower's hidden state that the projector reads.
      feature_select: which of its positions.
    """
    source = "llava" if decoder.architecture == "llama" and uses_image_tokens else decoder.original_type
    extra = {**_ORIGINAL_DEFAULTS, "architectures": [decoder.original_class], "mm_vision_tower": tower,
             "mm_use_im_patch_token": uses_image_tokens}
    return LlavaConfig(vision, decoder, projector_type, feature_layer=feature_layer, feature_select=feature_select,
                       image_aspect_ratio="square" if source == "llava" else "pad",
                       use_start_end=uses_image_tokens, source=source, extra=json.dumps(extra, sort_keys=True))


def from_original(config: Mapping[str, Any], vision: VisionConfig | None) -> LlavaConfig:
    """Reads the originals' own layout: LLaVA-Med v1.5, v1.0, v0 or LLaVA-1.5.

    Args:
      config: the content of `config.json`.
      vision: the tower's config; None takes it from the config or from the tower's name.

    Raises:
      UserError: settings that this model does not have, or a tower of unknown shape.
    """
    kind, ours = config["model_type"], as_object(config.get(OURS, {}), OURS)
    if tower_name(config) is None:
        raise UserError("config.json lacks mm_vision_tower")
    if kind in ("llava", "llama") and "mm_vision_tower" not in config:
        config = {**_V0_DEFAULTS, **config, "mm_vision_tower": tower_name(config)}
    tower, projector = tower_name(config), config.get("mm_projector_type", "linear")
    if kind == "llama":
        kind = "llava"
    if kind == "llava" and projector != "linear" and not config.get("mm_use_im_start_end"):
        kind = "llava_llama"  # LLaVA-1.5 from before transformers used the name `llava`
    if vision is None:
        shape = ours.get("vision_config")
        vision = tower_from_hf(as_object(shape, "vision_config")) if shape else KNOWN_TOWERS.get(known_name(tower))
        if vision is None:
            raise UserError(f"the shape of the vision tower {short(tower)} is unknown; its directory was expected as "
                            "vision_tower=PATH")
    ratio = config.get("image_aspect_ratio")
    if not isinstance(ratio, str | None) or _TILES.match(ratio or ""):
        later = " (LLaVA-1.6 and later)" * isinstance(ratio, str)
        raise UserError(f"image_aspect_ratio is {short(ratio)}{later}; pad or square was expected")
    if config.get("s2"):
        raise UserError(f"s2 is {short(config['s2'])} (a tower at several scales); one scale was expected")
    if config.get("mm_resampler_type") not in (None, "identity"):
        raise UserError(f"mm_resampler_type is {short(config['mm_resampler_type'])}; a projector without a resampler "
                        "was expected")
    layer, select = config.get("mm_vision_select_layer", -1), config.get("mm_vision_select_feature", "patch")
    if is_biomedclip(tower):  # v1.0 indexes a list of the last three blocks' outputs, without the class token
        if layer not in range(-3, 3):
            raise UserError(f"mm_vision_select_layer is {short(layer)}; -3, -2 or -1 was expected with BiomedCLIP, of "
                            "which the original computes the last three layers")
        layer, select = layer - 3 * (layer >= 0), "patch"
    if vision.original_deletes_last:
        stated = as_object(ours.get("vision_config") or {}, "vision_config")
        if not stated:
            layer, select = -2, "patch"  # the original reads neither key
        elif layer == -1 and stated.get("num_hidden_layers") == vision.num_layers - 1:
            layer = -2  # the whole tower in place of one without its last layer
    return LlavaConfig(
        vision=vision, decoder=plain_decoder(config), projector_type=projector,
        feature_layer=layer,  # -1 is the original's code default
        feature_select=select,
        image_aspect_ratio="pad" if config.get("image_aspect_ratio") == "pad" else "square",
        max_length=_max_length(config.get("tokenizer_model_max_length")),
        use_start_end=bool(config.get("mm_use_im_start_end", False)),
        template=ours.get("template"), source=kind, image_token_id=ours.get("image_token_id"),
        extra=_extra(config, _ORIGINAL_KEYS))


def _max_length(value):
    """Returns the longest prompt in tokens; None for no limit, which transformers writes as 1e30 (float or int)."""
    return None if isinstance(value, int | float) and value >= 1e18 else value


def to_original(cfg: LlavaConfig) -> dict:
    """Returns the `config.json` for the original's loader. UserError if it would fill the projector at random."""
    if not cfg.projector_bias and cfg.projector_type != "identity":
        raise UserError("this model's projector has no biases, but the original's code needs them; use --layout "
                        "transformers")
    if cfg.projector_act != "gelu" and projector_depth(cfg.projector_type) > 1:
        raise UserError(f"this model's projector has the activation {cfg.projector_act}, but the original's code "
                        "applies GELU; use --layout transformers")
    is_theirs = cfg.source != "transformers"  # only then do the extra keys belong to this layout
    kind = cfg.source if is_theirs else cfg.decoder.original_type
    architectures = [cfg.decoder.original_class]
    travelled = (json.loads(cfg.extra) if is_theirs else {}) or {
        **_ORIGINAL_DEFAULTS, "architectures": architectures, "mm_vision_tower": _stock_tower(cfg.vision)}
    if kind == "llava":
        travelled["mm_vision_tower"] = _writable_tower(travelled.get("mm_vision_tower"))
    return {
        **cfg.decoder.to_hf(), **travelled,
        "model_type": kind, "mm_hidden_size": cfg.vision.hidden_size, "mm_projector_type": cfg.projector_type,
        "mm_vision_select_layer": cfg.feature_layer, "mm_vision_select_feature": cfg.feature_select,
        "mm_use_im_start_end": cfg.use_start_end, "image_aspect_ratio": cfg.image_aspect_ratio,
        "tokenizer_model_max_length": cfg.max_length,
        OURS: dict(vision_config=cfg.vision.to_hf(), template=cfg.template, image_token_id=cfg.image_token_id),
    }


def from_transformers(config: Mapping[str, Any]) -> LlavaConfig:
    """Reads transformers' `llava` (`LlavaConfig`), of any of its generations.

    Raises:
      UserError: settings that this model does not have.
    """
    layer = config.get("vision_feature_layer", -2)
    layer = layer[0] if isinstance(layer, list) and len(layer) == 1 else layer
    if isinstance(layer, list):
        raise UserError(f"vision_feature_layer is {short(layer)}, which concatenates the features of several layers; "
                        "one layer was expected")
    strategy = config.get("vision_feature_select_strategy", "default")
    select = {"default": "patch", "full": "cls_patch"}.get(str(strategy))
    if select is None:
        raise UserError(f"vision_feature_select_strategy is {short(strategy)}; default or full was expected")
    text = config.get("text_config")
    text = as_object({"model_type": "llama"} if text is None else text, "text_config")  # transformers' default
    if config.get("eos_token_id") is not None:  # generate reads the outer one first
        text["eos_token_id"] = config["eos_token_id"]
    # transformers 5 ties if either config says so; older versions, which read the text config, wrote the same in both.
    text["tie_word_embeddings"] = bool(text.get("tie_word_embeddings") or config.get("tie_word_embeddings"))
    vision = config.get("vision_config")
    # Without a vision_config transformers takes this one; absent keys of a vision_config have its kind's defaults.
    vision = (KNOWN_TOWERS["openai/clip-vit-large-patch14-336"] if vision is None
              else tower_from_hf(as_object(vision, "vision_config")))
    if select == "patch" and not vision.class_tokens:
        raise UserError(f"vision_feature_select_strategy is {short(strategy)}, which drops the class token, but the "
                        f"tower {vision.model_type} has no class token; full was expected")
    ours = as_object(config.get(OURS, {}), OURS)
    cfg = LlavaConfig(
        vision=vision, decoder=decoder_from_hf(text),
        projector_type="mlp2x_gelu", projector_act=config.get("projector_hidden_act") or "gelu",
        projector_bias=config.get("multimodal_projector_bias", True), feature_layer=layer,
        feature_select=select, image_aspect_ratio=ours.get("image_aspect_ratio", "square"),
        max_length=ours.get("max_length"), use_start_end=ours.get("use_start_end", False),
        template=ours.get("template"),
        source=ours.get("source", "transformers"),
        image_token_id=config.get("image_token_index", config.get("image_token_id", 32000)),
        extra=(json.dumps(as_object(ours["extra"], "extra"), sort_keys=True) if "extra" in ours
               else _extra(config, _TRANSFORMERS_KEYS)))
    # Removes the rows that this project's export added for <image> and <pad>, unless the table was resized since.
    rows = ours.get("vocab_size", cfg.decoder.vocab_size)
    bare = cfg.replace(image_token_id=None, decoder=dataclasses.replace(cfg.decoder, vocab_size=rows))
    ids = token_ids(ours.get("added_ids", [rows, rows + 1]), f"{OURS}.added_ids")
    is_ours = bool(ids) and ids[0] == cfg.image_token_id and bare.rows_in_transformers(ids) == cfg.decoder.vocab_size
    return bare if is_ours else cfg


def to_transformers(cfg: LlavaConfig, ids: tuple[int, int] | None = None) -> dict:
    """Returns the `config.json` of a LlavaForConditionalGeneration (`llava_to_hf`); UserError for other projectors."""
    if cfg.projector_type != "mlp2x_gelu":
        raise UserError(f"this model's projector is {short(cfg.projector_type)}, but transformers' llava layout can "
                        "hold only a two-layer projector; use --layout llava")
    vocabulary, has_image = cfg.decoder.vocab_size, cfg.image_token_id is not None
    ids = ids or (vocabulary, vocabulary + 1)
    image_token, pad_token = (cfg.image_token_id, cfg.decoder.pad_token_id) if has_image else ids
    is_theirs = cfg.source == "transformers"
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "pad_token_id": pad_token,
        **(json.loads(cfg.extra) if is_theirs else {}),
        "model_type": "llava",
        "text_config": {**cfg.decoder.to_hf(), "vocab_size": cfg.rows_in_transformers(ids),
                        "architectures": [cfg.decoder.hf_class]},  # vLLM finds the decoder's code by it
        "vision_config": cfg.vision.to_hf(), "projector_hidden_act": cfg.projector_act,
        "multimodal_projector_bias": cfg.projector_bias,
        "vision_feature_layer": cfg.feature_layer,
        "vision_feature_select_strategy": cfg.select_strategy,
        "image_token_index": image_token, "image_token_id": image_token, "image_seq_length": cfg.tokens_per_image,
        "tie_word_embeddings": cfg.decoder.tie_word_embeddings,
        OURS: dict(image_aspect_ratio=cfg.image_aspect_ratio, max_length=cfg.max_length,
                   use_start_end=cfg.use_start_end,
                   template=cfg.template, source=cfg.source, vocab_size=vocabulary,
                   added_ids=None if has_image else list(ids),
                    extra=json.loads(cfg.extra)),
    }
