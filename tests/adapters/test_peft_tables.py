"""Whole embedding tables and factors of the head between adapters and bases whose tables have another number of rows."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llavamed_jax.adapters import peft_write
from llavamed_jax.adapters.lora import attach
from llavamed_jax.adapters.open import open_model
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tensor import Tensor
from llavamed_jax.config.adapter import AdapterConfig, AdapterRule, is_factor
from llavamed_jax.errors import UserError
from tests.checkpoints.test_export import config, with_tokenizer

PIECES = 1024  # of the sample's tokenizer
TABLE, HEAD = "decoder/embed_tokens/embedding", "decoder/lm_head/kernel"
AXIS = {TABLE: 0, HEAD: 1, "decoder/lm_head/kernel_lora_b": 1}


def base_of(rows, directory, layout="llava"):
    checkpoint = with_tokenizer(random_checkpoint(config(decoder={"vocab_size": rows}), seed=3), directory / "files", {"legacy": True})
    export(checkpoint, directory / layout, layout)
    return directory / layout


def adapted(base, has_head_factors):
    """The base with an adapter whose factors do something, and with other tables (of which PEFT holds no head with factors)."""
    modules = (r"decoder/layers_\d+/self_attn/q_proj", *([r"decoder/lm_head"] if has_head_factors else []))
    checkpoint = attach(open_model(base), AdapterConfig(tuple(AdapterRule(each, 3, 5.0) for each in modules)), 0)
    rng, changed = np.random.default_rng(1), {TABLE} if has_head_factors else {TABLE, HEAD}
    drawn = {name: rng.standard_normal(t.shape, np.float32) for name, t in checkpoint.tensors.items() if is_factor(name) or name in changed}
    return checkpoint.replace(changed=frozenset(changed), tensors={**checkpoint.tensors, **{
        name: Tensor(x.shape, x.dtype, lambda x=x: x) for name, x in drawn.items()}})


@pytest.fixture(scope="module", params=[False, True], ids=["whole head", "factors of the head"])
def case(request, tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    base = base_of(PIECES, root)
    checkpoint = adapted(base, request.param)
    peft_write.write(checkpoint, root / "adapter")
    return root, base, checkpoint


def cut(adapter, out, rows, tokenizer=None):
    """The adapter with tables of other rows: the first ones, or further ones of 7."""
    out.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    for key, tensor in tensors.items():
        if tensor.shape[0] > 1000:
            tensors[key] = np.concatenate([tensor[:rows], np.full((max(0, rows - len(tensor)), *tensor.shape[1:]), 7, tensor.dtype)])
    save_file(tensors, out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    for file in [] if tokenizer is None else tokenizer.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    return out


def test_an_adapter_has_the_rows_of_its_bases_export(case, tmp_path):
    root, base, checkpoint = case
    export(open_model(base), tmp_path / "hf")
    there = load_file(tmp_path / "hf" / "model.safetensors")
    rows = {tensor.shape[0] for key, tensor in load_file(root / "adapter" / "adapter_model.safetensors").items() if tensor.shape[0] > 1000}
    assert rows == {len(there["language_model.model.embed_tokens.weight"])} == {1088}
    for onto in (base, tmp_path / "hf"):
        again = open_model(onto, adapter=root / "adapter")
        assert again.config.decoder.vocab_size == PIECES and again.changed == checkpoint.changed
        for name in checkpoint.tensors:
            np.testing.assert_array_equal(again.read(name), checkpoint.read(name), err_msg=name)


@pytest.mark.parametrize("rows, there", [(1024, 1088), (1088, 1024), (1030, 1088), (1088, 1056)])
def test_the_rows_that_exist_are_taken(case, rows, there, tmp_path):
    root, _, checkpoint = case
    base = base_of(there, tmp_path)
    plain, found = open_model(base), open_model(base, adapter=cut(root / "adapter", tmp_path / "cut", rows))
    file = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    both = min(rows, there)
    for name in {*checkpoint.changed, *AXIS} & found.tensors.keys():
        table = np.moveaxis(found.read(name), AXIS[name], 0)
        assert len(table) == there
        if name in checkpoint.changed:
            key = next(key for key in file if ("embed_tokens" in key) == (name == TABLE) and "lora" not in key and file[key].shape[0] == rows)
            np.testing.assert_array_equal(table[:both], file[key][:both])
            np.testing.assert_array_equal(table[both:], np.moveaxis(plain.read(name), AXIS[name], 0)[both:])
        elif "lora_b" in name:
            np.testing.assert_array_equal(table[:PIECES], np.moveaxis(checkpoint.read(name), 1, 0))
            assert (table[both:] == 0).all()


@pytest.mark.parametrize("rows, sentence", [
    (1010, r" has 1010 rows, this model's table has 1024, and the tokenizer of the model has 1024 tokens; a row for each"),
    (2000, r" has 2000 rows; 1024, as this model has, was expected, or a few more or fewer, as an export fills a table up")])
def test_a_token_without_a_row_is_one_sentence(case, rows, sentence, tmp_path):
    root, base, _ = case
    with pytest.raises(UserError, match=sentence):
        open_model(base, adapter=cut(root / "adapter", tmp_path / "cut", rows))


@pytest.mark.parametrize("added, is_said", [({"<lesion>": 1024, "<organ>": 1025}, True), ({"<image>": 1024, "<pad>": 1025}, False), ({}, False)])
def test_an_adapters_own_tokens_are_said_where_every_one_has_a_row(case, tmp_path, capsys, added, is_said):
    root, _, _ = case
    base = base_of(1088, tmp_path)
    more = with_tokenizer(random_checkpoint(config()), tmp_path / "more", {"legacy": True}, added=added)
    assert more.files
    adapter = cut(root / "adapter", tmp_path / "cut", 1088, tmp_path / "more")
    open_model(base, adapter=adapter)
    said = capsys.readouterr().err
    assert (f"{adapter} has a tokenizer of its own with <lesion>, <organ>, where that of the base {base} has" in said) == is_said
    assert (f"--tokenizer {adapter} takes the adapter's" in said) == is_said


def test_tokens_of_the_adapters_own_tokenizer_need_rows(case, tmp_path):
    root, base, _ = case
    added = with_tokenizer(random_checkpoint(config()), tmp_path / "more", {"legacy": True}, added={"<lesion>": 1024, "<organ>": 1025})
    assert added.files
    with pytest.raises(UserError, match="has 1088 rows, this model's table has 1024, and the tokenizer of the adapter has 1026 tokens"):
        open_model(base, adapter=cut(root / "adapter", tmp_path / "cut", 1088, tmp_path / "more"))
    usual = with_tokenizer(random_checkpoint(config()), tmp_path / "usual", {"legacy": True}, added={"<image>": 1024, "<pad>": 1025})
    assert json.loads(usual.files["added_tokens.json"].read_text())
    found = open_model(base, adapter=cut(root / "adapter", tmp_path / "again", 1088, tmp_path / "usual"))
    assert found.read(TABLE).shape[0] == 1024
