"""Byte-level tokenizers in transformers' layout: every class that a version of transformers takes gives our ids."""

import json

import pytest

from llavamed_jax.checkpoints.export.tokenizer import write_tokenizer
from llavamed_jax.text.tokenizer import Tokenizer
from tests.support import byte_level

tokenizers = pytest.importorskip("tokenizers")
TEXTS = ("", "Is there a pneumothorax?", "<|im_start|>user\nWhat  is shown?<|im_end|>\n", "<s>a</s> <unk>", " né\n\n\nzwei")
CORE = ("bos_token", "eos_token", "unk_token")


def of_llamas_class(directory):
    """`LlamaTokenizerFast` of transformers 4: its own roles where none is said, and a beginning by `add_bos_token`."""
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    roles = {role: settings.get(role, own) for role, own in zip(CORE, ("<s>", "</s>", "<unk>"), strict=True)}
    made.add_special_tokens([token for token in roles.values() if token is not None and made.token_to_id(token) is None])
    bos = roles["bos_token"]
    if settings.get("add_bos_token", True):
        made.post_processor = tokenizers.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, made.token_to_id(bos))])
    else:
        made.post_processor = tokenizers.processors.TemplateProcessing(single="$A", pair="$A $B")
    return made


@pytest.mark.parametrize("of_transformers", [False, True])
@pytest.mark.parametrize("kind", byte_level.KINDS)
def test_prompts_have_our_ids_whichever_class_reads_them(kind, of_transformers, tmp_path):
    ours = Tokenizer.load(byte_level.save(tmp_path / "lm", kind), of_transformers)
    assert ours.has_bos == kind.startswith("llama3")
    (tmp_path / "hf").mkdir()
    write_tokenizer({path.name: path for path in (tmp_path / "lm").iterdir()}, tmp_path / "hf", of_transformers)
    settings = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    merges = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["model"]["merges"]
    assert merges and all(len(each.split(" ")) == 2 for each in merges), "pairs, which tokenizers before 0.20 do not read"
    assert (settings["tokenizer_class"], settings["add_bos_token"]) == ("PreTrainedTokenizerFast", ours.has_bos)
    plain, llamas = tokenizers.Tokenizer.from_file(str(tmp_path / "hf" / "tokenizer.json")), of_llamas_class(tmp_path / "hf")
    for text in TEXTS:
        assert plain.encode(text).ids == llamas.encode(text).ids == ours.encode(text), text
    assert Tokenizer.load(tmp_path / "hf", True).encode(TEXTS[1]) == ours.encode(TEXTS[1])


def test_an_export_that_asked_for_a_beginning_is_exported_as_it_is_read(tmp_path):
    """Earlier exports named LLaMA's class and add_bos_token for SmolLM2, whose prompts have no beginning."""
    directory = byte_level.save(tmp_path / "lm", "smollm2")
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "LlamaTokenizer", "add_bos_token": True}))
    for of_transformers in (True, False):
        out = tmp_path / str(of_transformers)
        out.mkdir()
        write_tokenizer({path.name: path for path in directory.iterdir()}, out, of_transformers)
        ours = Tokenizer.load(directory, of_transformers)
        assert ours.has_bos != of_transformers
        assert of_llamas_class(out).encode("a b").ids == Tokenizer.load(out, True).encode("a b") == ours.encode("a b")
