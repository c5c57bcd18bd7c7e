"""A whole model with kernels of few bits: which are rounded, that nothing else changes, meshes, adapters, commands."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import llavamed_jax as lm
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.config import QUANTIZED
from llavamed_jax.errors import UserError
from llavamed_jax.models.llava import Llava
from llavamed_jax.models.stacking import unstack
from llavamed_jax.quantized.kernels import Kernel
from llavamed_jax.quantized.rounding import ROUNDINGS
from tests.support.training_runs import write_start

IDS = np.arange(3, 27, dtype=np.int32)[None]


@functools.cache
def forward(config, scan=False):
    """The jitted model: (parameters by path, ids) -> logits."""
    apply = jax.jit(Llava(config, scan=scan).apply)
    return lambda flat: np.asarray(apply({"params": unflatten_dict(flat, sep="/")}, IDS))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A model with widths that groups divide."""
    return write_start(tmp_path_factory.mktemp("quantized") / "model", (32, 64, 2, 2, 16, 8), (64, 128, 2, 4, 2, 16))


@pytest.mark.parametrize("name", ROUNDINGS)
def test_the_decoders_kernels_and_nothing_else_are_rounded(path, name):
    """Equal bit for bit to the model whose kernels are widened beforehand, in float32; the difference is that of rounding."""
    checkpoint = open_checkpoint(path)
    exact, rounded = (flatten_dict(load_params(checkpoint, np.float32, quantize=how), sep="/") for how in (None, name))
    is_rounded = {key for key, x in rounded.items() if isinstance(x, Kernel)}
    assert is_rounded == {key for key in exact if key.startswith("decoder/layers_") and key.endswith("/kernel")} and len(is_rounded) == 14
    assert all(np.array_equal(rounded[key], exact[key]) for key in exact if key not in is_rounded)
    widened = {key: np.asarray(x.widened(jnp.float32)) if key in is_rounded else x for key, x in rounded.items()}
    with jax.default_matmul_precision("highest"):
        ours, wide, plain = map(forward(checkpoint.config), (rounded, widened, exact))
    np.testing.assert_allclose(ours, wide, atol=2e-5)
    error = np.abs(ours - plain).max() / np.abs(plain).max()
    assert 1e-4 < error < {"int8": 0.03, "int4": 0.4, "nf4": 0.4}[name]


def test_rounding_is_of_the_files_values_and_not_of_the_cast_ones(path):
    """bfloat16 first and int4 then would round twice."""
    checkpoint = open_checkpoint(path)
    one, two = (flatten_dict(load_params(checkpoint, dtype, quantize="int4"), sep="/") for dtype in (np.float32, jnp.bfloat16))
    name = "decoder/layers_1/mlp/up_proj/kernel"
    np.testing.assert_array_equal(np.asarray(one[name].values).astype(int), np.asarray(two[name].values).astype(int))
    np.testing.assert_array_equal(one[name].scales, two[name].scales)
    assert two["decoder/embed_tokens/embedding"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", ROUNDINGS)
def test_stacked_layers_are_rounded_one_by_one(path, name):
    checkpoint = open_checkpoint(path)
    stacked, single = (flatten_dict(load_params(checkpoint, np.float32, scan, quantize=name), sep="/") for scan in (True, False))
    for key, kernel in unstack(stacked).items():
        for ours, theirs in zip(jax.tree.leaves(kernel), jax.tree.leaves(single[key]), strict=True):
            assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), key
    np.testing.assert_allclose(forward(checkpoint.config, scan=True)(stacked), forward(checkpoint.config)(single), atol=2e-5)


def test_a_loaded_model_says_it_and_decodes_as_its_logits_say(path):
    models, ids = {name: lm.load(path, quantize=name) for name in ROUNDINGS}, IDS[0].tolist()
    for name, model in models.items():
        assert model.describe()["quantize"] == name and f"quantize {name}" in repr(model)
    new = models["nf4"].generate_tokens([ids], [[]], max_new_tokens=4)[0]
    logits = models["nf4"].logits(np.array([ids + new], np.int32), None)[0]
    assert new == np.argmax(logits[len(ids) - 1:-1], axis=-1).tolist() and len(new) == 4


