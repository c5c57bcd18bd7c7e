"""Reads an adapter as PEFT and LLaVA's training write it, and puts it onto its base.

A directory has `adapter_config.json` and `adapter_model.safetensors` (or `.bin`), whose tensors are named
`base_model.model.MODULE.lora_A.weight` [r,in] and `….lora_B.weight` [out,r], with torch's name of the module: that of
transformers' `LlavaForConditionalGeneration`, version 5 or 4, or of LLaVA's own classes. Whole tensors that were
trained beside the factors stand there too (`modules_to_save`), and LLaVA writes them to `non_lora_trainables.bin`.

Source: PEFT's `get_peft_model_state_dict`; `llava/train/train.py` and `llava/model/builder.py` of LLaVA.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llavamed_jax.adapters import lacking, peft_config, tables, tied
from llavamed_jax.adapters.peft_config import PeftConfig
from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.soundness import is_finite, what_is_not_finite
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.checkpoints.torch.files import ADAPTER_CONFIG, ADAPTER_OTHERS, ADAPTER_WEIGHTS, read_file
from llavamed_jax.checkpoints.torch.layout import from_torch
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import FACTOR_A, FACTOR_B, KERNEL, AdapterConfig, AdapterRule, without_factors
from llavamed_jax.errors import UserError, count_of, some, warn_once

START = "base_model.model."
# Behind a module's name: the adapter's own name ("default") stands in state dicts that PEFT did not strip.
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.[\w-]+)?\.weight")
_SAVED = re.compile(r"(.+?)\.modules_to_save(?:\.[\w-]+)?\.(weight|bias)")
_BASES = ".original_module."  # the base's own tensor, which PEFT keeps beside one of `modules_to_save`


class Adapter(NamedTuple):
    """An adapter in a model's canonical names.

    Attributes:
      config: the ranks and scales.
      tensors: factors, and whole tensors that replace the base's.
    """

    config: AdapterConfig
    tensors: dict[str, Tensor]


def is_adapter(directory: Path) -> bool:
    """Returns whether a directory holds an adapter, and no whole model beside it."""
    return (directory / ADAPTER_CONFIG).is_file() and any((directory / name).is_file() for name in ADAPTER_WEIGHTS)


def apply(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """Returns a base with the adapter of a directory: its factors beside the kernels, not merged.

    Raises:
      UserError: the adapter cannot be read, is not plain LoRA, or belongs to another model; the base has an adapter;
        when one of the adapter's tensors is loaded, it has NaN or infinite values.
    """
    if checkpoint.config.adapter is not None:
        raise UserError(f"{checkpoint.directory} has an adapter already, so {directory} cannot be added; a model "
                        "without an adapter was expected")
    adapter = read(directory, checkpoint)
    config = checkpoint.config.replace(adapter=adapter.config)
    changed = frozenset(without_factors(adapter.tensors))
    return checkpoint.replace(config=config, tensors={**checkpoint.tensors, **adapter.tensors}, changed=changed,
                              adapter_directory=directory)


def read(directory: Path, checkpoint: Checkpoint) -> Adapter:
    """Reads the adapter of a directory for a base. Its tables over the vocabulary get the base's number of rows.

    Raises:
      UserError: as `apply`.
    """
    settings, model = peft_config.read(directory), checkpoint.config
    file = next((directory / name for name in ADAPTER_WEIGHTS if (directory / name).is_file()), None)
    if file is None:
        raise UserError(f"{directory} holds no {' or '.join(ADAPTER_WEIGHTS)}; the weights of an adapter were expected")
    specs, canonical = names.specs(model), _canonical(model)
    modules = {torch.removesuffix(".weight"): name.removesuffix(KERNEL) for torch, name in canonical.items()
               if name.endswith(KERNEL) and len(specs[name].shape) == 2}
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in _read(file).items():
        name = key.removeprefix(START)
        if ".lora_embedding_" in name:
            raise UserError(f"{file} holds {key[:120]!r}, factors of an embedding, which are not supported; factors of "
                            "linear layers, and embeddings in modules_to_save, were expected")
        if found := _FACTOR.fullmatch(name):
            factors.setdefault(found[1], {})[found[2]] = tensor
        elif _BASES not in name:
            saved = _SAVED.fullmatch(name)
            whole[f"{saved[1]}.{saved[2]}" if saved else name.replace(".base_layer.", ".")] = tensor
    _leave_out_dropped(file, model, factors, whole)
    if not factors:
        raise UserError(f"{file} holds no tensors named …lora_A.weight for a part that this model has; the factors of "
                        "LoRA were expected")
    check_rows = functools.partial(tables.check_rows, checkpoint=checkpoint, adapter=directory)
    whole = tied.without_head(file, whole, canonical, checkpoint, is_pefts=True)
    tensors = _whole(file, specs, canonical, whole, check_rows)
    if (directory / ADAPTER_OTHERS).is_file():
        others = directory / ADAPTER_OTHERS
        whole = tied.without_head(others, _stripped(_read(others)), canonical, checkpoint, is_pefts=False)
        tensors |= _whole(others, specs, canonical, whole, check_rows)
    tensors = {name: tables.fitted(name, tensor, checkpoint.tensors[name]) if name in checkpoint.tensors else tensor
               for name, tensor in tensors.items()}
    unknown = sorted(module for module in factors if module not in modules)
    if unknown:
        raise UserError(f"{file} has factors of {some(unknown, 3)}, which this model does not have; an adapter of this "
                        f"model was expected{_named(settings)}")
    lacking.warn_of_factors(file, settings, modules, factors, tensors, model)
    lacking.warn_of_saved(file, settings, canonical, tensors)
    rules: dict[str, AdapterRule] = {}
    for module, pair in factors.items():
        name = modules[module]
        if name == tables.HEAD and len(shape := pair["B"].shape) == 2:
            check_rows(f"{file}: lora_B of {module}", shape[0])
            pair = {**pair, "B": tables.fitted_factor(pair["B"], model.decoder.vocab_size, 0)}
        rank = _check_factors(file, settings, module, pair, specs[name + KERNEL].shape)
        rules[name] = AdapterRule(name, rank, settings.alpha_of(module))
        tensors[name + FACTOR_A], tensors[name + FACTOR_B] = turned(pair["A"]), turned(pair["B"])
    return Adapter(AdapterConfig(_rules(rules, model), settings.use_rslora, settings.dropout), tensors)


def _read(file: Path) -> dict[str, Tensor]:
    """Returns the tensors of an adapter's file, each of which is checked when it is loaded."""
    return {key: Tensor(tensor.shape, tensor.dtype, functools.partial(_finite, file, key, tensor))
            for key, tensor in read_file(file).items()}


