"""The files that transformers' `AutoProcessor` reads beside an exported model: preprocessor, processor, chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.checkpoints import preprocessor_file
from llavamed_jax.checkpoints.export.chat_template import chat_template
from llavamed_jax.checkpoints.export.tokenizer import IMAGE, write_tokenizer
from llavamed_jax.config import LlavaConfig
from llavamed_jax.utils.files import write_json


def write_processor(cfg: LlavaConfig, files: Mapping[str, Path], out: Path) -> None:
    """Writes a `LlavaProcessor` whose ids and pixels are this project's, where `<image>` and `<pad>` have the ids of
    `tokenizer_files.ids_in_transformers`. Of text, nothing is written where `files` hold no tokenizer.

    Args:
      files: the checkpoint's own tokenizer and preprocessor files.

    Raises:
      UserError: a file cannot be read.
    """
    if "tokenizer.model" in files or "tokenizer.json" in files:
        write_tokenizer(files, out)
    write_json(out / preprocessor_file.FILE, preprocessor_file.written(cfg, is_transformers=True))
    write_json(out / preprocessor_file.PROCESSOR, dict(
        processor_class="LlavaProcessor", image_token=IMAGE, num_additional_image_tokens=cfg.vision.class_tokens,
        patch_size=cfg.vision.patch_size,
        vision_feature_select_strategy=cfg.select_strategy))
    template = chat_template(cfg)
    if template is not None:  # as a file of its own, and as versions before 4.50 look for it
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(out / "chat_template.json", {"chat_template": template})
