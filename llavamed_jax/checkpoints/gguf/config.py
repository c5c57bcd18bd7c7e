"""Makes transformers' `config.json` and `generation_config.json` from the metadata of a GGUF file."""

from __future__ import annotations

import re
from typing import Any

from llavamed_jax.checkpoints.gguf.file import GgufFile
from llavamed_jax.checkpoints.gguf.rope import TENSOR as ROPE_TENSOR
from llavamed_jax.checkpoints.gguf.rope import rope_settings
from llavamed_jax.checkpoints.gguf.vocabulary import CONTROL, KINDS, TOKENS, USER_DEFINED
from llavamed_jax.config import DecoderConfig
from llavamed_jax.config.decoders import DECODERS
from llavamed_jax.config.hf import plain_decoder
from llavamed_jax.errors import UserError, short, some, warn

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
# Architectures of GGUF whose name is transformers' `model_type`; llama.cpp writes a Mistral as `llama`.
_ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Keys below the architecture's prefix that are read, or that change nothing here.
_READ = {"block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "attention.layer_norm_rms_epsilon", "attention.key_length",
         "attention.value_length", "rope.freq_base", "rope.dimension_count", "rope.scaling.type", "rope.scaling.factor",
         "rope.scale_linear", "rope.scaling.original_context_length", "vocab_size"}
_WITHOUT_EFFECT = {"tensor_data_layout", "rope.scaling.finetuned", "pooling_type"}
# Keys that change what is computed, with the value at which they do not.
_NEUTRAL: dict[str, Any] = {
    "attention.sliding_window": 0, "attention.causal": True, "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0, "attention.scale": 0.0, "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0, "expert_count": 0, "expert_used_count": 0, "logit_scale": 0.0,
    "residual_scale": 0.0, "embedding_scale": 0.0, "rope.scaling.attn_factor": 1.0, "use_parallel_residual": False}
# The ids that end a sequence: its end, the end of a turn, the end of a message.
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Texts of tokens that end an answer whatever the metadata say (`special_eog_ids` in llama.cpp's `llama-vocab.cpp`), of
# language models with these architectures. The converters write no `eot_token_id` for Llama 3's `<|eot_id|>`.
_END_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>",
              "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<eos>")


def architectures() -> list[str]:
    """Returns the architectures of GGUF that can be read."""
    return [name for name in _ARCHITECTURES if name in DECODERS]


