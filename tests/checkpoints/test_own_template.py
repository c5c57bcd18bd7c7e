"""A model that is built from a language model writes prompts as that model's own chat template does, if a template here does."""

import pytest

from llavamed_jax.checkpoints.assemble.own_template import own_template
from llavamed_jax.text import template_process
from tests.support import byte_level

pytest.importorskip("tokenizers")


@pytest.mark.parametrize("name", byte_level.TEMPLATES)
def test_each_models_own_template_is_found(name, tmp_path):
    byte_level.save(tmp_path, byte_level.TEMPLATES[name])
    assert own_template(tmp_path) == (name, f"template: {name}, which writes the prompts of the decoder's chat template")


@pytest.mark.parametrize("change", [("SmolLM, trained", "SmallLM, trained"), ("<|im_end|>' + '\n'", "<|im_end|>'"),
                                    ("assistant\n' }}{% endif %}", "assistant ' }}{% endif %}")])
def test_a_template_that_differs_in_a_word_is_another_one(change, tmp_path):
    """In the system text, behind a turn, and before the answer."""
    byte_level.save(tmp_path, "smollm2")
    assert byte_level.SMOLLM2.count(change[0]) == 1
    (tmp_path / "chat_template.jinja").write_text(byte_level.SMOLLM2.replace(*change), encoding="utf-8")
    assert own_template(tmp_path) == (
        None, "template: by model type; the decoder's chat template has no counterpart here and is left out")


def test_a_template_of_another_kind_is_not_even_rendered(tmp_path, monkeypatch):
    byte_level.save(tmp_path, "smollm2")
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}", encoding="utf-8")
    monkeypatch.setattr(template_process, "render", lambda *args: pytest.fail("rendered"))
    assert own_template(tmp_path)[0] is None


def test_a_template_that_cannot_be_rendered_is_said(tmp_path):
    byte_level.save(tmp_path, "smollm2")
    (tmp_path / "chat_template.jinja").write_text("<|im_end|>{{ raise_exception('no') }}", encoding="utf-8")
    name, sentence = own_template(tmp_path)
    assert name is None and sentence.startswith("template: by model type, since the chat template ") and sentence.endswith("no")


def test_without_a_chat_template_nothing_is_said(tmp_path):
    byte_level.save(tmp_path, "llama3")
    (tmp_path / "tokenizer_config.json").unlink()
    assert own_template(tmp_path) == (None, None)
