"""Writes the files that transformers' `AutoProcessor` reads: preprocessor, processor, tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llavamed_jax.checkpoints import preprocessor_file
from llavamed_jax.checkpoints.export.chat_template import chat_template
from llavamed_jax.checkpoints.export.tokenizer import IMAGE, write_tokenizer
from llavamed_jax.config import LlavaConfig
from llavamed_jax.utils.files import write_json


def write_processor(cfg: LlavaConfig, files: Mapping[str, Path], out: Path) -> None:
    """Writes a `LlavaProcessor` that gives this project's ids and pixels.

    `<image>` and `<pad>` have the ids of `tokenizer.ids_in_transformers`. Without a tokenizer in `files`, no tokenizer
    files are written.

    Args:
      cfg: the model's config.
      files: the checkpoint's own tokenizer and preprocessor files.
      out: the directory of the export.

    Raises:
      UserError: a file cannot be read.
    """
    if "tokenizer.model" in files or "tokenizer.json" in files:
        write_tokenizer(files, out, cfg.source == "transformers")
    write_json(out / preprocessor_file.FILE, preprocessor_file.written(cfg, is_transformers=True))
    write_json(out / preprocessor_file.PROCESSOR, dict(
        processor_class="LlavaProcessor", image_token=IMAGE, num_additional_image_tokens=cfg.vision.class_tokens,
        patch_size=cfg.vision.patch_size,
        vision_feature_select_strategy=cfg.select_strategy))
    template = chat_template(cfg)
    if template is not None:  # written twice: transformers before 4.50 reads the JSON file
        (out / "chat_template.jinja").write_text(template, encoding="utf-8")
        write_json(out / "chat_template.json", {"chat_template": template})
