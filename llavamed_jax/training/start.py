"""Opens the checkpoint that a run starts from, with the recipe's tokenizer and template."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ml_collections import ConfigDict

from llavamed_jax.adapters.lora import adapter_of, attach
from llavamed_jax.checkpoints import hub
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import TEXT_FILES
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.config import PRESET, LlavaConfig, preset
from llavamed_jax.errors import UsageError, UserError
from llavamed_jax.text.templates import get_template
from llavamed_jax.text.tokenizer import TOKENIZERS, Tokenizer

_OF_TOKENIZERS = ("tokenizer", "added_", "special_")


def open_start(cfg: ConfigDict) -> Checkpoint:
    """Opens the checkpoint that `init` names, with the recipe's tokenizer and template, and fresh factors for `lora`.

    Kernels that its files have in few bits are widened to float32, and rounded once, to the dtype of the computation.
    A preset takes its vocabulary from the tokenizer. The run writes the template into its config, so that the model is
    asked as it was trained, except for `plain` and v1.0's `v0`, which serve for training only.

    Args:
      cfg: the recipe.

    Raises:
      UsageError: `init`, `vision_tower`, `tokenizer` or `template` is invalid.
    """
    if cfg.tokenizer is not None:
        with _naming(cfg, "tokenizer"):
            tokenizer = Tokenizer.load(cfg.tokenizer)
    if cfg.template is not None:
        with _naming(cfg, "template"):
            get_template(cfg.template)
    if cfg.init.startswith(PRESET):
        if cfg.tokenizer is None:
            raise UsageError(f"the config key 'init' is {cfg.init!r}, which has no tokenizer; set 'tokenizer' to a "
                             "tokenizer.model or a directory with one")
        with _naming(cfg, "init"):
            config = with_vocabulary(preset(cfg.init.removeprefix(PRESET)), tokenizer)
        checkpoint = random_checkpoint(config, cfg.seed)
    else:
        parts = {key: cfg[key] for key in ("init", "vision_tower") if cfg[key] is not None}
        for key, path in parts.items():
            with _naming(cfg, key):
                parts[key] = hub.local(path, may_be_bucket=key == "init")
                if not parts[key].is_dir():
                    raise UserError("the directory does not exist; a checkpoint's directory, owner/name of a hub"
                                    + (" or preset:NAME was expected" if key == "init" else " was expected"))
        checkpoint = open_checkpoint(parts["init"], parts.get("vision_tower")).widened()
    if cfg.tokenizer is not None:
        kept = {name: file for name, file in checkpoint.files.items() if not name.startswith(_OF_TOKENIZERS)}
        checkpoint = checkpoint.replace(files={**kept, **_tokenizer_files(Path(cfg.tokenizer))})
    if cfg.template is not None and not get_template(cfg.template).is_for_training_only:
        checkpoint = checkpoint.replace(config=checkpoint.config.replace(template=cfg.template))
    adapter = adapter_of(cfg)
    return checkpoint if adapter is None else attach(checkpoint, adapter, cfg.seed)


def with_vocabulary(config: LlavaConfig, tokenizer: Tokenizer) -> LlavaConfig:
    """Returns a preset's shapes with the vocabulary and the special ids of a tokenizer."""
    return config.replace(decoder=replace(
        config.decoder, vocab_size=tokenizer.vocab_size, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id))


def with_own_tokenizer(cfg: ConfigDict) -> ConfigDict:
    """Returns the recipe for a run's own directory, where `model/` already has the recipe's tokenizer."""
    own = cfg.copy_and_resolve_references()
    own.tokenizer = None
    return own


def _tokenizer_files(path: Path) -> dict[str, Path]:
    """Returns the files of `Tokenizer.load(path)` by their names in a directory.

    Only tokenizer files are returned: the model keeps its own preprocessor.
    """
    if path.is_file() and path.name not in TOKENIZERS:  # a file with a name of its own has no companion files
        return {"tokenizer.json" if path.suffix == ".json" else "tokenizer.model": path}
    directory = path if path.is_dir() else path.parent
    others = () if path.is_dir() else set(TOKENIZERS) - {path.name}
    return {name: directory / name for name in TEXT_FILES
            if name.startswith(_OF_TOKENIZERS) and name not in others and (directory / name).is_file()}


@contextlib.contextmanager
def _naming(cfg: ConfigDict, key: str) -> Iterator[None]:
    """Re-raises errors inside the block as UsageError that names the config key."""
    try:
        yield
    except (UserError, OSError) as error:  # an OSError if the name is too long for a file
        what = error.strerror if isinstance(error, OSError) else error
        raise UsageError(f"the config key {key!r} is {cfg[key]!r}: {what}") from error
