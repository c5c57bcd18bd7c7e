"""A calibrated export: every kernel's output error on other rows is smaller, with images, tied heads and a run's own tree."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from llavamed_jax.checkpoints.export.calibrate import calibrated
from llavamed_jax.checkpoints.export.few_bits import Rounding
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.cli import convert
from llavamed_jax.config import IMAGE_TOKEN
from llavamed_jax.errors import UserError
from llavamed_jax.models.layers import Linear
from llavamed_jax.models.llava import Llava
from llavamed_jax.pipeline.calibration import read_rows
from llavamed_jax.processor import Processor
from llavamed_jax.quantized.gptq import gptq
from llavamed_jax.quantized.rounding import int4
from tests.checkpoints.test_quantised_export import assert_equal_kernels, checkpoint_of
from tests.support.training_runs import SAMPLE, write_start


def rows_of(cfg, number, seed):
    """Rows of several lengths; every second one has an image. Text repeats a few tokens, so that inputs vary together."""
    rng, rows = np.random.default_rng(seed), []
    for i in range(number):
        text = rng.integers(3, 20, 40 + 7 * (i % 5)).tolist()
        pixels = rng.integers(0, 256, (i % 2, 28, 28, 3), dtype=np.uint8)
        rows.append(([1, *[IMAGE_TOKEN] * (cfg.tokens_per_image * len(pixels)), *text], pixels))
    return rows


@functools.partial(jax.jit, static_argnums=0)
def all_inputs(cfg, params, ids, pixels, segments):
    seen = {}

    def note(call, args, kwargs, context):
        if isinstance(context.module, Linear) and context.method_name == "__call__" and context.module.path[0] == "decoder":
            seen["/".join((*context.module.path, "kernel"))] = args[0]
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        Llava(cfg).apply({"params": params}, ids, pixels, None, segments, method="hidden")
    return seen


def inputs_of(cfg, params, rows):
    """The inputs of every kernel of the decoder's layers, by the whole model in one batch, without padding."""
    lengths = np.array([len(ids) for ids, _ in rows])
    held = np.arange(80) < lengths[:, None]
    ids, slots = np.zeros(held.shape, np.int32), np.zeros((len(rows), 1, 28, 28, 3), np.uint8)
    for row, (tokens, pixels) in enumerate(rows):
        ids[row, :len(tokens)], slots[row, :len(pixels)] = tokens, pixels
    seen = all_inputs(cfg, params, ids, slots, held.astype(np.int32))
    return {name: np.asarray(x)[held] for name, x in seen.items()}


@pytest.fixture(scope="module")
def case():
    """(checkpoint, parameters, rows, kernels that are calibrated with them) of a model with tied heads."""
    checkpoint = checkpoint_of(tie_word_embeddings=True)
    rows = rows_of(checkpoint.config, 12, 0)
    return checkpoint, load_params(checkpoint), rows, {name: load() for name, load in calibrated(checkpoint, rows, 64).items()}


def test_every_kernels_output_changes_less_on_other_rows(case):
    checkpoint, params, _, kernels = case
    held = inputs_of(checkpoint.config, params, rows_of(checkpoint.config, 12, 1))
    assert len(kernels) == 14 and kernels.keys() == held.keys()
    for name, x in held.items():
        exact = checkpoint.read(name)
        error = lambda rounded, x=x, exact=exact: np.linalg.norm(x @ (np.asarray(rounded.widened(jnp.float32)) - exact))
        assert error(kernels[name]) < 0.9 * error(int4(exact, 64, True)), name


