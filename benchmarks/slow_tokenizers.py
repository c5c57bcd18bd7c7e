"""Writes tests/support/slow_tokenizers.json: the ids that transformers' slow LlamaTokenizer gives, which the tests hold ours to.

    OTHER/python benchmarks/slow_tokenizers.py      # in environments with transformers 4.28.1 and 4.36.2, in turn

Each folder is the sample's tokenizer.model with the files below; the texts are drawn from a seed. A version adds or replaces
its own ids and leaves the others'.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL, FILE = ROOT / "samples" / "vqa_rad" / "tokenizer.model", ROOT / "tests" / "support" / "slow_tokenizers.json"
_IMAGES = {"<im_patch>": 1024, "<im_start>": 1025, "<im_end>": 1026}


def _token(text: str, **flags) -> dict:
    return {**dict(content=text, lstrip=False, rstrip=False, single_word=False, normalized=False), **flags}


def _decoder(**flags) -> dict:
    tokens = {0: _token("<unk>"), 1: _token("<s>"), 2: _token("</s>", **flags), 1024: _token("<image>", **flags), 1025: _token("[PAD]")}
    return {str(i): {**token, "special": True} for i, token in tokens.items()}


_BEGIN = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>")
FOLDERS = {
    "the model alone": {},
    "begins with the end": {"tokenizer_config.json": {"bos_token": "<s>"}, "special_tokens_map.json": {"bos_token": "</s>"}},
    "strings": {"tokenizer_config.json": _BEGIN, "added_tokens.json": _IMAGES, "special_tokens_map.json": {
        "bos_token": "</s>", "eos_token": "</s>", "unk_token": "<unk>"}},
    "objects": {"added_tokens.json": {**_IMAGES, "[PAD]": 1027}, "special_tokens_map.json": {
        "bos_token": _token("<s>"), "eos_token": _token("</s>", rstrip=True), "unk_token": _token("<unk>", lstrip=True),
        "pad_token": "[PAD]"}},
    "more special tokens": {"added_tokens.json": _IMAGES, "special_tokens_map.json": {
        "additional_special_tokens": ["<im_start>", _token("<im_end>", rstrip=True)]}},
    "a list of added tokens": {"tokenizer_config.json": {**_BEGIN, "added_tokens_decoder": _decoder()},
                               "special_tokens_map.json": {"bos_token": "</s>"}},
    "tokens that take white space": {"tokenizer_config.json": {**_BEGIN, "added_tokens_decoder": _decoder(lstrip=True, rstrip=True)}},
    "tokens that are words": {"tokenizer_config.json": {**_BEGIN, "added_tokens_decoder": _decoder(single_word=True)}},
    "not legacy": {"tokenizer_config.json": {**_BEGIN, "legacy": False, "added_tokens_decoder": _decoder()}},
    "not legacy, taking white space": {"tokenizer_config.json": {
        **_BEGIN, "legacy": False, "added_tokens_decoder": _decoder(lstrip=True, rstrip=True)}},
    "no begin": {"tokenizer_config.json": {"add_bos_token": False}},
    "tokens that the model lacks": {"tokenizer_config.json": {"bos_token": "[GO]", "pad_token": "[PAD]"}},
}
COUNT = 60
ALPHABETS = ("is the left lung normal     ", "ACX019.,;:()[]<>%/-+=#*'", "äéß½→—’", "胸部画像", "\n\t\u00a0▁", "🫁\x00")


def texts() -> list[str]:
    specials = ["<s>", "</s>", "<unk>", "</s> ", " <s>", "<im_patch>", "<im_start>", " <im_end>\n", "<image>", "<image>\n", " <image> ",
                "[PAD]", "<im_", "[GO]"]
    rng, out = random.Random(0), ["", "hello", "a <s> b </s> c <unk> d", "USER: <image>\nIs it? ASSISTANT: No.</s>"]
    while len(out) < COUNT:
        out.append("".join(rng.choice(specials) if rng.random() < 0.3 else
                           "".join(rng.choice(rng.choice(ALPHABETS[:1] * 5 + ALPHABETS)) for _ in range(rng.randrange(10)))
                           for _ in range(rng.randrange(1, 9))))
    return out


def record() -> None:
    import transformers
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    ids = known.get("ids", {})
    for name, files in FOLDERS.items():
        if transformers.__version__.startswith("4.28") and "added_tokens_decoder" in files.get("tokenizer_config.json", {}):
            continue  # it does not know the key, and never wrote it
        with tempfile.TemporaryDirectory() as folder:
            shutil.copyfile(str(MODEL), str(Path(folder) / "tokenizer.model"))
            for file, content in files.items():
                (Path(folder) / file).write_text(json.dumps(content), encoding="utf-8")
            tokenizer = transformers.LlamaTokenizer.from_pretrained(folder)
            ids.setdefault(name, {})[transformers.__version__] = [tokenizer(text)["input_ids"] for text in texts()]
    found = {"texts": texts(), "files": FOLDERS, "ids": ids}
    FILE.write_text(json.dumps(found, separators=(",", ":")).replace('"4.', '\n"4.') + "\n", encoding="utf-8")


if __name__ == "__main__":
    record()
