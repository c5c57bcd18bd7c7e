"""The tokenizer and processor files that transformers' `AutoProcessor` reads beside an exported model."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.checkpoints.files import write_json
from llavamed_jax.config import LlavaConfig
from llavamed_jax.errors import UserError

# CLIP's preprocessing (spec 3.3), for checkpoints that carry no preprocessor_config.json of their own.
_CLIP = dict(image_processor_type="CLIPImageProcessor", do_convert_rgb=True, do_resize=True, resample=3, do_center_crop=True,
             do_rescale=True, rescale_factor=1 / 255, do_normalize=True, image_mean=[0.48145466, 0.4578275, 0.40821073],
             image_std=[0.26862954, 0.26130258, 0.27577711])


def write_processor(cfg: LlavaConfig, files: Mapping[str, Path], out: Path) -> None:
    """Writes a LLaMA tokenizer with `<image>` and `<pad>` as the first two rows that the export adds, and a `LlavaProcessor`.

    Args:
      files: the checkpoint's own tokenizer and preprocessor files; nothing of a tokenizer is written without one.
    Raises:
      UserError: the tokenizer cannot be read, or has not one piece a row of the embedding table.
    """
    size = cfg.vision.image_size
    if "preprocessor_config.json" in files:
        shutil.copyfile(files["preprocessor_config.json"], out / "preprocessor_config.json")
    else:
        write_json(out / "preprocessor_config.json", {
            **_CLIP, "size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}})
    write_json(out / "processor_config.json", dict(
        processor_class="LlavaProcessor", image_token="<image>", num_additional_image_tokens=1, patch_size=cfg.vision.patch_size,
        vision_feature_select_strategy={"patch": "default", "cls_patch": "full"}[cfg.feature_select]))
    if "tokenizer.model" in files or "tokenizer.json" in files:
        _write_tokenizer(cfg, files, out)


def _write_tokenizer(cfg: LlavaConfig, files: Mapping[str, Path], out: Path) -> None:
    from transformers import LlamaTokenizer  # takes seconds to import, and most exports of tests have no tokenizer
    with tempfile.TemporaryDirectory() as directory:
        for name, file in files.items():
            shutil.copyfile(file, Path(directory) / name)
        try:
            tokenizer = LlamaTokenizer.from_pretrained(directory, add_bos_token=True)
        except Exception as error:  # transformers raises whatever the parser that it tried last did
            raise UserError(f"the tokenizer {', '.join(map(str, files.values()))} cannot be read ({type(error).__name__})") from None
    if len(tokenizer) != cfg.decoder.vocab_size:  # <image> would not be the row that the config says it is
        raise UserError(f"the tokenizer has {len(tokenizer)} pieces; {cfg.decoder.vocab_size} were expected, "
                        "one a row of the embedding table")
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tokenizer.save_pretrained(out)
    if "tokenizer.model" in files:  # transformers 5 saves tokenizer.json alone
        shutil.copyfile(files["tokenizer.model"], out / "tokenizer.model")