def test_on_a_mesh_it_is_the_same(path):
    checkpoint = open_checkpoint(path)
    for name in ROUNDINGS:
        one = forward(checkpoint.config)(flatten_dict(load_params(checkpoint, np.float32, quantize=name), sep="/"))
        mesh = lm.load(path, quantize=name, mesh="fsdp=2,tp=2")
        np.testing.assert_allclose(mesh.logits(IDS, None), one, atol=3e-5)
        kernel = mesh.engine.params["decoder"]["layers_0"]["mlp"]["up_proj"]["kernel"]
        values = kernel.codes if name == "nf4" else kernel.values
        assert {shard.data.shape for shard in values.addressable_shards} == {(32, 64)}


def test_an_adapter_stays_exact_over_a_rounded_base(path):
    from llavamed_jax.adapters.lora import attach
    from llavamed_jax.config.adapter import AdapterConfig, AdapterRule
    checkpoint = attach(open_checkpoint(path), AdapterConfig((AdapterRule(r"decoder/layers_\d+/.*", 4, 8.0),)), 0)
    params = flatten_dict(load_params(checkpoint, np.float32, quantize="int4"), sep="/")
    assert sum(isinstance(x, Kernel) for x in params.values()) == sum(name.endswith("lora_a") for name in params) == 14
    run = forward(checkpoint.config)
    plain = {name: x for name, x in params.items() if "_lora_" not in name}
    np.testing.assert_array_equal(run(params), run(plain))
    rng = np.random.default_rng(0)
    drawn = {name: rng.standard_normal(x.shape, np.float32) / 4 if name.endswith("lora_b") else x for name, x in params.items()}
    summed = {name: np.asarray(x.widened(np.float32)) + 2 * drawn[f"{name}_lora_a"] @ drawn[f"{name}_lora_b"] if isinstance(x, Kernel) else x
              for name, x in plain.items()}
    with jax.default_matmul_precision("highest"):
        ours, wanted, without = run(drawn), run(summed), run(plain)
    assert np.abs(ours - wanted).max() < 2e-5 * np.abs(wanted).max() and np.abs(ours - without).max() > 0.1 * np.abs(without).max()


def test_widths_that_no_group_divides_are_one_sentence(tmp_path):
    start = write_start(tmp_path / "start")
    with pytest.raises(UserError, match="none of them divides the width 16 of a kernel; int8 was expected"):
        lm.load(start, quantize="int4")
    assert lm.load(start, quantize="int8").logits(IDS, None).shape[1] == 24
    for bad in ("int2", 8, ["int8"]):
        with pytest.raises(UserError, match="int8, int4, nf4 or None was expected"):
            lm.load(start, quantize=bad)


@pytest.mark.slow
def test_an_evaluation_records_it_and_does_not_mix(path, tmp_path):
    from llavamed_jax.cli.eval import main
    argv = ["--config", "configs/eval/vqa_rad.py:demo", "--config.generation.max_new_tokens=2", "--checkpoint", str(path), "--workdir",
            str(tmp_path / "out"), "--quantize", "int8"]
    assert main(argv) == 0
    asked = lambda: json.loads((tmp_path / "out" / "metrics.json").read_text())["asked"]
    assert asked()["quantize"] == "int8"
    before = (tmp_path / "out" / "predictions.jsonl").read_text()
    assert main([*argv[:-1], "nf4"]) == 0
    assert asked()["quantize"] == "nf4" and (tmp_path / "out" / "predictions.jsonl").read_text() != before
    assert main([*argv[:-2], "--kv_cache", "int8"]) == 0
    assert asked()["quantize"] is None and asked()["kv_cache"] == "int8"


def test_the_names_of_the_roundings_are_those_of_the_flags():
    assert QUANTIZED == tuple(ROUNDINGS)
