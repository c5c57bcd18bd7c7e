"""Adapters as PEFT writes them: read in every naming, equal to PEFT's outputs, written again with the same bits, merged."""

import functools
import json
import re

import jax
import numpy as np
import pytest

peft = pytest.importorskip("peft")
from safetensors.numpy import load_file, save_file  # noqa: E402

import llavamed_jax as lm  # noqa: E402
from llavamed_jax.adapters import lacking, peft_write  # noqa: E402
from llavamed_jax.adapters.lora import merged  # noqa: E402
from llavamed_jax.adapters.open import open_model  # noqa: E402
from llavamed_jax.checkpoints.load import load_params  # noqa: E402
from llavamed_jax.cli.convert import main  # noqa: E402
from llavamed_jax.config.adapter import FACTOR_A, is_factor  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.models.llava import Llava  # noqa: E402
from tests.support import hf  # noqa: E402

pytestmark = pytest.mark.torch
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS = {
    "names": dict(target_modules=LINEAR, exclude_modules=r".*vision_tower.*"),
    "tower too": dict(target_modules=["q_proj", "v_proj", "fc1"]),
    "rslora": dict(target_modules=r"model\.language_model\.layers\.\d+\.(self_attn\.o|mlp\.down)_proj", use_rslora=True),
    "patterns": dict(target_modules=r".*language_model.*\.(q|k|up)_proj", rank_pattern={"k_proj": 2, r"layers\.1\.self_attn\.q_proj": 7},
                     alpha_pattern={"up_proj": 3, r"layers\.0\.self_attn\.q_proj": 1}),
    "one layer": dict(target_modules=["q_proj", "up_proj"], layers_to_transform=[1], layers_pattern="layers",
                      exclude_modules=r".*vision_tower.*"),
    "the projector": dict(target_modules=r".*(multi_modal_projector\.linear_[12]|language_model.*q_proj)"),
    "the head": dict(target_modules=r".*(lm_head|language_model.*v_proj)"),
    "modules to save": dict(target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["multi_modal_projector"]),
}


@functools.cache
def forward(config, scan):
    """The jitted model."""
    return jax.jit(Llava(config, scan=scan).apply)


class Case:
    """A base as transformers saves it, PEFT's model over it with random factors, and the adapter's directory."""

    def __init__(self, root, text=None, save_embedding_layers=False, has_images=True, **settings):
        model, self.config = hf.llava("mistral", text=text)
        self.base, self.adapter, self.has_images = root / "base", root / "adapter", has_images
        model.save_pretrained(self.base)
        settings = {"r": 4, "lora_alpha": 6, "lora_dropout": 0.1, **settings}
        self.model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
        generator = hf.torch.Generator().manual_seed(3)
        with hf.torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_" in name:
                    p.copy_(hf.torch.randn(p.shape, generator=generator) / p.shape[1] ** 0.5)
                elif "modules_to_save" in name:
                    p.add_(0.1 * hf.torch.randn(p.shape, generator=generator))
        self.model.save_pretrained(self.adapter, save_embedding_layers=save_embedding_layers)

    def inputs(self):
        ids = np.random.default_rng(0).integers(3, 90, (2, 26))
        if not self.has_images:
            return ids, None
        ids[0, 2:18] = ids[1, 5:21] = hf.IMAGE_ID
        return ids, hf.images(2)

    def theirs(self):
        ids, pixels = self.inputs()
        with hf.torch.no_grad():
            pixels = None if pixels is None else hf.torch.tensor(pixels).permute(0, 3, 1, 2)
            return self.model(input_ids=hf.torch.tensor(ids), pixel_values=pixels).logits.numpy()

    def ours(self, checkpoint, scan=False):
        ids, pixels = self.inputs()
        ids = np.where(ids == hf.IMAGE_ID, lm.IMAGE_TOKEN, ids)
        with jax.default_matmul_precision("highest"):
            return np.asarray(forward(checkpoint.config, scan)(
                {"params": load_params(checkpoint, np.float32, scan)}, ids, None if pixels is None else pixels[:, None]))


