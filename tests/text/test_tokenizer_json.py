"""A checkpoint whose tokenizer is `tokenizer.json`: ids are those of transformers' processors, whatever the file says.

Files are written here with each way that conversions have split text, and random texts go through transformers and through
this project. The sample's SentencePiece model (1,024 pieces) gives the pieces.
"""

import json
import random
import shutil
from pathlib import Path

import pytest

from llavamed_jax.config import IMAGE_TOKEN, preset
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer
from tests.text.test_tokenizer import random_text

tokenizers = pytest.importorskip("tokenizers")
SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"
IMAGE, BEGIN = 1024, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
PREFIXES = {
    "prepended by a normalizer": (["Prepend", "Replace"], None),
    "replaced only": (["Replace"], None),
    "Metaspace, first": ([], "first"),
    "Metaspace, always": ([], "always"),
    "Metaspace, never": ([], "never"),
}
IMAGES = {
    "plain": {}, "strips left": {"lstrip": True}, "strips right": {"rstrip": True}, "strips both": {"lstrip": True, "rstrip": True},
    "normalized": {"normalized": True}, "a single word": {"single_word": True},
}


@pytest.fixture(scope="module")
def pieces():
    """`tokenizer.json` of the sample's model, as this project exports it, without prefix and special tokens."""
    from llavamed_jax.checkpoints.export.tokenizer import _from_sentencepiece
    from llavamed_jax.text.special_tokens import read_special_tokens
    return _from_sentencepiece(SAMPLE, read_special_tokens({})).json


def metaspace(scheme, is_split):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": is_split}


def sentencepiece_like(pieces, prefix="prepended by a normalizer", image=None, has_bos=True, is_split=False):
    """A `tokenizer.json` of the sample's pieces with `<image>` as another token."""
    rules = {"Prepend": {"type": "Prepend", "prepend": "▁"}, "Replace": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}}
    kinds, scheme = PREFIXES[prefix]
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    special = [{"id": i, "content": text, **flags} for i, text in enumerate(("<unk>", "<s>", "</s>"))]
    return {
        **pieces, "added_tokens": [*special, {"id": IMAGE, "content": "<image>", **flags, **(image or {})}],
        "normalizer": {"type": "Sequence", "normalizers": [rules[kind] for kind in kinds]} if kinds else None,
        "pre_tokenizer": metaspace(scheme, is_split) if scheme else None,
        "post_processor": pieces["post_processor"] if has_bos else None}


def byte_level(has_bos=True):
    """A `tokenizer.json` as LLaMA 3's is made: bytes, a pattern, and no prefix anywhere."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>", "<image>"])
    tokenizer.train_from_iterator(["Is there a pleural effusion on the left side of the chest?", "The heart is not enlarged."], trainer)
    if has_bos:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return json.loads(tokenizer.to_str())


def directory(path, tokenizer, settings=None, source="transformers"):
    """A checkpoint's directory without weights, in transformers' layout or an original's."""
    path.mkdir(parents=True)
    config = llava_to_hf(preset("llava15-7b"), "transformers" if source == "transformers" else "llava")
    if source == "transformers":
        del config["llavamed_jax"]
        ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
        config |= {"image_token_index": ids.get("<image>", IMAGE)}
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "tokenizer_config.json").write_text(json.dumps({**BEGIN, "tokenizer_class": "LlamaTokenizerFast", **(settings or {})}))
    return path


