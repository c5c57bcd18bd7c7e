"""Weights in and out: every layout, both directions, to the bit; and one sentence for what does not fit."""

import json
import math
import shutil

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file, save_file  # noqa: E402

from llavamed_jax.checkpoints import names, writer  # noqa: E402
from llavamed_jax.checkpoints.load import flatten, load_params, random_checkpoint  # noqa: E402
from llavamed_jax.checkpoints.reader import open_checkpoint, read_config  # noqa: E402
from llavamed_jax.checkpoints.store import write_model  # noqa: E402
from llavamed_jax.checkpoints.writer import export  # noqa: E402
from llavamed_jax.config import IMAGE_TOKEN, PRESETS, DecoderConfig, LlavaConfig, VisionConfig  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.models import llava  # noqa: E402
from tests import hf  # noqa: E402

TINY = LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14),
                   DecoderConfig(70, 48, 96, 2, 4, 2, 12, 1e-5, 1e6, 512, architecture="mistral"), source="llava_mistral")
# As the release: the keys of LLaVA-Med v1.5's config.json (spec 2.3) at a tiny shape, its leftovers included.
V15 = dict(
    model_type="llava_mistral", architectures=["LlavaMistralForCausalLM"], hidden_size=48, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, vocab_size=70, rms_norm_eps=1e-5, rope_theta=1e6, max_position_embeddings=32768,
    sliding_window=None, hidden_act="silu", tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
    mm_vision_tower="openai/tiny-tower", mm_hidden_size=32, mm_projector_type="mlp2x_gelu", mm_vision_select_layer=-2,
    mm_vision_select_feature="patch", mm_use_im_start_end=False, mm_use_im_patch_token=False, image_aspect_ratio="pad",
    tokenizer_padding_side="right", tokenizer_model_max_length=2048, use_mm_proj=True, mm_projector_lr=2e-5,
    mm_patch_merge_type="flat", feature_outs="encoder+decoder", segtok_posembed="sincos", torch_dtype="bfloat16")
TOWER = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
             image_size=28, patch_size=14)


