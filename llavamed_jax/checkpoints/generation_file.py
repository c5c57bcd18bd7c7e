"""Reads and writes `generation_config.json`: the stop ids, and settings of transformers' `generate`.

If this file exists, transformers' `generate` takes all settings from it, stop ids included: a file without stop ids
means that no id stops generation. Only without the file does it read them from `config.json`. The same rule holds here.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llavamed_jax.config import DecoderConfig, LlavaConfig, token_ids
from llavamed_jax.config.hf import mended_ids
from llavamed_jax.errors import UserError, short, some
from llavamed_jax.utils.files import read_json, write_json

FILE = "generation_config.json"
# Settings that change transformers' answers and that this project does not have, each with its values without effect.
_NOT_APPLIED: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (), "suppress_tokens": (), "begin_suppress_tokens": (), "sequence_bias": (),
    "forced_eos_token_id": (),
    "forced_bos_token_id": (), "forced_decoder_ids": (), "min_length": (0,), "min_new_tokens": (0,), "stop_strings": (),
    "exponential_decay_length_penalty": (), "guidance_scale": (1.0,), "watermarking_config": (),
    "penalty_alpha": (0.0,),
    "dola_layers": (), "constraints": (), "force_words_ids": (), "token_healing": (False,),
    "remove_invalid_values": (False,),
    "min_p": (0.0,), "top_h": (), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),  # of sampling
    # of beam search
    "length_penalty": (1.0,), "early_stopping": (False,), "diversity_penalty": (0.0,), "num_beam_groups": (1,),
}
# Settings that a call or a recipe makes here, not a file: `generate`'s own arguments, with their own defaults (greedy).
_OF_A_CALL = {"do_sample", "temperature", "top_p", "top_k", "num_beams", "max_length", "max_new_tokens",
              "num_return_sequences"}
# Settings that change no answer: how it is computed, what else is returned, which software wrote the file.
_WITHOUT_EFFECT = {
    "eos_token_id", "bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version",
    "_from_model_config", "_commit_hash",
    "use_cache", "output_attentions", "output_hidden_states", "output_logits", "output_scores",
    "return_dict_in_generate",
    "renormalize_logits", "cache_config", "cache_implementation", "compile_config", "continuous_batching_config",
    "disable_compile",
    "low_memory", "max_cache_len", "max_matching_ngram_size", "max_time", "prefill_chunk_size",
    "prompt_lookup_num_tokens",
    "speculation_type", "target_lookbehind", "use_mtp", "is_assistant", "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight", "assistant_lookbehind",
    "generation_kwargs", "trust_remote_code", "chat_format",
}


def with_stop_ids(decoder: DecoderConfig, directory: Path) -> DecoderConfig:
    """Returns the decoder's config with the stop ids of a directory's `generation_config.json`, if that file exists.

    Args:
      decoder: the decoder's config.
      directory: the checkpoint's directory.

    Raises:
      UserError: the file cannot be read, or its `eos_token_id` is neither an id, nor a list of ids, nor null.
    """
    file = directory / FILE
    if not file.is_file():
        return decoder
    settings = read_json(file)
    try:
        ids = token_ids(mended_ids(decoder.architecture, settings).get("eos_token_id"), "eos_token_id", FILE)
    except UserError as error:
        raise UserError(f"{directory}: {error}") from None
    return dataclasses.replace(decoder, **DecoderConfig.ends_with(ids))


def settings_for(cfg: LlavaConfig, file: Path | None, pad: int | None = None) -> dict:
    """Returns the `generation_config.json` to write with a model: its file's settings, with this config's stop ids.

    Args:
      cfg: the model's config.
      file: the checkpoint's own `generation_config.json`; None if it had none.
      pad: the id of the padding token that an export adds; None keeps the file's.
    """
    decoder = cfg.decoder
    found = read_json(file) if file is not None else {}
    out = {"bos_token_id": decoder.bos_token_id, "pad_token_id": decoder.pad_token_id,
           **mended_ids(decoder.architecture, found)}
    out["eos_token_id"] = decoder.eos_value
    if pad is not None:
        out["pad_token_id"] = pad
    # An export had added this row.
    elif isinstance(out["pad_token_id"], int) and out["pad_token_id"] >= decoder.vocab_size:
        out["pad_token_id"] = decoder.pad_token_id
    return {key: value for key, value in out.items() if value is not None}


def copy_files(cfg: LlavaConfig, files: Mapping[str, Path], out: Path) -> None:
    """Copies a model's files; `generation_config.json` gets the stop ids of the config.

    Args:
      cfg: the model's config.
      files: the files by name.
      out: the directory to copy into.
    """
    for name, file in files.items():
        if name == FILE:
            write_json(out / name, settings_for(cfg, file))
        else:
            shutil.copyfile(file, out / name)


def sampling_of(files: Mapping[str, Path]) -> dict[str, float | int]:
    """Returns how a checkpoint wants to be sampled, for callers whose users did not say.

    Args:
      files: the checkpoint's files by name.

    Returns:
      `temperature` (0 unless the file says `do_sample`), and `top_p`, `top_k` and `max_new_tokens` where the file has
      them. The defaults that transformers has for absent settings (a `top_k` of 50) are not the checkpoint's.

    Raises:
      UserError: a value of the file is invalid.
    """
    found = read_json(files[FILE]) if FILE in files else {}
    out: dict[str, float | int] = {"temperature": 0.0}
    if found.get("do_sample"):
        out["temperature"] = 1.0 if found.get("temperature") is None else found["temperature"]
    out |= {key: found[key] for key in ("top_p", "top_k", "max_new_tokens") if found.get(key) is not None}
    for key, value in out.items():
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        is_valid = (is_whole and value >= (key == "max_new_tokens") if key in ("top_k", "max_new_tokens") else
                    (is_whole or isinstance(value, float))
                    and (0 <= value < float("inf") if key == "temperature" else 0 < value <= 1))
        if not is_valid:
            raise UserError(f"{files[FILE]}: {key} is {short(value)}, which is no setting of sampling")
    return out


def not_applied(cfg: LlavaConfig, files: Mapping[str, Path]) -> str | None:
    """Returns a sentence about the settings that this project does not apply; None if there are none.

    `config.json` may hold them too, if there is no `generation_config.json`: older transformers read them from there.
    """
    settings = read_json(files[FILE]) if FILE in files else {
        key: value for key, value in json.loads(cfg.extra).items() if key in _NOT_APPLIED}
    odd = [f"{key} {short(value)}" for key, value in sorted(settings.items())
           if value not in (None, [], {}) and key not in _OF_A_CALL | _WITHOUT_EFFECT
           and value not in _NOT_APPLIED.get(key, ())]
    where = FILE if FILE in files else "config.json"
    return f"{where} has {some(odd)}, which transformers' generate applies and this project does not" if odd else None