def _finite(file: Path, key: str, tensor: Tensor) -> np.ndarray:
    """Loads a tensor; UserError for NaN or infinity, which a sum with the base's kernel would show as the base's."""
    array = tensor.load()
    if not is_finite(array):
        raise UserError(f"{file} holds {key[:120]} with {what_is_not_finite(array)}; finite weights were expected")
    return array


def _leave_out_dropped(file: Path, model: LlavaConfig, factors: dict[str, dict[str, Tensor]],
                       whole: dict[str, Tensor]) -> None:
    """Removes factors and whole tensors of parts of the tower that LLaVA does not read, and warns of them."""
    of_layouts = [names.dropped(model, layout) for layout in ("transformers", "llava")]
    found = {name: part for part, key in ((factors, "{}.weight"), (whole, "{}")) for name in part
             if any(is_dropped(key.format(name)) for is_dropped in of_layouts)}
    for name, part in found.items():
        del part[name]
    if found:
        warn_once(f"{file}: what it has for {count_of(len(found), 'part')} of the vision tower that LLaVA does not "
                  f"read is left out: {some(sorted(found))}")


def _canonical(model: LlavaConfig) -> dict[str, str]:
    """Returns torch's name of every tensor, in every layout, -> its canonical name."""
    return {each: name for layout in ("transformers", "llava")
            for name, spellings in names.torch_names(model, layout).items() for each in spellings}


