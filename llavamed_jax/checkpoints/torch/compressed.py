"""Kernels of few bits in files: compressed-tensors' format `pack-quantized`, which vLLM and transformers read.

A layer has four tensors in place of `weight` [F,D]:

    weight_packed      int32 [F,W]          the values, packed along a row (`quantized.packing`)
    weight_scale       float [F,G]          G is 1 for a scale for each output
    weight_zero_point  int32 [words of F,G] packed along a column; without it the kernel is symmetric about 0
    weight_shape       int64 [2]            F and D

Axis letters: D width of the input, F of the output, G groups of inputs, W words of a row.

Source: `PackedQuantizationCompressor` of compressed-tensors 0.20.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavamed_jax.checkpoints.tensor import FewBits, Tensor
from llavamed_jax.config.hf import is_packed
from llavamed_jax.errors import UserError, short
from llavamed_jax.quantized import packing
from llavamed_jax.utils.files import read_json

if TYPE_CHECKING:  # imports jax, which a processor does without
    from llavamed_jax.quantized.kernels import Kernel

PACKED, SCALE, ZERO, SHAPE = "weight_packed", "weight_scale", "weight_zero_point", "weight_shape"
INTEGERS = (PACKED, ZERO, SHAPE)
BITS = {"int4": 4, "int8": 8}
# vLLM takes a name as that of one layer unless it begins with `re:`, and would quantise tower and projector by others.
IGNORED = ["re:.*vision_tower.*", "re:.*multi_modal_projector.*", "re:.*lm_head"]


def quantization_config(name: str, group: int | None) -> dict[str, Any]:
    """Returns the `quantization_config` of a `config.json`.

    Args:
      name: `int4` (groups) or `int8` (a scale for each output), symmetric about 0.
      group: width of a group of `int4`.
    """
    weights = dict(num_bits=BITS[name], type="int", symmetric=True, dynamic=False,
                   strategy="channel" if group is None else "group", group_size=group)
    scheme = dict(targets=["Linear"], weights=weights, input_activations=None, output_activations=None)
    return dict(quant_method="compressed-tensors", format="pack-quantized", quantization_status="compressed",
                config_groups={"group_0": scheme}, ignore=IGNORED, kv_cache_scheme=None)


def packed(weight: str, name: str, shape: tuple[int, int], dtype: np.dtype, group: int | None,
           load: Callable[[], Kernel]) -> dict[str, Tensor]:
    """Returns the tensors of a rounded kernel by their names in the file, each read on demand.

    Args:
      weight: the name of the layer's `weight`.
      name: `int4` without zeros, or `int8`.
      shape: [D,F].
      dtype: of the scales, whose values this dtype must hold.
      group: width of a group of `int4`.
      load: reads and rounds the kernel; called once or twice.
    """
    (D, F), bits, start, kept = shape, BITS[name], weight.removesuffix("weight"), []

    def scale_of(kernel: Kernel) -> np.ndarray:
        by_group = kernel.scale[None] if group is None else kernel.scales
        return np.ascontiguousarray(np.asarray(by_group).T.astype(dtype))

    def values() -> np.ndarray:
        kernel = load()
        kept.append(scale_of(kernel))  # until it is written, which is soon
        return packing.pack(np.asarray(kernel.values).T, bits)

    out = {PACKED: Tensor((F, packing.words(D, bits)), np.dtype(np.int32), values),
           SCALE: Tensor((F, 1 if group is None else D // group), dtype,
                         lambda: kept.pop() if kept else scale_of(load())),
           SHAPE: Tensor((2,), np.dtype(np.int64), lambda: np.array([F, D], np.int64))}
    return {start + key: tensor for key, tensor in out.items()}


def unpacked(directory: Path, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns a directory's tensors with one `weight` for the tensors of each packed kernel.

    Args:
      directory: the directory, whose `config.json` says how kernels are packed.
      found: its tensors by their names in the files.

    Raises:
      UserError: kernels are packed in another way than this project's are.
    """
    starts = [key.removesuffix(PACKED) for key in found if key.endswith(f".{PACKED}")]
    if not starts:
        return dict(found)
    _check_scheme(directory)
    taken = {start + key for start in starts for key in (PACKED, SCALE, ZERO, SHAPE)}
    out = {key: tensor for key, tensor in found.items() if key not in taken}
    return out | {f"{start}weight": _weight(directory, start, found) for start in starts}


