"""Makes and applies deltas: LLaVA-Med v1.0 was released as a target minus the LLaMA that it was trained from.

Source: `llava/model/make_delta.py` and `llava/model/apply_delta.py` of LLaVA-Med v1.0.

All arithmetic is the original's, in float16. For vocabulary rows and the projector, which the base lacks, the delta
holds the target's own values. Both directions write the original's layout, tensor by tensor.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from llavamed_jax.checkpoints import hub, names
from llavamed_jax.checkpoints.model_config import TEXT_FILES
from llavamed_jax.checkpoints.soundness import Tally, is_finite
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import read_weights, refuse_adapter
from llavamed_jax.checkpoints.torch.write import Progress, total_bytes, write_safetensors
from llavamed_jax.errors import UserError, at, short, some, warn
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import read_json, write_json

_TABLE = "model.embed_tokens.weight"
_VOCABULARY = (_TABLE, "lm_head.weight")
# Config keys that training does not change; LLaMA 2 differs from LLaMA in the first two.
_OF_THE_BASE = ("rms_norm_eps", "max_position_embeddings", "hidden_act", "num_attention_heads", "rope_theta",
                "rope_scaling")
_VERBATIM = ("model.mm_projector.", "model.vision_tower.")  # tensors that a plain decoder lacks


def make_delta(base: str | Path, target: str | Path, out: str | Path, progress: Progress = iter) -> dict[str, Tensor]:
    """Writes `target` minus `base`.

    Args:
      base: the plain decoder's directory, or its name on a hub.
      target: the directory of a model in the original's layout, or its name on a hub.
      out: a directory that does not exist or is empty. It appears when it is complete.
      progress: wraps the names of the tensors.

    Returns:
      The tensors that were written, by name.

    Raises:
      UserError: the two do not belong together; raised before anything is written.
    """
    return _write(base, target, out, np.subtract, "the target", progress)


def apply_delta(base: str | Path, delta: str | Path, out: str | Path, progress: Progress = iter) -> dict[str, Tensor]:
    """Writes `base` plus `delta`, with the delta's config and tokenizer.

    Args:
      base: the plain decoder's directory, or its name on a hub.
      delta: the delta's directory in the original's layout, or its name on a hub.
      out: a directory that does not exist or is empty. It appears when it is complete.
      progress: wraps the names of the tensors.

    Returns:
      The tensors that were written, by name.

    Raises:
      UserError: the two do not belong together; raised before anything is written.
    """
    return _write(base, delta, out, np.add, "the delta", progress)


def _write(base, other, out, operation: np.ufunc, what: str, progress: Progress) -> dict[str, Tensor]:
    base, other = hub.local(base), hub.local(other)
    for directory in (base, other):
        refuse_adapter(directory)
        if not (directory / "config.json").is_file():
            hint = (" (`convert export --layout llava` writes one)"
                    if (directory / "model" / "config.json").is_file() else "")
            raise at(directory, f"{directory} is not a directory with a config.json; a model in the original's layout "
                                f"was expected{hint}")
    config = read_json(other / "config.json")
    ours, theirs = (_weights(directory) for directory in (base, other))
    _check(base, ours, what, other, theirs)
    _check_config(other, config, theirs)
    _warn_of_base(base, what, other, config)
    config |= dict.fromkeys({"torch_dtype", *({"dtype"} & config.keys())}, "float16")  # transformers 5 writes `dtype`
    tally = Tally()
    tensors = {name: _combined(name, ours.get(name), tensor, operation, tally) for name, tensor in theirs.items()}
    with new_directory(out, total_bytes(tensors), (base, other)) as temporary:
        write_safetensors(temporary, tensors, progress, {"format": "pt"})
        for name in TEXT_FILES:
            if (other / name).is_file():
                shutil.copyfile(other / name, temporary / name)
        write_json(temporary / "config.json", config)
    tally.warn()
    return tensors


def _weights(directory: Path) -> dict[str, Tensor]:
    """Reads the tensors without buffers, which every version of transformers recomputes and a delta holds as zeros."""
    return {name: tensor for name, tensor in read_weights(directory).items() if not names.is_buffer(name)}


def _check(base: Path, ours: Mapping[str, Tensor], what: str, other: Path, theirs: Mapping[str, Tensor]) -> None:
    """Raises UserError if the shapes show that the other model was made from another base."""
    for directory, tensors in ((base, ours), (other, theirs)):
        if _TABLE not in tensors or len(tensors[_TABLE].shape) != 2:
            raise UserError(f"{directory} holds no {_TABLE}; a decoder of the LLaMA family under the original's names "
                            "was expected")
    if _has_projector(ours):
        raise UserError(f"the base {base} has a projector, so it is a whole LLaVA model; the plain decoder was "
                        "expected")
    if not _has_projector(theirs):
        raise UserError(f"{what} {other} has no projector (model.mm_projector), so it is a plain decoder; a LLaVA "
                        "model was expected")
    for size, mine, wanted in (("hidden size", ours[_TABLE].shape[1], theirs[_TABLE].shape[1]),
                               ("number of layers", _layers(ours), _layers(theirs))):
        if mine != wanted:
            raise UserError(f"{base} is not the base of {what} {other}: its {size} is {mine}; {wanted} was expected")
    if ours[_TABLE].shape[0] > theirs[_TABLE].shape[0]:
        raise UserError(f"{base} is not the base of {what} {other}: its vocabulary has {ours[_TABLE].shape[0]} rows; "
                        f"at most {theirs[_TABLE].shape[0]} were expected")
    problems = [f"{name} is missing in {what}" for name in ours if name not in theirs]
    problems += [f"{name} is missing in the base" for name in theirs
                 if name not in ours and not name.startswith(_VERBATIM)]
    for name in ours.keys() & theirs.keys():
        kept = slice(1, None) if name in _VOCABULARY else slice(None)
        if ours[name].shape[kept] != theirs[name].shape[kept] or ours[name].shape[0] > theirs[name].shape[0]:
            problems.append(f"{name} is {list(ours[name].shape)} in the base and {list(theirs[name].shape)} in {what}")
    if problems:
        raise UserError(f"{base} is not the base of {what} {other}: {some(sorted(problems), 4)}")


def _has_projector(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith("model.mm_projector.") for name in tensors)


def _check_config(other: Path, config: Mapping[str, object], theirs: Mapping[str, Tensor]) -> None:
    """Raises UserError if the config belongs to another model than the tensors, so that the output would not open."""
    rows, width = theirs[_TABLE].shape
    for key, found in (("vocab_size", rows), ("hidden_size", width), ("num_hidden_layers", _layers(theirs))):
        if config.get(key) != found:
            raise UserError(f"{other / 'config.json'} has {key} {config.get(key)!r}, but the tensors beside it have "
                            f"{found}")


def _warn_of_base(base: Path, what: str, other: Path, config: Mapping[str, object]) -> None:
    """Warns if a base of the right shapes has other settings than its delta's config.

    LLaMA 2 in the place of LLaMA gives a model that answers nonsense.
    """
    raw = read_json(base / "config.json")
    differ = [key for key in _OF_THE_BASE if key in raw and key in config and raw[key] != config[key]]
    if differ:
        said = "; ".join(f"{key} is {short(raw[key])} in the base and {short(config[key])} in {what}" for key in differ)
        warn(f"{base} may not be the base of {other}, although the shapes agree: {said}")


def _layers(tensors: Mapping[str, Tensor]) -> int:
    return 1 + max((int(found[1]) for found in map(re.compile(r"model\.layers\.(\d+)\.").match, tensors) if found),
                   default=-1)


def _combined(name: str, base: Tensor | None, other: Tensor, operation: np.ufunc, tally: Tally) -> Tensor:
    """Returns `other` with `operation` applied to the rows that `base` has; other rows and tensors are unchanged."""
    half = np.dtype(np.float16)

    def load() -> np.ndarray:
        try:
            out = np.array(tally.cast(name, other.load(), half))
            if base is not None:
                rows = out[:base.shape[0]]
                with np.errstate(over="ignore", invalid="ignore"):  # reported below, in one sentence
                    operation(rows, tally.cast(name, base.load(), half), out=rows)
            is_whole = is_finite(out)
        except UserError:  # raised by a cast
            is_whole = False
        if not is_whole:
            raise UserError(f"{name} is not finite in float16, the dtype of deltas: a value exceeds 65504, or the "
                            "weights are damaged")
        return out
    return Tensor(other.shape, np.dtype(np.float16), load)
