"""Every layout that a released checkpoint has: what its config leaves out, and that checkpoints of the true shapes open."""

import json

import numpy as np
import pytest

from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config.hf import llava_from_hf, llava_to_hf
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from tests.support import tiny
from tests.support.tiny import v1_tensors


@pytest.fixture
def v1(tmp_path):
    return tiny.save_v1(tmp_path)


# --- LLaVA-Med v1.0 and v0, LLaVA-1.5 ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [73, 74])
def test_v1_with_its_rows_buffers_and_tower(rows, tmp_path):
    tensors = v1_tensors(rows)
    tiny.save_clip(tmp_path / "far" / "tower")
    directory = tiny.save(tmp_path / "v1", {**tiny.V1, "vocab_size": rows}, tensors | tiny.buffers(tiny.LLAMA))
    (directory / "added_tokens.json").write_text('{"<im_patch>": 70, "<im_start>": 71, "<im_end>": 72}')
    checkpoint = open_checkpoint(directory, tmp_path / "far" / "tower")
    assert checkpoint.config.decoder.vocab_size == rows and checkpoint.config.projector_type == "linear"
    assert (checkpoint.config.source, checkpoint.config.use_start_end, checkpoint.config.image_aspect_ratio) == ("llava", True, "square")
    assert not any("inv_freq" in name for name in checkpoint.tensors)
    np.testing.assert_array_equal(checkpoint.read("decoder/embed_tokens/embedding"), tensors["model.embed_tokens.weight"])
    np.testing.assert_array_equal(checkpoint.read("projector/linear_0/kernel"), tensors["model.mm_projector.weight"].T)
    assert "added_tokens.json" in checkpoint.files
    assert Processor.from_checkpoint(checkpoint).template_name == "v1.0:multimodal"


def test_a_tower_of_another_width_is_named(v1, tmp_path):
    wide = {**tiny.CLIP, "hidden_size": 64}
    tiny.save(tmp_path / "wide", wide, tiny.drawn(tiny.clip_shapes(wide)))
    with pytest.raises(UserError, match="the vision tower .*wide has width 64; the projector expects 32"):
        open_checkpoint(v1, tmp_path / "wide")


