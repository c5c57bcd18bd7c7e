"""Opens a model with its adapter, from a base and an adapter's directory, or from the adapter's directory alone."""

from __future__ import annotations

from pathlib import Path

from llavamed_jax.adapters import peft, peft_config, plain_base, tables
from llavamed_jax.checkpoints import hub
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import kind_of, tree_root
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.torch.files import ADAPTER_CONFIG
from llavamed_jax.checkpoints.tree import reference
from llavamed_jax.config import PRESET
from llavamed_jax.config.adapter import is_factor
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.errors import UserError, exists, short, some, warn_once
from llavamed_jax.utils.files import read_json
from llavamed_jax.utils.paths import is_bucket

# Keys of LLaVA's config.json that change what the tower or the decoder gets -> fields of the model's config.
_SETTINGS = {"image_aspect_ratio": "image_aspect_ratio", "mm_vision_select_layer": "feature_layer",
             "mm_vision_select_feature": "feature_select", "mm_use_im_start_end": "use_start_end",
             "tokenizer_model_max_length": "max_length"}


def open_model(path: str | Path, vision_tower: str | Path | None = None,
               adapter: str | Path | None = None) -> Checkpoint:
    """Opens a checkpoint of any kind, with an adapter if one is named, or if PATH is one.

    Args:
      path: as for `open_checkpoint`, or the directory of an adapter in PEFT's or LLaVA's layout, whose base is then
        the one that its `adapter_config.json` names.
      vision_tower: as for `open_checkpoint`; belongs to the base.
      adapter: the directory of an adapter, or its name on a hub; None for none, or for the one that PATH is.

    Raises:
      UserError: as `open_checkpoint` and `peft.apply`; PATH is an adapter whose base is not found.
    """
    if adapter is None:
        if not _is_adapter(path):
            return open_checkpoint(path, vision_tower)
        path, adapter = _base(hub.local(path)), path
    directory = _adapter(adapter)
    base, _ = kind_of(path)
    if plain_base.is_plain(Path(base), directory):
        tower = None if vision_tower is None else hub.local(vision_tower)
        return plain_base.open_joined(Path(base), directory, tower)
    checkpoint = open_checkpoint(base, vision_tower)
    _warn_of_other_settings(checkpoint, directory)
    _warn_of_another_tokenizer(checkpoint, directory)
    if has_own_base(checkpoint):
        return _in_place_of_its_own(checkpoint, directory)
    return peft.apply(checkpoint, directory)


def has_own_base(checkpoint: Checkpoint) -> bool:
    """Returns whether a checkpoint is the step of a run that trained an adapter over a base which the run copied."""
    return (checkpoint.config.adapter is not None and checkpoint.step is not None
            and checkpoint.adapter_directory is None and reference.path(checkpoint.directory) is None)


def _in_place_of_its_own(run: Checkpoint, adapter: Path) -> Checkpoint:
    """Returns a run's base with another adapter in place of the run's own, which may be the same.

    Raises:
      UserError: as `peft.apply`; the run trained a whole tensor that the adapter lacks, so that its base is gone.
    """
    tensors = {name: tensor for name, tensor in run.tensors.items() if not is_factor(name)}
    base = run.replace(config=run.config.replace(adapter=None), tensors=tensors, changed=frozenset())
    found = peft.apply(base, adapter)
    if lacking := sorted(run.changed - found.changed):
        raise UserError(f"{adapter} lacks {some(lacking, 3)}, which the run {run.directory} trained beside an adapter "
                        "of its own; the adapter of that run (convert export-lora), or a model without an adapter, "
                        "was expected")
    warn_once(f"{adapter} is taken in place of the adapter that the run {run.directory} trained")
    return found


def _warn_of_other_settings(checkpoint: Checkpoint, adapter: Path) -> None:
    """Warns of settings in the `config.json` that LLaVA's training writes beside an adapter, if the base has others.

    LLaVA's builder takes the adapter's. Here the base's are applied.
    """
    file = adapter / "config.json"
    raw = read_json(file) if file.is_file() else {}
    if "mm_vision_tower" not in raw:
        return
    try:
        theirs = llava_from_hf(raw, checkpoint.config.vision)
    except UserError as error:
        warn_once(f"{file} cannot be compared with the base's settings, which are applied: {error}")
        return
    other = [f"{key} {short(raw[key])}" for key, name in _SETTINGS.items()
             if key in raw and getattr(theirs, name) != getattr(checkpoint.config, name)]
    if other:
        warn_once(f"{file} has {some(other, 5)}, which the base {checkpoint.directory} has not; the base's settings "
                  "are applied, where LLaVA applies the adapter's")


def _warn_of_another_tokenizer(checkpoint: Checkpoint, adapter: Path) -> None:
    """Warns of tokens of an adapter's own tokenizer that the base's lacks, since the base's is taken."""
    if other := tables.other_tokens(checkpoint, adapter):
        warn_once(f"{adapter} has a tokenizer of its own with {some(other, 3)}, where that of the base "
                  f"{checkpoint.directory} has other tokens or none; the base's is taken, and --tokenizer {adapter} "
                  "takes the adapter's")


def _is_adapter(path: str | Path) -> bool:
    """Returns whether a PATH is an adapter; fetches one that the PATH names on a hub."""
    if str(path).startswith(PRESET) or is_bucket(path) or exists(tree_root(Path(path)) / "model"):
        return False  # of a bucket only this project's own tree is read
    directory = hub.local(path)
    return exists(directory) and peft.is_adapter(directory)


def _adapter(adapter: str | Path) -> Path:
    local = Path(adapter)
    if local.is_dir() and (tree_root(local) / "model" / "config.json").is_file():
        raise UserError(f"{adapter} is a run of this project, which names its base; the directory of an adapter as "
                        "PEFT writes it was expected, or the run as the checkpoint and no adapter")
    directory = hub.local(adapter)
    if not directory.is_dir():
        raise UserError(f"{adapter} is not a directory; the directory of an adapter, as PEFT writes it, was expected")
    return directory


def _base(adapter: Path) -> str:
    """Returns the PATH of the base that an adapter's config names."""
    settings = peft_config.read(adapter)
    name, revision = settings.base, settings.revision
    if name is None:
        raise UserError(f"{adapter} holds an adapter, and its {ADAPTER_CONFIG} names no base; the base as the "
                        "checkpoint and this directory as the adapter (--checkpoint BASE --adapter THIS) were expected")
    for found in (Path(name), adapter.parent / Path(name).name):
        if found.is_dir() and found.resolve() != adapter.resolve():
            if revision is not None:
                warn_once(f"{adapter / ADAPTER_CONFIG} names revision {short(revision)} of its base; {found} is "
                          "taken as it is")
            return str(found)
    try:
        # Of a revision in the name itself, PEFT knows nothing.
        return str(hub.local(name if revision is None or "@" in name else f"{name}@{revision}"))
    except UserError as error:
        raise UserError(f"{adapter} holds an adapter of {name}, which is neither a directory here nor beside it, and "
                        f"could not be fetched: {error}; the base as the checkpoint and this directory as the adapter "
                        "(--checkpoint BASE --adapter THIS) were expected") from None