@pytest.fixture(scope="module", params=KINDS)
def case(request, tmp_path_factory):
    has_images = request.param in ("tower too", "the projector", "modules to save")
    return request.param, Case(tmp_path_factory.mktemp("peft"), has_images=has_images, **KINDS[request.param])


def difference(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def test_logits_are_pefts(case):
    name, case = case
    checkpoint = open_model(case.base, adapter=case.adapter)
    theirs = case.theirs()
    assert difference(case.ours(checkpoint), theirs) < 2e-5
    with case.model.disable_adapter():
        assert difference(case.theirs(), theirs) > 1e-2, "the adapter does nothing"


def test_every_kernel_with_factors_is_pefts(case, monkeypatch):
    name, case = case
    monkeypatch.setattr(lacking, "warn_once", pytest.fail)
    checkpoint = open_model(case.base, adapter=case.adapter)
    adapted = [n for n, _ in case.model.named_modules() if n.endswith("lora_A.default")]
    assert sum(n.endswith(FACTOR_A) for n in checkpoint.tensors) == len(adapted) > 1


def test_scanned_layers_give_the_same_or_a_sentence(case):
    """The same of one that has factors in the layers of both stacks; those outside of the layers are not scanned."""
    name, case = case
    checkpoint = open_model(case.base, adapter=case.adapter)
    if name in ("patterns", "one layer"):
        from llavamed_jax.models.llava import abstract_params
        with pytest.raises(UserError, match="differs between layers; training scans the layers"):
            abstract_params(checkpoint.config, scan=True)
    elif name == "tower too":
        assert difference(case.ours(checkpoint, scan=True), case.theirs()) < 2e-5


@pytest.mark.parametrize("case", ["tower too", "rslora", "patterns", "the head", "modules to save"], indirect=True)
def test_merged_equals_unmerged_and_pefts_merge(case, tmp_path):
    """Of modules in all parts of the model, and of ranks and scales that differ."""
    name, case = case
    checkpoint = open_model(case.base, adapter=case.adapter)
    assert main(["merge-lora", "--base", str(case.base), "--adapter", str(case.adapter), "--out", str(tmp_path / "out")]) == 0
    result = open_model(tmp_path / "out")
    assert result.config.adapter is None and result.layout == "transformers"
    assert difference(case.ours(result), case.ours(checkpoint)) < 2e-5
    model = hf.transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype=hf.torch.float32)
    loaded = peft.PeftModel.from_pretrained(
        hf.transformers.LlavaForConditionalGeneration.from_pretrained(case.base, dtype=hf.torch.float32), case.adapter)
    theirs = dict(loaded.merge_and_unload().named_parameters())
    for key, p in model.named_parameters():
        np.testing.assert_allclose(p.detach().numpy(), theirs[key].detach().numpy(), rtol=0, atol=2e-6, err_msg=key)


