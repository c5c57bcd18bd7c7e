"""docs/checkpoint_keys.md lists every key of the tokenizer's files that the versions of transformers from 4.28 to today's write."""

import json
import re
import shutil
from pathlib import Path

import pytest

from llavamed_jax.text.special_tokens import ROLES
from llavamed_jax.text.tokenizer_generations import _NOT_APPLIED

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "checkpoint_keys.md").read_text(encoding="utf-8")
# What 4.28.1 and 4.36.2 save of a LlamaTokenizer and its fast twin, and what published folders of LLaVA's have besides.
SAVED = {
    "tokenizer_config.json": {
        "add_bos_token", "add_eos_token", "added_tokens_decoder", "additional_special_tokens", "bos_token", "chat_template",
        "clean_up_tokenization_spaces", "eos_token", "legacy", "model_max_length", "pad_token", "sp_model_kwargs",
        "spaces_between_special_tokens", "tokenizer_class", "unk_token", "use_default_system_prompt", "padding_side",
        "trust_remote_code", "processor_class", "image_token", "add_prefix_space", "extra_special_tokens"},
    "special_tokens_map.json": {"additional_special_tokens", "bos_token", "eos_token", "pad_token", "unk_token"},
    "tokenizer.json": {"added_tokens", "decoder", "model", "normalizer", "padding", "post_processor", "pre_tokenizer", "truncation",
                       "version"},
}


def section(file):
    """The keys of a file's table."""
    table = PAGE.split(f"\n| `{file}`")[1].split("\n\n")[0]
    return {key for line in table.splitlines() for key in re.findall("`([^`]+)`", line.split("|")[1])}


def saved_by_todays(tmp_path):
    """The keys that the installed transformers writes, by file."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "source").mkdir()
    shutil.copyfile(ROOT / "samples" / "vqa_rad" / "tokenizer.model", tmp_path / "source" / "tokenizer.model")
    for name in ("LlamaTokenizer", "TokenizersBackend"):
        tokenizer = getattr(transformers, name).from_pretrained(tmp_path / "source")
        tokenizer.add_special_tokens({"pad_token": "<pad>", "additional_special_tokens": ["<a>"]})
        tokenizer.save_pretrained(tmp_path / name)
        for file in (tmp_path / name).glob("*.json"):
            yield file.name, set(json.loads(file.read_text(encoding="utf-8")))


def test_every_key_has_a_row(tmp_path):
    roles = {"special_tokens_map.json": set(ROLES)}  # its row says "and the other roles"
    for file, keys in (*SAVED.items(), *saved_by_todays(tmp_path)):
        assert keys - section(file) - roles.get(file, set()) == set(), file


def test_what_is_read_and_what_is_warned_of_stands_there():
    assert set(ROLES) | set(_NOT_APPLIED) <= section("tokenizer_config.json")
