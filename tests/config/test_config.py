"""A config.json can hold anything anywhere: each wrong kind of value is one sentence that names key and value."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import pytest

from llavamed_jax.checkpoints.model_config import read_config
from llavamed_jax.config import LlavaConfig, preset
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from tests.support import tiny

TOKENIZER = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"
HF = {"model_type": "llava", "text_config": tiny.MISTRAL, "vision_config": tiny.CLIP, "vision_feature_layer": -2}
V15 = {**tiny.MISTRAL, "model_type": "llava_mistral", "mm_vision_tower": "openai/clip-vit-large-patch14-336",
       "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024, "tokenizer_model_max_length": 2048}
# What a key is called once it is read, where that is not its own name.
OUR_NAMES = {"mm_vision_select_layer": "feature_layer", "vision_feature_layer": "feature_layer", "image_token_index": "image_token_id",
             "mm_vision_select_feature": "feature_select", "tokenizer_model_max_length": "max_length",
             "mm_projector_type": "projector_type", "multimodal_projector_bias": "projector_bias"}
KINDS = {"transformers": HF, "original": V15, "ours": preset("small").to_dict()}


@pytest.mark.parametrize("kind, path, value", [
    ("transformers", "text_config", 5), ("transformers", "vision_config", 5), ("transformers", "vision_config", []),
    ("transformers", "text_config.vocab_size", "x"), ("transformers", "text_config.vocab_size", True),
    ("transformers", "text_config.model_type", ["llama"]), ("transformers", "text_config.rms_norm_eps", "x"),
    ("transformers", "text_config.rope_theta", [1]), ("transformers", "text_config.rope_parameters", 5),
    ("transformers", "text_config.rope_scaling", "linear"), ("transformers", "text_config.head_dim", "x"),
    ("transformers", "text_config.sliding_window", "x"), ("transformers", "text_config.eos_token_id", []),
    ("transformers", "text_config.bos_token_id", "<s>"), ("transformers", "vision_config.layer_norm_eps", "x"),
    ("transformers", "vision_config.hidden_act", ["gelu"]), ("transformers", "vision_feature_layer", True),
    ("transformers", "vision_feature_select_strategy", ["default"]), ("transformers", "multimodal_projector_bias", "yes"),
    ("transformers", "image_token_index", "<image>"), ("transformers", "llavamed_jax", 5),
    ("original", "vocab_size", "x"), ("original", "pad_token_id", "x"), ("original", "mm_vision_tower", 5),
    ("original", "mm_projector_type", 2), ("original", "mm_vision_select_layer", "-2"), ("original", "llavamed_jax", 5),
    ("original", "mm_vision_select_feature", None), ("original", "tokenizer_model_max_length", "x"),
    ("ours", "vision", None), ("ours", "decoder", 5), ("ours", "decoder.vocab_size", "x"), ("ours", "max_length", 1.5),
    ("ours", "image_aspect_ratio", "anyres"), ("ours", "template", 5), ("ours", "vision.hidden_size", None), ("ours", "projector_bias", 1)])
def test_a_value_of_another_kind_is_one_sentence(tmp_path, kind, path, value):
    config = json.loads(json.dumps(KINDS[kind]))
    *parents, key = path.split(".")
    at = config
    for parent in parents:
        at = at[parent]
    at[key] = value
    tiny.save(tmp_path / "model" if kind == "ours" else tmp_path, config)
    with pytest.raises(UserError) as error:
        read_config(tmp_path)
    sentence = str(error.value)
    assert repr(value) in sentence and "expected" in sentence and "\n" not in sentence, sentence
    assert OUR_NAMES.get(key, key) in sentence


def test_null_where_transformers_has_a_default():
    """`text_config` and `vision_config` of null are LLaMA 7B and CLIP-L/14-336 there."""
    cfg = llava_from_hf({"model_type": "llava", "text_config": None, "vision_config": None, "image_token_index": 32000})
    assert cfg.decoder.hidden_size == 4096 and cfg.vision.image_size == 336


@pytest.mark.parametrize("name", ["small", "v15-7b", "v1-13b", "llava15-7b"])
def test_our_own_config_survives_writing(name):
    assert LlavaConfig.from_dict(json.loads(json.dumps(preset(name).to_dict()))) == preset(name)


@pytest.mark.parametrize("file, content, sentence", [
    ("preprocessor_config.json", {"image_mean": None, "image_std": [1, 1, 1]}, "image_mean None; a list of three numbers"),
    ("preprocessor_config.json", {"image_mean": [0, 0, 0], "image_std": 0.5}, "image_std 0.5; a list of three numbers"),
    ("preprocessor_config.json", {"image_mean": [0.5, 0.5], "image_std": [1, 1, 1]}, r"image_mean \[0.5, 0.5\]"),
    ("preprocessor_config.json", {"image_mean": [0.5, "x", 0], "image_std": [1, 1, 1]}, "image_mean"),
    ("preprocessor_config.json", {"image_mean": [0, 0, 0], "image_std": [1, 0, 1]}, "image_std"),
    ("processor_config.json", {"image_processor": {"image_mean": None, "image_std": None}}, "image_mean None"),
    ("tokenizer_config.json", [], "tokenizer_config.json holds a JSON list"),
    ("chat_template.json", "{", "chat_template.json is not valid JSON"), ("chat_template.json", [], "holds a JSON list"),
    ("processor_config.json", {"chat_template": 5}, "the chat_template 5; a text was expected")])
def test_files_beside_the_config(tmp_path, file, content, sentence):
    directory = tiny.save(tmp_path, HF)
    shutil.copy(TOKENIZER, directory / "tokenizer.model")
    (directory / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=sentence) as error:
        Processor.load(directory)
    assert file in str(error.value)


def test_several_ends_of_a_sequence_travel_both_ways():
    text = {**HF["text_config"], "eos_token_id": [2, 7, 9]}
    cfg = llava_from_hf({**HF, "text_config": text})
    assert cfg.decoder.eos_ids == (2, 7, 9) and cfg.decoder.to_hf()["eos_token_id"] == [2, 7, 9]
    assert LlavaConfig.from_dict(json.loads(json.dumps(cfg.to_dict()))) == cfg and hash(cfg)
    single = llava_from_hf({**HF, "text_config": {**text, "eos_token_id": 2}})
    assert single.decoder.eos_ids == (2,) and single.decoder.to_hf()["eos_token_id"] == 2
    none = dataclasses.replace(single.decoder, eos_token_id=None)
    assert none.eos_ids == ()


WRONG = [None, True, 1.5, -1, 10**400, float("nan"), "", "a" * 100_000, [], ["x"], [[]], {"a": 1}, "/a/b\0c"]


def places(config, path=()):
    """The path of every key, those of objects inside too."""
    for key, value in config.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from places(value, (*path, key))


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_with_every_kind_of_value_is_read_or_one_short_sentence(kind, tmp_path):
    """Whatever JSON can hold at any place, and keys that a config may have beside those that it has."""
    more = [("rope_scaling",), ("rope_parameters",), ("attention_bias",), ("head_dim",), ("eos_token_id",), ("partial_rotary_factor",)]
    whole, refused = json.dumps(KINDS[kind]), 0
    for *parents, key in [*places(KINDS[kind]), *more]:
        for value in WRONG:
            config = json.loads(whole)
            functools.reduce(lambda at, parent: at[parent], parents, config)[key] = value
            tiny.save(tmp_path / "model" if kind == "ours" else tmp_path, config)
            try:
                hash(read_config(tmp_path))
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000, (parents, key, value)
                refused += 1
    assert refused > 100


@pytest.mark.parametrize(("said", "read"), [
    (int(1e30), None), (1e30, None), (None, None), (2048, 2048)])
def test_a_limit_that_is_none_is_read_as_none(tmp_path, said, read):
    """transformers' word for a tokenizer without a limit is 1e30, which trainers copy into config.json."""
    (tmp_path / "config.json").write_text(json.dumps({**V15, "tokenizer_model_max_length": said}), encoding="utf-8")
    assert read_config(tmp_path).max_length == read