def test_written_again_it_has_the_same_bits(case, tmp_path):
    """PEFT -> here -> PEFT: tensors, ranks and scales; PEFT loads the result and computes the same."""
    name, case = case
    peft_write.write(open_model(case.base, adapter=case.adapter), tmp_path / "out")
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (case.adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key in before:
        np.testing.assert_array_equal(before[key], after[key], err_msg=key)
    loaded = [peft.PeftModel.from_pretrained(hf.transformers.LlavaForConditionalGeneration.from_pretrained(
        case.base, dtype=hf.torch.float32, attn_implementation="eager"), folder).eval() for folder in (case.adapter, tmp_path / "out")]
    theirs, ours = (model.state_dict() for model in loaded)
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert hf.torch.equal(tensor, ours[key]), key
    scales = [{n: m.scaling["default"] for n, m in model.named_modules() if isinstance(getattr(m, "scaling", None), dict)}
              for model in loaded]
    assert scales[0] == scales[1] and scales[0]


@pytest.mark.parametrize("changed, parts", [
    (["decoder/embed_tokens/embedding", "decoder/lm_head/kernel"], ["lm_head", "model.language_model.embed_tokens"]),
    (["decoder/layers_0/input_layernorm/scale", "decoder/norm/scale"], ["model.language_model.layers.0.input_layernorm", "model.language_model.norm"]),
    (["decoder/layers_1/mlp/up_proj/kernel", "projector/linear_0/bias"], ["model.language_model.layers.1.mlp.up_proj", "model.multi_modal_projector"]),
    (["vision_tower/embeddings/class_embedding", "vision_tower/layers_1/self_attn/q_proj/kernel", "vision_tower/pre_layrnorm/bias"],
     ["model.vision_tower.embeddings", "model.vision_tower.encoder.layers.1.self_attn.q_proj", "model.vision_tower.pre_layrnorm"])])
def test_whole_tensors_of_any_module_are_read_by_peft(saved, tmp_path, changed, parts):
    """PEFT gives factors to the same modules as before, and reads every whole tensor that was written."""
    before = open_model(saved.base, adapter=saved.adapter)
    tensors = {**before.tensors, **{name: before.tensors[name].__class__(
        before.tensors[name].shape, before.tensors[name].dtype, lambda name=name: before.read(name) + 1) for name in changed}}
    checkpoint = before.replace(tensors=tensors, changed=before.changed | set(changed))
    peft_write.write(checkpoint, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["modules_to_save"] == sorted({*parts, "model.multi_modal_projector"})
    model = peft.PeftModel.from_pretrained(hf.transformers.LlavaForConditionalGeneration.from_pretrained(
        saved.base, dtype=hf.torch.float32, attn_implementation="eager"), tmp_path / "out").eval()
    theirs = model.state_dict()
    file = load_file(tmp_path / "out" / "adapter_model.safetensors")
    factors = {key for key in file if "lora_" in key}
    assert {key.replace(".default", "") for key in theirs if "lora_" in key and "modules_to_save" not in key} == factors and len(factors) == 8
    inputs = saved.inputs()
    with hf.torch.no_grad():
        logits = model(input_ids=hf.torch.tensor(inputs[0]), pixel_values=hf.torch.tensor(inputs[1]).permute(0, 3, 1, 2)).logits.numpy()
    assert difference(saved.ours(checkpoint), logits) < 2e-5
    again = open_model(saved.base, adapter=tmp_path / "out")
    assert again.changed >= checkpoint.changed
    for name in checkpoint.tensors:
        if name in checkpoint.changed or is_factor(name):
            np.testing.assert_array_equal(again.read(name), checkpoint.read(name), err_msg=name)


def test_a_module_with_factors_that_was_trained_whole_is_refused(saved, tmp_path):
    checkpoint = open_model(saved.base, adapter=saved.adapter)
    checkpoint = checkpoint.replace(changed=frozenset({"decoder/layers_1/self_attn/q_proj/kernel"}))
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.q_proj has factors and was trained whole too, which PEFT cannot hold"):
        peft_write.write(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- the three namings -------------------------------------------------------------------------------------------------


def renamed(case, out, change, others=None):
    """The adapter under other torch names, as another generation writes it; whole tensors go where `others` says."""
    tensors = {change(key): tensor for key, tensor in load_file(case.adapter / "adapter_model.safetensors").items()}
    config = json.loads((case.adapter / "adapter_config.json").read_text())
    out.mkdir()
    whole = {key: tensor for key, tensor in tensors.items() if "lora_" not in key}
    if others:
        hf.torch.save({key: hf.torch.tensor(tensor) for key, tensor in whole.items()}, out / others)
        tensors = {key: tensor for key, tensor in tensors.items() if key not in whole}
    save_file(tensors, out / "adapter_model.safetensors")
    config["target_modules"] = ["q_proj", "v_proj"]
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def of_transformers_4(key):
    return key.replace("model.model.language_model.", "model.language_model.model.").replace(
        "model.model.multi_modal", "model.multi_modal")


def of_llava(key):
    key = key.replace("model.model.language_model.", "model.model.")
    place = {"linear_1": "0", "linear_2": "2"}
    return re.sub(r"multi_modal_projector\.(linear_\d)", lambda found: f"mm_projector.{place[found[1]]}", key)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("namings"), **KINDS["modules to save"])


@pytest.mark.parametrize("change, others", [(of_transformers_4, None), (of_llava, "non_lora_trainables.bin"), (of_llava, None),
                                            (lambda key: key.replace(".weight", ".default.weight") if "lora_" in key else key, None)],
                         ids=["transformers 4", "llava", "llava in one file", "with the adapter's name"])
def test_other_namings_are_the_same_adapter(saved, tmp_path, capsys, change, others):
    directory = renamed(saved, tmp_path / "adapter", change, others)
    checkpoint, wanted = (open_model(saved.base, adapter=each) for each in (directory, saved.adapter))
    assert "warning" not in capsys.readouterr().err
    assert checkpoint.tensors.keys() == wanted.tensors.keys() and checkpoint.changed == wanted.changed
    assert checkpoint.config.adapter == wanted.config.adapter
    for name in wanted.tensors:
        np.testing.assert_array_equal(checkpoint.read(name), wanted.read(name), err_msg=name)


def test_llavas_layout_is_read_as_it_was_written(saved, tmp_path):
    """With a base in LLaVA's layout, and the projector in `non_lora_trainables.bin`."""
    checkpoint = open_model(saved.base, adapter=saved.adapter)
    peft_write.write(checkpoint, tmp_path / "out", "llava", base="somebody/llava")
    keys = load_file(tmp_path / "out" / "adapter_model.safetensors").keys()
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in keys and len(keys) == 8
    others = hf.torch.load(tmp_path / "out" / "non_lora_trainables.bin")
    assert set(others) == {f"base_model.model.model.mm_projector.{n}.{leaf}" for n in (0, 2) for leaf in ("weight", "bias")}
    again = open_model(saved.base, adapter=tmp_path / "out")
    for name in checkpoint.tensors:
        np.testing.assert_array_equal(again.read(name), checkpoint.read(name), err_msg=name)


def test_llavas_layout_without_whole_tensors_has_all_files(saved, tmp_path):
    """LLaVA's builder reads `config.json` and `non_lora_trainables.bin` in any case."""
    checkpoint = open_model(saved.base, adapter=saved.adapter).replace(changed=frozenset())
    peft_write.write(checkpoint, tmp_path / "out", "llava", base="somebody/llava")
    assert hf.torch.load(tmp_path / "out" / "non_lora_trainables.bin") == {}
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (raw["hidden_size"], raw["model_type"]) == (64, "llava_mistral") and "mm_vision_tower" in raw
    again = open_model(saved.base, adapter=tmp_path / "out")
    assert again.config.adapter == checkpoint.config.adapter and not again.changed


def test_settings_of_an_adapter_that_its_base_has_not_are_said(saved, tmp_path, capsys):
    """LLaVA takes those of the adapter's `config.json`; over a whole base, the base's are applied here."""
    peft_write.write(open_model(saved.base, adapter=saved.adapter), tmp_path / "out", "llava", base="somebody/llava")
    file = tmp_path / "out" / "config.json"
    raw = json.loads(file.read_text())
    same = open_model(saved.base, adapter=tmp_path / "out").config
    assert "config.json has" not in capsys.readouterr().err
    for key, value in {"image_aspect_ratio": "pad" if same.image_aspect_ratio == "square" else "square", "mm_vision_select_layer": -1,
                       "mm_vision_select_feature": "cls_patch", "mm_use_im_start_end": not same.use_start_end, "tokenizer_model_max_length": 77}.items():
        file.write_text(json.dumps({**raw, key: value}))
        assert open_model(saved.base, adapter=tmp_path / "out").config == same
        assert f"config.json has {key} {value!r}, which the base {saved.base} has not; the base's settings" in capsys.readouterr().err
    file.write_text(json.dumps({**raw, "image_aspect_ratio": "anyres"}))
    assert open_model(saved.base, adapter=tmp_path / "out").config == same
    assert "cannot be compared with the base's settings" in capsys.readouterr().err


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_llavas_adapter_over_a_plain_language_model(saved, tmp_path, weights):
    """LLaVA's own directory: the base is the language model, the tower lies beside it, the projector in the adapter's directory."""
    from llavamed_jax.checkpoints import names
    from llavamed_jax.checkpoints.export.directory import export
    whole = open_model(saved.base, adapter=saved.adapter)
    export(merged(whole), tmp_path / "whole", "llava")
    adapter, base = tmp_path / "llava-lora", tmp_path / "vicuna"
    peft_write.write(whole, adapter, "llava", base="somebody/vicuna")
    raw = json.loads((adapter / "config.json").read_text())
    exported = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert {**raw, "dtype": "float32", "torch_dtype": "float32"} == exported  # that of the whole model
    raw.pop("llavamed_jax", None)
    (adapter / "config.json").write_text(json.dumps({**raw, "mm_vision_tower": "somebody/tower"}))
    if weights.endswith(".bin"):
        hf.torch.save({key: hf.torch.tensor(x) for key, x in load_file(adapter / "adapter_model.safetensors").items()}, adapter / weights)
        (adapter / "adapter_model.safetensors").unlink()
    base.mkdir()
    (base / "config.json").write_text(json.dumps({**whole.config.decoder.to_hf(), "architectures": ["MistralForCausalLM"]}))
    save_file({names.decoder_torch_name(spec): np.ascontiguousarray(names.to_torch(name, whole.read(name)))
               for name, spec in names.decoder_specs(whole.config.decoder).items()}, base / "model.safetensors")
    tower = hf.transformers.CLIPVisionModel(hf.transformers.CLIPVisionConfig(**hf.VISION))
    tower.save_pretrained(tmp_path / "tower")
    from llavamed_jax.preflight.compile import check_model
    check_model({"config": {}, "checkpoint": str(base), "vision_tower": None, "adapter": str(adapter)})
    found = open_model(base, adapter=adapter)
    assert found.tensors.keys() == whole.tensors.keys() and found.config.decoder == whole.config.decoder
    assert open_model(adapter).changed == found.changed == whole.changed  # it finds the base beside it
    for folder, stops in ((base, (7, 9)), (adapter, (8,))):  # the base's stop ids, unless the adapter has its own
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(stops)}))
        decoder = open_model(adapter).config.decoder
        assert decoder == type(decoder)(**{**vars(decoder), **decoder.ends_with(stops)}) and decoder != whole.config.decoder
    for name in whole.tensors:
        if not name.startswith("vision_tower/"):
            np.testing.assert_array_equal(found.read(name), whole.read(name), err_msg=name)
    name = "vision_tower/embeddings/class_embedding"
    np.testing.assert_array_equal(found.read(name), tower.state_dict()[next(k for k in tower.state_dict() if k.endswith("class_embedding"))])
    (adapter / "non_lora_trainables.bin").unlink()
    with pytest.raises(UserError, match="lacks projector/linear_0/bias, and its base .*vicuna is a plain language model; the projector in"):
        open_model(adapter)


