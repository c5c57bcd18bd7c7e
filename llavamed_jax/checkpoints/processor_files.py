"""The files that transformers' `AutoProcessor` reads beside an exported model: preprocessor, processor, chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.checkpoints.chat_template import chat_template
from llavamed_jax.checkpoints.files import read_json, write_json
from llavamed_jax.checkpoints.tokenizer_files import IMAGE, write_tokenizer
from llavamed_jax.config import LlavaConfig

# CLIP's preprocessing (spec 3.3), for checkpoints that carry no preprocessor_config.json of their own.
_CLIP = dict(do_convert_rgb=True, do_resize=True, resample=3, do_center_crop=True, do_rescale=True, rescale_factor=1 / 255,
             do_normalize=True)


def clip_preprocessor(cfg: LlavaConfig, files: Mapping[str, Path]) -> dict:
    """The `preprocessor_config.json` of a checkpoint's tower: its own, else what CLIP does at this size."""
    size = cfg.vision.image_size
    own = read_json(files["preprocessor_config.json"]) if "preprocessor_config.json" in files else {
        **_CLIP, "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size},
        "image_mean": list(cfg.vision.image_mean), "image_std": list(cfg.vision.image_std)}
    return {**own, "image_processor_type": "CLIPImageProcessor"}


def write_processor(cfg: LlavaConfig, files: Mapping[str, Path], out: Path) -> None:
    """Writes a `LlavaProcessor` whose ids and pixels are this project's, where `<image>` and `<pad>` are the first two rows
    that the export adds. Of text, nothing is written where `files` hold no tokenizer.

    Args:
      files: the checkpoint's own tokenizer and preprocessor files.
    Raises:
      UserError: a file cannot be read, or the tokenizer has not one piece a row of the embedding table.
    """
    is_padded = cfg.image_aspect_ratio == "pad"
    if "tokenizer.model" in files or "tokenizer.json" in files:
        write_tokenizer(cfg.decoder.vocab_size, files, out)
    # Only LLaVA's own image processor knows LLaVA's padding to a square. Square images need none, and CLIP's is older.
    kind = {"image_processor_type": "LlavaImageProcessor", "do_pad": True} if is_padded else {}
    write_json(out / "preprocessor_config.json", {**clip_preprocessor(cfg, files), **kind})
    write_json(out / "processor_config.json", dict(
        processor_class="LlavaProcessor", image_token=IMAGE, num_additional_image_tokens=1, patch_size=cfg.vision.patch_size,
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[cfg.feature_select]))
    template = chat_template(cfg)
    if template is not None:  # as a file of its own, and as versions before 4.50 look for it
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(out / "chat_template.json", {"chat_template": template})
