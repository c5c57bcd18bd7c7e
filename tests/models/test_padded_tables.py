"""Tables with more rows than the tokenizer has pieces, or a few less, in transformers' layout: ids, logits, tokens and the way back."""

import json

import numpy as np
import pytest

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.export.tokenizer import ids_in_transformers
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.config import IMAGE_TOKEN
from llavamed_jax.config.hf import llava_from_hf
from llavamed_jax.errors import UserError
from tests.checkpoints.test_export import SAMPLE_TOKENIZER, config, lively, with_tokenizer
from tests.support.released import all_tensors, assert_same_bits

PIECES = 1024  # of the sample's tokenizer
# rows of the table -> (ids of <image> and <pad>, rows in transformers' layout)
SIZES = {1024: (1024, 1025, 1088), 1025: (1024, 1025, 1088), 1026: (1024, 1025, 1026), 1027: (1024, 1025, 1027), 1088: (1024, 1025, 1088),
         1100: (1024, 1025, 1100), 2048: (1024, 1025, 2048), 1023: (1024, 1025, 1088), 1008: (1024, 1025, 1088)}


def padded(rows, directory, added=None, tied=False):
    cfg = config(decoder={"vocab_size": rows, "tie_word_embeddings": tied})
    return with_tokenizer(random_checkpoint(cfg, seed=3), directory, {"legacy": True}, added=added)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", SIZES)
def test_ids_and_rows_and_the_way_back(rows, tied, tmp_path):
    image, pad, there = SIZES[rows]
    checkpoint = padded(rows, tmp_path / "files", tied=tied)
    export(checkpoint, tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["image_token_index"], raw["pad_token_id"], raw["text_config"]["vocab_size"]) == (image, pad, there)
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["pad_token_id"] == pad
    write_model(tmp_path / "tree", open_checkpoint(tmp_path / "hf"))
    export(open_checkpoint(tmp_path / "tree"), tmp_path / "original", "llava")
    for directory in ("hf", "tree", "original"):
        found = open_checkpoint(tmp_path / directory)
        assert found.config.decoder == checkpoint.config.decoder and found.config.image_token_id is None
        assert_same_bits(all_tensors(found), all_tensors(checkpoint))
        assert found.files["tokenizer.model"].read_bytes() == SAMPLE_TOKENIZER.read_bytes()


@pytest.mark.parametrize("rows", [1025, 1023])
def test_logits_ids_and_tokens_in_transformers(rows, tmp_path):
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    transformers = pytest.importorskip("transformers")
    import llavamed_jax as lm
    checkpoint = lively(padded(rows, tmp_path / "scratch"), tmp_path / "files")
    export(checkpoint, tmp_path / "hf")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf", backend="pil")
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [1024, 1025]
    ours, real = lm.load(tmp_path / "hf", dtype="float32"), min(rows, PIECES)
    picture = np.random.default_rng(0).integers(0, 256, (28, 28, 3), np.uint8)
    text = "[INST] <image>\nWhat is shown? [/INST]"
    batch = processor(text=text, images=[picture], return_tensors="pt")
    row = ours.processor.encode(text)
    ids = ours.processor.expand(row)
    assert batch["input_ids"][0].tolist() == [1024 if i == IMAGE_TOKEN else i for i in ids]
    pixels = ours.processor.images([picture])
    with torch.no_grad():
        theirs = model(**batch).logits.numpy()
    found = ours.logits([ids], pixels)
    np.testing.assert_allclose(theirs[..., :real], found[..., :real], atol=2e-5 * max(1, found.std()), rtol=0)
    if rows < PIECES:
        return
    with torch.no_grad():
        new = model.generate(**batch, max_new_tokens=10, do_sample=False)[0, batch["input_ids"].shape[1]:].tolist()
    length = next((i for i, token in enumerate(new) if token >= real), len(new))  # a row that no token has may win, of random ones
    assert length >= 3
    assert ours.generate_tokens([row], [list(pixels)], max_new_tokens=10)[0][:length] == new[:length]


@pytest.mark.parametrize(("added", "ids"), [
    ({"<pad>": 1024}, (1025, 1024)), ({"<image>": 1024}, (1024, 1025)), ({"<image>": 1025, "<pad>": 1024}, (1025, 1024)),
    ({"[PAD]": 1024}, (1025, 1026))])
def test_a_tokenizer_that_has_one_of_the_two_keeps_it(added, ids, tmp_path):
    transformers = pytest.importorskip("transformers")
    rows = PIECES + len(added)
    checkpoint = padded(rows, tmp_path / "files", added)
    export(checkpoint, tmp_path / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tuple(tokenizer.convert_tokens_to_ids(["<image>", "<pad>"])) == ids
    assert tokenizer("a<image>b")["input_ids"].count(ids[0]) == 1 and tokenizer.pad_token_id == ids[1]
    found = open_checkpoint(tmp_path / "hf")
    assert found.config.decoder == checkpoint.config.decoder
    assert_same_bits(all_tensors(found), all_tensors(checkpoint))


@pytest.mark.parametrize("rows", [1007, 1000, 2049, 32000])
def test_a_table_of_another_model_is_refused(rows, tmp_path):
    files = padded(1024, tmp_path / "files").files
    with pytest.raises(UserError, match=f"the tokenizer has 1024 pieces, but the embedding table has {rows} rows; "
                                        "at most 1024 fewer or 16 more"):
        ids_in_transformers(rows, files)
    assert ids_in_transformers(rows, {}) == (rows, rows + 1)


def test_exports_of_before_are_read(tmp_path):
    """Whose config does not say which ids were added."""
    export(padded(1024, tmp_path / "files"), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    del raw["llavamed_jax"]["added_ids"]
    assert llava_from_hf(raw).decoder.vocab_size == 1024


def test_a_padded_table_that_was_resized_since_is_taken_as_it_is(tmp_path):
    export(padded(1100, tmp_path / "files"), tmp_path / "hf")
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    raw["text_config"]["vocab_size"] = 1152
    cfg = llava_from_hf(raw)
    assert (cfg.decoder.vocab_size, cfg.image_token_id) == (1152, 1024)
