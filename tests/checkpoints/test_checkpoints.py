"""Weights in and out: the table of names, round trips to the bit, loading, and whose vision tower it is."""

import json
import math

import ml_dtypes
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
transformers = pytest.importorskip("transformers")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402
from safetensors import safe_open  # noqa: E402
from safetensors.numpy import load_file  # noqa: E402

from llavamed_jax.checkpoints import names  # noqa: E402
from llavamed_jax.checkpoints.export.directory import export  # noqa: E402
from llavamed_jax.checkpoints.load import load_params  # noqa: E402
from llavamed_jax.checkpoints.model_config import read_config  # noqa: E402
from llavamed_jax.checkpoints.open import open_checkpoint  # noqa: E402
from llavamed_jax.checkpoints.random import random_checkpoint  # noqa: E402
from llavamed_jax.checkpoints.torch import write  # noqa: E402
from llavamed_jax.checkpoints.tree.model import write_model  # noqa: E402
from llavamed_jax.config import PRESETS, DecoderConfig  # noqa: E402
from llavamed_jax.errors import UserError  # noqa: E402
from llavamed_jax.models import llava  # noqa: E402
from llavamed_jax.models.stacking import stack  # noqa: E402
from tests.support import hf, released  # noqa: E402
from tests.support.released import TINY, TOWER, V15, all_tensors, assert_same_bits, save, shard_tensors, v15_tensors  # noqa: E402


@pytest.fixture
def v15(tmp_path):
    return released.save_v15(tmp_path)


# --- the table ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("preset", "tensors"), [("v15-7b", 291 + 4 + 391), ("v1-7b", 325 - 32 + 391), ("v1-13b", 405 - 40 + 391)])
def test_the_table_has_the_tensors_of_the_releases(preset, tensors):
    """As counted in the released files: v1.0's less one inv_freq buffer a layer, and v1.5's."""
    assert len(names.specs(PRESETS[preset])) == tensors


@pytest.mark.parametrize("layout", ["llava", "transformers"])
@pytest.mark.parametrize("preset", PRESETS)
def test_names_are_one_to_one(preset, layout):
    spelled = names.torch_names(PRESETS[preset], layout)
    everything = [s for spellings in spelled.values() for s in spellings]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize("change, tied", [
    ({}, False), ({}, True), ({"projector_type": "linear"}, False), ({"projector_type": "mlp3x_gelu"}, False),
    ({"projector_type": "identity"}, False), ({"projector_bias": False}, False), ({"feature_layer": -1}, True), ({"feature_layer": 1}, False)])
def test_expected_shapes_are_those_of_the_model(change, tied):
    text = {"hidden_size": 32} if change.get("projector_type") == "identity" else {}
    cfg = TINY.replace(decoder=DecoderConfig(**{**vars(TINY.decoder), **text, "tie_word_embeddings": tied}), **change)
    model = {name: leaf.shape for name, leaf in flatten_dict(llava.abstract_params(cfg), sep="/").items()}
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
    monkeypatch.setattr(write, "SHARD_BYTES", 20_000)
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


# --- loading -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_load_params_has_the_form_of_the_model(scan):
    checkpoint = random_checkpoint(TINY)
    params = load_params(checkpoint, scan=scan)
    wanted = llava.abstract_params(TINY, scan)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, wanted)
    if scan:
        jax.tree.map(np.testing.assert_array_equal, params, stack(load_params(checkpoint)))
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