def v15_tensors(seed=0, dtype=ml_dtypes.bfloat16, tower="model.vision_tower.vision_tower.vision_model."):
    """Tensors under the release's own names, which are written here once more, apart from the table under test."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (70, 48), "lm_head.weight": (70, 48), "model.norm.weight": (48,),
              "model.mm_projector.0.weight": (48, 32), "model.mm_projector.0.bias": (48,),
              "model.mm_projector.2.weight": (48, 48), "model.mm_projector.2.bias": (48,),
              **{f"{tower}{norm}.{leaf}": (32,) for norm in ("pre_layrnorm", "post_layernorm") for leaf in ("weight", "bias")},
              f"{tower}embeddings.class_embedding": (32,), f"{tower}embeddings.patch_embedding.weight": (32, 3, 14, 14),
              f"{tower}embeddings.position_embedding.weight": (5, 32)}
    for i in range(2):
        layer = f"model.layers.{i}."
        shapes |= {f"{layer}{norm}.weight": (48,) for norm in ("input_layernorm", "post_attention_layernorm")}
        shapes |= {f"{layer}self_attn.{p}_proj.weight": s for p, s in dict(q=(48, 48), k=(24, 48), v=(24, 48), o=(48, 48)).items()}
        shapes |= {f"{layer}mlp.{p}_proj.weight": s for p, s in dict(gate=(96, 48), up=(96, 48), down=(48, 96)).items()}
    for j in range(3):
        layer = f"{tower}encoder.layers.{j}."
        modules = {**{f"self_attn.{p}_proj": (32, 32) for p in ("q", "k", "v", "out")}, "mlp.fc1": (64, 32), "mlp.fc2": (32, 64)}
        shapes |= {f"{layer}{m}.weight": s for m, s in modules.items()} | {f"{layer}{m}.bias": s[:1] for m, s in modules.items()}
        shapes |= {f"{layer}layer_norm{n}.{leaf}": (32,) for n in (1, 2) for leaf in ("weight", "bias")}
    return {name: draw(rng, name, shape).astype(dtype) for name, shape in shapes.items()}


def draw(rng, name, shape):
    """Norm scales that are not 1, biases that are not 0, and kernels that keep activations, hence logits, at about 1."""
    values = rng.standard_normal(shape, np.float32)
    if len(shape) > 1:
        return values / math.prod(shape[1:]) ** 0.5
    return 1 + 0.3 * values if "norm" in name and name.endswith("weight") else 0.2 * values


def save(directory, config, tensors):
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture
def v15(tmp_path):
    """A directory in the release's layout, with the tower's own directory beside it for its shape."""
    save(tmp_path / "tiny-tower", TOWER, {})
    return save(tmp_path / "v15", V15, v15_tensors())


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert found[name].dtype == wanted[name].dtype, name
        assert found[name].shape == wanted[name].shape and found[name].tobytes() == wanted[name].tobytes(), name


def all_tensors(checkpoint):
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def shard_tensors(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


# --- the table ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "tensors"), [("v15-7b", 291 + 4 + 391), ("v1-7b", 325 - 32 + 391), ("v1-13b", 405 - 40 + 391)])
def test_the_table_has_the_tensors_of_the_releases(preset, tensors):
    """Counts of spec 2.1 (less one inv_freq buffer a layer) and 2.3."""
    assert len(names.specs(PRESETS[preset])) == tensors


@pytest.mark.parametrize("layout", ["llava", "transformers"])
@pytest.mark.parametrize("preset", PRESETS)
def test_names_are_one_to_one(preset, layout):
    spelled = names.torch_names(PRESETS[preset], layout)
    everything = [s for spellings in spelled.values() for s in spellings]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("change", [{}, {"projector_type": "linear"}, {"projector_type": "mlp3x_gelu"}, {"projector_type": "identity"},
                                    {"projector_bias": False}, {"feature_layer": -1}, {"feature_layer": 1}])
@pytest.mark.parametrize("tied", [False, True])
def test_expected_shapes_are_those_of_the_model(change, tied):
    text = {"hidden_size": 32} if change.get("projector_type") == "identity" else {}
    cfg = TINY.replace(decoder=DecoderConfig(**{**vars(TINY.decoder), **text, "tie_word_embeddings": tied}), **change)
    model = {name: leaf.shape for name, leaf in flatten(llava.abstract_params(cfg)).items()}
    assert names.expected_shapes(cfg) == model
    assert not set(names.unused_names(cfg)) & model.keys()


@pytest.mark.parametrize(("kind", "suffixes"), [
    ("linear", ["weight", "bias"]), ("mlp1x_gelu", ["0.weight", "0.bias"]), ("identity", []),
    ("mlp3x_gelu", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"])])
def test_projector_names_are_those_of_the_original(kind, suffixes):
    spelled = names.torch_names(TINY.replace(projector_type=kind), "llava")
    assert [s[0] for n, s in spelled.items() if n.startswith("projector/")] == [f"model.mm_projector.{s}" for s in suffixes]


@pytest.mark.parametrize(("name", "shape", "torch_shape"), [
    ("x/kernel", (2, 3), (3, 2)), ("x/kernel", (7, 5, 3, 4), (4, 3, 7, 5)), ("x/embedding", (2, 3), (2, 3)), ("x/scale", (2,), (2,))])
def test_orientation_goes_and_comes_back(name, shape, torch_shape):
    array = np.arange(math.prod(shape)).reshape(shape)
    assert names.torch_shape(name, shape) == names.to_torch(name, array).shape == torch_shape
    np.testing.assert_array_equal(names.from_torch(name, names.to_torch(name, array)), array)


# --- round trips -------------------------------------------------------------------------------------------------------------------


def test_original_to_ours_to_transformers_to_ours_to_original(v15, tmp_path):
    first = open_checkpoint(v15)
    write_model(tmp_path / "ours", first)
    export(open_checkpoint(tmp_path / "ours"), tmp_path / "hf", "transformers")
    write_model(tmp_path / "again", open_checkpoint(tmp_path / "hf"))
    export(open_checkpoint(tmp_path / "again"), tmp_path / "original", "llava")

    assert_same_bits(shard_tensors(tmp_path / "original"), v15_tensors())
    for directory in ("ours", "hf", "again", "original"):
        checkpoint = open_checkpoint(tmp_path / directory)
        assert checkpoint.config == first.config, directory
        assert_same_bits(all_tensors(checkpoint), all_tensors(first))
    exported = json.loads((tmp_path / "original" / "config.json").read_text())
    assert {key: exported[key] for key in V15} == V15


def test_transformers_to_ours_to_original_and_back(tmp_path):
    model, _ = hf.llava()
    model.save_pretrained(tmp_path / "hf")
    first = open_checkpoint(tmp_path / "hf")
    export(first, tmp_path / "original", "llava")
    assert json.loads((tmp_path / "original" / "config.json").read_text())["model_type"] == "llava_mistral"
    export(open_checkpoint(tmp_path / "original"), tmp_path / "again", "transformers")
    again = open_checkpoint(tmp_path / "again")
    assert_same_bits(all_tensors(again), all_tensors(first))
    assert (again.config.decoder, again.config.vision) == (first.config.decoder, first.config.vision)
    assert again.config.image_token_id == first.config.image_token_id == hf.IMAGE_ID  # the table has its own <image>: no rows added


def test_transformers_gives_back_what_transformers_wrote(tmp_path):
    model, _ = hf.llava("llama")
    model.save_pretrained(tmp_path / "hf")
    export(open_checkpoint(tmp_path / "hf"), tmp_path / "again")
    loaded, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_every_dtype_travels_as_it_is(dtype, tmp_path):
    save(tmp_path / "tiny-tower", TOWER, {})
    source = open_checkpoint(save(tmp_path / "in", V15, v15_tensors(dtype=dtype)))
    write_model(tmp_path / "tree", source)
    assert_same_bits(all_tensors(open_checkpoint(tmp_path / "tree")), all_tensors(source))
    assert {a.dtype for a in all_tensors(source).values()} == {np.dtype(dtype)}


def test_shards_and_index_hold_the_same_as_one_file(v15, tmp_path, monkeypatch):
    checkpoint = open_checkpoint(v15)
    export(checkpoint, tmp_path / "one", "llava")
    monkeypatch.setattr(writer, "SHARD_BYTES", 20_000)
    export(checkpoint, tmp_path / "many", "llava")
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = shard_tensors(tmp_path / "one")
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    for file in files:
        with safe_open(tmp_path / "many" / file, "np") as shard:
            names_there = list(shard.keys())
            assert {index["weight_map"][name] for name in names_there} == {file}
            assert len(names_there) == 1 or sum(tensors[name].nbytes for name in names_there) <= 20_000
    assert_same_bits(all_tensors(open_checkpoint(tmp_path / "many")), all_tensors(checkpoint))


# --- transformers ------------------------------------------------------------------------------------------------------------------


def spelled(prefixes):
    """A tiny transformers model's tensors under another generation of key names."""
    def rename(name):
        name = name.removeprefix("model.")
        for part, prefix in prefixes.items():
            if name.startswith(part):
                return prefix + name[len(part):]
        return name
    return rename


