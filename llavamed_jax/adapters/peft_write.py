"""Writes the adapter of a checkpoint as PEFT does, with torch's names of transformers 5 or of LLaVA's own classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path

from llavamed_jax.adapters import peft, tables
from llavamed_jax.checkpoints import names
from llavamed_jax.checkpoints.checkpoint import Checkpoint
from llavamed_jax.checkpoints.export.directory import padded_vocabulary
from llavamed_jax.checkpoints.export.tokenizer import ids_in_transformers
from llavamed_jax.checkpoints.torch.files import ADAPTER_CONFIG, ADAPTER_OTHERS
from llavamed_jax.checkpoints.torch.layout import to_torch
from llavamed_jax.checkpoints.torch.write import total_bytes, write_bin, write_safetensors
from llavamed_jax.checkpoints.tree import reference
from llavamed_jax.config import LlavaConfig
from llavamed_jax.config.adapter import FACTOR_A, FACTOR_B, KERNEL, AdapterConfig
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.errors import UserError, some
from llavamed_jax.utils.directories import new_directory
from llavamed_jax.utils.files import write_json

# Transformers 5 reads the names that its modules have in memory, which are not those of whole models' files.
_TRANSFORMERS_5 = {"language_model.model.": "model.language_model.",
                   "vision_tower.vision_model.": "model.vision_tower.", "vision_tower.": "model.vision_tower.",
                   "multi_modal_projector.": "model.multi_modal_projector.", "language_model.lm_head.": "lm_head."}
_PROJECTOR, _HEAD = "model.multi_modal_projector.", "lm_head.weight"


def write(checkpoint: Checkpoint, out: str | Path, layout: str = "transformers", base: str | None = None) -> list[str]:
    """Writes `adapter_config.json` and `adapter_model.safetensors` into a new directory.

    Whole tensors that were trained beside the factors, such as the projector's, are written to the same file
    (`modules_to_save`), and for LLaVA to `non_lora_trainables.bin`, beside the whole model's `config.json`.

    Args:
      checkpoint: a checkpoint with an adapter: a run, or a base with an adapter put onto it.
      out: a directory that does not exist or is empty.
      layout: `transformers` or `llava`.
      base: `base_model_name_or_path`; None for the directory of the base.

    Returns:
      The names of the tensors that were written.

    Raises:
      UserError: the checkpoint has no adapter; the layout has no names for its modules; its tokenizer does not fit its
        table; torch is not installed, which `non_lora_trainables.bin` needs.
    """
    adapter = checkpoint.config.adapter
    if adapter is None:
        raise UserError(f"{checkpoint.directory} has no adapter; an adapter, or a run that trains one, was expected")
    spelled = {name: _spelling(spellings[0], layout, checkpoint.config)
               for name, spellings in names.torch_names(checkpoint.config, layout).items()}
    if layout == "transformers":
        checkpoint = _as_in_an_export(checkpoint)
    modules = sorted(name.removesuffix(FACTOR_A) for name in checkpoint.tensors if name.endswith(FACTOR_A))
    homeless = [module for module in modules if module + KERNEL not in spelled]
    if homeless:
        raise UserError(f"the layout {layout} has no names for {some(homeless, 3)}; another layout was expected")
    torch_modules = {module: spelled[module + KERNEL].removesuffix(".weight") for module in modules}
    factors = {}
    for module, torch in torch_modules.items():
        for leaf, letter in ((FACTOR_A, "A"), (FACTOR_B, "B")):
            factors[f"{peft.START}{torch}.lora_{letter}.weight"] = peft.turned(checkpoint.tensors[module + leaf])
    changed = {spelled[name] for name in checkpoint.changed if name in spelled}
    is_tied = (layout == "transformers" and checkpoint.config.decoder.tie_word_embeddings
               and tables.TABLE in checkpoint.changed)
    changed |= {_HEAD} if is_tied else set()  # with the table alone, the base's would stay PEFT's head (`tied`)
    parts = _modules_to_save(changed, torch_modules.values()) if layout == "transformers" else []
    # PEFT reads every tensor of a module that it saves, those that did not change too.
    whole = {torch: to_torch(name, checkpoint.tensors[name]) for name, torch in sorted(spelled.items())
             if torch in changed or any(torch.startswith(f"{part}.") for part in parts)}
    whole |= {_HEAD: whole[spelled[tables.TABLE]]} if is_tied else {}
    tensors = factors | ({peft.START + name: tensor for name, tensor in whole.items()} if parts else {})
    others = {f"base_model.model.{name}": tensor for name, tensor in whole.items()} if layout == "llava" else {}
    with new_directory(out, total_bytes(tensors | others), checkpoint.sources) as folder:
        # PEFT reads an adapter from one file.
        write_safetensors(folder, tensors, metadata={"format": "pt"}, stem="adapter_model", is_cut=False)
        if layout == "llava":  # LLaVA's builder reads both, the latter also if it holds nothing
            write_json(folder / "config.json", llava_to_hf(checkpoint.config.replace(adapter=None), layout))
            write_bin(folder / ADAPTER_OTHERS, others)
        write_json(folder / ADAPTER_CONFIG, _config(adapter, torch_modules, parts, _base(checkpoint, base))
                   | ({"ensure_weight_tying": True} if is_tied else {}))
    return [*tensors, *others]


def _as_in_an_export(checkpoint: Checkpoint) -> Checkpoint:
    """Returns the checkpoint with as many rows of the vocabulary as its base has in transformers' layout.

    Raises:
      UserError: the tokenizer belongs to another model than the table.
    """
    cfg, factor = checkpoint.config, f"{tables.HEAD}{FACTOR_B}"
    has_rows = factor in checkpoint.tensors or checkpoint.changed & tables.AXES.keys()
    if cfg.image_token_id is not None or not has_rows:
        return checkpoint
    rows = cfg.rows_in_transformers(ids_in_transformers(cfg.decoder.vocab_size, checkpoint.files))
    longer = padded_vocabulary(checkpoint, rows)
    if factor in checkpoint.tensors:
        longer[factor] = tables.fitted_factor(checkpoint.tensors[factor], rows, 1)
    return checkpoint.replace(tensors={**checkpoint.tensors, **longer})


def _spelling(name: str, layout: str, cfg: LlavaConfig) -> str:
    if layout == "transformers":
        for old, new in _TRANSFORMERS_5.items():
            if name.startswith(old):
                rest = name.removeprefix(old)
                return new + (cfg.vision.in_memory(rest) if "vision_tower" in new else rest)
    return name


def _modules_to_save(changed: Collection[str], targets: Collection[str]) -> list[str]:
    """Returns the modules whose tensors hold the changed ones, by full names: PEFT takes a last part of a name too.

    Modules inside another of the list are left out. The projector is one module, unless one of its layers has factors.

    Raises:
      UserError: a module with factors has a changed tensor, or lies in a module that has one: PEFT saves it whole or
        gives it factors.
    """
    modules = {name.rpartition(".")[0] for name in changed}
    if not any(target.startswith(_PROJECTOR) for target in targets):
        modules = {_PROJECTOR.rstrip(".") if module.startswith(_PROJECTOR) else module for module in modules}
    parts = sorted(module for module in modules if not any(module.startswith(f"{other}.") for other in modules))
    both = sorted(target for target in targets if any(f"{target}.".startswith(f"{part}.") for part in parts))
    if both:
        raise UserError(f"{some(both, 3)} has factors and was trained whole too, which PEFT cannot hold; `convert "
                        "merge-lora`, or the layout llava, was expected")
    return parts


def _base(checkpoint: Checkpoint, base: str | None) -> str | None:
    if base is not None or checkpoint.directory is None:
        return base
    return reference.path(checkpoint.directory) or str(checkpoint.directory.absolute())


def _config(adapter: AdapterConfig, modules: Mapping[str, str], parts: list[str], base: str | None) -> dict:
    """Returns the content of `adapter_config.json`; r and alpha are the most frequent, others stand in patterns."""
    rules = {torch: adapter.rule(module) for module, torch in modules.items()}
    rank = Counter(rule.rank for rule in rules.values()).most_common(1)[0][0]
    alpha = Counter(rule.alpha for rule in rules.values()).most_common(1)[0][0]
    escaped = {torch: torch.replace(".", r"\.") for torch in rules}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "inference_mode": True,
        "r": rank, "lora_alpha": _plain(alpha), "lora_dropout": adapter.dropout, "use_rslora": adapter.use_rslora,
        "bias": "none", "fan_in_fan_out": False, "init_lora_weights": True, "use_dora": False,
        "target_modules": list(rules), "modules_to_save": parts or None,
        "rank_pattern": {escaped[torch]: rule.rank for torch, rule in rules.items() if rule.rank != rank},
        "alpha_pattern": {escaped[torch]: _plain(rule.alpha) for torch, rule in rules.items() if rule.alpha != alpha},
    }


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else alpha
