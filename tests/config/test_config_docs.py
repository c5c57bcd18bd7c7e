"""docs/checkpoint_keys.md names every key of the installed transformers' config classes, and what is said of a default is so."""

import re
from pathlib import Path

import pytest

from llavamed_jax.checkpoints import generation_file
from llavamed_jax.config import ACTIVATIONS
from llavamed_jax.config.decoders import DECODERS
from llavamed_jax.config.hf import llava_from_hf
from tests.support import released, tiny

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "checkpoint_keys.md").read_text(encoding="utf-8")
# Of every model's config: how it is run, returned and labelled.
COMMON = {"chunk_size_feed_forward", "is_encoder_decoder", "id2label", "label2id", "problem_type", "output_attentions",
          "output_hidden_states", "return_dict", "model_type"}


def section(title):
    return DOCS.split(f"### {title}")[1].split("\n## ")[0].split("\n### ")[0]


@pytest.mark.parametrize("name", ["LlamaConfig", "MistralConfig", "Qwen2Config", "Qwen3Config", "Olmo2Config", "LlavaConfig", "CLIPVisionConfig",
                                  "SiglipVisionConfig", "ViTConfig"])
def test_every_key_of_transformers_configs_is_named(name):
    transformers = pytest.importorskip("transformers")
    text = section("`config.json` of the originals") + section("`config.json` of transformers")
    keys = set(getattr(transformers, name)().to_dict()) - COMMON
    assert not {key for key in keys if f"`{key}`" not in text}


def test_every_key_of_generation_is_named():
    text = section("`generation_config.json`")
    known = set(generation_file._NOT_APPLIED) | generation_file._OF_A_CALL
    assert not {key for key in known if f"`{key}`" not in text}


def test_every_key_of_the_releases_is_named():
    text = section("`config.json` of the originals")
    for config in (released.V15, tiny.V1):
        assert not {key for key in config if f"`{key}`" not in text}


def test_the_activations_are_those_that_there_are():
    row = next(line for line in section("`config.json` of the originals").splitlines() if line.startswith("| `hidden_act`"))
    assert re.search(f"{', '.join(ACTIVATIONS)}: obeyed", row)


def test_what_is_said_of_defaults():
    raw = {"model_type": "llava", "vision_config": {}, "text_config": {"model_type": "mistral"}}
    mistral, llama = (llava_from_hf({**raw, "text_config": {"model_type": kind}}).decoder for kind in ("mistral", "llama"))
    assert (mistral.sliding_window, mistral.max_position_embeddings, mistral.num_kv_heads) == (4096, 131072, 8)
    assert (llama.sliding_window, llama.max_position_embeddings, llama.eos_ids) == (None, 2048, (2,))
    assert (llama.rms_norm_eps, llama.rope_theta, llama.hidden_act) == (1e-6, 1e4, "silu")
    assert llava_from_hf({**raw, "vision_config": None}).vision.image_size == 336
    assert llava_from_hf(raw).image_token_id == 32000


@pytest.mark.parametrize("kind", DECODERS)
def test_every_kind_of_decoder_is_named(kind):
    row = next(line for line in section("`config.json` of transformers").splitlines() if line.startswith("| `text_config`"))
    assert f"`{kind}`" in row


def test_what_is_said_of_windows_and_biases():
    """Which kinds obey `sliding_window`, `attention_bias` and `mlp_bias`."""
    keys = dict(use_sliding_window=True, sliding_window=64, max_window_layers=0, attention_bias=True, mlp_bias=True)
    read = {kind: llava_from_hf({"model_type": "llava", "vision_config": {}, "text_config": {"model_type": kind, **keys}}).decoder
            for kind in DECODERS}
    assert {kind for kind, found in read.items() if found.sliding_window == 64} == {"mistral", "qwen2", "qwen3"}
    assert {kind for kind, found in read.items() if found.attention_bias} == {"llama", "qwen2", "qwen3", "olmo2"}
    assert {kind for kind, found in read.items() if found.mlp_bias} == {"llama"}