def decoder_config(file: GgufFile) -> DecoderConfig:
    """Reads the decoder's config.

    Args:
      file: the GGUF file.

    Raises:
      UserError: another architecture, metadata that are missing or of another type, or a setting that this project's
        decoder does not have.
    """
    kind = file.get("general.architecture", str)
    if kind not in architectures():
        raise UserError(f"{file.path} has general.architecture {short(kind)}; {' or '.join(architectures())} was "
                        "expected")
    _check_keys(file, kind)
    key = lambda name: f"{kind}.{name}"
    width, heads = file.get(key("embedding_length"), int), file.per_layer(key("attention.head_count"))
    if heads < 1:
        raise UserError(f"{file.path} has {key('attention.head_count')} {heads}; a whole number of at least 1 was "
                        "expected")
    head_dim = file.get(key("attention.key_length"), int, width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if file.get(key(name), int, head_dim) != head_dim:
            raise UserError(f"{file.path} has {key(name)} {file.get(key(name), int)}; {head_dim}, the width of a head, "
                            "was expected")
    theta = file.get(key("rope.freq_base"), float, 10000.0)
    scaling = rope_settings(file, kind, head_dim, theta)
    raw = dict(
        model_type=kind, vocab_size=_rows(file, kind), hidden_size=width,
        intermediate_size=file.per_layer(key("feed_forward_length")),
        num_hidden_layers=file.get(key("block_count"), int), num_attention_heads=heads,
        num_key_value_heads=file.per_layer(key("attention.head_count_kv"), heads), head_dim=head_dim,
        max_position_embeddings=file.get(key("context_length"), int),
        rms_norm_eps=file.get(key("attention.layer_norm_rms_epsilon"), float),
        rope_theta=theta, hidden_act="silu", tie_word_embeddings=HEAD not in file.tensors,
        attention_bias="blk.0.attn_q.bias" in file.tensors, mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        bos_token_id=_token_id(file, "bos_token_id"), pad_token_id=_token_id(file, "padding_token_id"),
        eos_token_id=stop_ids(file) or None, **({"rope_scaling": scaling} if scaling else {}))
    try:
        return plain_decoder(raw)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None


def config_json(decoder: DecoderConfig, dtype: str) -> dict[str, Any]:
    """Returns the `config.json` of a decoder, which every version of transformers reads.

    Args:
      decoder: the config.
      dtype: the type of the tensors by name; both spellings of its key are written.
    """
    return {**decoder.to_hf(), "architectures": [decoder.hf_class], "dtype": dtype, "torch_dtype": dtype}


def generation_json(decoder: DecoderConfig) -> dict[str, Any]:
    """Returns the `generation_config.json` of a decoder: its special ids."""
    ids = dict(bos_token_id=decoder.bos_token_id, eos_token_id=decoder.eos_value, pad_token_id=decoder.pad_token_id)
    return {key: value for key, value in ids.items() if value is not None}


def stop_ids(file: GgufFile) -> list[int]:
    """Returns the ids that end a sequence, without repetitions: those that the metadata name, then others by text."""
    found = [_token_id(file, name) for name in _ENDS]
    return list(dict.fromkeys(i for i in (*found, *_ends_by_text(file)) if i is not None))


def _ends_by_text(file: GgufFile) -> list[int]:
    """Returns the ids of the tokens in `_END_TEXTS` that are cut out of texts; [] for a file without a vocabulary."""
    if not {TOKENS, KINDS} <= {*file.keys}:  # an error where the tokenizer is read
        return []
    ids = {text: i for i, (text, kind) in enumerate(zip(file.strings(TOKENS), file.integers(KINDS)))
           if kind in (CONTROL, USER_DEFINED)}
    return [ids[text] for text in _END_TEXTS if text in ids]


def _token_id(file: GgufFile, name: str) -> int | None:
    key = f"tokenizer.ggml.{name}"
    i = file.get(key, int, None)
    count = file.tensors[EMBEDDING].shape[0] if EMBEDDING in file.tensors else 0
    if i is not None and not 0 <= i < count:
        raise UserError(f"{file.path} has {key} {i}; an id below {count} was expected")
    return i


def _rows(file: GgufFile, kind: str) -> int:
    """Returns the rows of the embedding table. Raises UserError if the file says another size of the vocabulary."""
    if EMBEDDING not in file.tensors:
        raise UserError(f"{file.path} holds no {EMBEDDING}; the tensors of a whole model were expected")
    rows, key = file.tensors[EMBEDDING].shape[0], f"{kind}.vocab_size"
    if file.get(key, int, rows) != rows:
        raise UserError(f"{file.path} has {key} {file.get(key, int)} and {rows} rows in {EMBEDDING}; the same number "
                        "was expected")
    return rows


def _check_keys(file: GgufFile, kind: str) -> None:
    """Raises UserError for a setting that changes what is computed; warns of the keys that are not known."""
    unknown = []
    for key in file.keys:
        name = key.removeprefix(f"{kind}.")
        if name == key or name in _READ | _WITHOUT_EFFECT:
            continue
        if name not in _NEUTRAL:
            unknown.append(key)
        elif (value := file.get(key, type(_NEUTRAL[name]))) != _NEUTRAL[name]:
            raise UserError(f"{file.path} has {key} {short(value)}; none, or {_NEUTRAL[name]}, was expected")
    if unknown:
        warn(f"{file.path} has {some(unknown)} in its metadata, which this project does not know and does not apply")


def is_ignored(name: str) -> bool:
    """Returns whether a tensor of a GGUF file is no weight: the frequencies of the rotary embedding."""
    return name == ROPE_TENSOR or re.fullmatch(r"blk\.\d+\.attn_rot_(embd|freqs)(\.weight)?", name) is not None