def refuse_other_formats(directory: Path) -> None:
    """Raises UserError if a directory's `config.json` names a format of compressed-tensors that cannot be read."""
    said = _said(directory)
    if said.get("quant_method") == "compressed-tensors" and said.get("format") not in ("pack-quantized", "dense"):
        raise UserError(f"{directory} is quantised in the format {short(said.get('format'))} of compressed-tensors; "
                        "pack-quantized, or the model before it was quantised, was expected")


def _said(directory: Path) -> Mapping[str, Any]:
    """Returns the `quantization_config` of a directory's `config.json`; {} without one."""
    config = read_json(directory / "config.json") if (directory / "config.json").is_file() else {}
    said = config.get("quantization_config") if isinstance(config, Mapping) else None
    return said if isinstance(said, Mapping) else {}


def _check_scheme(directory: Path) -> None:
    said = _said(directory)
    if not is_packed({"quantization_config": said}):
        raise UserError(f"{directory} holds packed kernels ({PACKED}), and its config.json has no quantization_config "
                        "of compressed-tensors with the format pack-quantized, which was expected")
    groups = said.get("config_groups")
    for group in groups.values() if isinstance(groups, Mapping) else []:
        weights = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(weights, Mapping) or weights.get("type", "int") != "int" or group.get("input_activations"):
            raise UserError(f"{directory} is quantised by compressed-tensors with the scheme {short(group)}; integer "
                            "weights and activations that are not quantised were expected")


def _weight(directory: Path, start: str, found: Mapping[str, Tensor]) -> Tensor:
    """Returns a packed kernel as the tensor `weight` [F,D] in the dtype of its scales."""
    lacking = [key for key in (SCALE, SHAPE) if start + key not in found]
    if lacking or f"{start}weight" in found or f"{start}weight_g_idx" in found:
        what = (f"lacks {start}{lacking[0]}" if lacking else
                f"holds {start}weight beside it" if f"{start}weight" in found else
                f"orders its groups by activations ({start}weight_g_idx)")
        raise UserError(f"{directory} holds {start}{PACKED} of compressed-tensors and {what}, which cannot be read")
    values, scale, zero = found[start + PACKED], found[start + SCALE], found.get(start + ZERO)
    shape = [int(size) for size in found[start + SHAPE].load().reshape(-1)]
    if len(shape) != 2 or min(shape) < 1:
        raise UserError(f"{directory} holds {start}{SHAPE} with {short(shape)}; two sizes were expected")
    F, D = shape
    bits = next((bits for bits in (4, 8) if values.shape == (F, packing.words(D, bits))), None)
    G = scale.shape[1] if len(scale.shape) == 2 and scale.shape[0] == F else 0
    fits = values.dtype == np.int32 and G > 0 and D % G == 0 and (bits == 4 or bits == 8 and G == 1 and zero is None)
    fits &= zero is None or zero.dtype == np.int32 and zero.shape == (packing.words(F, 4), G)
    if not fits:
        said = {key: list(found[start + key].shape) for key in (PACKED, SCALE, ZERO) if start + key in found}
        raise UserError(f"{directory} holds {start}weight of {shape} as compressed-tensors' {said}; int4 in groups of "
                        "inputs, or int8 with a scale for each output, was expected")

    def load() -> Kernel:
        from llavamed_jax.quantized.kernels import Int4Kernel, Int8Kernel
        whole = np.ascontiguousarray(packing.unpack(values.load(), bits, D).T)
        scales = np.ascontiguousarray(scale.load().astype(np.float32).T)
        if bits == 8:
            return Int8Kernel(whole, scales[0])
        import ml_dtypes
        zeros = None if zero is None else packing.unpack(zero.load().T, bits, F)
        return Int4Kernel(whole.astype(ml_dtypes.int4), scales, zeros)

    return Tensor((F, D), scale.dtype, lambda: np.ascontiguousarray(load().widened(scale.dtype).T),
                  FewBits(f"int{bits}", load))