@pytest.mark.parametrize("prefixes", [
    {"language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "vision_tower.": "vision_tower.vision_model."},
    {"language_model.": "model.language_model.", "vision_tower.": "model.vision_tower.vision_model.",
     "multi_modal_projector.": "model.multi_modal_projector."},
    {"language_model.": "model.language_model.", "vision_tower.": "model.vision_tower.",
     "multi_modal_projector.": "model.multi_modal_projector."},
], ids=["up to 4.51", "4.52 on", "5 in memory"])
def test_every_generation_of_transformers_names_is_read(prefixes, tmp_path):
    model, cfg = hf.llava()
    rename = spelled(prefixes)
    tensors = {rename(n): t.detach().numpy() for n, t in model.state_dict().items()}
    save(tmp_path / "hf", model.config.to_dict(), tensors)
    found = load_params(open_checkpoint(tmp_path / "hf"))
    found, wanted = flatten(found), flatten(hf.params_of(model))
    assert found.keys() == wanted.keys() - set(names.unused_names(cfg))
    for name, array in found.items():
        np.testing.assert_array_equal(array, wanted[name], name)


def test_what_save_pretrained_writes_is_read_and_gives_the_same_logits(tmp_path):
    model, cfg = hf.llava()
    model.save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.config.replace(extra="{}") == cfg.replace(extra="{}")
    ids = image_row(cfg, [1, 5], [7, 9, 11, 40])
    pixels = hf.images(1)
    logits = jax.jit(llava.Llava(cfg).apply)({"params": load_params(checkpoint)}, ids, pixels[None])
    np.testing.assert_allclose(logits, hf.torch_logits(model, ids, pixels), atol=2e-5, rtol=0)


def image_row(cfg, before, after):
    return np.array([before + [IMAGE_TOKEN] * cfg.tokens_per_image + after], np.int32)


@pytest.mark.parametrize("source", ["released", "random"])
def test_the_export_loads_in_transformers_and_gives_the_same_logits(source, v15, tmp_path):
    if source == "released":
        checkpoint = open_checkpoint(v15).cast(np.float32)
    else:
        checkpoint = random_checkpoint(TINY.replace(feature_select="cls_patch", feature_layer=-1, image_aspect_ratio="square"), seed=4)
    cfg = checkpoint.config
    export(checkpoint, tmp_path / "hf", "transformers")
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, attn_implementation="eager")
    assert not any(info.values()), info
    assert model.config.text_config.vocab_size == 128 and model.config.image_token_index == 70

    ids, pixels = image_row(cfg, [1, 5], [7, 9, 69, 2]), hf.images(1)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(np.where(ids == IMAGE_TOKEN, 70, ids)),
                              pixel_values=torch.tensor(pixels).permute(0, 3, 1, 2)).logits.numpy()
    ours = np.asarray(jax.jit(llava.Llava(cfg).apply)({"params": load_params(checkpoint)}, ids, pixels[None]))
    assert 0.5 < ours.std() < 2
    np.testing.assert_allclose(theirs[..., :70], ours, atol=2e-5, rtol=0)