# ---- opening -----------------------------------------------------------------------------------------------------------


def test_an_adapters_directory_finds_its_base(saved, tmp_path, monkeypatch):
    config = json.loads((saved.adapter / "adapter_config.json").read_text())
    for name, beside in ((str(saved.base), False), ("somebody/base", True), ("somebody/other", True), (None, True)):
        root = tmp_path / str(name).replace("/", "_")
        adapter = root / "adapter"
        adapter.mkdir(parents=True)
        (adapter / "adapter_model.safetensors").symlink_to(saved.adapter / "adapter_model.safetensors")
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        if beside:
            (root / "base").symlink_to(saved.base)
        if name in ("somebody/other", None):
            what = "names no base; the base as the checkpoint" if name is None else "an adapter of somebody/other, which is neither"
            with pytest.raises(UserError, match=what):
                open_model(adapter)
        else:
            assert open_model(adapter).changed == open_model(saved.base, adapter=saved.adapter).changed


def test_the_revision_of_a_base_is_obeyed(saved, tmp_path, monkeypatch, capsys):
    """Of a hub's base; of a directory a warning says that it is taken as it is."""
    from llavamed_jax.checkpoints import hub
    asked, local = [], hub.local
    monkeypatch.setattr(hub, "local", lambda path, *others, **more: (asked.append(path) or saved.base) if str(path).startswith("me/") else local(path, *others, **more))
    for i, (name, revision, wanted) in enumerate([("me/base", "v2", "me/base@v2"), ("me/base", None, "me/base"), ("me/base@v1", "v2", "me/base@v1"),
                                                  (str(saved.base), "v3", None), (str(saved.base), None, None)]):
        adapter = altered(saved, tmp_path / str(i), {"base_model_name_or_path": name, "revision": revision})
        asked.clear()
        assert open_model(adapter).changed and asked == [wanted][:wanted is not None]
        assert ("names revision 'v3' of its base;" in capsys.readouterr().err) == (revision == "v3")


