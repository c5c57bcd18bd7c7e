"""Small GGUF files, written by the gguf library's writer. llama.cpp's names and permutation are written here once more."""

import functools
import json

import numpy as np
import pytest

from tests.support import tiny

gguf = pytest.importorskip("gguf", reason="the gguf library is not installed")

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
MODULES = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
           "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
           "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
           "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LINES = ["the lung is normal in 12 of 345 images", "The heart isn't enlarged; there's no fracture.", "Größe naïve 日本語"]


def bytes_as_characters():
    """GPT-2's table: each byte a printable character, the printable ones themselves."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in kept]
    return {**{byte: chr(byte) for byte in kept}, **{byte: chr(256 + i) for i, byte in enumerate(others)}}


@functools.cache
def byte_level_vocabulary(special=("<|endoftext|>", "<|im_start|>", "<|im_end|>"), merges=200):
    """Tokens, kinds and merges of a byte-level BPE that was trained on a few lines."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = list(bytes_as_characters().values())
    trained.train_from_iterator(LINES * 3, trainers.BpeTrainer(
        vocab_size=256 + len(special) + merges, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False))
    vocabulary = trained.get_vocab()
    tokens = sorted(vocabulary, key=vocabulary.get)
    pairs = [tuple(pair) for pair in json.loads(trained.to_str())["model"]["merges"]]
    return tokens, [CONTROL if token in special else NORMAL for token in tokens], pairs


def name_of(torch_name):
    module, leaf = torch_name.rsplit(".", 1)
    if module in TOP:
        return f"{TOP[module]}.{leaf}"
    _, _, layer, rest = module.split(".", 3)
    return f"blk.{layer}.{MODULES[rest]}.{leaf}"


def permuted(weights, heads):
    """`LlamaModel.permute` of convert_hf_to_gguf.py."""
    return (weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2)
            .reshape(weights.shape))


def as_in_gguf(tensors, config):
    """transformers' tensors under GGUF's names, in llama.cpp's order."""
    out = {}
    for name, tensor in tensors.items():
        if config["model_type"] == "llama" and ".q_proj." in name:
            tensor = permuted(tensor, config["num_attention_heads"])
        if config["model_type"] == "llama" and ".k_proj." in name:
            tensor = permuted(tensor, config.get("num_key_value_heads", config["num_attention_heads"]))
        out[name_of(name)] = tensor
    return out


def metadata_of(config):
    """What the converter writes of a config.json; key -> value, in the types that it uses."""
    arch = config["model_type"]
    out = {"general.type": "model", "general.name": "Tiny", f"{arch}.block_count": config["num_hidden_layers"],
           f"{arch}.context_length": config["max_position_embeddings"],
           f"{arch}.embedding_length": config["hidden_size"], f"{arch}.feed_forward_length": config["intermediate_size"],
           f"{arch}.attention.head_count": config["num_attention_heads"],
           f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
           f"{arch}.rope.freq_base": float(config.get("rope_theta", 1e4))}
    if "num_key_value_heads" in config:
        out[f"{arch}.attention.head_count_kv"] = config["num_key_value_heads"]
    if "head_dim" in config:
        out |= {f"{arch}.attention.{part}_length": config["head_dim"] for part in ("key", "value")}
    return out


def tokenizer_metadata(pre="smollm", tokens=None, kinds=None, merges=None):
    if tokens is None:
        tokens, kinds, merges = byte_level_vocabulary()
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": kinds, "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.add_bos_token": False}


def write(path, architecture, metadata, tensors, types=None, endianess=None):
    """Writes a file. A tensor is an array, or (bytes as uint8 [rows, bytes], type) for a type that needs quantising."""
    writer = gguf.GGUFWriter(str(path), architecture, **({} if endianess is None else {"endianess": endianess}))
    for key, value in metadata.items():
        if value is None:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value) if value >= 0 else writer.add_int32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, tensor in tensors.items():
        if isinstance(tensor, tuple):
            writer.add_tensor(name, tensor[0], raw_dtype=tensor[1])
        else:
            writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def config(**changes):
    """A tiny LLaMA whose table has a row for each token of the tiny vocabulary."""
    rows = len(byte_level_vocabulary()[0])
    return {**tiny.LLAMA, "vocab_size": rows, "hidden_size": 64, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, **changes}


def model(path, cfg=None, tensors=None, metadata=(), drop=(), more=(), **pre):
    """Writes a whole model; returns transformers' tensors of it."""
    cfg = cfg or config()
    if tensors is None:
        tensors = tiny.drawn(tiny.decoder_shapes(cfg), dtype=np.float32)
    found = {**metadata_of(cfg), **tokenizer_metadata(**pre), **dict(metadata)}
    written = {**as_in_gguf(tensors, cfg), **dict(more)}
    write(path, cfg["model_type"], {key: value for key, value in found.items() if key not in drop},
          {name: tensor for name, tensor in written.items() if name not in drop})
    return tensors