def _check_factors(file: Path, settings: PeftConfig, module: str, pair: Mapping[str, Tensor],
                   shape: tuple[int, int]) -> int:
    """Returns the rank of a module's factors; UserError if they do not fit each other, the config or the model."""
    if len(pair) < 2:
        raise UserError(f"{file} lacks lora_{'B' if 'A' in pair else 'A'} of {module}; both factors were expected")
    a, b = pair["A"].shape, pair["B"].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise UserError(f"{file} has for {module} lora_A {list(a)} and lora_B {list(b)}; [r, in] and [out, r] with the "
                        "same r were expected")
    if (a[1], b[0]) != shape:
        raise UserError(f"{file} has for {module} factors of {a[1]} -> {b[0]}; {shape[0]} -> {shape[1]}, as this model "
                        f"has, was expected{_named(settings)}")
    if a[0] != (rank := settings.rank_of(module)):
        raise UserError(f"{file} has for {module} factors of rank {a[0]}; {rank}, as {settings.file} says, was "
                        "expected")
    if not settings.is_target(module):
        raise UserError(f"{file} has factors of {module}, which target_modules of {settings.file} does not name; "
                        "factors of its targets alone were expected")
    return rank


def _named(settings: PeftConfig) -> str:
    return f" (it was trained on {settings.base})" if settings.base else ""


def turned(factor: Tensor) -> Tensor:
    """Returns a factor of torch's orientation in this project's, or the reverse."""
    return Tensor(factor.shape[::-1], factor.dtype, lambda: np.ascontiguousarray(factor.load().T))


def _stripped(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors of `non_lora_trainables.bin` by the names of the model, as LLaVA's builder strips them."""
    out = {key.removeprefix("base_model."): tensor for key, tensor in found.items()}
    if any(key.startswith("model.model.") for key in out):
        out = {key.removeprefix("model."): tensor for key, tensor in out.items()}
    return out


def _whole(file: Path, specs: Mapping[str, names.Spec], canonical: Mapping[str, str], found: Mapping[str, Tensor],
           check_rows: Callable[[str, int], None]) -> dict[str, Tensor]:
    """Returns whole tensors by canonical name; tables over the vocabulary with the rows that `check_rows` lets pass."""
    out = {}
    for key, tensor in found.items():
        name = canonical.get(key)
        if name is None:
            raise UserError(f"{file} holds {key[:120]!r}, which is neither a factor of LoRA nor a tensor of this "
                            "model; plain LoRA of this model was expected")
        axis, own = tables.AXES.get(name), specs[name].shape
        if axis is not None and len(tensor.shape) == len(own):
            check_rows(f"{file}: {key}", tensor.shape[0])
            own = own[:axis] + tensor.shape[:1] + own[axis + 1:]
        shape = names.torch_shape(name, own)
        if tensor.shape != shape:
            raise UserError(f"{file} has {key} {list(tensor.shape)}; {list(shape)}, as this model has, was expected")
        out[name] = from_torch(name, tensor, own)
    return out


def _rules(found: Mapping[str, AdapterRule], model: LlavaConfig) -> tuple[AdapterRule, ...]:
    """Returns few rules that match exactly these modules: one for each rank, alpha and set of layers."""
    depths = {"vision_tower": model.vision.num_layers, "decoder": model.decoder.num_layers}
    layers: dict[tuple[str, int, float], set[int]] = {}
    out = []
    for name, rule in found.items():
        if place := re.fullmatch(r"(\w+)/layers_(\d+)/(.+)", name):
            layers.setdefault((f"{place[1]} {place[3]}", rule.rank, rule.alpha), set()).add(int(place[2]))
        else:
            out.append(AdapterRule(re.escape(name), rule.rank, rule.alpha))
    groups: dict[tuple[str, str, int, float], list[str]] = {}
    for (place, rank, alpha), numbers in layers.items():
        part, module = place.split(" ")
        which = r"\d+" if len(numbers) == depths[part] else f"({'|'.join(map(str, sorted(numbers)))})"
        groups.setdefault((part, which, rank, alpha), []).append(module)
    for (part, which, rank, alpha), modules in groups.items():
        which_modules = modules[0] if len(modules) == 1 else f"({'|'.join(modules)})"
        out.append(AdapterRule(f"{part}/layers_{which}/{which_modules}", rank, alpha))
    return tuple(out)
