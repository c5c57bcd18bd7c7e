"""Rounding to few bits and the product: bounds of the error, equality with what the arrays say, the compiled program."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llavamed_jax.errors import UserError
from llavamed_jax.models.layers import Linear
from llavamed_jax.quantized import kernels, rounding


def drawn(D=256, F=48, seed=0):
    rng = np.random.default_rng(seed)
    kernel = rng.standard_normal((D, F), np.float32) * np.exp(rng.standard_normal(F, np.float32))
    kernel[:, 3] = 0  # an output without weights
    kernel[:64, 5] = 0  # a group without weights
    kernel[:, 7] = np.abs(kernel[:, 7]) + 2  # values of one sign, far from 0
    return kernel


def steps_of(rounded):
    """The distance of neighbouring values, for each group of inputs and each output."""
    if isinstance(rounded, kernels.Int8Kernel):
        return rounded.scale[None]
    return rounded.scales if isinstance(rounded, kernels.Int4Kernel) else rounded.absmax


@pytest.mark.parametrize("how", [rounding.int8, rounding.int4, lambda k: rounding.int4(k, 32)], ids=["int8", "int4", "groups of 32"])
def test_an_error_is_at_most_half_a_step(how):
    kernel = drawn()
    rounded = how(kernel)
    steps = np.repeat(steps_of(rounded), 256 // len(steps_of(rounded)), axis=0)
    error = np.abs(np.asarray(rounded.widened(jnp.float32)) - kernel)
    # The zero is a whole step, so the ends of an asymmetric range may be half a step beyond the last value.
    most = 1.0 if getattr(rounded, "zeros", None) is not None else 0.5
    assert (error <= most * steps * (1 + 1e-5) + 1e-7).all()
    assert np.median(error / np.maximum(steps, 1e-9)) < 0.3 and (error[:, 3] == 0).all()
    assert rounded.shape == kernel.shape and not np.asarray(rounded.widened(jnp.float32))[:, 3].any()


def test_zeros_keep_being_zeros():
    """A pruned weight stays pruned: 0 is one of the values of every rounding."""
    kernel = drawn()
    kernel[::3] = 0
    for how in rounding.ROUNDINGS.values():
        assert not np.asarray(how(kernel).widened(jnp.float32))[::3].any()


def test_int8_uses_its_range_and_int4_its_groups():
    kernel = drawn()
    eight, four = rounding.int8(kernel), rounding.int4(kernel)
    assert (np.abs(eight.values).max(axis=0)[[0, 7]] == 127).all() and eight.values.dtype == np.int8
    assert four.scales.shape == four.zeros.shape == (2, 48) and four.values.dtype.name == "int4"
    assert rounding.int4(drawn(192)).scales.shape == (3, 48) and rounding.int4(drawn(96)).scales.shape == (3, 48)
    with pytest.raises(UserError, match="none of them divides the width 80"):
        rounding.int4(drawn(80))
    with pytest.raises(UserError, match="a group of 64 inputs does not divide the width 96"):
        rounding.nf4(drawn(96))


def test_less_error_with_more_bits_and_smaller_groups():
    kernel = drawn()
    of = lambda rounded: np.linalg.norm(np.asarray(rounded.widened(jnp.float32)) - kernel) / np.linalg.norm(kernel)
    errors = [of(rounding.int8(kernel)), of(rounding.int4(kernel, 32)), of(rounding.int4(kernel, 128)),
              of(rounding.int4(kernel, 128, is_symmetric=True))]
    assert errors == sorted(errors) and errors[0] < 0.02 and errors[-1] < 0.2
    normal = np.random.default_rng(1).standard_normal((256, 64), np.float32)
    error = np.linalg.norm(np.asarray(rounding.nf4(normal).widened(jnp.float32)) - normal) / np.linalg.norm(normal)
    assert 0.08 < error < 0.1  # what nf4 in blocks of 64 loses of a normal distribution


def test_nf4_takes_the_nearest_of_its_values():
    kernel = np.random.default_rng(2).standard_normal((128, 8), np.float32)
    rounded = rounding.nf4(kernel)
    scaled = kernel.reshape(2, 64, 8) / rounded.absmax[:, None]
    nearest = np.abs(scaled[..., None] - kernels.NF4).argmin(-1)
    np.testing.assert_array_equal(np.asarray(rounded.codes).astype(int), nearest.reshape(128, 8))
    np.testing.assert_array_equal(rounded.absmax, np.abs(kernel.reshape(2, 64, 8)).max(1))


@pytest.mark.parametrize("name", rounding.ROUNDINGS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_product_is_that_of_the_widened_kernel(name, dtype):
    kernel, x = drawn(), np.random.default_rng(3).standard_normal((2, 5, 256), np.float32)
    rounded = rounding.ROUNDINGS[name](kernel)
    layer = Linear(48, ("embed", "mlp"), use_bias=False, dtype=dtype)
    run = jax.jit(lambda params, x: layer.apply({"params": params}, x))
    y = run({"kernel": rounded}, x)
    assert y.dtype == dtype
    wanted = x.astype(np.float64) @ np.asarray(rounded.widened(jnp.float32), np.float64)
    tolerance = 2e-6 if dtype == jnp.float32 else 2e-2
    assert np.abs(np.asarray(y, np.float64) - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("name, element", [("int8", "s8[256,48]"), ("int4", "s4[256,48]"), ("nf4", "u4[256,48]")])
def test_a_programs_argument_has_few_bits(name, element):
    rounded = rounding.ROUNDINGS[name](drawn())
    layer = Linear(48, ("embed", "mlp"), use_bias=False, dtype=jnp.bfloat16)
    text = jax.jit(lambda params, x: layer.apply({"params": params}, x)).lower({"kernel": rounded}, np.zeros((1, 256), np.float32)).compile().as_text()
    entry = text[text.index("ENTRY"):]
    arguments = [line for line in entry.splitlines() if " parameter(" in line]
    assert sum(f"= {element}" in line for line in arguments) == 1 and not any("f32[256,48]" in line for line in arguments), arguments


def test_symmetric_scales_have_the_least_error_of_several():
    """Values within the range have half a step of error at most; the scale of a wide group may cut its largest values."""
    kernel = drawn()
    rounded = rounding.int4(kernel, is_symmetric=True)
    groups, scales = kernel.reshape(2, 128, 48), np.asarray(rounded.scales)[:, None]
    values = np.asarray(rounded.widened(jnp.float32)).reshape(groups.shape)
    within = (groups > -8.5 * scales) & (groups < 7.5 * scales)
    assert rounded.zeros is None and (np.abs(values - groups)[within] <= 0.5000001 * np.broadcast_to(scales, groups.shape)[within]).all()
    found = np.square(values - groups).sum(1)
    largest, several = np.abs(groups).max(1, keepdims=True), []
    for number in rounding.LARGEST:
        steps = np.where(largest > 0, largest / np.float32(number), 1)
        several.append(np.square(np.clip(np.rint(groups / steps), -8, 7) * steps - groups).sum(1))
    np.testing.assert_allclose(found, np.min(several, 0), rtol=1e-5, atol=1e-12)
    assert len({int(i) for i in np.argmin(several, 0).reshape(-1)}) > 3 and (found < 0.95 * several[2]).mean() > 0.3


def lowered(platform, rows, F, out_dtype):
    """The text of a product of bfloat16 with [64,F], lowered for a platform that need not be here."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, rows, 64), (64, F)))
    traced = jax.jit(lambda x, kernel: kernels.dot(x, kernel, out_dtype)).trace(x, kernel)
    return traced.lower(lowering_platforms=(platform,)).as_text()


