"""Ids against those that the original's slow tokenizers gave (spec 3.6 and A4), and the files they are read from."""

import json
import pickle
import shutil

import pytest

from llavamed_jax.data.tokenizer import Tokenizer
from llavamed_jax.errors import UserError

TEXT = "[INST] What is shown? [/INST] A chest X-ray. </s>[INST] Where? [/INST]"


@pytest.fixture(scope="module")
def mistral(mistral_tokenizer):
    return Tokenizer.load(mistral_tokenizer)


def test_special_ids(mistral):
    assert (mistral.bos_id, mistral.eos_id, mistral.unk_id, mistral.pad_id) == (1, 2, 0, 0)
    assert mistral.vocab_size == 32000
    assert mistral.encode("</s>", bos=False) == [2] and len(mistral.encode("<image>", bos=False)) > 1


def test_known_ids(mistral):
    assert mistral.encode("[INST] ") == [1, 733, 16289, 28793, 28705]
    assert mistral.encode("\nWhat is shown in this image? [/INST]", bos=False) == [
        28705, 13, 3195, 349, 4894, 297, 456, 3469, 28804, 733, 28748, 16289, 28793]


def test_text_after_a_special_token_gets_its_own_prefix(mistral):
    # From the mistral_instruct row of A4: "No. </s>" and "[INST] Is" around the id 2.
    assert mistral.encode("side. </s>[INST] Is", bos=False)[-6:] == [28705, 2, 733, 16289, 28793, 1691]


def test_not_legacy_means_no_prefix_after_a_special_token(llama_tokenizer, tmp_path):
    shutil.copyfile(llama_tokenizer, tmp_path / "tokenizer.model")
    assert Tokenizer.load(tmp_path).encode("No.</s>USER: hi") == [1, 1939, 29889, 2, 3148, 1001, 29901, 7251]
    (tmp_path / "tokenizer_config.json").write_text('{"legacy": false}')
    tokenizer = Tokenizer.load(tmp_path)
    assert not tokenizer.is_legacy and not Tokenizer.load(tmp_path / "tokenizer.model").is_legacy
    assert tokenizer.encode("No.</s>USER: hi") == [1, 1939, 29889, 2, 11889, 29901, 7251]


def test_decode_inverts_encode_and_skips_special_tokens(mistral):
    for text in ("Yes, on the right side.", "naïve — 5 µm ½", "胸部X線", "two  blanks\nand a line"):
        assert mistral.decode(mistral.encode(text)) == text
    assert mistral.decode([1, *mistral.encode("No.", bos=False), 2, 0]) == "No."
    assert mistral.decode([40000, -200]) == ""  # rows of a padded table, and images, are no text


def test_growing_ids_give_growing_text(mistral):
    ids = mistral.encode("Opacity in the left lower lobe, 胸.", bos=False)
    texts = [mistral.decode(ids[:n]).rstrip("�") for n in range(len(ids) + 1)]
    assert all(after.startswith(before) for before, after in zip(texts, texts[1:], strict=False))


def test_added_tokens_from_every_file_that_names_them(mistral_tokenizer, tmp_path):
    shutil.copyfile(mistral_tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<im_start>": 32000, "<im_end>": 32001}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(
        {"added_tokens_decoder": {"32002": {"content": "<pad>", "special": True}}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.vocab_size == 32003
    assert tokenizer.encode("<im_start><im_end>", bos=False) == [32000, 32001]
    assert tokenizer.decode([32000, 32002, 32001]) == "<im_start><im_end>"


def test_tokenizer_json_alone_gives_the_same_ids(mistral, mistral_tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers")
    (tmp_path / "source").mkdir()
    shutil.copyfile(mistral_tokenizer, tmp_path / "source" / "tokenizer.model")
    transformers.LlamaTokenizer.from_pretrained(tmp_path / "source").save_pretrained(tmp_path / "fast")
    (tmp_path / "fast" / "tokenizer.model").unlink(missing_ok=True)
    fast = Tokenizer.load(tmp_path / "fast")
    assert (fast.bos_id, fast.eos_id, fast.unk_id, fast.vocab_size) == (1, 2, 0, 32000)
    for text in ("Is there a pleural effusion?", "\nWhat is shown?", "naïve 胸", "[INST] "):
        assert fast.encode(text) == mistral.encode(text)
    assert fast.decode(fast.encode("Yes, on the right.")) == "Yes, on the right."


def test_a_tokenizer_travels_to_a_worker_process(mistral):
    assert pickle.loads(pickle.dumps(mistral)).encode(TEXT) == mistral.encode(TEXT)


@pytest.mark.parametrize("make, sentence", [
    (lambda d: d, "holds no tokenizer"), (lambda d: d / "tokenizer.model", "does not exist"),
    (lambda d: (d / "tokenizer.model").write_bytes(b"nonsense") and d, "is not a SentencePiece model"),
    (lambda d: (d / "tokenizer.json").write_text("{") and d, "is not a tokenizer.json")])
def test_bad_files_are_one_sentence(tmp_path, make, sentence):
    with pytest.raises(UserError, match=sentence):
        Tokenizer.load(make(tmp_path))
