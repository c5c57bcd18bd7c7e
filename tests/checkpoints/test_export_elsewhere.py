"""What other software looks for in an export, from its own code: transformers since 4.36, vLLM, llama.cpp, and the originals."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.torch import write
from llavamed_jax.config import KNOWN_TOWERS, DecoderConfig, LlavaConfig, VisionConfig, preset
from llavamed_jax.config.hf import llava_to_hf
from tests.support import tiny

PIECES = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"  # 1,024 of them
VISION = VisionConfig(32, 64, 3, 4, 28, 14)


def config(source="llava_mistral", **changes):
    architecture = "mistral" if source == "llava_mistral" else "llama"
    decoder = DecoderConfig(70, 48, 96, 2, 4, 2, 12, 1e-5, 1e6, 512, architecture=architecture, eos_token_id=7)
    return LlavaConfig(VISION, decoder, source=source, **changes)


def read(file):
    return json.loads(file.read_text())


def exported(cfg, out, layout="transformers"):
    export(random_checkpoint(cfg), out, layout)
    with safe_open(out / "model.safetensors", "np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.metadata()


def test_names_are_the_oldest_ones(tmp_path):
    """Those of transformers up to 4.51: the later ones read them too, the older ones no others. llama.cpp's surgery looks for
    `vision_model.` in the tower's."""
    names, metadata = exported(config(), tmp_path / "hf")
    text = tiny.decoder_shapes({**tiny.MISTRAL, "vocab_size": 128})
    wanted = {f"language_model.{name}": shape for name, shape in text.items()}
    wanted |= tiny.clip_shapes(prefix="vision_tower.vision_model.")
    wanted |= {f"multi_modal_projector.linear_{n}.{leaf}": shape for n, kernel in ((1, (48, 32)), (2, (48, 48)))
               for leaf, shape in (("weight", kernel), ("bias", kernel[:1]))}
    assert names == wanted
    assert metadata == {"format": "pt"}  # without it transformers before 4.46 opens no file


@pytest.mark.parametrize("source", ["llava_mistral", "llava_llama"])
def test_the_decoder_is_named(source, tmp_path):
    """vLLM finds its code by `architectures` of text_config, and llama.cpp prefers it to the one above."""
    exported(config(source), tmp_path / "hf")
    raw = read(tmp_path / "hf" / "config.json")
    assert raw["architectures"] == ["LlavaForConditionalGeneration"]
    assert raw["text_config"]["architectures"] == [{"llava_mistral": "MistralForCausalLM", "llava_llama": "LlamaForCausalLM"}[source]]
    assert raw["dtype"] == raw["torch_dtype"] == "float32"
    assert raw["image_token_index"] == raw["image_token_id"] == 70 and raw["pad_token_id"] == 71


def test_what_has_no_tensors_is_said(tmp_path):
    """No bias in the projector and no head of its own: a reader that expected them would draw them at random."""
    cfg = config(projector_bias=False)
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, tie_word_embeddings=True))
    names, _ = exported(cfg, tmp_path / "hf")
    raw = read(tmp_path / "hf" / "config.json")
    assert (raw["multimodal_projector_bias"], raw["tie_word_embeddings"], raw["text_config"]["tie_word_embeddings"]) == (False, True, True)
    assert not [name for name in names if "lm_head" in name or ("projector" in name and name.endswith("bias"))]
    assert open_checkpoint(tmp_path / "hf").config == cfg


@pytest.mark.parametrize(("pieces", "rows"), [(32000, 32064), (62, 64), (63, 128), (64, 128), (126, 128)])
def test_rows_for_image_and_pad_and_up_to_a_multiple_of_64(pieces, rows):
    cfg = config()
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, vocab_size=pieces))
    assert llava_to_hf(cfg, "transformers")["text_config"]["vocab_size"] == rows


