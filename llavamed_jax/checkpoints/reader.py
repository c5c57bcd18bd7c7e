"""Checkpoints as a mapping from canonical names to tensors that are read when they are asked for.

`open_checkpoint` looks at the config and at the headers of the weight files alone; the files are memory-mapped and a tensor is
read by `Checkpoint.read`. It is strict: what the config calls for and what the files hold must be the same tensors, of the
same shapes, or one error names those that differ.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import hub, names
from llavamed_jax.checkpoints.generation_file import FILE as GENERATION
from llavamed_jax.checkpoints.generation_file import with_stop_ids
from llavamed_jax.checkpoints.layouts import canonical
from llavamed_jax.checkpoints.preprocessor_file import check, has_settings, with_image_settings
from llavamed_jax.checkpoints.soundness import Tally, is_zero, norms_are_small
from llavamed_jax.checkpoints.torch_files import Tensor, has_weights, read_weights, refuse_adapter
from llavamed_jax.checkpoints.tower import check_width, fetch_tower, find_tower, tower_config, tower_tensors
from llavamed_jax.checkpoints.tower_shape import is_tower, known_shape, shape_of_tensors
from llavamed_jax.config import KNOWN_TOWERS, OURS, LlavaConfig, VisionConfig, as_object, preset, projector_depth
from llavamed_jax.config.hf import is_transformers, llava_from_hf, not_obeyed, tower_name
from llavamed_jax.errors import UserError, at, warn
from llavamed_jax.utils.files import read_json

TEXT_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
              "preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json",
              GENERATION)


@dataclass(frozen=True)
class Checkpoint:
    """Config, tensors under canonical names, and the files that travel with them.

    Attributes:
      layout: `llava`, `transformers`, `tree` (this project's own), `preset` (random weights) or `built` (`build.build`).
      directory: None for the last two.
      tensors: every tensor, the unused ones of the tower included.
      files: tokenizer and preprocessor files by name.
      tower: which vision tower this is, in words, for the log.
      step: of a tree, the training step whose tensors are laid over the base.
      tower_directory: where the tower's config or tensors were read, if that is not the checkpoint's own directory.
      is_delta: whether buffers say that these tensors are the difference of two models; the norms may say so too.
      tally: of what a cast of the tensors loses.
    """

    config: LlavaConfig
    layout: str
    directory: Path | None
    tensors: Mapping[str, Tensor]
    files: Mapping[str, Path]
    tower: str
    step: int | None = None
    tower_directory: Path | None = None
    is_delta: bool = False
    tally: Tally = field(default_factory=Tally, compare=False, repr=False)

    def read(self, name: str) -> np.ndarray:
        """The tensor of a canonical name, in this project's orientation and in its own dtype."""
        return self.tensors[name].load()

    @property
    def unused(self) -> list[str]:
        """Tensors that the model does not compute with (`names.unused_names`)."""
        return names.unused_names(self.config)

    @property
    def sources(self) -> list[Path]:
        """Directories inside of which nothing may be written: somebody else's files, where a new one could change what is read.
        A tree is a workdir, where exports may lie."""
        return [self.directory] if self.directory is not None and self.layout in ("llava", "transformers") else []

    def replace(self, **changes) -> "Checkpoint":
        return dataclasses.replace(self, **changes)

    def cast(self, dtype) -> "Checkpoint":
        """The same checkpoint with every tensor read as `dtype`; None keeps each tensor's own."""
        if dtype is None:
            return self
        dtype = np.dtype(dtype)
        return self.replace(tensors={
            name: Tensor(t.shape, dtype, lambda name=name, load=t.load: self.tally.cast(name, load(), dtype))
            for name, t in self.tensors.items()})

    def doubt(self) -> str | None:
        """What is wrong with these tensors as a model, in a sentence, as far as a few small ones show; None for nothing."""
        if not self.is_delta and not norms_are_small(self.tensors):
            return None
        what = "buffers of zeros" if self.is_delta else "norms of about 0"
        return (f"{self.directory} is no model but a delta: it has {what}, as the difference of two models has; `convert apply-delta "
                "--base LLAMA --delta THIS --out DIR` makes a model of it")

    def sound(self) -> "Checkpoint":
        """The same checkpoint with every tensor looked at when it is read: for whoever computes with it or writes it.

        Whoever has read what it wanted calls `tally.warn`.
        Raises:
          UserError: a delta. When a tensor is read: NaN or infinite values.
        """
        if doubt := self.doubt():
            raise UserError(doubt)
        where = f"{self.directory}: " if self.directory else ""
        return self.replace(tensors={
            name: Tensor(t.shape, t.dtype, lambda name=name, load=t.load: self.tally.look(name, load(), where))
            for name, t in self.tensors.items()})


def open_checkpoint(path: str | Path, vision_tower: str | Path | None = None, seed: int = 0) -> Checkpoint:
    """Opens a checkpoint of any kind.

    Args:
      path: a directory in a PyTorch layout, this project's own tree or one step of it, `owner/name[@revision]` of a hub, or
        `preset:NAME` for random weights.
      vision_tower: a CLIP tower, as a directory or by name, that is taken instead of the checkpoint's own. A directory with a
        `config.json` and no weights says which shape the tower's tensors in the checkpoint have.
      seed: of the random weights of a preset.
    Raises:
      UserError: no checkpoint, another architecture, or tensors that are missing, unexpected or misshapen.
    """
    path, kind = _kind(path)
    vision_tower = None if vision_tower is None else hub.local(vision_tower)
    # The two other kinds stand on this module, and Orbax takes seconds to import: both are fetched when needed.
    if kind == "preset":
        from llavamed_jax.checkpoints.load import random_checkpoint
        checkpoint = random_checkpoint(read_config(path), seed)
    elif kind == "tree":
        from llavamed_jax.checkpoints.store import open_tree
        checkpoint = open_tree(path)
    else:
        return _open_torch(Path(path), vision_tower)
    return checkpoint if vision_tower is None else _with_tower(checkpoint, vision_tower)


def read_config(path: str | Path, vision_tower: str | Path | None = None) -> LlavaConfig:
    """The config of a checkpoint of any kind; no weight file need be there, and none is looked at but where the shape of the
    tower stands in its tensors alone.

    Args and errors as of `open_checkpoint`.
    """
    path, kind = _kind(path, weights=False)
    vision_tower = None if vision_tower is None else hub.local(vision_tower, weights=False)
    if kind == "torch":
        return _torch_config(Path(path), vision_tower, lambda: read_weights(Path(path)))[0]
    config = preset(path.removeprefix("preset:")) if kind == "preset" else tree_config(Path(path))
    return config if vision_tower is None else _replace_tower(config, vision_tower)


def tree_root(path: Path) -> Path:
    """The tree that a PATH means: itself, or of `DIR/checkpoints/STEP` DIR."""
    return path.parents[1] if path.parent.name == "checkpoints" else path


def tree_config(path: Path) -> LlavaConfig:
    """The config of this project's own tree or of one of its steps."""
    file = tree_root(path) / "model" / "config.json"
    try:
        config = LlavaConfig.from_dict(read_json(file))
    except (KeyError, TypeError) as error:
        raise UserError(f"{file} is no config of this project: {error}") from None
    config = config.replace(decoder=with_stop_ids(config.decoder, file.parent))
    return with_image_settings(config, file.parent, config.source == "transformers")


def _kind(path: str | Path, weights: bool = True) -> tuple[str, str]:
    """A PATH as text, and whether it is a `preset`, a `tree` or a directory in a `torch` layout. Names are fetched."""
    if str(path).startswith("preset:"):
        return str(path), "preset"
    # A step of a tree need not be there: whoever opens it says what is wrong with it.
    try:
        directory = Path(path) if (tree_root(Path(path)) / "model").is_dir() else hub.local(path, weights)
    except OSError as error:  # a name that no file can have
        raise at(path, f"{str(path)[:80]!r} cannot be opened: {error.strerror}") from None
    if (tree_root(directory) / "model" / "config.json").is_file():
        return str(directory), "tree"
    if directory.is_dir():
        return str(directory), "torch"
    raise at(path, f"{path} is no directory; a checkpoint's directory, owner/name of a hub or preset:NAME was expected")


def text_files(directory: Path) -> dict[str, Path]:
    """The files that travel with a checkpoint; of an export of ours those from before it added tokens, but for
    `generation_config.json`: its user may have changed the one that transformers goes by."""
    source = directory / OURS
    source = source if source.is_dir() else directory
    found = {name: source / name for name in TEXT_FILES if (source / name).is_file()}
    named = source / "additional_chat_templates" / "default.jinja"  # transformers keeps several templates so
    if named.is_file():
        found.setdefault("chat_template.jinja", named)
    return found | ({GENERATION: directory / GENERATION} if GENERATION in found and (directory / GENERATION).is_file() else {})


def _torch_config(directory: Path, vision_tower: Path | None,
                  weights: Callable[[], Mapping[str, Tensor]]) -> tuple[LlavaConfig, dict, str]:
    """The config of a PyTorch layout, `config.json` as it stands there, and what of the tower is assumed, in words.

    Args:
      weights: reads the headers of the weight files; asked where the tower's shape stands nowhere else.
    """
    refuse_adapter(directory)
    if not (directory / "config.json").is_file():
        raise UserError(f"{directory} holds no config.json; a checkpoint's directory was expected")
    raw, vision, assumed, asked = read_json(directory / "config.json"), None, "", vision_tower
    if vision_tower is None and not is_transformers(raw) and "vision_config" not in as_object(raw.get(OURS, {}), OURS):
        name = tower_name(raw)
        vision_tower = find_tower(directory, name)
        if vision_tower is None and name is not None and name not in KNOWN_TOWERS:
            vision_tower, vision, assumed = _tower_of_elsewhere(directory, name, weights)
    if vision_tower is not None:
        vision = tower_config(vision_tower)
    try:
        config = llava_from_hf(raw, vision)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    if vision is not None:
        check_width(vision_tower or directory, vision, config.vision.hidden_size if is_transformers(raw) else raw.get("mm_hidden_size"))
    config = config.replace(vision=vision or config.vision, decoder=with_stop_ids(config.decoder, directory))
    return with_image_settings(config, directory, is_transformers(raw), asked), raw, assumed


def _tower_of_elsewhere(directory: Path, name: str,
                        weights: Callable[[], Mapping[str, Tensor]]) -> tuple[Path | None, VisionConfig | None, str]:
    """What is to be found of a tower that lies neither inside nor beside a checkpoint: its directory as a hub gives it, else its
    config from the tensors in the checkpoint and what of that is assumed, else from the name alone.

    Raises:
      UserError: nothing says what shape the tower has.
    """
    try:
        return fetch_tower(directory, name, weights=False), None, ""
    except UserError as error:
        refusal = error
    try:
        found = weights()
    except UserError:  # whoever reads them says it
        found = {}
    if any(map(is_tower, found)):
        return None, *shape_of_tensors(directory, name, found)
    vision = known_shape(name)
    if vision is None:
        raise refusal
    return None, vision, ""


def _open_torch(directory: Path, vision_tower: Path | None) -> Checkpoint:
    weights = functools.cache(lambda: read_weights(directory))
    config, raw, assumed = _torch_config(directory, vision_tower, weights)
    layout = "transformers" if is_transformers(raw) else "llava"
    found = weights()
    for sentence in not_obeyed(raw):
        warn(f"{directory}: {sentence}")
    if layout == "llava" and projector_depth(config.projector_type) and not any("mm_projector." in key for key in found):
        raise UserError(f"{directory} holds no projector (model.mm_projector), so it is a plain decoder: `convert build "
                        "--decoder PATH --vision CLIP` joins it with a tower")
    tower_directory = vision_tower
    has_tower = layout == "transformers" or any(map(is_tower, found))
    if vision_tower is not None and has_tower and not has_weights(vision_tower):
        tower_directory, tower = None, f"the tensors in the checkpoint, of the shape in {vision_tower}"
    elif vision_tower is not None:
        tower = f"{vision_tower}, as asked for"
    elif has_tower:
        tower = "the tensors in the checkpoint" + (f", {assumed}" if assumed else "")
    else:
        name = tower_name(raw)
        tower_directory = find_tower(directory, name) or fetch_tower(directory, name)
        tower = f"{tower_directory}, which mm_vision_tower names"
    rows = (raw.get("text_config") or {}).get("vocab_size") if layout == "transformers" else None
    if tower_directory is None:
        tensors = canonical(directory, found, config, layout, rows=rows)
    else:
        without = {key: tensor for key, tensor in found.items() if not is_tower(key)}
        tensors = canonical(directory, without, config, layout, ("vision_tower/",), rows) | tower_tensors(config, tower_directory)
    frequencies = [tensor for key, tensor in found.items() if key.endswith("rotary_emb.inv_freq")]
    is_delta = any(is_zero(tensor.load()) for tensor in frequencies)  # a delta's are a difference, so zeros (spec Q33)
    beside = vision_tower or tower_directory or (find_tower(directory, tower_name(raw)) if layout == "llava" else None)
    return Checkpoint(config, layout, directory, tensors, text_files(directory), tower, tower_directory=beside, is_delta=is_delta)


def _replace_tower(config: LlavaConfig, directory: Path) -> LlavaConfig:
    vision = tower_config(directory)
    check_width(directory, vision, config.vision.hidden_size)
    if not has_settings(directory):
        own = config.vision
        vision = dataclasses.replace(vision, image_mean=own.image_mean, image_std=own.image_std, images=own.images)
    config = config.replace(vision=vision)
    check(config, str(directory))
    return config


def _with_tower(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    config = _replace_tower(checkpoint.config, directory)
    kept = {name: t for name, t in checkpoint.tensors.items() if not name.startswith("vision_tower/")}
    return checkpoint.replace(config=config, tensors=kept | tower_tensors(config, directory), tower=f"{directory}, as asked for",
                              tower_directory=directory)
