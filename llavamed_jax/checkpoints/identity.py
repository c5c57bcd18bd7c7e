"""Lists the files that a loaded model depends on, to tell whether it is still the same model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.model_config import text_files
from llavamed_jax.checkpoints.torch.files import ADAPTER_CONFIG, ADAPTER_OTHERS, ADAPTER_WEIGHTS, weight_files
from llavamed_jax.config import OURS
from llavamed_jax.utils.hashes import sha256_of_files, sha256_of_list, short_hash

_TOWER = ("config.json", "preprocessor_config.json", "processor_config.json", "open_clip_config.json")
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """The files that a model was loaded from.

    Attributes:
      path: the PATH that it was loaded from.
      step: the training step of a run; None for other checkpoints.
      config: a hash of the config that all its files result in.
      files: the checkpoint's files, by their names in it. Tensors of this project's own tree count by their manifests,
        which have a sha256 of each tensor that is checked at reading; those of PyTorch's layouts by their files.
      beside: files of a vision tower, an adapter or a tokenizer in another directory.
      adapter: the directory of an adapter that was put onto the checkpoint; None for none.
      known: name -> sha256 of files that may be gone later: a running job deletes its older steps.
    """

    path: str
    step: int | None = None
    config: str = ""
    files: Mapping[str, Path] = field(default_factory=dict)
    beside: Mapping[str, Path] = field(default_factory=dict)
    adapter: str | None = None
    known: Mapping[str, str] = field(default_factory=dict)

    def hashes(self) -> dict[str, str]:
        """Returns name -> sha256 of every file, those in other directories included; UserError if a file is gone."""
        found = {name: file for name, file in {**self.files, **self.beside}.items() if name not in self.known}
        return sha256_of_files(found) | self.known

    def sha256(self, hashes: Mapping[str, str]) -> str:
        """Returns one sha256 of the checkpoint, over the list of its own files."""
        return sha256_of_list({name: hashes[name] for name in self.files})


def origin(path: str | Path, checkpoint: Checkpoint, tokenizer: str | Path | None = None) -> Origin:
    """Returns the files that an open checkpoint came from.

    Args:
      path: the PATH as the user gave it.
      checkpoint: the open checkpoint.
      tokenizer: the file or directory of a tokenizer that replaces the checkpoint's own; None if none does.
    """
    root, files = checkpoint.directory, {}
    if checkpoint.layout == "tree":
        files = _tree_files(root, checkpoint.step)
    elif root is not None:
        files = {name: root / name for name in ("config.json",)} | _named(root, text_files(root).values())
        files |= _named(root, [*(root / OURS).rglob("*"), *(root / "additional_chat_templates").glob("*"),
                               *weight_files(root)])
    beside = {}
    if checkpoint.tower_directory is not None:
        tower = checkpoint.tower_directory
        found = [*(tower / name for name in _TOWER), *weight_files(tower)]
        beside |= {f"vision tower: {name}": file for name, file in _named(tower, found).items()}
    if checkpoint.adapter_directory is not None:
        folder = checkpoint.adapter_directory
        found = [folder / name for name in (ADAPTER_CONFIG, *ADAPTER_WEIGHTS, ADAPTER_OTHERS)]
        beside |= {f"adapter: {name}": file for name, file in _named(folder, found).items()}
    if tokenizer is not None:
        source = Path(tokenizer)
        found = text_files(source) if source.is_dir() else {source.name: source, **text_files(source.parent)}
        beside |= {f"tokenizer: {name}": file for name, file in found.items() if file.is_file()}
    known = sha256_of_files({name: file for name, file in files.items()
                             if checkpoint.layout == "tree" and name.startswith("checkpoints/")})
    return Origin(str(path), checkpoint.step,
                  short_hash(json.loads(json.dumps(checkpoint.config.to_dict(), default=str))), files, beside,
                  None if checkpoint.adapter_directory is None else str(checkpoint.adapter_directory), known)


def _tree_files(root: Path, step: int | None) -> dict[str, Path]:
    manifest = root / "base" / _MANIFEST
    base = [manifest] if manifest.is_file() else (root / "base").glob("*")
    steps = [] if step is None else [root / "checkpoints" / str(step) / _MANIFEST]
    return _named(root, [*base, root / "base.json", *(root / "model").rglob("*"), *steps])


def _named(root: Path, files: Iterable[Path]) -> dict[str, Path]:
    return {file.relative_to(root).as_posix(): file for file in sorted(files) if file.is_file()}
