"""Ids of `tokenizer.model` beside those that transformers 4.28.1 and 4.36.2 gave (benchmarks/slow_tokenizers.py), for each way in
which special and added tokens stand in a folder's files."""

import json
import shutil

import pytest

from benchmarks import slow_tokenizers, tokenizer_v1
from llavamed_jax.config import IMAGE_TOKEN, preset
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer

RECORDED = json.loads(slow_tokenizers.FILE.read_text(encoding="utf-8"))
CASES = [(name, version) for name, versions in RECORDED["ids"].items() for version in versions]


def test_the_record_is_of_these_folders_and_texts():
    assert RECORDED["files"] == slow_tokenizers.FOLDERS and RECORDED["texts"] == slow_tokenizers.texts()
    assert {version for _, version in CASES} == {"4.28.1", "4.36.2"} and set(RECORDED["ids"]) == set(slow_tokenizers.FOLDERS)


@pytest.mark.parametrize("name, version", CASES)
def test_ids_are_the_slow_classs(name, version, tmp_path):
    shutil.copyfile(slow_tokenizers.MODEL, tmp_path / "tokenizer.model")
    for file, content in RECORDED["files"][name].items():
        (tmp_path / file).write_text(json.dumps(content))
    tokenizer = Tokenizer.load(tmp_path)
    tokenizer = tokenizer.as_v1([]) if version.startswith("4.28") else tokenizer
    for text, wanted in zip(RECORDED["texts"], RECORDED["ids"][name][version], strict=True):
        assert tokenizer.encode(text) == wanted, text


@pytest.mark.parametrize("config, own_map, added, wanted", [
    ({"bos_token": "<s>"}, {"bos_token": "</s>"}, False, 2),  # as v1.0's code saves it under transformers 4.28
    ({"bos_token": "<s>"}, {"bos_token": "</s>"}, True, 1),  # a folder that a version from 4.34 on has written
    ({"bos_token": "</s>"}, {}, False, 2), ({}, {"bos_token": {"content": "</s>"}}, False, 2), ({"bos_token": "</s>"}, None, True, 2),
    ({"bos_token": {"__type": "AddedToken", "content": "</s>"}}, {"bos_token": "<s>"}, False, 1),
    ({"bos_token": "</s>"}, {"bos_token": ""}, False, 2), ({"bos_token": None}, {"bos_token": None}, False, 1),
    ({"bos_token": "</s>"}, {"eos_token": "<s>"}, False, 2)])
def test_which_file_says_what_a_sequence_begins_with(config, own_map, added, wanted, tmp_path):
    """transformers 4.36.2 and 5.24.0 give each of these, and so does 4.28.1, which knows no list of added tokens. Null and "" name
    no token here; there, null is refused and "" makes texts begin with the unknown token."""
    shutil.copyfile(slow_tokenizers.MODEL, tmp_path / "tokenizer.model")
    tokens = {str(i): {"content": text, "special": True} for i, text in enumerate(("<unk>", "<s>", "</s>"))}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, **({"added_tokens_decoder": tokens} if added else {})}))
    if own_map is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(own_map))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("hello")[0] == tokenizer.bos_id == wanted
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"


@pytest.mark.parametrize("settings, begins", [({}, True), ({"add_bos_token": True}, True), ({"add_bos_token": False}, False),
                                              ({"add_bos_token": None}, False), ({"legacy": None}, True)])
def test_null_is_no_switch_that_is_on(settings, begins, tmp_path):
    """The ids that transformers 4.28.1 and 4.36.2 give."""
    shutil.copyfile(slow_tokenizers.MODEL, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(tmp_path)
    for each in (tokenizer, tokenizer.as_v1([])):
        assert each.encode("hello</s>a") == [1] * begins + [318, 491, 960, 2, 275]


@pytest.mark.parametrize("config, own_map, wanted", [
    ({"pad_token": "[PAD]"}, {}, [1, 275, 952, 1024, 952, 322]), ({}, {"pad_token": "[PAD]"}, [1, 275, 1024, 322]),
    ({"pad_token": "[PAD]"}, {"pad_token": "[PAD]"}, [1, 275, 1024, 322])])
def test_white_space_beside_the_padding_depends_on_the_file_that_names_it(config, own_map, wanted, tmp_path):
    """The ids that transformers 4.28.1 gives."""
    shutil.copyfile(slow_tokenizers.MODEL, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(own_map))
    assert Tokenizer.load(tmp_path).as_v1([]).encode("a [PAD] b") == wanted


def test_every_reader_has_the_same_roles(tmp_path):
    shutil.copyfile(slow_tokenizers.MODEL, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<unk>", "pad_token": {"content": "[PAD]"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.unk_id, tokenizer.id_of("[PAD]")) == (1, 0, 0, 1024)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "<unk>", "unk_token": "<unk>", "pad_token": "[PAD]"}


@pytest.mark.parametrize("version", tokenizer_v1.VERSIONS)
def test_the_folders_of_v1s_own_code_give_its_ids_on_600_samples(version, shared, tmp_path):
    """Folders as v1.0's training saves them under transformers 4.28.1, and a hash of the ids that they give there."""
    recorded = json.loads(tokenizer_v1.FILE.read_text(encoding="utf-8"))
    tokenizer_v1.texts(tmp_path, shared / "data" / "vqa_rad")
    talks = json.loads((tmp_path / "texts.json").read_text(encoding="utf-8"))["talks"]
    shutil.copyfile(shared / "tokenizers" / "llama2.tokenizer.model", tmp_path / "tokenizer.model")
    for name, content in recorded["folders"][version].items():
        (tmp_path / name).write_text(json.dumps(content))
    ids = tokenizer_v1.ours(tmp_path, version, talks)
    assert len(ids) == 600 and {row[0] for row in ids} == {2 if "llama" in version else 1}
    assert tokenizer_v1.digest(ids) == recorded["digests"][version]


@pytest.mark.parametrize("name", ["a list of added tokens", "tokens that take white space", "tokens that are words", "not legacy",
                                  "not legacy, taking white space"])
def test_texts_with_images_are_encoded_whole_in_transformers_layout(name, tmp_path):
    """Where `<image>` is a token, transformers' processors hand the whole text to the tokenizer: text behind an image is split as
    text behind any special token. The originals' code encodes it as a beginning."""
    config = llava_to_hf(preset("llava15-7b"), "transformers")
    del config["llavamed_jax"]
    (tmp_path / "config.json").write_text(json.dumps({**config, "image_token_index": 1024}))
    shutil.copyfile(slow_tokenizers.MODEL, tmp_path / "tokenizer.model")
    for file, content in RECORDED["files"][name].items():
        (tmp_path / file).write_text(json.dumps(content))
    processor = Processor.load(tmp_path)
    for text, wanted in zip(RECORDED["texts"], RECORDED["ids"][name]["4.36.2"], strict=True):
        assert processor.encode(text) == [IMAGE_TOKEN if i == 1024 else i for i in wanted], text
    (tmp_path / "config.json").write_text(json.dumps(llava_to_hf(preset("llava15-7b"), "llava")))
    original, apart = Processor.load(tmp_path), "USER: <image>\nIs it? ASSISTANT:"
    chunks = [original.tokenizer.encode(chunk, bos=i == 0) for i, chunk in enumerate(apart.split("<image>"))]
    assert original.encode(apart) == [*chunks[0], IMAGE_TOKEN, *chunks[1]]