def test_an_adapter_is_one_file_of_any_size(saved, tmp_path, monkeypatch):
    from llavamed_jax.checkpoints.torch import write
    monkeypatch.setattr(write, "SHARD_BYTES", 5000)
    checkpoint = open_model(saved.base, adapter=saved.adapter)
    peft_write.write(checkpoint, tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    assert open_model(saved.base, adapter=tmp_path / "out").tensors.keys() == checkpoint.tensors.keys()


def test_load_names_its_adapter(saved):
    model = lm.load(saved.base, adapter=saved.adapter)
    assert model.describe()["adapter"] == str(saved.adapter)
    assert any(name.startswith("adapter: adapter_model") for name in model.origin.hashes())
    ids, pixels = saved.inputs()
    logits = model.logits(np.where(ids == hf.IMAGE_ID, lm.IMAGE_TOKEN, ids), pixels)
    assert difference(np.asarray(logits), saved.theirs()) < 2e-5


def altered(saved, root, change_config=None, change_tensors=None):
    root.mkdir()
    config = json.loads((saved.adapter / "adapter_config.json").read_text())
    (root / "adapter_config.json").write_text(json.dumps({**config, **(change_config or {})}))
    tensors = load_file(saved.adapter / "adapter_model.safetensors")
    save_file(change_tensors(tensors) if change_tensors else tensors, root / "adapter_model.safetensors")
    return root


Q = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize("config, tensors, sentence", [
    ({"use_dora": True}, None, "has use_dora True, which is not supported; plain LoRA was expected"),
    ({"peft_type": "IA3"}, None, "has peft_type 'IA3'; LORA was expected"),
    ({"init_lora_weights": "pissa_niter_4"}, None, "with which the adapter fits a changed base only"),
    ({"layer_replication": [[0, 2]]}, None, "has layer_replication"), ({"lora_bias": True}, None, "has lora_bias True"),
    ({"trainable_token_indices": [5]}, None, r"has trainable_token_indices \[5\], which is not supported"),
    ({"revision": 5}, None, "has revision 5; a text was expected"),
    (None, lambda t: {**t, "base_model.model.model.language_model.embed_tokens.lora_embedding_A": np.ones((4, 96), np.float32)},
     "lora_embedding_A', factors of an embedding, which are not supported; factors of linear layers"),
    ({"r": 8}, None, "factors of rank 4; 8, as .* says, was expected"), ({"r": 0}, None, "has r 0; a whole number from 1"),
    ({"r": "4"}, None, "has r '4'; a whole number"), ({"lora_alpha": None}, None, "has lora_alpha None; a finite number"),
    ({"rank_pattern": {"(": 3}}, None, "which is not a regular expression"),
    ({"rank_pattern": {"(a+)+b": 3}}, None, "a regular expression without nested repetition"),
    ({"target_modules": "(.*)*x"}, None, "a regular expression without nested repetition"),
    ({"target_modules": ["k_proj"]}, None, "which target_modules of .* does not name"),
    ({"target_modules": 5}, None, "has target_modules 5; names, or a regular expression"),
    ({"lora_dropout": 1}, None, "has lora_dropout 1; 0 or more and less than 1"),
    ({"base_model_name_or_path": 5}, None, "has base_model_name_or_path 5"),
    (None, lambda t: {k: v for k, v in t.items() if k != f"{Q}.lora_B.weight"}, "lacks lora_B of model.language_model.layers.0"),
    (None, lambda t: {**t, f"{Q}.lora_B.weight": np.zeros((64, 5), np.float32)}, r"lora_A \[4, 64\] and lora_B \[64, 5\]"),
    (None, lambda t: {**t, f"{Q}.lora_A.weight": np.zeros((4, 32), np.float32)}, "factors of 32 -> 64; 64 -> 64, as this model has"),
    (None, lambda t: {k.replace("q_proj", "c_attn"): v for k, v in t.items()}, "which this model does not have; an adapter of this model"),
    (None, lambda t: {k.replace("layers.1.", "layers.7."): v for k, v in t.items()}, r"layers\.7\.self_attn\.q_proj"),
    (None, lambda t: {**t, f"{Q}.lora_magnitude_vector": np.ones(64, np.float32)}, "neither a factor of LoRA nor a tensor"),
    (None, lambda t: {k: v for k, v in t.items() if "lora_" not in k}, r"holds no tensors named …lora_A\.weight"),
])
def test_what_does_not_fit_is_one_sentence(saved, tmp_path, config, tensors, sentence):
    with pytest.raises(UserError, match=sentence):
        open_model(saved.base, adapter=altered(saved, tmp_path / "adapter", config, tensors))


@pytest.mark.parametrize("pattern", [
    r"^(model\.language_model(?=\.).*\.(q_proj|v_proj))$", r"^(model\.language_model(?=\.)(?!.*(lm_head|output)).*\.(q|v)_proj)$",  # ms-swift's
    r"(?i)MODEL\.language_model.*", r"(?i:.*Q_PROJ)|.*v_proj", r".*(?<=self_attn)\.(?<!x)\w_proj", r"(?P<a>.*)_proj"])
def test_targets_by_any_pattern_that_peft_takes(saved, tmp_path, pattern):
    found = open_model(saved.base, adapter=altered(saved, tmp_path / "adapter", {"target_modules": pattern}))
    assert found.config.adapter == open_model(saved.base, adapter=saved.adapter).config.adapter
    shape = peft.LoraConfig(target_modules=pattern)
    from peft.tuners.tuners_utils import check_target_module_exists
    for module in ("model.language_model.layers.0.self_attn.q_proj", "model.language_model.layers.1.self_attn.v_proj"):
        assert check_target_module_exists(shape, module)


@pytest.mark.parametrize("change, sentence", [
    ({"target_modules": "((a+))+b"}, "without nested repetition"), ({"target_modules": r"(?P<a>.+)(?P=a)*"}, "without nested repetition"),
    ({"target_modules": r"(a)?(?(1)b|c)"}, "without nested repetition"), ({"target_modules": r"(?=.*)*x"}, "without nested repetition"),
    ({"target_modules": "(?<=a+)b"}, "is not a regular expression"), ({"rank_pattern": {"(?i)q_proj": 3}}, "is not a regular expression")])
def test_patterns_that_cannot_be_used_are_one_sentence(saved, tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        open_model(saved.base, adapter=altered(saved, tmp_path / "adapter", change))


@pytest.mark.parametrize("value", [np.nan, -np.inf])
@pytest.mark.parametrize("key, others", [(f"{Q}.lora_A.weight", None), (f"{Q}.lora_B.weight", None),
    ("base_model.model.model.multi_modal_projector.linear_1.bias", None),
    ("base_model.model.model.multi_modal_projector.linear_1.bias", "non_lora_trainables.bin")])
def test_what_is_not_finite_is_the_adapters(saved, tmp_path, key, others, value):
    """And not the base's, merged and unmerged: the file and the tensor in it are named."""
    adapter = altered(saved, tmp_path / "adapter", None, lambda t: {**t, key: np.where(np.arange(t[key].size).reshape(t[key].shape) == 3, np.float32(value), t[key])})
    if others:
        adapter = renamed(type("", (), {"adapter": adapter}), tmp_path / "llava", of_llava, others)
        key = "base_model.model.model.mm_projector.0.bias"
    checkpoint, file = open_model(saved.base, adapter=adapter), adapter / (others or "adapter_model.safetensors")
    for model in (checkpoint, merged(checkpoint)):
        with pytest.raises(UserError, match=re.escape(f"{file} holds {key} with 1 {'NaN' if np.isnan(value) else 'infinite'} among ")):
            for name in model.sound().tensors:
                model.sound().read(name)


def without(*words):
    return lambda tensors: {key: t for key, t in tensors.items() if not any(word in key for word in words)}


NAMES = ["q_proj", "v_proj"]


@pytest.mark.parametrize("config, tensors, sentence", [
    ({"target_modules": NAMES}, without("v_proj"), "lacks factors of self_attn.v_proj in every layer of the decoder, which target_modules of adapter_config.json names"),
    ({"target_modules": NAMES}, without("1.self_attn.q_proj"), "lacks factors of self_attn.q_proj in layer 1 of the decoder, which"),
    ({"target_modules": [*NAMES, "fc1"]}, None, "lacks factors of mlp.fc1 in layers "),
    ({"target_modules": [*NAMES, "lm_head"]}, None, "lacks factors of lm_head in the decoder, which"),
    ({}, without("0.self_attn.v_proj"), "lacks factors of self_attn.v_proj in layer 0 of the decoder, which"),
    ({"target_modules": "all-linear"}, None, "lacks factors of "),
    ({"target_modules": NAMES, "layers_to_transform": [1]}, without("layers.0.", "v_proj"),
     "lacks factors of self_attn.v_proj in layer 1 of the decoder, which"),
    ({"target_modules": NAMES, "layers_to_transform": 3}, None, "has factors of self_attn.q_proj in every layer of the decoder, self_attn.v_proj in every layer of"),
    ({}, without("multi_modal_projector"), "lacks the tensors of multi_modal_projector, which modules_to_save of adapter_config.json names"),
    ({"target_modules": NAMES, "layers_to_transform": [1], "layers_pattern": "layers"}, without("layers.0."), None),
    ({"target_modules": NAMES, "layers_to_transform": 0}, without("layers.1."), None),
    ({"target_modules": NAMES, "exclude_modules": ["v_proj"]}, without("v_proj"), None),
    ({"target_modules": NAMES, "exclude_modules": r".*(a+)+"}, without("v_proj"), None),
    ({"target_modules": [*NAMES, "c_attn"], "modules_to_save": ["multi_modal_projector", "score"]}, None, None),
    ({"target_modules": None}, without("v_proj"), None)])
def test_what_the_config_names_and_the_files_lack(saved, tmp_path, capsys, config, tensors, sentence):
    adapter = altered(saved, tmp_path / "adapter", config, tensors)
    assert open_model(saved.base, adapter=adapter).config.adapter
    said = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(said) == (sentence is not None) and all(f"{adapter / 'adapter_model.safetensors'} {sentence}" in line for line in said), said


def test_an_adapter_over_an_adapter_is_refused(saved, tmp_path):
    with pytest.raises(UserError, match="names|adapter"):
        open_model(saved.adapter, adapter=saved.adapter)
    one = open_model(saved.base, adapter=saved.adapter)
    from llavamed_jax.adapters import peft as ours
    with pytest.raises(UserError, match="has an adapter already"):
        ours.apply(one, saved.adapter)


def test_layouts_have_no_place_for_an_adapter(saved, tmp_path, capsys):
    from llavamed_jax.checkpoints.export.directory import export
    checkpoint = open_model(saved.base, adapter=saved.adapter)
    for layout in ("transformers", "llava"):
        with pytest.raises(UserError, match="has no place for one; `convert merge-lora` merges it"):
            export(checkpoint, tmp_path / layout, layout)
    assert not any(is_factor(name) for name in merged(checkpoint).tensors)
