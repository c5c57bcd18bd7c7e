"""Adapters of models whose head is their embedding table: PEFT holds both, and they fit here if they are equal."""

import json

import numpy as np
import pytest

peft = pytest.importorskip("peft")
from safetensors.numpy import load_file, save_file  # noqa: E402

from llavamed_jax.adapters import peft_write  # noqa: E402
from llavamed_jax.adapters.open import open_model  # noqa: E402
from llavamed_jax.adapters.tables import TABLE  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from tests.adapters.test_peft import Case, difference  # noqa: E402
from tests.support import hf  # noqa: E402

pytestmark = pytest.mark.torch
LAYERS, BOTH = dict(target_modules=r".*language_model.*\.(q|v)_proj"), ["embed_tokens", "lm_head"]
EMBED, HEAD = "base_model.model.model.language_model.embed_tokens.weight", "base_model.model.lm_head.weight"


def tied(root, **settings):
    return Case(root, text={"tie_word_embeddings": True}, has_images=False, **LAYERS, **settings)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Table and head as one array, moved together."""
    return tied(tmp_path_factory.mktemp("tied"), modules_to_save=BOTH, ensure_weight_tying=True)


def pefts_logits(case, adapter):
    model = peft.PeftModel.from_pretrained(hf.transformers.LlavaForConditionalGeneration.from_pretrained(
        case.base, dtype=hf.torch.float32, attn_implementation="eager"), adapter).eval()
    with hf.torch.no_grad():
        return model(input_ids=hf.torch.tensor(case.inputs()[0])).logits.numpy()


@pytest.mark.parametrize("settings, is_changed", [
    ({}, False), (dict(save_embedding_layers=True), True), (dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True), True),
    (dict(modules_to_save=["lm_head"], ensure_weight_tying=True, save_embedding_layers=True), True),
    (dict(modules_to_save=BOTH, ensure_weight_tying=True), True)],
    ids=["no table", "the base's own", "the table", "the head", "both"])
def test_logits_are_pefts_and_pefts_are_ours(tmp_path, settings, is_changed):
    case = tied(tmp_path, **settings)
    found = open_model(case.base, adapter=case.adapter)
    assert found.changed == ({TABLE} if is_changed else set())
    ours = case.ours(found)
    assert difference(ours, pefts_logits(case, case.adapter)) < 2e-5
    peft_write.write(found, tmp_path / "out")
    assert difference(ours, pefts_logits(case, tmp_path / "out")) < 2e-5
    again = open_model(case.base, adapter=tmp_path / "out")
    for name in found.tensors:
        np.testing.assert_array_equal(again.read(name), found.read(name), err_msg=name)


def altered(saved, out, change):
    out.mkdir()
    tensors = load_file(saved.adapter / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_bytes((saved.adapter / "adapter_config.json").read_bytes())
    return out


@pytest.mark.parametrize("change, what", [
    (lambda t: t.pop(HEAD), r"embed_tokens\.weight alone"), (lambda t: t.pop(EMBED), r"lm_head\.weight alone"),
    (lambda t: t.update({HEAD: np.nextafter(t[HEAD], 9)}), r"lm_head\.weight that differs from .*embed_tokens\.weight")])
def test_a_table_that_is_not_the_head_is_refused(saved, tmp_path, change, what):
    with pytest.raises(UserError, match=what + r", and the head of the base .* is its embedding table \(tie_word_embeddings\)"):
        open_model(saved.base, adapter=altered(saved, tmp_path / "adapter", change))


def test_the_table_alone_is_both_in_llavas_files(saved, tmp_path):
    """LLaVA's builder loads `non_lora_trainables.bin` into the model, where both are one array."""
    before = open_model(saved.base, adapter=saved.adapter)
    peft_write.write(before, tmp_path / "out", "llava", base="somebody/llava")
    others = hf.torch.load(tmp_path / "out" / "non_lora_trainables.bin")
    assert set(others) == {"base_model.model.model.embed_tokens.weight"}
    assert "ensure_weight_tying" not in json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    again = open_model(saved.base, adapter=tmp_path / "out")
    np.testing.assert_array_equal(again.read(TABLE), before.read(TABLE))
    hf.torch.save(others | {"base_model.model.lm_head.weight": hf.torch.zeros(96, 64)}, tmp_path / "out" / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="lm_head.weight that differs from model.embed_tokens.weight"):
        open_model(saved.base, adapter=tmp_path / "out")