def test_added_rows_are_the_mean_and_go_again(v15, tmp_path):
    checkpoint = open_checkpoint(v15)
    export(checkpoint, tmp_path / "hf")
    table = shard_tensors(tmp_path / "hf")["language_model.model.embed_tokens.weight"]
    assert table.shape == (128, 48)
    mean = checkpoint.read("decoder/embed_tokens/embedding").mean(0, dtype=np.float32).astype(table.dtype)
    np.testing.assert_array_equal(table[70:], np.broadcast_to(mean, (58, 48)))
    assert open_checkpoint(tmp_path / "hf").config.decoder.vocab_size == 70


def test_rows_that_a_user_added_after_the_export_are_kept(v15, tmp_path):
    export(open_checkpoint(v15), tmp_path / "hf")
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    model.resize_token_embeddings(192)
    model.save_pretrained(tmp_path / "resized")
    config = open_checkpoint(tmp_path / "resized").config
    assert (config.decoder.vocab_size, config.image_token_id) == (192, 70)


def test_a_stock_checkpoint_keeps_its_rows():
    stock = {"model_type": "llava", "image_token_index": 32000, "pad_token_id": 32001, "vision_config": {},
             "text_config": {"model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5}}
    cfg = LlavaConfig.from_hf(stock)
    assert (cfg.decoder.vocab_size, cfg.transformers_vocab_size, cfg.image_token_id) == (32064, 32064, 32000)
    assert LlavaConfig.from_hf(cfg.to_hf("transformers")) == cfg


def test_tied_head(tmp_path):
    model, cfg = hf.llava(text={"tie_word_embeddings": True})
    model.save_pretrained(tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert "decoder/lm_head/kernel" not in checkpoint.tensors
    export(checkpoint, tmp_path / "again")
    _, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(info.values()), info


def test_the_exports_processor_expands_an_image_for_the_exports_model(mistral_tokenizer, tmp_path):
    cfg = TINY.replace(decoder=DecoderConfig(**{**vars(TINY.decoder), "vocab_size": 32000}))
    checkpoint = random_checkpoint(cfg).replace(files={"tokenizer.model": mistral_tokenizer})
    export(checkpoint, tmp_path / "hf")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "hf")
    assert processor.tokenizer.convert_tokens_to_ids(["<image>", "<pad>"]) == [32000, 32001]
    picture = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    batch = processor(text="[INST] <image>\nWhat is this? [/INST]", images=[picture], return_tensors="pt")
    ids = batch["input_ids"][0].tolist()
    assert ids[:5] == [1, 733, 16289, 28793, 28705] and ids.count(32000) == cfg.tokens_per_image
    model = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "hf")
    assert model(**batch).logits.shape == (1, len(ids), 32064)

    again = open_checkpoint(tmp_path / "hf")  # has the tokenizer as it was before
    assert again.config.decoder.vocab_size == 32000
    assert {n: f.read_bytes() for n, f in again.files.items()} == {"tokenizer.model": mistral_tokenizer.read_bytes()}


# --- loading -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_load_params_has_the_form_of_the_model(scan):
    checkpoint = random_checkpoint(TINY)
    params = load_params(checkpoint, scan=scan)
    wanted = llava.abstract_params(TINY, scan)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    if scan:
        jax.tree.map(np.testing.assert_array_equal, params, llava.stack(load_params(checkpoint)))
    assert {a.dtype for a in jax.tree.leaves(load_params(checkpoint, ml_dtypes.bfloat16, scan))} == {np.dtype(ml_dtypes.bfloat16)}


def test_random_weights_depend_on_the_seed_alone():
    one, same, other = (all_tensors(open_checkpoint("preset:small", seed=s)) for s in (1, 1, 2))
    assert_same_bits(one, same)
    assert not np.array_equal(one["decoder/lm_head/kernel"], other["decoder/lm_head/kernel"])
    assert not np.array_equal(one["decoder/layers_0/mlp/up_proj/kernel"], one["decoder/layers_1/mlp/up_proj/kernel"])
    assert (one["decoder/norm/scale"] == 1).all() and (one["projector/linear_0/bias"] == 0).all()


def test_random_weights_keep_activations_in_size():
    checkpoint = open_checkpoint("preset:small")
    ids = np.random.default_rng(0).integers(3, 1024, (2, 24), np.int32)
    logits = jax.jit(llava.Llava(checkpoint.config).apply)({"params": load_params(checkpoint)}, ids)
    assert 0.5 < float(jnp.std(logits)) < 2


# --- the tower ---------------------------------------------------------------------------------------------------------------------


def without_tower(tensors):
    return {name: t for name, t in tensors.items() if "vision_tower" not in name}


@pytest.mark.parametrize("place", ["inside", "beside", "absolute", "argument"])
def test_a_tower_in_its_own_directory(place, tmp_path):
    tensors = v15_tensors()
    where = {"inside": tmp_path / "v1" / "tiny-tower", "beside": tmp_path / "tiny-tower"}.get(place, tmp_path / "far" / "clip")
    save(where, TOWER, v15_tensors(tower="vision_model."))  # a whole v1.5 file would have other tensors: only the tower's stay
    clip = {n: t for n, t in v15_tensors(tower="vision_model.").items() if n.startswith("vision_model.")}
    text_half = {"text_model.final_layer_norm.weight": np.ones(4, np.float32), "logit_scale": np.ones(1, np.float32)}
    save(where, {"model_type": "clip", "vision_config": TOWER}, {**clip, **text_half})
    config = {**V15, "mm_vision_tower": str(where) if place == "absolute" else V15["mm_vision_tower"]}
    directory = save(tmp_path / "v1", config, without_tower(tensors))
    checkpoint = open_checkpoint(directory, where if place == "argument" else None)
    assert str(where) in checkpoint.tower
    inside = open_checkpoint(save(tmp_path / "in", V15, tensors), None if place == "beside" else where)
    assert_same_bits(all_tensors(checkpoint), all_tensors(inside))


def test_the_argument_goes_before_the_tensors_in_the_checkpoint(v15, tmp_path):
    other = {n: t for n, t in v15_tensors(7, tower="").items() if n.startswith(("embeddings", "encoder", "pre_", "post_l"))}
    save(tmp_path / "other", TOWER, other)
    write_model(tmp_path / "tree", open_checkpoint(v15))
    for path in (v15, tmp_path / "tree"):
        own, chosen = open_checkpoint(path), open_checkpoint(path, tmp_path / "other")
        np.testing.assert_array_equal(chosen.read("vision_tower/pre_layrnorm/scale"), other["pre_layrnorm.weight"])
        assert not np.array_equal(own.read("vision_tower/pre_layrnorm/scale"), other["pre_layrnorm.weight"])
        np.testing.assert_array_equal(own.read("projector/linear_0/kernel"), chosen.read("projector/linear_0/kernel"))
        assert own.tower != chosen.tower


def test_no_tower_anywhere_asks_for_one(tmp_path):
    known = {**V15, "mm_vision_tower": "openai/clip-vit-large-patch14-336"}
    directory = save(tmp_path / "in", known, without_tower(v15_tensors()))
    with pytest.raises(UserError, match="clip-vit-large-patch14-336.*vision_tower=PATH"):
        open_checkpoint(directory)
    with pytest.raises(UserError, match="'openai/tiny-tower', which lies neither inside nor beside.*vision_tower=PATH"):
        open_checkpoint(save(tmp_path / "in", V15, without_tower(v15_tensors())))


def test_a_v1_export_keeps_its_tower_in_a_directory(tmp_path):
    cfg = TINY.replace(source="llava", projector_type="linear", use_start_end=True)
    checkpoint = random_checkpoint(cfg)
    export(checkpoint, tmp_path / "v1", "llava")
    assert not any("vision_tower" in name for name in load_file(tmp_path / "v1" / "model.safetensors"))
    again = open_checkpoint(tmp_path / "v1")
    assert_same_bits(all_tensors(again), all_tensors(checkpoint))
    assert again.config.projector_type == "linear" and again.config.use_start_end
    _, info = transformers.CLIPVisionModel.from_pretrained(tmp_path / "v1" / "vision_tower", output_loading_info=True)
    assert not any(info.values()), info


def test_the_config_is_read_without_weights(v15, tmp_path):
    whole = open_checkpoint(v15).config
    write_model(tmp_path / "tree", open_checkpoint(v15))
    for file in [*v15.glob("*.safetensors"), *(tmp_path / "tree" / "base").iterdir()]:
        file.unlink()
    assert read_config(v15) == read_config(tmp_path / "tree") == whole
    assert read_config("preset:small") == PRESETS["small"]


# --- strictness and bad input ------------------------------------------------------------------------------------------------------


def edited(directory, **changes):
    """Rewrites a checkpoint's file: name=None drops a tensor, name=array sets it."""
    tensors = load_file(directory / "model.safetensors")
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_one_error_lists_what_is_missing_unexpected_and_misshapen(v15):
    edited(v15, **{"model.norm.weight": None, "model.image_newline": np.zeros(48, np.float32),
                   "model.layers.1.self_attn.k_proj.weight": np.zeros((48, 48), np.float32)})
    with pytest.raises(UserError) as error:
        open_checkpoint(v15)
    text = str(error.value)
    assert "1 tensor missing: model.norm.weight [48]" in text
    assert "1 tensor unexpected: model.image_newline [48]" in text
    assert "1 tensor misshapen: model.layers.1.self_attn.k_proj.weight is [48, 48] where [24, 48] was expected" in text


def test_a_long_list_is_cut_with_its_count(v15):
    edited(v15, **{n: None for n in v15_tensors() if ".layers.0." in n})
    with pytest.raises(UserError, match=r"25 tensors missing: (?:[^,]+ \[[^]]*\], ){7}[^,]+ \[[^]]*\] and 17 more"):
        open_checkpoint(v15)


def test_buffers_are_ignored_by_name_and_nothing_else_is(v15):
    edited(v15, **{"model.layers.0.self_attn.rotary_emb.inv_freq": np.zeros(6, np.float32),
                   "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": np.arange(5)[None]})
    assert len(open_checkpoint(v15).tensors) == len(names.specs(open_checkpoint(v15).config))
    edited(v15, **{"model.layers.0.self_attn.rotary_emb.scale": np.zeros(6, np.float32)})
    with pytest.raises(UserError, match="unexpected: model.layers.0.self_attn.rotary_emb.scale"):
        open_checkpoint(v15)


def test_two_spellings_of_one_tensor_are_one_too_many(tmp_path):
    model, _ = hf.llava()
    model.save_pretrained(tmp_path / "hf")
    edited(tmp_path / "hf", **{"lm_head.weight": np.zeros((96, 64), np.float32)})
    with pytest.raises(UserError, match="1 tensor unexpected"):
        open_checkpoint(tmp_path / "hf")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


BAD_INPUT = {
    "no directory": (shutil.rmtree, "is no directory"),
    "no config": (lambda d: (d / "config.json").unlink(), "holds no config.json"),
    "config is no JSON": (lambda d: (d / "config.json").write_text("{"), "config.json is no JSON"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), "holds a JSON list; an object"),
    "other architecture": (lambda d: (d / "config.json").write_text('{"model_type": "bert"}'), "model_type 'bert'; llava_mistral"),
    "no weights": (lambda d: (d / "model.safetensors").unlink(), "no weights; .safetensors or pytorch_model"),
    "bin": (lambda d: (d / "model.safetensors").rename(d / "pytorch_model.bin"), "pytorch_model.bin is no whole file of torch.save"),
    "truncated": (lambda d: truncate(d / "model.safetensors"), "model.safetensors is no whole safetensors file"),
    "integer weights": (lambda d: edited(d, **{"model.norm.weight": np.zeros(48, np.int32)}), "model.norm.weight in .* is of type I32"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_sentence(case, v15):
    damage, sentence = BAD_INPUT[case]
    damage(v15)
    with pytest.raises(UserError, match=sentence) as error:
        open_checkpoint(v15)
    assert "\n" not in str(error.value)


def test_a_missing_shard_and_an_index_that_is_wrong(v15, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SHARD_BYTES", 50_000)
    export(open_checkpoint(v15), tmp_path / "many", "llava")
    shutil.copytree(tmp_path / "many", tmp_path / "wrong")
    shards = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    (tmp_path / "many" / shards[1]).unlink()
    with pytest.raises(UserError, match=f"the shard .*{shards[1]} is missing"):
        open_checkpoint(tmp_path / "many")
    file = tmp_path / "wrong" / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    index["weight_map"]["model.ghost"] = shards[0]
    file.write_text(json.dumps(index))
    with pytest.raises(UserError, match="holds model.ghost, which it does not"):
        open_checkpoint(tmp_path / "wrong")


@pytest.mark.parametrize("path", ["preset:huge", "someone/some-model", "nowhere/at/all"])
def test_paths_that_mean_nothing(path):
    with pytest.raises(UserError, match="expected|HF_HUB_OFFLINE is set"):
        open_checkpoint(path)


def test_a_failed_export_leaves_nothing(v15, tmp_path):
    checkpoint = open_checkpoint(v15)

    def fail(names_):
        yield from names_[:20]
        raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError):
        export(checkpoint, tmp_path / "out", "llava", fail)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-tower", "v15"]


def test_an_export_does_not_overwrite_and_a_linear_projector_does_not_fit_transformers(v15, tmp_path):
    checkpoint = open_checkpoint(v15)
    with pytest.raises(UserError, match="exists and is not empty"):
        export(checkpoint, v15, "llava")
    (tmp_path / "empty").mkdir()
    export(checkpoint, tmp_path / "empty", "llava")
    with pytest.raises(UserError, match="two-layer projectors only.*--layout llava"):
        export(random_checkpoint(TINY.replace(projector_type="linear")), tmp_path / "linear", "transformers")
    assert not (tmp_path / "linear").exists()