@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_v0_configs_without_a_word_of_vision(kind, tmp_path):
    """Spec 2.1: tower and width are patched in; the feature layer is not, so it is the code's -1."""
    large = {**tiny.CLIP, "hidden_size": 1024, "num_attention_heads": 16}
    tiny.save(tmp_path / "clip-vit-large-patch14", large, tiny.drawn(tiny.clip_shapes(large)))
    tensors = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA) | tiny.projector_shapes(width=1024))
    config = {**tiny.LLAMA, "model_type": kind, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": -1}
    checkpoint = open_checkpoint(tiny.save(tmp_path / "v0", config, tensors))
    cfg = checkpoint.config
    assert (cfg.source, cfg.feature_layer, cfg.feature_select, cfg.projector_type, cfg.use_start_end, cfg.max_length) == (
        "llava", -1, "patch", "linear", False, None)
    assert cfg.num_vision_layers_used == 3 and str(tmp_path / "clip-vit-large-patch14") in checkpoint.tower
    # The first conversions of LLaMA gave its tokens ids that its tokenizer does not have.
    assert (cfg.decoder.bos_token_id, cfg.decoder.eos_token_id, cfg.decoder.pad_token_id) == (1, 2, None)
    exported = llava_to_hf(cfg, "llava")
    assert (exported["model_type"], exported["mm_vision_tower"], exported["mm_hidden_size"], exported["use_mm_proj"]) == (
        "llava", "openai/clip-vit-large-patch14", 1024, True)


def test_a_plain_decoder_is_told_from_a_v0_checkpoint(tmp_path):
    tiny.save(tmp_path / "llama", tiny.LLAMA, tiny.drawn(tiny.decoder_shapes(tiny.LLAMA)))
    with pytest.raises(UserError, match="holds no projector .* plain decoder: `convert build"):
        open_checkpoint(tmp_path / "llama")


LLAVA15 = {**tiny.V1, "vocab_size": 73, "mm_use_im_start_end": False, "mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad",
           "mm_vision_select_feature": "patch", "tokenizer_model_max_length": 2048, "mm_use_im_patch_token": False}


@pytest.mark.parametrize("kind", ["llava_llama", "llava"])
def test_llava_1_5_before_and_after_transformers_took_its_name(kind, tmp_path):
    tower = "model.vision_tower.vision_tower.vision_model."
    tensors = tiny.drawn(tiny.decoder_shapes({**tiny.LLAMA, "vocab_size": 73}) | tiny.projector_shapes("mlp2x_gelu")
                         | tiny.clip_shapes(prefix=tower))
    tiny.save(tmp_path / "tiny-tower", tiny.CLIP)  # its shape alone: the tensors are in the checkpoint
    checkpoint = open_checkpoint(tiny.save(tmp_path / "llava15", {**LLAVA15, "model_type": kind}, tensors))
    assert checkpoint.tower == "the tensors in the checkpoint"
    assert (checkpoint.config.source, checkpoint.config.image_aspect_ratio, checkpoint.config.max_length) == ("llava_llama", "pad", 2048)
    assert Processor.from_checkpoint(checkpoint).template_name == "up:vicuna_v1"
    np.testing.assert_array_equal(checkpoint.read("vision_tower/pre_layrnorm/bias"), tensors[f"{tower}pre_layrnorm.bias"])
    assert llava_to_hf(checkpoint.config, "llava")["model_type"] == "llava_llama"


# --- transformers' configs ---------------------------------------------------------------------------------------------------------

STOCK = {  # as llava-hf published LLaVA-1.5: what LlamaConfig has as a default is left out
    "model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100, "image_token_index": 32000,
    "pad_token_id": 32001, "projector_hidden_act": "gelu", "vision_feature_layer": -2, "vision_feature_select_strategy": "default",
    "tie_word_embeddings": False, "vocab_size": 32064,
    "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama", "max_position_embeddings": 4096,
                    "rms_norm_eps": 1e-05, "vocab_size": 32064},
    "vision_config": {"hidden_size": 1024, "image_size": 336, "intermediate_size": 4096, "model_type": "clip_vision_model",
                      "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768, "vocab_size": 32000}}
CONFIGS = {
    "published": {},
    "no text_config": {"text_config": None},
    "no vision_config": {"vision_config": None},
    "partial vision_config": {"vision_config": {"model_type": "clip_vision_model", "hidden_size": 384, "num_attention_heads": 6}},
    "rope_theta": {"text_config": {"model_type": "mistral", "rope_theta": 1e6, "sliding_window": None, "head_dim": None}},
    "rope_parameters": {"text_config": {"model_type": "mistral", "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}},
    "partial mistral": {"text_config": {"model_type": "mistral"}},
    "no groups": {"text_config": {"model_type": "llama", "num_key_value_heads": None, "rope_scaling": None}},
    "tied above": {"tie_word_embeddings": True},
    "tied below": {"text_config": {"model_type": "llama", "tie_word_embeddings": True}},
    "no bias": {"multimodal_projector_bias": False, "vision_feature_select_strategy": "full", "vision_feature_layer": -1},
}


@pytest.mark.parametrize("case", CONFIGS)
def test_a_config_is_read_as_transformers_reads_it(case):
    import transformers
    raw = {**STOCK, **CONFIGS[case]}
    theirs, ours = transformers.LlavaConfig.from_dict(json.loads(json.dumps(raw))), llava_from_hf(raw)
    text, vision, d, v = theirs.text_config, theirs.vision_config, ours.decoder, ours.vision
    assert (d.vocab_size, d.hidden_size, d.intermediate_size, d.num_layers, d.num_heads, d.num_kv_heads, d.head_dim) == (
        text.vocab_size, text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.num_attention_heads,
        text.num_key_value_heads, text.head_dim or text.hidden_size // text.num_attention_heads)
    assert (d.rms_norm_eps, d.rope_theta, d.max_position_embeddings, d.sliding_window, d.tie_word_embeddings) == (
        text.rms_norm_eps, text.rope_parameters["rope_theta"], text.max_position_embeddings, getattr(text, "sliding_window", None),
        theirs.tie_word_embeddings)
    assert (v.hidden_size, v.intermediate_size, v.num_layers, v.num_heads, v.image_size, v.patch_size, v.layer_norm_eps, v.hidden_act) == (
        vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers, vision.num_attention_heads, vision.image_size,
        vision.patch_size, vision.layer_norm_eps, vision.hidden_act)
    assert (ours.feature_layer, ours.projector_bias, ours.feature_select) == (
        theirs.vision_feature_layer, theirs.multimodal_projector_bias,
        {"default": "patch", "full": "cls_patch"}[theirs.vision_feature_select_strategy])


def tied_tensors(config, head):
    text = tiny.decoder_shapes({**config, "tie_word_embeddings": True})
    shapes = {f"language_model.{name}": s for name, s in text.items()} | tiny.clip_shapes(prefix="vision_tower.vision_model.")
    shapes |= {f"multi_modal_projector.linear_{n}.{leaf}": s for n, shape in ((1, (48, 32)), (2, (48, 48)))
               for leaf, s in (("weight", shape), ("bias", shape[:1]))}
    tensors = tiny.drawn(shapes)
    table = tensors["language_model.model.embed_tokens.weight"]
    return tensors | {"absent": {}, "same": {"language_model.lm_head.weight": table.copy()},
                      "other": {"language_model.lm_head.weight": table + np.float16(1)}}[head]


@pytest.mark.parametrize("head", ["absent", "same", "other"])
def test_a_tied_head_may_be_there_twice_and_not_differ(head, tmp_path):
    text = {**tiny.MISTRAL, "tie_word_embeddings": True}
    config = {"model_type": "llava", "text_config": text, "vision_config": tiny.CLIP, "image_token_index": 69}
    directory = tiny.save(tmp_path / "hf", config, tied_tensors(text, head))
    if head == "other":
        with pytest.raises(UserError, match="has tie_word_embeddings set .* language_model.lm_head.weight differs from the embedding"):
            open_checkpoint(directory)
    else:
        checkpoint = open_checkpoint(directory)
        assert checkpoint.config.decoder.tie_word_embeddings and "decoder/lm_head/kernel" not in checkpoint.tensors


# --- true shapes -------------------------------------------------------------------------------------------------------------------

MISTRAL_7B = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
                  vocab_size=32000, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768, sliding_window=None)
LLAMA_7B = dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000,
                rms_norm_eps=1e-5, max_position_embeddings=4096)
LLAMA_13B = LLAMA_7B | dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40, num_attention_heads=40)
CLIP_L = dict(model_type="clip_vision_model", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
              patch_size=14, image_size=336)
ORIGINAL = dict(mm_vision_tower="openai/clip-vit-large-patch14-336", mm_hidden_size=1024, mm_projector_type="mlp2x_gelu",
                mm_vision_select_layer=-2, tie_word_embeddings=False)
TOWER = "model.vision_tower.vision_tower.vision_model."
RENAMED = {"model.mm_projector.0.": "multi_modal_projector.linear_1.", "model.mm_projector.2.": "multi_modal_projector.linear_2.",
           TOWER: "vision_tower.vision_model.", "model.": "language_model.model.", "lm_head.": "language_model.lm_head."}
MISTRAL, VICUNA, VICUNA_13B, CLIP_336 = 7_241_732_096, 6_738_415_616, 13_015_864_320, 303_507_456  # parameters, as published
MLP, MLP_13B, LINEAR, CLIP_224 = 20_979_712, 31_467_520, 4_198_400, CLIP_336 - (577 - 257) * 1024
# Model -> config, whether names are transformers', parameters.
FULL = {
    "llava-med-v1.5-mistral-7b": ({**MISTRAL_7B, **ORIGINAL, "model_type": "llava_mistral"}, False, MISTRAL + MLP + CLIP_336),
    "llava-med-7b": ({**LLAMA_7B, **ORIGINAL, "model_type": "llava", "vocab_size": 32003, "mm_projector_type": "linear",
                      "mm_vision_tower": "openai/clip-vit-large-patch14", "mm_use_im_start_end": True}, False,
                     VICUNA + 6 * 4096 + LINEAR + CLIP_224),
    "llava-v1.5-7b": ({**LLAMA_7B, **ORIGINAL, "model_type": "llava_llama"}, False, VICUNA + MLP + CLIP_336),
    "llava-v1.5-13b": ({**LLAMA_13B, **ORIGINAL, "model_type": "llava_llama"}, False, VICUNA_13B + MLP_13B + CLIP_336),
    "llava-1.5-7b-hf": ({**STOCK}, True, VICUNA + 128 * 4096 + MLP + CLIP_336),
}


def sparse(directory, config, shapes):
    """A checkpoint of the true size of which the header alone takes room on the disk; all its numbers are zero."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    tiny.save(directory, config)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return directory


@pytest.mark.parametrize("case", FULL)
def test_checkpoints_of_the_true_shapes_open(case, tmp_path):
    config, is_transformers, parameters = FULL[case]
    text = {**LLAMA_7B, "tie_word_embeddings": False, "vocab_size": 32064} if is_transformers else config
    shapes = tiny.decoder_shapes(text) | tiny.projector_shapes(config.get("mm_projector_type", "mlp2x_gelu"), 1024, text["hidden_size"])
    if case == "llava-med-7b":
        tower = {**CLIP_L, "image_size": 224}
        sparse(tmp_path / "clip-vit-large-patch14", tower, tiny.clip_shapes(tower))
    else:
        shapes |= tiny.clip_shapes(CLIP_L, TOWER)
    if is_transformers:
        shapes = {next(new + name.removeprefix(old) for old, new in RENAMED.items() if name.startswith(old)): shape
                  for name, shape in shapes.items()}
    checkpoint = open_checkpoint(sparse(tmp_path / "checkpoint", config, shapes))
    assert len(checkpoint.tensors) == len(shapes) + (391 if case == "llava-med-7b" else 0)
    assert sum(int(np.prod(tensor.shape)) for tensor in checkpoint.tensors.values()) == parameters
    assert not checkpoint.read("decoder/norm/scale").any()
