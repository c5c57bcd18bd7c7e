"""Damaged and odd tokenizer files: each loads and works, or is one sentence, in every place that reads it."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from llavamed_jax.checkpoints.assemble.image_tokens import _vocabulary
from llavamed_jax.checkpoints.export.tokenizer import write_tokenizer
from llavamed_jax.config import preset
from llavamed_jax.config.hf import llava_to_hf
from llavamed_jax.errors import UserError
from llavamed_jax.processor import Processor
from llavamed_jax.text.tokenizer import Tokenizer

SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"
TURNS = [{"from": "human", "value": "<image>\nIs it?"}, {"from": "gpt", "value": "No."}]
FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
SETTINGS = {
    "tokenizer_config.json": {
        "add_bos_token": True, "add_eos_token": False, "additional_special_tokens": [], "bos_token": "<s>",
        "eos_token": {"content": "</s>"}, "unk_token": "<unk>", "pad_token": None,
        "added_tokens_decoder": {str(i): {"content": text, "special": True, **FLAGS} for i, text in enumerate(("<unk>", "<s>", "</s>"))},
        "chat_template": "{{ messages }}", "clean_up_tokenization_spaces": False, "legacy": True, "model_max_length": 2048,
        "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"},
    "special_tokens_map.json": {"bos_token": {"content": "<s>", **FLAGS}, "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]",
                                "additional_special_tokens": ["<a>", {"content": "<b>"}]},
    "added_tokens.json": {"<im_start>": 1024, "<im_end>": 1025, "[PAD]": 1026},
}
ODD = [None, [], {}, "", "x", 0, -1, 1.5, float("inf"), float("nan"), True, 10**30, ["a"], {"a": 1}, [None], {"content": None}, "\ud800",
       {"content": "<s>", "lstrip": "yes"}, "x" * 10**4, 2**20]


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut, overwritten in one place or many, shortened, or with bytes put in."""
    out, at = bytearray(content), rng.randrange(len(content))
    match rng.randrange(6):
        case 0:
            del out[at:]
        case 1:
            for _ in range(rng.randrange(1, 20)):
                out[rng.randrange(len(out))] = rng.randrange(256)
        case 2:
            del out[at:at + rng.randrange(1, 2000)]
        case 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 100))
        case _:  # whose length fields stay right more often than not
            out[at] = rng.choice([0, 255, out[at] ^ 1, rng.randrange(256)])
    return bytes(out)


def places(value, before=()):
    """The paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value[:30]) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*before, key)
        yield from places(each, (*before, key))


def with_odd_value(content: dict, rng: random.Random) -> dict:
    content = json.loads(json.dumps(content))
    *path, last = rng.choice(list(places(content)))
    inside = content
    for key in path:
        inside = inside[key]
    if rng.random() < 0.15 and isinstance(inside, dict):
        del inside[last]
    else:
        inside[last] = rng.choice(ODD)
    return content


def checkpoint(path, source):
    path.mkdir(exist_ok=True)
    for file in path.rglob("*.*"):  # folders stay: to delete one takes as long as to read a tokenizer
        file.unlink()
    config = llava_to_hf(preset("llava15-7b"), source)
    config.pop("llavamed_jax", None)
    (path / "config.json").write_text(json.dumps(config))
    return path


def uses(path):
    """Everything that reads a tokenizer's files, as functions."""
    files = {file.name: file for file in path.iterdir() if file.suffix and file.name != "config.json"}

    def tokenizer():
        found = Tokenizer.load(path)
        found.decode(found.encode("Is it <image>\n naïve 胸 </s> x [PAD]\x00"))
        found.decode(range(0, found.vocab_size, 37))
        found.as_v1(["<im_patch>"]).encode("a <im_patch> b")

    def processor():
        found = Processor.load(path)
        found.encode("USER: <image>\nIs it? </s>")
        assert all(isinstance(i, int) for i in (*found.eos_ids, *found.encode("x")))
        Processor.load(path, template="up:vicuna_v1").training_example(TURNS)

    def export():
        (path / "out").mkdir(exist_ok=True)
        write_tokenizer(files, path / "out")

    return tokenizer, processor, export, lambda: _vocabulary(files)


def outcomes(path) -> set[str]:
    """What came of each use: a sentence that is one line and not long, or nothing to say. Any other exception fails."""
    found = set()
    for use in uses(path):
        try:
            use()
            found.add("ok")
        except UserError as error:
            assert "\n" not in str(error) and len(str(error)) < 700
            assert re.search("tokenizer|special_tokens|added_tokens|chat_template|surrogate|pieces", str(error)), error
            found.add("sentence")
    return found