def test_a_layers_sums_are_those_of_the_rows_behind_the_rounded_layers(case):
    """Padding does not count, images do, and the second layer sees what the rounded first one gives."""
    checkpoint, params, rows, kernels = case
    flat = flatten_dict(params, sep="/")
    for layer in (0, 1):
        seen = inputs_of(checkpoint.config, unflatten_dict(flat, sep="/"), rows)
        for name in [name for name in kernels if f"layers_{layer}/" in name]:
            x = seen[name].astype(np.float64)
            wanted = gptq(checkpoint.read(name), x.T @ x, 64)
            same = (np.asarray(wanted.values) == np.asarray(kernels[name].values)).mean()
            assert same > 0.97, (name, same)
        for name in [name for name in kernels if f"layers_{layer}/" in name]:
            flat[name] = np.asarray(kernels[name].widened(jnp.float32))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("calibrated") / "model", (32, 64, 2, 2, 16, 8), (64, 128, 2, 4, 2, 16))


def test_the_command(tree, tmp_path, capsys):
    flags = ["export", "--checkpoint", str(tree), "--layout", "transformers", "--quantize", "int4", "--dtype", "bfloat16"]
    data = ["--calibrate", str(SAMPLE / "vqa_train.json"), "--images", str(SAMPLE / "images"), "--calibration_rows", "6"]
    assert convert.main([*flags, *data, "--out", str(tmp_path / "hf")]) == 0
    assert "calibrating with 6 samples of" in capsys.readouterr().out
    assert "int4 (symmetric groups of 64 inputs, calibrated)" in (tmp_path / "hf" / "README.md").read_text()
    assert convert.main([*flags, "--out", str(tmp_path / "plain")]) == 0
    exact, plain, found = (open_checkpoint(path) for path in (tree, tmp_path / "plain", tmp_path / "hf"))
    rows = read_rows(SAMPLE / "vqa_train.json", SAMPLE / "images", Processor.from_checkpoint(exact), 6)
    assert len(rows) == 6 and all(len(pixels) == 1 and ids.count(IMAGE_TOKEN) == exact.config.tokens_per_image for ids, pixels in rows)
    wanted = calibrated(exact, rows, 64, np.dtype("bfloat16"))
    for name, load in wanted.items():
        assert_equal_kernels(found.tensors[name].few_bits.load(), load())
    differing = [name for name in wanted if not np.array_equal(found.read(name), plain.read(name))]
    assert len(differing) == len(wanted) == 14


def test_bad_input_is_one_sentence(tree, tmp_path, capsys):
    data = str(SAMPLE / "vqa_train.json")
    for flags, sentence in (
            (["--calibrate", data], "--calibrate is for int4; --quantize int4 was expected beside it"),
            (["--calibrate", data, "--quantize", "int8"], "--calibrate is for int4"),
            (["--quantize", "int4", "--calibration_rows", "5"], "--calibration_rows can be used only with --calibrate"),
            (["--quantize", "int4", "--images", "x"], "--images can be used only with --calibrate"),
            (["--quantize", "int4", "--calibrate", data, "--calibration_rows", "0"], "--calibration_rows is 0; at least 1"),
            (["--quantize", "int4", "--calibrate", str(tmp_path / "none.json")], "none.json does not exist"),
            (["--quantize", "int4", "--calibrate", data, "--images", str(tmp_path)], "cannot be used for calibration"),
            (["--quantize", "int4", "--calibrate", data, "--images", str(SAMPLE / "images")], "the layout llava has no place for kernels")):
        layout = "llava" if "llava" in sentence else "transformers"
        assert convert.main(["export", "--checkpoint", str(tree), "--layout", layout, *flags, "--out", str(tmp_path / "out")]) in (1, 2)
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1 and not (tmp_path / "out").exists(), said
    checkpoint = checkpoint_of()
    with pytest.raises(UserError, match="there are no rows to calibrate with"):
        calibrated(checkpoint, [], 64)
    with pytest.raises(UserError, match="a row has 3 image positions and 0 images"):
        calibrated(checkpoint, [([1, *[IMAGE_TOKEN] * 3], np.zeros((0,)))], 64)
    assert Rounding.of(checkpoint, "int4").words == "int4 (symmetric groups of 64 inputs)"
