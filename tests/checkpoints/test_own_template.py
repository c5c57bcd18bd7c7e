"""A model that is built from a language model writes prompts as that model's own chat template does, if a template here does."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from llavamed_jax.checkpoints.assemble.own_template import own_template
from llavamed_jax.cli.convert import main
from llavamed_jax.processor import Processor
from tests.support import byte_level, tiny

pytest.importorskip("tokenizers")

ROOT = Path(__file__).resolve().parents[2]
SAME = "which writes the prompts of the decoder's chat template"
BUT_BLANKS = f"{SAME} but for white space"
BUT_SYSTEM = "which writes the turns of the decoder's chat template, with another system text or none where none is given"
NONE = "by model type, because no template here writes the prompts of the decoder's chat template, which is left out"
# As released. Mistral 0.2's first one has no blank behind [/INST], and refuses a system text; a later one begins with a blank.
MISTRAL = ("{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
           "'Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if message['role'] == 'user' %}{{ '[INST] "
           "' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token}}{% else %}{{ "
           "raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}")
MISTRAL_LATER = (
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set turns = messages[1:] %}{%- else %}{%- set "
    "turns = messages %}{%- endif %}{{- bos_token }}{%- for message in turns %}{%- if message['role'] == 'user' %}{%- if loop.first and "
    "system is defined %}{{- ' [INST] ' + system + '\n\n' + message['content'] + ' [/INST]' }}{%- else %}{{- ' [INST] ' + "
    "message['content'] + ' [/INST]' }}{%- endif %}{%- else %}{{- ' ' + message['content'] + eos_token}}{%- endif %}{%- endfor %}")
LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}{% set system_message = messages[0]['content'] %}{% else "
    "%}{% set loop_messages = messages %}{% set system_message = false %}{% endif %}{% for message in loop_messages %}{% if loop.index0 == 0 "
    "and system_message != false %}{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}{% else %}{% "
    "set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' "
    "}}{% elif message['role'] == 'assistant' %}{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}")
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if loop.first and m.role != 'system' %}A chat between a curious user and an artificial "
    "intelligence assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}{% if m.role == "
    "'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + "
    "eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}")


@pytest.mark.parametrize("name", byte_level.TEMPLATES)
def test_each_models_own_template_is_found(name, tmp_path):
    byte_level.save(tmp_path, byte_level.TEMPLATES[name])
    assert own_template(tmp_path, "up:vicuna_v1") == (name, SAME)


@pytest.mark.parametrize("source, name, why", [
    (byte_level.CHATML, "hf:chatml_no_system", SAME),
    (byte_level.SMOLLM2.replace("SmolLM, trained", "SmallLM, trained"), "hf:chatml_no_system", BUT_SYSTEM),
    (byte_level.SMOLLM2.replace("<|im_end|>' + '\n'", "<|im_end|>'"), "hf:chatml", BUT_BLANKS),
    (byte_level.SMOLLM2.replace("assistant\n' }}{% endif %}", "assistant ' }}{% endif %}"), "hf:chatml", BUT_BLANKS),
    (byte_level.CHATML.replace("im_end", "end"), None, NONE), (byte_level.CHATML.replace("assistant\n", "bot\n"), None, NONE)])
def test_a_template_that_differs_in_a_word_is_another_one(source, name, why, tmp_path):
    """In the system text, behind a turn, before the answer, in a token and in a role."""
    byte_level.save(tmp_path, "smollm2")
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    assert source != byte_level.SMOLLM2
    assert own_template(tmp_path, "up:vicuna_v1") == (name, why)


@pytest.mark.parametrize("default", ["v1.5:mistral_instruct", "up:vicuna_v1", "v1.0:multimodal"])  # of a directory, a GGUF, image tokens
@pytest.mark.parametrize("source, name, why", [
    (MISTRAL, "v1.5:mistral_instruct", BUT_BLANKS), (MISTRAL_LATER, "v1.5:mistral_instruct", BUT_BLANKS),
    (LLAMA_2, "v1.5:llava_llama_2", BUT_SYSTEM), (VICUNA, "up:vicuna_v1", SAME), (byte_level.CHATML, None, NONE),
    ("{% for m in messages %}{{ m.content }}{% endfor %}", None, NONE)])
def test_templates_without_special_tokens_are_found_too(source, name, why, default, mistral_tokenizer, tmp_path):
    shutil.copyfile(mistral_tokenizer, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "chat_template": source}))
    assert own_template(tmp_path, default) == (name, why)


def test_llama_3s_day_is_not_today(tmp_path):
    byte_level.save(tmp_path, "llama3.1")
    source = byte_level.LLAMA31.replace('date_string = "26 Jul 2024"', 'date_string = strftime_now("%d %b %Y")')
    (tmp_path / "chat_template.jinja").write_text(source, encoding="utf-8")
    assert source != byte_level.LLAMA31 and own_template(tmp_path, "up:vicuna_v1") == ("hf:llama3.1", SAME)


def test_a_template_that_cannot_be_rendered_is_said(tmp_path):
    byte_level.save(tmp_path, "smollm2")
    (tmp_path / "chat_template.jinja").write_text("<|im_end|>{{ raise_exception('no') }}", encoding="utf-8")
    name, why = own_template(tmp_path, "up:vicuna_v1")
    assert name is None and why.startswith("by model type, because the chat template ") and why.endswith("no")


def test_without_a_chat_template_nothing_is_said(tmp_path):
    byte_level.save(tmp_path, "llama3")
    (tmp_path / "tokenizer_config.json").unlink()
    assert own_template(tmp_path, "up:vicuna_v1") == (None, None)


@pytest.mark.parametrize("kind, files, chat_template, line", [
    ("mistral", "pieces", MISTRAL, f"template: v1.5:mistral_instruct, {BUT_BLANKS}"),
    ("llama", "pieces", MISTRAL, f"template: v1.5:mistral_instruct, {BUT_BLANKS}"),
    ("llama", "pieces", None, "template: up:vicuna_v1, by model type, because the decoder has no chat template"),
    ("llama", "pieces", "{{ messages }}", f"template: up:vicuna_v1, {NONE}"),
    ("llama", None, None, "template: up:vicuna_v1, by model type, because the decoder has no tokenizer"),
    ("llama", "smollm2", None, "template: hf:chatml_no_system, by the special tokens of the decoder's tokenizer, because the decoder has no chat"),
    ("llama", "smollm2", "{{ messages }}", f"template: up:vicuna_v1, {NONE}"),
    ("qwen3", "qwen3", None, "template: hf:qwen3, by the special tokens of the decoder's tokenizer, because the decoder has no chat template"),
    ("qwen3", "qwen3-2507", byte_level.QWEN3_2507, f"template: hf:chatml_no_system, {SAME}"),
    ("qwen3", "llama3", "{{ messages }}", f"template: up:vicuna_v1, {NONE}, and the tokenizer lacks the special tokens of hf:qwen3")])
def test_build_always_says_which_template_and_why(kind, files, chat_template, line, tmp_path, capsys):
    own = {"mistral": tiny.MISTRAL, "llama": tiny.LLAMA, "qwen3": dict(model_type="qwen3", num_key_value_heads=4, head_dim=12)}[kind]
    directory, config = tmp_path / "lm", {**tiny.LLAMA, **own, "vocab_size": 1024, "eos_token_id": 2}
    norms = {f"model.layers.{i}.self_attn.{each}_norm.weight": (12,) for i in range(2) for each in "qk" if kind == "qwen3"}
    tiny.save(directory, config, tiny.drawn({**tiny.decoder_shapes(config), **norms}, dtype=np.float32))
    if files == "pieces":
        shutil.copyfile(ROOT / "samples" / "vqa_rad" / "tokenizer.model", directory / "tokenizer.model")
    elif files is not None:
        byte_level.save(directory, files)
        (directory / "tokenizer_config.json").unlink()
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    tiny.save_clip(tmp_path / "clip")
    command = ["build", "--decoder", str(directory), "--vision", str(tmp_path / "clip"), "--projector", "linear"]
    assert main([*command, "--out", str(tmp_path / "built")]) == 0
    said = [each for each in capsys.readouterr().out.splitlines() if each.startswith("template: ")]
    assert len(said) == 1 and said[0].startswith(line)
    if files is not None:
        assert Processor.load(tmp_path / "built").template_name == line.split()[1].rstrip(",")