@pytest.mark.parametrize("seed", range(6))
def test_a_damaged_sentencepiece_model(seed, tmp_path, capfd):
    seen = set()
    for i in range(50):
        path = checkpoint(tmp_path / "m", "llava" if i % 2 else "transformers")
        (path / "tokenizer.model").write_bytes(damaged(SAMPLE.read_bytes(), random.Random(seed * 1000 + i)))
        seen |= outcomes(path)
    assert seen == {"ok", "sentence"} and capfd.readouterr().err == ""


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_tokenizer_json(seed, tmp_path, capfd):
    write_tokenizer({"tokenizer.model": SAMPLE}, tmp_path)
    whole, seen = (tmp_path / "tokenizer.json").read_bytes(), set()
    for i in range(30):
        path, rng = checkpoint(tmp_path / "m", "llava" if i % 2 else "transformers"), random.Random(seed * 1000 + i)
        content = damaged(whole, rng) if i % 3 else json.dumps(with_odd_value(json.loads(whole), rng)).encode()
        (path / "tokenizer.json").write_bytes(content)
        seen |= outcomes(path)
    assert "sentence" in seen and "panicked" not in capfd.readouterr().err


@pytest.mark.parametrize("name", SETTINGS)
def test_odd_values_anywhere(name, tmp_path, capfd):
    seen = set()
    for i in range(120):
        path, rng = checkpoint(tmp_path / "m", "llava" if i % 2 else "transformers"), random.Random(i)
        shutil.copyfile(SAMPLE, path / "tokenizer.model")
        for other, content in SETTINGS.items():
            if other == "tokenizer_config.json" and i % 4 < 2:
                content = {key: value for key, value in content.items() if key != "added_tokens_decoder"}
            (path / other).write_text(json.dumps(with_odd_value(content, rng) if other == name else content))
        seen |= outcomes(path)
    assert seen == {"ok", "sentence"}


MISTAKES = {
    "added_tokens.json": [
        ('{"<a>": Infinity}', "has inf for '<a>'; a whole number from 0 to 1048575 was expected"), ('{"<a>": NaN}', "has nan for '<a>'"),
        ('{"<a>": -1}', "has -1 for '<a>'"), ('{"<a>": 1e3}', "has 1000.0 for '<a>'"), ('{"<a>": true}', "has True for '<a>'"),
        ('{"<a>": 99999999999}', "has 99999999999 for '<a>'"), ('{"<a>": "7"}', "has '7' for '<a>'"),
        ('{"": 1024}', "has 1024 for ''; a token's text and its id"), ("[]", "holds a JSON list"),
        ('{"<a>": 1024, "<b>": 1024}', "the id 1024 stands for '<a>' and for '<b>'; one token per id was expected"),
        ("[" * 10**5, "is nested too deeply"), (b"\xff", "is not valid JSON: 'utf-8' codec")],
    "tokenizer_config.json": [
        ('{"bos_token": ["<s>"]}', r"has \['<s>'\] for 'bos_token'; a text, or an object with its content and flags was expected"),
        ('{"eos_token": 2}', "has 2 for 'eos_token'"), ('{"legacy": "no"}', "has 'no' for 'legacy'; true or false"),
        ('{"added_tokens_decoder": []}', r"has \[\] for 'added_tokens_decoder'; an object of ids and tokens"),
        ('{"added_tokens_decoder": {"x": {"content": "a"}}}', "has 'x' for 'added_tokens_decoder x'; a whole number"),
        ('{"added_tokens_decoder": {"-5": {"content": "a"}}}', "has '-5' for 'added_tokens_decoder -5'"),
        ('{"added_tokens_decoder": {"5": "a"}}', "has 'a' for 'added_tokens_decoder 5'; an object with the token's content"),
        ('{"additional_special_tokens": "<a>"}', "has '<a>' for 'additional_special_tokens'; a list of tokens")],
    "special_tokens_map.json": [
        ('{"unk_token": {"content": "<unk>", "rstrip": 1}}', "special_tokens_map.json has {'content': '<unk>', 'rstrip': 1} for")],
}


@pytest.mark.parametrize("file, content, sentence", [(file, *case) for file, cases in MISTAKES.items() for case in cases])
def test_each_mistake_names_file_key_and_value(file, content, sentence, tmp_path):
    shutil.copyfile(SAMPLE, tmp_path / "tokenizer.model")
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=sentence) as error:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_null_says_nothing(tmp_path):
    shutil.copyfile(SAMPLE, tmp_path / "tokenizer.model")
    for name, content in SETTINGS.items():
        (tmp_path / name).write_text(json.dumps(dict.fromkeys(content) if name != "added_tokens.json" else {}))
    wanted = Tokenizer.load(SAMPLE).encode("a</s>b")
    assert Tokenizer.load(tmp_path).encode("a</s>b") == wanted[1:], "but for add_bos_token: transformers 4 takes null as false"