def test_what_processors_of_each_age_read(tmp_path):
    """Slow tokenizers and llama.cpp the SentencePiece model, `legacy` the slow ones; the template of its own file, before 4.50 JSON."""
    cfg = config(feature_select="cls_patch", template="v1.5:mistral_instruct")
    cfg = cfg.replace(vision=dataclasses.replace(VISION, patch_size=7), decoder=dataclasses.replace(cfg.decoder, vocab_size=1024))
    export(random_checkpoint(cfg).replace(files={"tokenizer.model": PIECES}), tmp_path / "hf")
    assert (tmp_path / "hf" / "tokenizer.model").read_bytes() == PIECES.read_bytes()
    settings = read(tmp_path / "hf" / "tokenizer_config.json")
    assert (settings["legacy"], settings["add_bos_token"], settings["add_eos_token"], settings["processor_class"]) == (
        True, True, False, "LlavaProcessor")
    assert {i: token["content"] for i, token in settings["added_tokens_decoder"].items() if int(i) >= 1024} == {
        "1024": "<image>", "1025": "<pad>"}
    assert read(tmp_path / "hf" / "processor_config.json") == {
        "processor_class": "LlavaProcessor", "image_token": "<image>", "patch_size": 7, "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "full"}
    template = (tmp_path / "hf" / "chat_template.jinja").read_text()
    assert "[INST]" in template and read(tmp_path / "hf" / "chat_template.json") == {"chat_template": template}


def test_an_import_has_the_tokenizer_from_before_the_export(tmp_path):
    """Whose pieces are the rows that are left, so that it can be exported again."""
    cfg = config(template="v1.5:mistral_instruct")
    cfg = cfg.replace(decoder=dataclasses.replace(cfg.decoder, vocab_size=1024))
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    files = {"tokenizer.model": PIECES, "tokenizer_config.json": tmp_path / "tokenizer_config.json"}
    export(random_checkpoint(cfg).replace(files=files), tmp_path / "hf")
    again = open_checkpoint(tmp_path / "hf")
    assert {name: file.read_bytes() for name, file in again.files.items()} == {name: file.read_bytes() for name, file in files.items()}
    export(again, tmp_path / "again")
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Rows 1024 to 1087 of both tables" in card and "| precision | float32 |" in card
    export(again.cast(np.float16), tmp_path / "half")
    assert "| precision | float16 |" in (tmp_path / "half" / "README.md").read_text()
    assert read(tmp_path / "half" / "config.json")["torch_dtype"] == "float16"


def test_generation_ends_where_the_model_ends(tmp_path):
    exported(config(), tmp_path / "hf")
    assert read(tmp_path / "hf" / "generation_config.json") == {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 71}


def test_shards_are_listed_where_they_lie(tmp_path, monkeypatch):
    monkeypatch.setattr(write, "SHARD_BYTES", 40_000)
    export(random_checkpoint(config()), tmp_path / "hf")
    index = read(tmp_path / "hf" / "model.safetensors.index.json")
    found, size = {}, 0
    for file in sorted((tmp_path / "hf").glob("*.safetensors")):
        with safe_open(file, "np") as shard:
            found |= dict.fromkeys(shard.keys(), file.name)
            assert shard.metadata() == {"format": "pt"}
        stored = file.stat().st_size
        size += stored - 8 - int.from_bytes(file.read_bytes()[:8], "little")
        assert stored < 44_000 or len([name for name in found if found[name] == file.name]) == 1
    assert index == {"metadata": {"total_size": size}, "weight_map": found} and len(set(found.values())) > 3


def test_a_shard_holds_the_whole_projector(tmp_path, monkeypatch):
    """llama.cpp's surgery takes the projector from one file."""
    cfg = preset("v15-7b")
    sizes = {name: write._bytes(tensor) // 2 for name, tensor in random_checkpoint(cfg).tensors.items()}  # in bfloat16
    before = sum(size for name, size in sizes.items() if name.startswith(("vision_tower/", "projector/")))
    assert list(sizes)[:391] == [name for name in sizes if name.startswith("vision_tower/")]
    assert [name.partition("/")[0] for name in list(sizes)[391:395]] == ["projector"] * 4
    assert before < write.SHARD_BYTES


# --- the originals -------------------------------------------------------------------------------------------------------------------


def test_the_original_layout_says_how_features_are_taken(tmp_path):
    cfg = config(feature_layer=-1, feature_select="cls_patch", image_aspect_ratio="square", use_start_end=True, max_length=99)
    exported(cfg, tmp_path / "out", "llava")
    raw = read(tmp_path / "out" / "config.json")
    assert {key: raw[key] for key in raw if key.startswith(("mm_", "tokenizer_", "image_"))} == {
        "mm_vision_tower": "vision_tower", "mm_hidden_size": 32, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -1,
        "mm_vision_select_feature": "cls_patch", "mm_use_im_start_end": True, "mm_use_im_patch_token": False,
        "mm_patch_merge_type": "flat", "image_aspect_ratio": "square", "tokenizer_model_max_length": 99,
        "tokenizer_padding_side": "right"}
    assert open_checkpoint(tmp_path / "out").config.replace(extra="{}") == cfg


@pytest.mark.parametrize("name", KNOWN_TOWERS)
def test_a_tower_without_a_name_is_called_as_the_stock_one_of_its_shape(name):
    """The original's code fetches it by this name, and refuses one that is neither a directory nor OpenAI's."""
    cfg = config("transformers").replace(vision=KNOWN_TOWERS[name])
    found = llava_to_hf(cfg, "llava")["mm_vision_tower"]
    assert KNOWN_TOWERS[found] == KNOWN_TOWERS[name]
    assert found == name or (found, name) == ("google/siglip-base-patch16-256", "google/siglip-base-patch16-256-multilingual")


def test_the_tower_of_v1_is_a_whole_directory(tmp_path):
    """v1.0's code opens weights and image processor by the name in `mm_vision_tower`."""
    transformers = pytest.importorskip("transformers")
    cfg = config("llava", projector_type="linear", image_aspect_ratio="square", extra='{"mm_vision_tower": "me/tiny-clip"}')
    exported(cfg, tmp_path / "out", "llava")
    assert "here the directory `tiny-clip`" in (tmp_path / "out" / "README.md").read_text()
    tower = tmp_path / "out" / "tiny-clip"
    assert {file.name for file in tower.iterdir()} == {"config.json", "model.safetensors", "preprocessor_config.json"}
    processor = transformers.AutoImageProcessor.from_pretrained(tower, backend="pil")
    assert type(processor).__name__.startswith("CLIPImageProcessor")
    assert (dict(processor.size), processor.do_center_crop) == ({"shortest_edge": 28}, True)
    assert dict(processor.crop_size) == {"height": 28, "width": 28}


def test_a_tower_that_transformers_5_saved_in_the_originals_code(tmp_path):
    """Its CLIPVisionModel has no `vision_model`, so neither have the names of LLaVA's checkpoints."""
    names, _ = exported(config(), tmp_path / "old", "llava")
    assert "model.vision_tower.vision_tower.vision_model.pre_layrnorm.bias" in names
    from safetensors.numpy import load_file, save_file
    tensors = load_file(tmp_path / "old" / "model.safetensors")
    save_file({name.replace("vision_model.", ""): tensor for name, tensor in tensors.items()}, tmp_path / "old" / "model.safetensors")
    checkpoint, wanted = open_checkpoint(tmp_path / "old"), random_checkpoint(config())
    assert all((checkpoint.read(name) == wanted.read(name)).all() for name in wanted.tensors)
