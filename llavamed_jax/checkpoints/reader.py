"""Checkpoints as a mapping from canonical names to tensors that are read when they are asked for.

`open_checkpoint` looks at the config and at the headers of the weight files alone; the files are memory-mapped and a tensor is
read by `Checkpoint.read`. It is strict: what the config calls for and what the files hold must be the same tensors, of the
same shapes, or one error names those that differ.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.files import read_json
from llavamed_jax.config import OURS, LlavaConfig, VisionConfig, preset
from llavamed_jax.errors import UserError

DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16)}
TEXT_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json",
              "generation_config.json")


@dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory yet."""

    shape: tuple[int, ...]
    dtype: np.dtype
    load: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Checkpoint:
    """Config, tensors under canonical names, and the files that travel with them.

    Attributes:
      layout: `llava`, `transformers`, `tree` (this project's own) or `preset` (random weights).
      directory: None for a preset.
      tensors: every tensor, the unused ones of the tower included.
      files: tokenizer and preprocessor files by name.
      tower: which vision tower this is, in words, for the log.
      step: of a tree, the training step whose tensors are laid over the base.
    """

    config: LlavaConfig
    layout: str
    directory: Path | None
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Path]
    tower: str
    step: int | None = None

    def read(self, name: str) -> np.ndarray:
        """The tensor of a canonical name, in this project's orientation and in its own dtype."""
        return self.tensors[name].load()

    @property
    def unused(self) -> list[str]:
        """Tensors that the model does not compute with (`names.unused_names`)."""
        return names.unused_names(self.config)

    def replace(self, **changes) -> "Checkpoint":
        return dataclasses.replace(self, **changes)

    def cast(self, dtype) -> "Checkpoint":
        """The same checkpoint with every tensor read as `dtype`; None keeps each tensor's own."""
        if dtype is None:
            return self
        dtype = np.dtype(dtype)
        return self.replace(tensors={
            name: Tensor(t.shape, dtype, lambda load=t.load: load().astype(dtype, copy=False)) for name, t in self.tensors.items()})


def open_checkpoint(path: str | Path, vision_tower: str | Path | None = None, seed: int = 0) -> Checkpoint:
    """Opens a checkpoint of any kind.

    Args:
      path: a directory in a PyTorch layout, this project's own tree or one step of it, or `preset:NAME` for random weights.
      vision_tower: a directory with a CLIP tower that is taken instead of the checkpoint's own.
      seed: of the random weights of a preset.
    Raises:
      UserError: no checkpoint, another architecture, or tensors that are missing, unexpected or misshapen.
    """
    path, kind = _kind(path)
    # The two other kinds stand on this module, and Orbax takes seconds to import: both are fetched when needed.
    if kind == "preset":
        from llavamed_jax.checkpoints.load import random_checkpoint
        checkpoint = random_checkpoint(read_config(path), seed)
    elif kind == "tree":
        from llavamed_jax.checkpoints.store import open_tree
        checkpoint = open_tree(path)
    else:
        return _open_torch(Path(path), vision_tower)
    return checkpoint if vision_tower is None else _with_tower(checkpoint, Path(vision_tower))


def read_config(path: str | Path, vision_tower: str | Path | None = None) -> LlavaConfig:
    """The config of a checkpoint of any kind; no weight file is touched, nor need be there.

    Args and errors as of `open_checkpoint`.
    """
    path, kind = _kind(path)
    if kind == "torch":
        return _torch_config(Path(path), vision_tower)[0]
    config = preset(path.removeprefix("preset:")) if kind == "preset" else tree_config(Path(path))
    return config if vision_tower is None else _replace_tower(config, Path(vision_tower))


def tree_root(path: Path) -> Path:
    """The tree that a PATH means: itself, or of `DIR/checkpoints/STEP` DIR."""
    return path.parents[1] if path.parent.name == "checkpoints" else path


def tree_config(path: Path) -> LlavaConfig:
    """The config of this project's own tree or of one of its steps."""
    file = tree_root(path) / "model" / "config.json"
    try:
        return LlavaConfig.from_dict(read_json(file))
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no config of this project: {error}") from None


def _kind(path: str | Path) -> tuple[str, str]:
    """A PATH as text, and whether it is a `preset`, a `tree` or a directory in a `torch` layout."""
    path = str(path)
    if path.startswith("preset:"):
        return path, "preset"
    if (tree_root(Path(path)) / "model" / "config.json").is_file():
        return path, "tree"
    if Path(path).is_dir():
        return path, "torch"
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", path):
        raise UserError(f"{path} is no directory; names of a hub are not fetched: download it, then give its directory")
    raise UserError(f"{path} is no directory; a checkpoint's directory or preset:NAME was expected")


