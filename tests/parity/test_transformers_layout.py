"""transformers' `llava`: every generation of its names is read, and what is written loads there and gives the same logits."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from llavamed_jax.checkpoints import names  # noqa: E402
from llavamed_jax.checkpoints.export.directory import export  # noqa: E402
from llavamed_jax.checkpoints.load import load_params  # noqa: E402
from llavamed_jax.checkpoints.open import open_checkpoint  # noqa: E402
from llavamed_jax.checkpoints.random import random_checkpoint  # noqa: E402
from llavamed_jax.config import IMAGE_TOKEN, DecoderConfig  # noqa: E402
from llavamed_jax.config.hf import llava_from_hf, llava_to_hf  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.models import llava  # noqa: E402
from tests.support import hf, released  # noqa: E402
from tests.support.released import TINY, save, shard_tensors  # noqa: E402


@pytest.fixture
def v15(tmp_path):
    return released.save_v15(tmp_path)


def spelled(prefixes):
    """A tiny transformers model's tensors under another generation of key names."""
    def rename(name):
        name = name.removeprefix("model.")
        for part, prefix in prefixes.items():
            if name.startswith(part):
                return prefix + name[len(part):]
        return name
    return rename


@pytest.mark.parametrize("prefixes", [
    {"language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "vision_tower.": "vision_tower.vision_model."},
    {"language_model.": "model.language_model.", "vision_tower.": "model.vision_tower.vision_model.",
     "multi_modal_projector.": "model.multi_modal_projector."},
    {"language_model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
     "multi_modal_projector.": "model.multi_modal_projector."},
], ids=["up to 4.51", "4.52 on", "5 in memory"])
def test_every_generation_of_transformers_names_is_read(prefixes, tmp_path):
    model, cfg = hf.llava()
    rename = spelled(prefixes)
    tensors = {rename(n): t.detach().numpy() for n, t in model.state_dict().items()}
    save(tmp_path / "hf", model.config.to_dict(), tensors)
    found = load_params(open_checkpoint(tmp_path / "hf"))
    found, wanted = flatten_dict(found, sep="/"), flatten_dict(hf.params_of(model), sep="/")
    assert found.keys() == wanted.keys() - set(names.unused_names(cfg))
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], name)


def test_what_save_pretrained_writes_is_read_and_gives_the_same_logits(tmp_path):
    model, cfg = hf.llava()
    model.save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.config.replace(extra="{}") == cfg.replace(extra="{}")
    ids = image_row(cfg, [1, 5], [7, 9, 11, 40])
    pixels = hf.images(1)
    logits = jax.jit(llava.Llava(cfg).apply)({"params": load_params(checkpoint)}, ids, pixels[None])
    np.testing.assert_allclose(logits, hf.torch_logits(model, ids, pixels), atol=2e-5, rtol=0)


def image_row(cfg, before, after):
    return np.array([before + [IMAGE_TOKEN] * cfg.tokens_per_image + after], np.int32)


@pytest.mark.parametrize("source", ["released", "random"])
def test_the_export_loads_in_transformers_and_gives_the_same_logits(source, v15, tmp_path):
    if source == "released":
        checkpoint = open_checkpoint(v15).cast(np.float32)
    else:
        checkpoint = random_checkpoint(TINY.replace(feature_select="cls_patch", feature_layer=-1, image_aspect_ratio="square"), seed=4)
    cfg = checkpoint.config
    export(checkpoint, tmp_path / "hf", "transformers")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert model.config.text_config.vocab_size == 128 and model.config.image_token_index == 70

    ids, pixels = image_row(cfg, [1, 5], [7, 9, 69, 2]), hf.images(1)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(np.where(ids == IMAGE_TOKEN, 70, ids)),
                              pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits.numpy()
    ours = np.asarray(jax.jit(llava.Llava(cfg).apply)({"params": load_params(checkpoint)}, ids, pixels[None]))
    assert 0.5 < ours.std() < 2
    np.testing.assert_allclose(theirs[..., :70], ours, atol=2e-5, rtol=0)


def test_added_rows_are_the_mean_and_go_again(v15, tmp_path):
    checkpoint = open_checkpoint(v15)
    export(checkpoint, tmp_path / "hf")
    table = shard_tensors(tmp_path / "hf")["language_model.model.embed_tokens.weight"]
    assert table.shape == (128, 48)
    mean = checkpoint.read("decoder/embed_tokens/embedding").mean(0, dtype=np.float32).astype(table.dtype)
    np.testing.assert_array_equal(table[70:], np.broadcast_to(mean, (58, 48)))
    assert open_checkpoint(tmp_path / "hf").config.decoder.vocab_size == 70


def test_rows_that_a_user_added_after_the_export_are_kept(v15, tmp_path):
    export(open_checkpoint(v15), tmp_path / "hf")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    model.resize_token_embeddings(192)
    model.save_pretrained(tmp_path / "resized")
    config = open_checkpoint(tmp_path / "resized").config
    assert (config.decoder.vocab_size, config.image_token_id) == (192, 70)


def test_a_stock_checkpoint_keeps_its_rows():
    stock = {"model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "vision_config": {},
             "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}}
    cfg = llava_from_hf(stock)
    assert (cfg.decoder.vocab_size, cfg.rows_in_transformers((32064, 32065)), cfg.image_token_id) == (32064, 32064, 32000)
    assert llava_from_hf(llava_to_hf(cfg, "transformers")) == cfg


def test_tied_head(tmp_path):
    model, cfg = hf.llava(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert "decoder/lm_head/kernel" not in checkpoint.tensors
    export(checkpoint, tmp_path / "again")
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info


def test_the_exports_processor_expands_an_image_for_the_exports_model(mistral_tokenizer, tmp_path):
    cfg = TINY.replace(decoder=DecoderConfig(**{**vars(TINY.decoder), "vocab_size": 32000}))
    checkpoint = random_checkpoint(cfg).replace(files={"tokenizer.model": mistral_tokenizer})
    export(checkpoint, tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    batch = processor(text="[INST] <image>\nWhat is this? [/INST]", images=[picture], return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    assert ids[:5] == [1, 733, 16289, 28793, 28705] and ids.count(32000) == cfg.tokens_per_image
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert model(**batch).logits.shape == (1, len(ids), 32064)

    again = open_checkpoint(tmp_path / "hf")  # has the tokenizer as it was before
    assert again.config.decoder.vocab_size == 32000
    assert {n: f.read_bytes() for n, f in again.files.items()} == {"tokenizer.model": mistral_tokenizer.read_bytes()}


def test_two_spellings_of_one_tensor_are_one_too_many(tmp_path):
    model, _ = hf.llava()
    model.save_pretrained(tmp_path / "hf")
    tensors = load_file(tmp_path / "hf" / "model.safetensors") | {"lm_head.weight": np.zeros((96, 64), np.float32)}
    save_file(tensors, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="1 tensor unexpected"):
        open_checkpoint(tmp_path / "hf")