def theirs(path):
    """The ids of transformers' tokenizer of a `llava` checkpoint, an image as one IMAGE_TOKEN."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return lambda text, **kw: [IMAGE_TOKEN if i == image else i for i in tokenizer(text, **kw)["input_ids"]]


def texts(seed, count=150):
    rng = random.Random(seed)
    return [random_text(rng, ["<image>", "<image>\n", " <image> ", "</s>", "<s>", "</s> ", "<unk>", "<im"]) for _ in range(count)]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_whole_texts_are_transformers(prefix, image, pieces, tmp_path):
    path = directory(tmp_path / "m", sentencepiece_like(pieces, prefix, IMAGES[image]))
    ours, wanted = Processor.load(path), theirs(path)
    for text in ["USER: <image>\nIs it? ASSISTANT:", "<image>", "", *texts(0)]:
        assert ours.encode(text) == wanted(text), text


@pytest.mark.parametrize("has_bos", [True, False])
@pytest.mark.parametrize("kind", ["bytes", "split words"])
def test_other_pre_tokenizers_and_files_without_a_begin(kind, has_bos, pieces, tmp_path, capsys):
    tokenizer = byte_level(has_bos) if kind == "bytes" else sentencepiece_like(pieces, "Metaspace, first", None, has_bos, True)
    path = directory(tmp_path / "m", tokenizer, {"add_bos_token": True})
    ours, wanted = Processor.load(path), theirs(path)
    assert (ours.tokenizer.has_bos, ours.encode("x")[0] == ours.tokenizer.bos_id) == (has_bos, has_bos)
    for text in ["USER: <image>\nIs it? ASSISTANT:", *texts(1)]:
        assert ours.encode(text) == wanted(text), text
    assert ("has add_bos_token True, but tokenizer.json does the opposite" in capsys.readouterr().err) == (not has_bos)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_text_behind_an_image_in_an_originals_layout(prefix, pieces, tmp_path):
    """The originals' `tokenizer_image_token` encodes each chunk on its own, with whichever tokenizer the directory has."""
    path = directory(tmp_path / "m", sentencepiece_like(pieces, prefix), source="llava")
    transformers = pytest.importorskip("transformers")
    ours, fast = Processor.load(path), transformers.PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"))
    for text in ["USER: <image>\nIs it? ASSISTANT:", *texts(2, 60)]:
        first, *rest = [fast(chunk)["input_ids"] for chunk in text.split("<image>")]
        assert ours.encode(text) == first + [i for chunk in rest for i in (IMAGE_TOKEN, *chunk[1:])]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_decoding_is_transformers(prefix, pieces, tmp_path):
    transformers = pytest.importorskip("transformers")
    path = directory(tmp_path / "m", sentencepiece_like(pieces, prefix))
    ours, wanted = Tokenizer.load(path, of_transformers=True), transformers.AutoTokenizer.from_pretrained(path)
    for text in texts(3, 60):
        ids = ours.encode(text)
        assert ours.decode(ids) == wanted.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def test_the_image_token_may_have_another_name(pieces, tmp_path):
    tokenizer = sentencepiece_like(pieces, "Metaspace, first")
    tokenizer["added_tokens"][-1]["content"] = "[IMG]"
    path = directory(tmp_path / "m", tokenizer)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "image_token_index": IMAGE}))
    ours = Processor.load(path)
    assert ours.encode("a[IMG]\nb") == ours.encode("a<image>\nb") == [
        *ours.tokenizer.encode("a"), IMAGE_TOKEN, *ours.tokenizer.encode("[IMG]\nb", bos=False)[1:]]
    assert ours.encode("a<image>\nb").count(IMAGE_TOKEN) == 1


def test_labels_where_text_behind_a_special_token_has_no_prefix(pieces, tmp_path):
    """Whether ids are counted as of a legacy tokenizer follows from what the file does, not from a key of another file."""
    turns = [{"from": "human", "value": "<image>\nIs it normal?"}, {"from": "gpt", "value": "No."},
             {"from": "human", "value": "Why not?"}, {"from": "gpt", "value": "It is large."}]
    for prefix in ("Metaspace, first", "Metaspace, always", "prepended by a normalizer"):
        processor = Processor.load(directory(tmp_path / prefix, sentencepiece_like(pieces, prefix)), template="up:vicuna_v1")
        assert processor.tokenizer.is_legacy == (prefix != "Metaspace, first")
        ids, labels = processor.training_example(turns)
        spans = "".join(" " if label < 0 else "x" for label in labels).split()
        assert len(spans) == 2 and ids[-len(spans[1]):] == labels[-len(spans[1]):]
        assert processor.decode(ids[-len(spans[1]):]).strip() == "It is large."
        at = labels.index(next(label for label in labels if label >= 0))
        assert processor.decode(ids[at:at + len(spans[0])]).strip() == "No."


# ---- several files ---------------------------------------------------------------------------------------------------