def text_files(directory: Path) -> dict[str, Path]:
    """The tokenizer and preprocessor files of a checkpoint; of an export of ours those from before it added tokens."""
    source = directory / OURS
    directory = source if source.is_dir() else directory
    return {name: directory / name for name in TEXT_FILES if (directory / name).is_file()}


def read_safetensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory's `.safetensors` files by its name there; with an index, those that it names."""
    index = next(iter(sorted(directory.glob("*.safetensors.index.json"))), None)
    if index is None:
        shards = {file.name: None for file in sorted(directory.glob("*.safetensors"))}
        if not shards:
            bins = sorted(p.name for p in directory.glob("*.bin"))
            found = f"its weights as {bins[0]}" if bins else "no weights"
            raise UserError(f"{directory} holds {found}; .safetensors files were expected")
    else:
        shards = {}
        for name, shard in read_json(index).get("weight_map", {}).items():
            shards.setdefault(shard, []).append(name)
    tensors = {}
    for shard, wanted in shards.items():
        found = _open_shard(directory / shard)
        absent = [name for name in wanted or () if name not in found]
        if absent:
            raise UserError(f"{index} says that {shard} holds {_some(absent)}, which it does not")
        tensors.update(found)
    return tensors


def _open_shard(file: Path) -> dict[str, Tensor]:
    try:
        handle = safe_open(file, framework="np")
    except FileNotFoundError:
        raise UserError(f"the shard {file} is missing") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is no whole safetensors file: {error}") from None
    tensors = {}
    for name in handle.keys():
        view = handle.get_slice(name)
        if view.get_dtype() in DTYPES:
            tensors[name] = Tensor(tuple(view.get_shape()), DTYPES[view.get_dtype()], lambda name=name: handle.get_tensor(name))
        elif not names.is_buffer(name):
            raise UserError(f"{name} in {file} is of type {view.get_dtype()}; one of {', '.join(DTYPES)} was expected")
    return tensors


def match(where: Path, found: Mapping[str, Tensor], spellings: Mapping[str, Iterable[str]],
          shapes: Mapping[str, tuple[int, ...]], ignore: Callable[[str], bool] = names.is_buffer) -> dict[str, Tensor]:
    """Finds every canonical name among the tensors of a file.

    Args:
      where: what the error names.
      found: tensors by their names in the file.
      spellings: canonical name -> the names it may have there.
      shapes: canonical name -> shape there.
      ignore: says of a name in the file that it needs no match.
    Returns:
      Canonical name -> the tensor as it is in the file.
    Raises:
      UserError: lists what is missing, unexpected or misshapen, with shapes.
    """
    taken = {name: next((s for s in spelled if s in found), None) for name, spelled in spellings.items()}
    missing = [f"{next(iter(spellings[n]))} {list(shapes[n])}" for n, key in taken.items() if key is None]
    matched = set(taken.values())
    unexpected = [f"{key} {list(t.shape)}" for key, t in found.items() if key not in matched and not ignore(key)]
    misshapen = [f"{key} is {list(found[key].shape)} where {list(shapes[n])} was expected"
                 for n, key in taken.items() if key is not None and found[key].shape != tuple(shapes[n])]
    problems = [f"{len(items)} tensor{'s' * (len(items) > 1)} {word}: {_some(items)}"
                for word, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)) if items]
    if problems:
        raise UserError(f"{where} does not fit its config.json; {'; '.join(problems)}")
    return {name: found[key] for name, key in taken.items()}


def _some(items: list[str], limit: int = 8) -> str:
    return ", ".join(items[:limit]) + (f" and {len(items) - limit} more" if len(items) > limit else "")


def _torch_config(directory: Path, vision_tower: str | Path | None) -> tuple[LlavaConfig, dict]:
    """The config of a PyTorch layout, and `config.json` as it stands there."""
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json; a checkpoint's directory was expected")
    raw = read_json(directory / "config.json")
    if vision_tower is None and "text_config" not in raw and "vision_config" not in raw.get(OURS, {}):
        vision_tower = _named_tower(directory, raw.get("mm_vision_tower"))
    vision = None if vision_tower is None else _tower_config(Path(vision_tower))
    try:
        config = LlavaConfig.from_hf(raw, vision)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    return config if vision is None else config.replace(vision=vision), raw


