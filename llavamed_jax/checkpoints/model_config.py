"""Reads the config of a checkpoint of any kind, without its weights and without jax."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path

from llavamed_jax.checkpoints import hub
from llavamed_jax.checkpoints.generation_file import FILE as GENERATION
from llavamed_jax.checkpoints.generation_file import with_stop_ids
from llavamed_jax.checkpoints.preprocessor_file import check, has_settings, with_image_settings
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import has_weights, read_weights, refuse_adapter
from llavamed_jax.checkpoints.torch.tower import check_width, fetch_tower, find_tower, tower_config
from llavamed_jax.checkpoints.torch.tower_shape import (
    is_tower,
    known_shape,
    shape_of_tensors,
    without_last_layer,
)
from llavamed_jax.config import OURS, PRESET, LlavaConfig, VisionConfig, as_object, preset
from llavamed_jax.config.hf import is_transformers, llava_from_hf, tower_name
from llavamed_jax.config.towers import known_name
from llavamed_jax.errors import UserError, at
from llavamed_jax.utils.files import read_json

TEXT_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
              "added_tokens.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json",
              GENERATION)


def read_config(path: str | Path, vision_tower: str | Path | None = None) -> LlavaConfig:
    """Reads the config of a checkpoint of any kind.

    Weight files need not exist. Their headers are read only if nothing else gives the tower's shape.

    Args:
      path: as for `open_checkpoint`.
      vision_tower: as for `open_checkpoint`.

    Raises:
      UserError: as `open_checkpoint`, except for errors of the tensors.
    """
    path, kind = kind_of(path, weights=False)
    vision_tower = None if vision_tower is None else hub.local(vision_tower, weights=False)
    if kind == "torch":
        return torch_config(Path(path), vision_tower, lambda: read_weights(Path(path)))[0]
    config = preset(path.removeprefix(PRESET)) if kind == "preset" else tree_config(Path(path))
    return config if vision_tower is None else replace_tower(config, vision_tower)


def tree_root(path: Path) -> Path:
    """Returns the tree that a PATH belongs to: DIR for `DIR/checkpoints/STEP`, else the path itself."""
    return path.parents[1] if path.parent.name == "checkpoints" else path


def tree_config(path: Path) -> LlavaConfig:
    """Reads the config of this project's own tree or of one of its steps. Raises UserError for an invalid one."""
    file = tree_root(path) / "model" / "config.json"
    try:
        config = LlavaConfig.from_dict(read_json(file))
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is not a config of this project: {error}") from None
    config = config.replace(decoder=with_stop_ids(config.decoder, file.parent))
    return with_image_settings(config, file.parent, config.source == "transformers")


def kind_of(path: str | Path, weights: bool = True) -> tuple[str, str]:
    """Returns a PATH as text, and its kind; fetches a model that the PATH names on a hub or in a bucket.

    Args:
      path: as for `open_checkpoint`.
      weights: False fetches no weights.

    Returns:
      The path of the directory, or the preset's name with its prefix, and `preset`, `tree` or `torch` (a PyTorch
      layout).

    Raises:
      UserError: there is no such directory.
    """
    if str(path).startswith(PRESET):
        return str(path), "preset"
    # A step of a tree need not exist here: opening it raises its own error.
    try:
        is_here = (tree_root(Path(path)) / "model").is_dir()
        directory = Path(path) if is_here else hub.local(path, weights, may_be_bucket=True)
    except OSError as error:  # the path is not a valid file name
        raise at(path, f"{str(path)[:80]!r} cannot be opened: {error.strerror}") from None
    if (tree_root(directory) / "model" / "config.json").is_file():
        return str(directory), "tree"
    if directory.is_dir():
        return str(directory), "torch"
    raise at(path, f"{path} is not a directory; a checkpoint's directory, owner/name of a hub or preset:NAME was "
                   "expected")


def text_files(directory: Path) -> dict[str, Path]:
    """Returns the tokenizer, preprocessor and template files of a checkpoint, by name.

    For an export by this project, these are the files from before the export added tokens, except
    `generation_config.json`: the user may have changed the one that transformers reads.
    """
    source = directory / OURS
    source = source if source.is_dir() else directory
    found = {name: source / name for name in TEXT_FILES if (source / name).is_file()}
    named = source / "additional_chat_templates" / "default.jinja"  # where transformers stores several templates
    if named.is_file():
        found.setdefault("chat_template.jinja", named)
    return found | ({GENERATION: directory / GENERATION}
                    if GENERATION in found and (directory / GENERATION).is_file() else {})


