"""Exports of few bits: what is written, read back, refused, and matched by vLLM's rule."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import llavamed_jax as lm
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.export.few_bits import Rounding
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.torch import compressed
from llavamed_jax.cli import convert
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.errors import UserError
from llavamed_jax.quantized import packing, rounding
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.quantized.rounding import ROUNDED

CONFIG = LlavaConfig(VisionConfig(32, 64, 2, 2, 28, 14), DecoderConfig(
    vocab_size=70, hidden_size=64, intermediate_size=192, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, rms_norm_eps=1e-5,
    rope_theta=1e4, max_position_embeddings=512, architecture="mistral"), source="llava_mistral")


def checkpoint_of(dtype=np.float32, **decoder):
    cfg = CONFIG.replace(decoder=DecoderConfig(**{**vars(CONFIG.decoder), **decoder}))
    return random_checkpoint(cfg, seed=3).cast(dtype)


def exported(out, how, dtype=np.float32, **decoder):
    checkpoint = checkpoint_of(dtype, **decoder)
    return checkpoint, export(checkpoint, out, rounding=Rounding.of(checkpoint, how)), out


def kernels_of(params):
    return {name: x for name, x in flatten_dict(params, sep="/").items() if isinstance(x, Kernel)}


def assert_same(one, other):
    assert one.keys() == other.keys() and len(one) == 14
    for name in one:
        for a, b in zip(jax.tree.leaves(one[name]), jax.tree.leaves(other[name]), strict=True):
            assert a.dtype == b.dtype and np.array_equal(a, b), name


@pytest.mark.parametrize("bits", [4, 8])
def test_packing(bits):
    rng = np.random.default_rng(0)
    for count in (1, 7, 8, 31, 64, 65):
        values = rng.integers(-2**(bits - 1), 2**(bits - 1), (3, count)).astype(np.int8)
        packed = packing.pack(values, bits)
        assert packed.shape == (3, packing.words(count, bits)) and packed.dtype == np.int32
        assert np.array_equal(packing.unpack(packed, bits, count), values)
        for i in (0, count // 2, count - 1):  # value i lies in bits i b … of the row
            word = packed.view(np.uint32)[1, i * bits // 32] >> (i * bits % 32) & (2**bits - 1)
            assert word == int(values[1, i]) + 2**(bits - 1)


@pytest.mark.parametrize("how", ["int4", "int8"])
def test_what_is_exported_is_read_back_with_the_same_bits(how, tmp_path):
    """float32: nothing is rounded twice."""
    checkpoint, written, out = exported(tmp_path / "hf", how)
    wanted = kernels_of(load_params(checkpoint, quantize=how))
    if how == "int4":  # without zeros, unlike the rounding of loading
        wanted = {name: rounding.int4(checkpoint.read(name), is_symmetric=True) for name in wanted}
    again = open_checkpoint(out)
    assert again.few_bits == how and again.config.replace(extra="{}") == checkpoint.config.replace(extra="{}")
    assert_same(kernels_of(load_params(again, np.float32, as_stored=True)), wanted)
    widened = load_params(again)
    assert not kernels_of(widened)
    for name, x in flatten_dict(widened, sep="/").items():
        value = np.asarray(wanted[name].widened(jnp.float32)) if name in wanted else checkpoint.read(name)
        assert np.array_equal(x, value), name
    tensors = load_file(out / "model.safetensors")
    assert tensors.keys() == written.keys() and all(tensors[n].shape == t.shape and tensors[n].dtype == t.dtype for n, t in written.items())
    assert sum(name.endswith("_proj.weight_packed") for name in tensors) == 14


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_scales_have_the_models_dtype(dtype, tmp_path):
    checkpoint, _, out = exported(tmp_path / "hf", "int4", dtype)
    again, stored = open_checkpoint(out), kernels_of(load_params(open_checkpoint(out), as_stored=True))
    for name, kernel in stored.items():
        assert np.array_equal(kernel.scales, kernel.scales.astype(dtype).astype(np.float32)) and (kernel.scales > 0).all()
        assert again.tensors[name].dtype == dtype and np.array_equal(again.read(name), np.asarray(kernel.widened(dtype)))
        assert_equal_kernels(kernel, rounding.int4(checkpoint.read(name), 64, True, dtype))
        exact = rounding.int4(checkpoint.read(name), 64, True)
        assert np.abs(exact.scales - kernel.scales).max() > 0 and (exact.values != kernel.values).mean() < 0.2


def test_small_kernels_in_float16_do_not_vanish():
    kernel = np.full((64, 2), 6e-8, np.float32) * np.arange(1, 65, dtype=np.float32)[:, None]
    for rounded in (rounding.int4(kernel, dtype=np.float16), rounding.int4(kernel, None, True, np.float16),
                    rounding.int8(kernel, np.float16)):
        assert np.abs(np.asarray(rounded.widened(np.float32)) - kernel).max() <= 0.1 * kernel.max()


def matches(name, targets):
    """vLLM's rule: a whole name, or a regular expression from the name's beginning after `re:`."""
    return any(re.match(target[3:], name) is not None if target.startswith("re:") else target == name for target in targets)


@pytest.mark.parametrize("tied", [False, True])
def test_vllm_quantises_the_decoders_projections_and_nothing_else(tied, tmp_path):
    _, written, out = exported(tmp_path / "hf", "int8", tie_word_embeddings=tied)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert group["targets"] == ["Linear"] and config["format"] == "pack-quantized" and group["weights"]["group_size"] is None
    modules = {name.rpartition(".")[0] for name in written}
    quantised = {name.rpartition(".")[0] for name in written if name.endswith(".weight_packed")}
    assert {m for m in modules if m.endswith("_proj") and "language_model" in m and "vision" not in m} == quantised
    assert len(quantised) == 14 and not any(matches(m, config["ignore"]) for m in quantised)
    linear = {m for m in modules if f"{m}.weight" in written and written[f"{m}.weight"].shape[1:] and "embed" not in m}
    assert linear and all(matches(m, config["ignore"]) for m in linear)  # each plain matrix of a linear layer
    assert all(matches(m.replace("language_model.model.", "model.language_model."), config["ignore"]) for m in linear)
    assert not any(matches("vision_tower.vision_model.encoder.layers.0.mlp.fc1", [bare]) for bare in ("vision_tower", "lm_head"))


def test_the_command_and_the_model_card(tmp_path, capsys):
    out = tmp_path / "hf"
    source = tmp_path / "source"
    export(checkpoint_of(), source)
    assert convert.main(["export", "--checkpoint", str(source), "--layout", "transformers", "--quantize", "int4", "--dtype", "bfloat16",
                         "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    assert "int4 (symmetric groups of 64 inputs)" in card and "compressed-tensors" in card
    rounded, exact = open_checkpoint(out), open_checkpoint(source)
    for name in filter(ROUNDED.fullmatch, exact.tensors):
        stored, wanted = rounded.tensors[name].few_bits.load(), exact.read(name)  # from float32, not from bfloat16
        assert_equal_kernels(stored, rounding.int4(wanted, 64, True, ml_dtypes.bfloat16))
    assert convert.main(["inspect", str(out)]) == 0 and "few bits      int4, in compressed-tensors' format" in capsys.readouterr().out
    assert rounded.tensors["decoder/norm/scale"].dtype == ml_dtypes.bfloat16
    model = lm.load(out, dtype="float32")
    assert model.describe()["quantize"] == "int4" and "warning" not in capsys.readouterr().err


def assert_equal_kernels(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert np.array_equal(a, b)


def test_one_width_of_groups_for_the_whole_model(tmp_path):
    """Readers take the width from a setting of the whole model: 64 here, where loading takes 128 for some kernels."""
    checkpoint, _, out = exported(tmp_path / "hf", "int4", hidden_size=128, num_heads=8)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]["weights"]["group_size"] == 64
    stored = kernels_of(load_params(open_checkpoint(out), as_stored=True))
    assert_same(stored, {name: rounding.int4(checkpoint.read(name), 64, True) for name in stored})


@pytest.mark.parametrize("how", ["int4", "int8"])
def test_others_write_what_is_read(how, tmp_path):
    """int4 with zeros, in words that end in the middle of a column; and one group for a whole row."""
    checkpoint, _, out = exported(tmp_path / "hf", how, num_heads=8, num_kv_heads=1, head_dim=20)
    tensors, zeros = load_file(out / "model.safetensors"), {}
    if how == "int4":
        for name in [name for name in tensors if name.endswith("down_proj.weight_scale")]:
            tensors[name] = tensors[name][:, :1].copy()
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            zeros[name[:-6]] = np.random.default_rng(0).integers(-8, 8, tensors[name].T.shape).astype(np.int8)
            tensors[f"{name[:-6]}_zero_point"] = packing.pack(zeros[name[:-6]], 4).T.copy()
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    again = open_checkpoint(out)
    for name in filter(ROUNDED.fullmatch, again.tensors):
        kernel = again.tensors[name].few_bits.load()
        weight = name.replace("decoder/layers_", "language_model.model.layers.").replace("/kernel", "/weight").replace("/", ".")
        values = packing.unpack(tensors[f"{weight}_packed"], compressed.BITS[how], len(checkpoint.read(name))).T.astype(np.float32)
        whole = lambda by_group, values=values: np.repeat(by_group, len(values) // len(by_group), axis=0)
        values -= whole(zeros[weight]) if zeros else 0
        assert how == "int8" or np.array_equal(kernel.zeros, zeros[weight])
        assert np.array_equal(again.read(name), values * whole(tensors[f"{weight}_scale"].T)), name


def test_preflight_counts_the_kernels_that_the_files_have(tmp_path):
    from llavamed_jax.preflight import programs
    _, _, out = exported(tmp_path / "hf", "int8")
    assert programs.few_bits_of(str(out), None) == "int8" and programs.few_bits_of("preset:v15-7b", "nf4") == "nf4"
    with pytest.raises(UserError, match="is quantised already"):
        programs.few_bits_of(str(out), "int4")


def test_bad_input_is_one_sentence(tmp_path, capsys):
    checkpoint, _, out = exported(tmp_path / "hf", "int4")
    for flags, sentence in (
            (["--layout", "transformers", "--quantize", "int4"], "is quantised already (int4, in compressed-tensors' format)"),
            (["--layout", "transformers", "--quantize", "nf4"], "quantize is 'nf4'; int4 or int8, of which compressed-tensors has a format"),
            (["--layout", "llava", "--quantize", "int4"], "the layout llava has no place for kernels of few bits")):
        source = out
        if "llava" in flags:
            export(checkpoint, source := tmp_path / "plain")
        assert convert.main(["export", "--checkpoint", str(source), *flags, "--out", str(tmp_path / "none")]) in (1, 2)
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1 and not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="is quantised already"):
        lm.load(out, quantize="int8")
    with pytest.raises(UserError, match="is quantised already"):
        load_params(open_checkpoint(out), quantize="nf4", scan=True)
    with pytest.raises(UserError, match="none of them divides the width 80"):
        Rounding.of(checkpoint_of(intermediate_size=80), "int4")
    assert Rounding.of(checkpoint_of(intermediate_size=80), "int8").group is None


def test_damaged_or_other_files_are_refused_by_name(tmp_path):
    _, _, out = exported(tmp_path / "hf", "int4")
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    key = next(name for name in tensors if name.endswith("k_proj.weight_packed"))
    start = key.removesuffix("weight_packed")
    said = config["quantization_config"]
    asymmetric = {"group_0": {**said["config_groups"]["group_0"], "input_activations": {"num_bits": 8}}}
    cases = [
        (None, {f"{start}weight_scale": None}, "lacks .*weight_scale, which cannot be read"),
        (None, {f"{start}weight_shape": None}, "lacks .*weight_shape"),
        (None, {f"{start}weight_shape": np.array([32, 99])}, r"weight of \[32, 99\] as compressed-tensors'"),
        (None, {f"{start}weight_shape": np.array([32])}, "two sizes were expected"),
        (None, {f"{start}weight_scale": tensors[f"{start}weight_scale"][:3].copy()}, "int4 in groups of inputs, or int8"),
        (None, {f"{start}weight_scale": tensors[f"{start}weight_scale"] * np.nan}, "has scales with 32 NaN among 32 values"),
        (None, {f"{start}weight": np.zeros((32, 64), np.float32)}, "beside it"),
        (None, {f"{start}weight_g_idx": np.zeros(64, np.float32)}, "orders its groups by activations"),
        (None, {f"{start}weight_zero_point": np.zeros((32, 1), np.int32)}, "int4 in groups of inputs, or int8"),
        (None, {key: tensors[key].astype(np.float32)}, "is of type F32; one of I32, I64 was expected"),
        ({"quantization_config": None}, {}, "holds packed kernels"),
        ({"quantization_config": {**said, "quant_method": "gptq"}}, {}, "holds packed kernels"),
        ({"quantization_config": {**said, "format": "float-quantized"}}, {}, "the format 'float-quantized' of compressed-tensors"),
        ({"quantization_config": {**said, "config_groups": asymmetric}}, {}, "activations that are not quantised were expected"),
    ]
    for number, (change, changed, sentence) in enumerate(cases):
        directory = tmp_path / str(number)
        shutil.copytree(out, directory)
        (directory / "config.json").write_text(json.dumps({**config, **(change or {})}))
        save_file({n: x for n, x in {**tensors, **changed}.items() if x is not None}, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=sentence):
            load_params(open_checkpoint(directory), as_stored=True)


def test_an_export_of_few_bits_becomes_a_plain_model_again(tmp_path, capsys):
    """Import and plain export widen the kernels, say so, and claim no format that the result does not have."""
    _, _, out = exported(tmp_path / "hf", "int4")
    export(open_checkpoint(out), tmp_path / "plain")
    assert "14 kernels of few bits were widened to float32" in capsys.readouterr().err
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert convert.main(["import", "--checkpoint", str(out), "--out", str(tmp_path / "tree")]) == 0
    assert "14 kernels of few bits were widened to float32" in capsys.readouterr().err
    rounded, plain, tree = open_checkpoint(out), open_checkpoint(tmp_path / "plain"), open_checkpoint(tmp_path / "tree")
    assert plain.few_bits is tree.few_bits is None
    assert all(np.array_equal(rounded.read(n), plain.read(n)) and np.array_equal(plain.read(n), tree.read(n)) for n in rounded.tensors)
