"""Adapters of a plain ViT tower, whose modules transformers 5 names otherwise than its files: read in both spellings."""

import re

import jax.numpy as jnp
import numpy as np
import pytest

peft = pytest.importorskip("peft")
from safetensors.numpy import load_file, save_file  # noqa: E402

import llavamed_jax as lm  # noqa: E402
from llavamed_jax.adapters import peft_write  # noqa: E402
from llavamed_jax.adapters.open import open_model  # noqa: E402
from llavamed_jax.checkpoints.export.directory import export  # noqa: E402
from llavamed_jax.checkpoints.load import load_params  # noqa: E402
from llavamed_jax.checkpoints.open import open_checkpoint  # noqa: E402
from tests.adapters.test_peft import forward  # noqa: E402
from tests.support import hf, towers  # noqa: E402

pytestmark = pytest.mark.torch
OLD = [(r"\.layers\.(\d+)\.attention\.(q|k|v)_proj", lambda m: f".encoder.layer.{m[1]}.attention.attention.{dict(q='query', k='key', v='value')[m[2]]}"),
       (r"\.layers\.(\d+)\.attention\.o_proj", r".encoder.layer.\1.attention.output.dense"),
       (r"\.layers\.(\d+)\.mlp\.fc1", r".encoder.layer.\1.intermediate.dense"), (r"\.layers\.(\d+)\.mlp\.fc2", r".encoder.layer.\1.output.dense")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A base, PEFT's model over it with random factors in every linear layer of the tower, and its adapter's directory."""
    root = tmp_path_factory.mktemp("vit")
    export(towers.built("vit", root)[1], root / "base")
    model = hf.transformers.LlavaForConditionalGeneration.from_pretrained(root / "base", dtype=hf.torch.float32, attn_implementation="eager")
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=r".*vision_tower.*\.([qkvo]_proj|fc1|fc2)")).eval()
    randomise(model)
    model.save_pretrained(root / "adapter", save_embedding_layers=False)
    return root, model


def randomise(model):
    generator = hf.torch.Generator().manual_seed(3)
    with hf.torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(hf.torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)


def pefts_logits(model, checkpoint):
    ids = [[1, *[model.config.image_token_id] * checkpoint.config.tokens_per_image, 5, 9]]
    with hf.torch.no_grad():
        return model(input_ids=hf.torch.tensor(ids), pixel_values=hf.torch.tensor(hf.images(1)).permute(0, 3, 1, 2)).logits.numpy()


def logits(root, adapter):
    checkpoint = open_model(root / "base", adapter=adapter)
    ids = jnp.array([[1, *[lm.IMAGE_TOKEN] * checkpoint.config.tokens_per_image, 5, 9]])
    return checkpoint, np.asarray(forward(checkpoint.config, False)({"params": load_params(checkpoint, np.float32)}, ids, hf.images(1)[:, None]))


def test_logits_are_pefts_and_what_is_written_is_what_was_read(saved, tmp_path):
    root, model = saved
    checkpoint, ours = logits(root, root / "adapter")
    theirs = pefts_logits(model, checkpoint)[..., :ours.shape[-1]]
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
    with model.disable_adapter():
        assert np.abs(pefts_logits(model, checkpoint)[..., :ours.shape[-1]] - theirs).max() > 1e-2 * np.abs(theirs).max(), "the adapter does nothing"
    peft_write.write(checkpoint, tmp_path / "out")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (root / "adapter", tmp_path / "out"))
    assert before.keys() == after.keys() and len(before) == 2 * 6 * 3
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)


@pytest.mark.parametrize("kind, part", [("siglip", "head"), ("vit", "pooler")])
def test_what_llava_does_not_read_is_left_out(kind, part, tmp_path, capsys):
    """Factors in SigLIP's head and in ViT's pooler, and a whole tensor of it: PEFT's logits do not depend on them."""
    export(towers.built(kind, tmp_path)[1], tmp_path / "base")
    shapes = hf.transformers.AutoConfig.from_pretrained(tmp_path / "base")
    shapes.vision_config.vision_use_head = True  # as published models have it, and our exports have not
    model = hf.transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "base", config=shapes, dtype=hf.torch.float32, attn_implementation="eager")
    whole = [name for name, _ in model.named_modules() if re.fullmatch(rf"model\.vision_tower\.{part}\.(layernorm|dense)", name)]
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=6, target_modules=r"model\.vision_tower.*\.(fc1|fc2)" + r"|.*v_proj" * (kind == "vit"),
                                                       modules_to_save=whole)).eval()
    randomise(model)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    keys = [key for key in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if f".{part}." in key]
    assert any("lora_" in key for key in keys) == (kind == "siglip") and any("lora_" not in key for key in keys)
    checkpoint, ours = logits(tmp_path, tmp_path / "adapter")
    assert f"of the vision tower that LLaVA does not read is left out: model.vision_tower.{part}." in capsys.readouterr().err
    assert not checkpoint.changed
    theirs = pefts_logits(model, checkpoint)[..., :ours.shape[-1]]
    assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
    with model.disable_adapter():
        assert np.abs(pefts_logits(model, checkpoint)[..., :ours.shape[-1]] - theirs).max() > 1e-2 * np.abs(theirs).max(), "the adapter does nothing"


def test_the_names_of_earlier_versions_are_the_same_adapter(saved, tmp_path):
    root, _ = saved
    (tmp_path / "old").mkdir()
    tensors = load_file(root / "adapter" / "adapter_model.safetensors")
    settings = (root / "adapter" / "adapter_config.json").read_text().replace("([qkvo]_proj|fc1|fc2)", "(query|key|value|dense)")
    (tmp_path / "old" / "adapter_config.json").write_text(settings)
    for new, old in OLD:
        tensors = {re.sub(new, old, key): tensor for key, tensor in tensors.items()}
    assert all(".encoder.layer." in key and "_proj" not in key and ".mlp." not in key for key in tensors)
    save_file(tensors, tmp_path / "old" / "adapter_model.safetensors")
    np.testing.assert_array_equal(logits(root, tmp_path / "old")[1], logits(root, root / "adapter")[1])


def test_a_model_saved_by_the_names_in_memory_is_read(saved, tmp_path):
    root, _ = saved
    base = root / "base"
    (tmp_path / "raw").mkdir()
    for file in base.iterdir():
        if file.is_file() and not file.name.startswith("model"):
            (tmp_path / "raw" / file.name).write_bytes(file.read_bytes())
    model = hf.transformers.LlavaForConditionalGeneration.from_pretrained(base)
    model.save_pretrained(tmp_path / "raw", save_original_format=False)
    assert any("vision_tower.layers.0.attention.q_proj" in key for key in load_file(tmp_path / "raw" / "model.safetensors"))
    raw, plain = open_checkpoint(tmp_path / "raw"), open_checkpoint(base)
    assert raw.tensors.keys() == plain.tensors.keys()
    for name in plain.tensors:
        np.testing.assert_array_equal(raw.read(name), plain.read(name), err_msg=name)