def torch_config(directory: Path, vision_tower: Path | None,
                  weights: Callable[[], Mapping[str, Tensor]]) -> tuple[LlavaConfig, dict, str]:
    """Reads the config of a PyTorch layout.

    Args:
      directory: the checkpoint's directory.
      vision_tower: the directory of the tower that replaces the checkpoint's own; None for its own.
      weights: reads the headers of the weight files; called only if nothing else gives the tower's shape.

    Returns:
      The config, the content of `config.json`, and in words what is assumed about the tower ("" for nothing).

    Raises:
      UserError: the directory holds no config, or one of another architecture.
    """
    refuse_adapter(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json; a checkpoint's directory was expected")
    raw, vision, assumed, asked = read_json(directory / "config.json"), None, "", vision_tower
    if vision_tower is None and not is_transformers(raw) and "vision_config" not in as_object(raw.get(OURS, {}), OURS):
        name = tower_name(raw)
        vision_tower = find_tower(directory, name)
        if vision_tower is None and name is not None and known_name(name) is None:
            vision_tower, vision, assumed = _tower_of_elsewhere(directory, name, weights)
    if vision_tower is not None:
        vision = tower_config(vision_tower)
    try:
        config = llava_from_hf(raw, vision)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    if vision is not None:
        check_width(vision_tower or directory, vision,
                    config.vision.hidden_size if is_transformers(raw) else raw.get("mm_hidden_size"))
    config = config.replace(vision=vision or config.vision, decoder=with_stop_ids(config.decoder, directory))
    is_stated = is_transformers(raw) or "vision_config" in as_object(raw.get(OURS, {}), OURS)
    if not is_stated and config.vision.original_deletes_last and (asked is None or not has_weights(asked)):
        short = without_last_layer(tower_name(raw), config.vision, _headers(weights))
        config = config if short is None else config.replace(vision=short, feature_layer=-1)
    return with_image_settings(config, directory, is_transformers(raw), asked), raw, assumed


def _tower_of_elsewhere(directory: Path, name: str,
                        weights: Callable[[], Mapping[str, Tensor]]) -> tuple[Path | None, VisionConfig | None, str]:
    """Finds a tower that lies neither inside nor beside the checkpoint: on a hub, in the tensors, or by its name.

    Returns:
      The tower's directory as fetched from a hub; else its config, from the tensors or from the name alone, and in
      words what is assumed about it.

    Raises:
      UserError: nothing gives the tower's shape.
    """
    try:
        return fetch_tower(directory, name, weights=False), None, ""
    except UserError as error:
        refusal = error
    found = _headers(weights)
    if any(map(is_tower, found)):
        return None, *shape_of_tensors(directory, name, found)
    vision = known_shape(name)
    if vision is None:
        raise refusal
    return None, vision, ""


def _headers(weights: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Returns the tensors of a checkpoint; none if they cannot be read, which reading them later says."""
    try:
        return weights()
    except UserError:
        return {}


def replace_tower(config: LlavaConfig, directory: Path) -> LlavaConfig:
    """Returns the config with the tower of a directory; its image settings too, if the directory has any."""
    vision = tower_config(directory)
    check_width(directory, vision, config.vision.hidden_size)
    own = config.vision
    if not has_settings(directory) and type(own) is type(vision):
        vision = dataclasses.replace(vision, image_mean=own.image_mean, image_std=own.image_std, images=own.images)
    # A whole tower in place of one without its last layer: the features stay those of the layer before the last.
    is_whole = vision.original_deletes_last and vision.num_layers == own.num_layers + 1 and config.feature_layer == -1
    config = config.replace(vision=vision, feature_layer=-2 if is_whole else config.feature_layer)
    check(config, str(directory))
    return config


def model_directory(path: Path) -> Path | None:
    """Returns the directory with the config and tokenizer files of a checkpoint PATH; None without such files."""
    candidates = ([path / "model", path, path.parent.parent / "model"] if path.parent.name == "checkpoints"
                  else [path / "model", path])
    return next((c for c in candidates if (c / "config.json").is_file()), None)