def test_two_files_that_differ_are_named_once(pieces, tmp_path, capsys):
    path = directory(tmp_path / "m", sentencepiece_like(pieces, "Metaspace, first"), {"legacy": True})
    shutil.copyfile(SAMPLE, path / "tokenizer.model")
    processor = Processor.load(path)
    said = capsys.readouterr().err
    assert said.count("warning:") == 1 and "It encodes 'a</s>b' as [1, " in said
    assert "tokenizer.model encodes it as [1, " in said
    assert "tokenizer.json is used, as transformers' processors and fast classes do" in said
    assert processor.tokenizer.file.name == "tokenizer.json"
    Processor.load(path)
    assert capsys.readouterr().err == ""
    (tmp_path / "original").mkdir()
    for file in path.iterdir():
        if file.name != "config.json":
            shutil.copyfile(file, tmp_path / "original" / file.name)
    (tmp_path / "original" / "config.json").write_text(json.dumps(llava_to_hf(preset("llava15-7b"), "llava")))
    assert Processor.load(tmp_path / "original").tokenizer.file.name == "tokenizer.model"
    assert "tokenizer.model is used, as the originals' code does" in capsys.readouterr().err


def test_two_files_that_agree_are_not(pieces, tmp_path, capsys):
    path = directory(tmp_path / "m", sentencepiece_like(pieces, "prepended by a normalizer"))
    shutil.copyfile(SAMPLE, path / "tokenizer.model")
    (path / "added_tokens.json").write_text(json.dumps({"<image>": IMAGE}))
    Processor.load(path)
    assert capsys.readouterr().err == ""
    (path / "tokenizer.model").write_bytes(b"nonsense")
    assert Processor.load(path).encode("x")[0] == 1
    assert "tokenizer.model is not a SentencePiece model" in capsys.readouterr().err


def test_a_class_that_is_not_llamas_reads_tokenizer_json_in_every_layout(pieces, tmp_path, capsys):
    """LLaMA 3's directories may hold a tokenizer.model that is no SentencePiece model."""
    path = directory(tmp_path / "m", byte_level(), {"tokenizer_class": "PreTrainedTokenizerFast"}, source="llava")
    (path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    assert Processor.load(path).tokenizer.file.name == "tokenizer.json"
    assert Processor.load(path).encode("Is it?")[0] == 0
    assert "tokenizer.model is not a SentencePiece model" in capsys.readouterr().err


def test_tokens_of_other_files_are_added_to_tokenizer_json(pieces, tmp_path):
    entry = {"content": "<pad>", "special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    path = directory(tmp_path / "m", sentencepiece_like(pieces), {"added_tokens_decoder": {"1025": entry}, "pad_token": "<pad>"})
    ours, wanted = Processor.load(path), theirs(path)
    assert ours.tokenizer.id_of("<pad>") == 1025 and ours.tokenizer.vocab_size == 1026
    for text in ("a<pad>b <image> c", "<pad>"):
        assert ours.encode(text) == wanted(text)
    (path / "tokenizer_config.json").write_text(json.dumps({**BEGIN, "added_tokens_decoder": {"1030": entry}}))
    with pytest.raises(UserError, match="tokenizer.json lacks the token '<pad>', whose id is 1030; the next free id is 1025"):
        Processor.load(path)


@pytest.mark.parametrize("single, settings", [("<s> $A </s>", {}), ("$A </s>", {}), ("<s> $A", {"bos_token": "</s>"})])
def test_a_file_that_puts_other_tokens_around_a_text_is_followed_and_said(single, settings, pieces, tmp_path, capsys):
    processor = tokenizers.processors.TemplateProcessing(single=single, special_tokens=[("<s>", 1), ("</s>", 2)])
    tokenizer = {**sentencepiece_like(pieces), "post_processor": json.loads(processor.__getstate__())}
    path = directory(tmp_path / "m", tokenizer, settings)
    assert Processor.load(path).encode("Is <image> it?") == theirs(path)("Is <image> it?")
    assert "to every text, although the bos_token" in capsys.readouterr().err


@pytest.mark.parametrize("settings, sentence", [
    ({"clean_up_tokenization_spaces": True}, "clean_up_tokenization_spaces True, which is not applied"),
    ({"split_special_tokens": True}, "split_special_tokens True, which is not applied"),
    ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs {'enable_sampling': True}, which is not applied"),
    ({"add_eos_token": True}, "add_eos_token True, which is not applied"),
    ({"add_prefix_space": False}, "add_prefix_space False, which is not applied"),
    ({"add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False, "sp_model_kwargs": {}, "legacy": None}, "")])
def test_settings_that_are_not_applied_are_said(settings, sentence, tmp_path, capsys):
    shutil.copyfile(SAMPLE, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    Tokenizer.load(tmp_path)
    said = capsys.readouterr().err
    assert sentence in said and said.count("warning:") == bool(sentence)