def test_one_row_is_two_on_a_gpu_where_xla_would_not_take_the_library(monkeypatch):
    monkeypatch.setattr(kernels, "_LIBRARY", 64 * 32)
    is_two = lambda *asked: "tensor<2x64xbf16>" in lowered(*asked)
    assert is_two("cuda", 1, 31, None) and is_two("cuda", 1, 32, jnp.float32)
    assert not is_two("cuda", 1, 32, None) and not is_two("cuda", 1, 32, jnp.bfloat16) and not is_two("cuda", 3, 31, jnp.float32)
    assert not is_two("cpu", 1, 31, jnp.float32)
    assert [lowered(platform, 1, 31, None).count("stablehlo.dot_general") for platform in ("cuda", "cpu")] == [1, 1]


def test_the_choice_of_a_platform_is_no_work():
    """The program of one row is the plain product's, with no condition left."""
    x, kernel = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((1, 64), (64, 31)))
    of = lambda function: jax.jit(lambda x, kernel: function(x, kernel, jnp.float32)).lower(x, kernel).compile().as_text()
    found, plain = (re.sub(r"metadata=\{[^}]*\}", "", text[text.index("\n%"):]) for text in map(of, (kernels.dot, kernels._product)))
    assert found == plain and "conditional" not in found


@pytest.mark.parametrize("out_dtype", [None, jnp.float32])
def test_the_two_rows_give_the_one(out_dtype):
    x, kernel = (jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.bfloat16) for shape in ((1, 1, 64), (64, 31)))
    found, wanted = kernels._of_one_row(x, kernel, out_dtype), kernels.dot(x, kernel, out_dtype)
    assert found.shape == wanted.shape == (1, 1, 31) and found.dtype == wanted.dtype
    np.testing.assert_allclose(found.astype(jnp.float32), wanted.astype(jnp.float32), rtol=2e-2 if out_dtype is None else 1e-5, atol=1e-5)