def _open_torch(directory: Path, vision_tower: str | Path | None) -> Checkpoint:
    config, raw = _torch_config(directory, vision_tower)
    layout = "transformers" if "text_config" in raw else "llava"
    found = read_safetensors(directory)
    named = raw.get("mm_vision_tower")
    tower_directory = None
    if vision_tower is not None:
        tower_directory = Path(vision_tower)
        tower = f"{tower_directory}, as asked for"
    elif layout == "transformers" or any(map(_is_tower, found)):
        tower = "the tensors in the checkpoint"
    elif (tower_directory := _named_tower(directory, named)) is not None:
        tower = f"{tower_directory}, which mm_vision_tower names"
    else:
        raise UserError(f"{directory} holds no vision tower, and no directory {named!r} that its config.json names lies inside "
                        "or beside it; vision_tower=PATH was expected")
    spellings = names.torch_names(config, layout)
    if tower_directory is not None:
        spellings = {name: spelled for name, spelled in spellings.items() if not name.startswith("vision_tower/")}
        found = {key: tensor for key, tensor in found.items() if not _is_tower(key)}
    rows = raw["text_config"].get("vocab_size", config.decoder.vocab_size) if layout == "transformers" else None
    tensors = _canonical(match(directory, found, spellings, _torch_shapes(config, spellings, rows)), config)
    if tower_directory is not None:
        tensors |= _tower_tensors(config, tower_directory)
    return Checkpoint(config, layout, directory, tensors, text_files(directory), tower)


def _is_tower(key: str) -> bool:
    return key.startswith(("vision_tower.", "model.vision_tower."))


def _torch_shapes(config: LlavaConfig, wanted: Iterable[str], rows: int | None = None) -> dict[str, tuple[int, ...]]:
    """Shapes in a PyTorch file, whose vocabulary may have more rows than ours (config.transformers_vocab_size)."""
    specs = names.specs(config)
    shapes = {name: names.torch_shape(name, specs[name].shape) for name in wanted}
    for name in ("decoder/embed_tokens/embedding", "decoder/lm_head/kernel"):
        if rows is not None and name in shapes:
            shapes[name] = (rows, *shapes[name][1:])
    return shapes


def _canonical(tensors: Mapping[str, Tensor], config: LlavaConfig) -> dict[str, Tensor]:
    """Tensors of a PyTorch file in this project's orientation, without rows that an export added to the vocabulary."""
    def convert(name, tensor, shape):
        rows = names.torch_shape(name, shape)[0]  # only a vocabulary is longer in the file
        return Tensor(shape, tensor.dtype, lambda: names.from_torch(name, tensor.load()[:rows]))
    specs = names.specs(config)
    return {name: convert(name, tensor, specs[name].shape) for name, tensor in tensors.items()}


def _named_tower(directory: Path, name: str | None) -> Path | None:
    """The directory that `mm_vision_tower` names: an absolute path, or its last component inside or beside the checkpoint."""
    if not name:
        return None
    candidates = [Path(name)] if Path(name).is_absolute() else []
    candidates += [directory / Path(name).name, directory.resolve().parent / Path(name).name]
    return next((c for c in candidates if (c / "config.json").is_file()), None)


def _tower_config(directory: Path) -> VisionConfig:
    if not (directory / "config.json").is_file():
        raise UserError(f"the vision tower {directory} holds no config.json; a CLIP model's directory was expected")
    try:
        return VisionConfig.from_hf(read_json(directory / "config.json"))
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None


def _tower_tensors(config: LlavaConfig, directory: Path) -> dict[str, Tensor]:
    """A tower in its own directory, which may be a whole CLIP model: its text half is not looked at."""
    wanted = names.torch_names(config, "clip")
    is_text = re.compile(r"text_model\..*|(text|visual)_projection\.weight|logit_scale").fullmatch
    found = match(directory, read_safetensors(directory), wanted, _torch_shapes(config, wanted),
                  lambda key: names.is_buffer(key) or is_text(key))
    return _canonical(found, config)


def _replace_tower(config: LlavaConfig, directory: Path) -> LlavaConfig:
    vision = _tower_config(directory)
    if vision.hidden_size != config.vision.hidden_size:
        raise UserError(f"the vision tower {directory} has width {vision.hidden_size}; the projector expects {config.vision.hidden_size}")
    return config.replace(vision=vision)


def _with_tower(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    config = _replace_tower(checkpoint.config, directory)
    kept = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("vision_tower/")}
    return checkpoint.replace(config=config, tensors=kept | _tower_tensors(config, directory), tower=f"{directory}, as asked for")
