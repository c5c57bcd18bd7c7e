"""`convert verify`: equal models of any layout are equal, and each kind of difference is named."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.cli.convert import main
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from llavamed_jax.verification import compare
from tests.support import programs

TINY = LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14), DecoderConfig(70, 48, 96, 1, 4, 2, 12, 1e-5, 1e6, 512, architecture="mistral"))


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    directory = tmp_path_factory.mktemp("verify") / "original"
    export(random_checkpoint(TINY, seed=5), directory, "llava")
    return directory


@pytest.fixture
def other(original, tmp_path):
    """A copy to be changed: `other(name=function)` changes a tensor, `config={…}` the config."""
    def make(config=None, **changes):
        directory = tmp_path / "other"
        directory.mkdir()
        read = json.loads((original / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(read | (config or {})))
        tensors = load_file(original / "model.safetensors")
        for name, change in changes.items():
            tensors[name] = change(tensors[name])
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        return directory
    return make


def verify(*argv):
    return main(["verify", *map(str, argv)])


def lines(capsys):
    """what -> the rest of its line."""
    out = capsys.readouterr().out
    found = {line.split("  ")[0]: line for line in out.splitlines()}
    return found, out.splitlines()[-1]


@programs.shared()
def test_a_model_in_two_layouts_is_equal_and_one_with_another_value_is_not(original, other, tmp_path, capsys):
    """In one test, whose second half needs no program that the first has not compiled."""
    export(open_checkpoint(original), tmp_path / "hf", "transformers")
    assert verify(original, tmp_path / "hf") == 0
    found, last = lines(capsys)
    assert last == "equal within 0.0001 of the largest magnitude"
    for what in ("settings", "tensors: vision_tower", "tensors: projector", "tensors: decoder", "tensors: beyond the feature layer",
                 "logits: text", "logits: an image", "logits: two images", "greedy tokens: an image"):
        assert "equal" in found[what] and "DIFFERS" not in found[what], what
    assert "4 of 4 bit for bit" in found["tensors: projector"]

    def change(tensor):
        tensor = tensor.copy()
        tensor[3, 7] += 0.5 * np.abs(tensor).max()
        return tensor
    changed = other(**{"model.mm_projector.2.weight": change})
    assert verify(original, changed) == 1
    found, last = lines(capsys)
    assert "most in projector/linear_1/kernel" in found["tensors: projector"] and "DIFFERS" in found["tensors: projector"]
    assert "equal" in found["tensors: decoder"] and "equal" in found["logits: text"]
    assert "DIFFERS" in found["logits: an image"]
    assert last.startswith("not equal: tensors: projector; logits: an image")


def test_rounding_differs_unless_it_is_tolerated(original, tmp_path, capsys):
    export(open_checkpoint(original).cast(ml_dtypes.bfloat16), tmp_path / "rounded", "llava")
    assert verify(original, tmp_path / "rounded", "--tensors_only") == 1
    found, _ = lines(capsys)
    difference = float(found["tensors: decoder"].split()[2])
    assert 2**-10 < difference <= 2**-8  # bfloat16 keeps eight bits
    assert not any(what.startswith("logits") for what in found)
    assert verify(original, tmp_path / "rounded", "--tensors_only", "--tolerance", "4e-3") == 0


def test_what_no_tensor_shows(original, other, capsys):
    assert verify(original, other({"rope_theta": 1e4, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})) == 1
    found, last = lines(capsys)
    assert "decoder.rope_theta is 1000000.0 and 10000.0" in found["settings"]
    assert last == "not equal: settings" and not any(what.startswith("logits") for what in found)


@pytest.mark.parametrize("kind, is_equal", [("mlp2x_gelu", False), ("linear", True)])
def test_the_projectors_activation_counts_where_there_is_one(kind, is_equal):
    ours = random_checkpoint(TINY.replace(projector_type=kind), seed=5)
    theirs = ours.replace(config=ours.config.replace(projector_act="relu"))
    row = compare.compare(ours, theirs, tensors_only=True)[0]
    assert row.is_equal is is_equal and ("projector_act is 'gelu' and 'relu'" in row.found) is not is_equal


@pytest.mark.parametrize("change, what, counts", [
    (dict(image_aspect_ratio="square"), "image_aspect_ratio is 'pad' and 'square'", True),
    (dict(use_start_end=True), "use_start_end is False and True", True),
    (dict(template="v1.0:simple"), "v1.5:mistral_instruct and v1.0:simple; not counted", False)])
def test_how_prompts_are_prepared(original, change, what, counts, monkeypatch):
    """It is said, a template is not counted, and logits of prepared prompts are compared all the same."""
    monkeypatch.setattr(compare, "_outputs", lambda *_: [compare.Row("logits", "", True)])
    ours = open_checkpoint(original)
    rows = compare.compare(ours, ours.replace(config=ours.config.replace(**change)))
    differing = [row for row in rows if not row.is_equal]
    assert [(row.found, row.counts) for row in differing] == [(what, counts)] and rows[-1].what == "logits"
    assert ("DIFFERS" if counts else " differs ") in compare.table(rows) and (counts or "DIFFERS" not in compare.table(rows))
    assert all(row.is_equal for row in compare.compare(ours, ours, tensors_only=True))


def test_shapes_and_names_that_do_not_fit(original, tmp_path, capsys):
    shapes = TINY.replace(decoder=DecoderConfig(**{**vars(TINY.decoder), "intermediate_size": 100}), projector_type="mlp3x_gelu")
    export(random_checkpoint(shapes), tmp_path / "other", "llava")
    assert verify(original, tmp_path / "other") == 1
    found, _ = lines(capsys)
    assert "projector/linear_2/kernel is only in the second" in found["tensors: projector"]
    assert "mlp/gate_proj/kernel is [48, 96] and [48, 100]" in found["tensors: decoder"]


def test_rows_that_transformers_added_are_not_compared(original, tmp_path, capsys):
    """As in a conversion by transformers' script, which this project did not write: the config does not say what was added."""
    export(open_checkpoint(original), tmp_path / "hf", "transformers")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["llavamed_jax"] = {"image_aspect_ratio": "pad"}
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "hf").config.decoder.vocab_size == 128
    assert verify(original, tmp_path / "hf", "--tensors_only") == 0
    assert verify(tmp_path / "hf", original, "--tensors_only") == 0


def test_numbers_that_are_none_differ(original, other, capsys):
    assert verify(original, other(**{"model.norm.weight": lambda t: t * np.float32("nan")}), "--tensors_only") == 1
    found, _ = lines(capsys)
    assert "inf" in found["tensors: decoder"]


def test_divergence_is_that_of_the_distributions():
    a, b = np.log([[0.5, 0.5], [0.9, 0.1]]), np.log([[0.5, 0.5], [0.5, 0.5]]) + 7  # logits are up to a constant
    assert compare.kl_divergence(a, b) == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))
    assert compare.kl_divergence(a, a) == 0


@pytest.mark.parametrize(("argv", "status", "sentence"), [
    ([], 2, "required: A, B"), (["preset:small", "nowhere"], 2, "nowhere is not a directory"),
    (["preset:small", "preset:small", "--tolerance", "-1"], 2, "--tolerance is -1.0; a number of at least 0"),
    (["preset:small", "preset:small", "--tolerance", "x"], 2, "--tolerance"),
    (["preset:small", "preset:huge"], 1, "one of small")])
def test_wrong_calls_are_one_sentence(argv, status, sentence, capsys):
    assert verify(*argv) == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and sentence in error and "\n" not in error


def test_what_is_not_finite_is_equal_to_nothing(original, monkeypatch):
    """The bits of two broken models are the same, and their logits are still no answer."""
    checkpoint = open_checkpoint(original)
    asked = compare.prompts(TINY, 70)
    logits = {name: np.full((3, 70), np.nan, np.float32) for name in asked}
    monkeypatch.setattr(compare, "_run", lambda *_: (logits, {name: [5] for name in asked}))
    rows = {row.what: row for row in compare.compare(checkpoint, checkpoint)}
    assert all(rows[f"logits: {name}"].found == "not finite in the first and the second" for name in asked)
    assert [what for what, row in rows.items() if not row.is_equal] == [f"logits: {name}" for name in asked]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("filled", [0.0, 1.0])
def test_no_number_equals_what_is_none(filled, is_first, value):
    """Largest of 0 and NaN is 0 for Python's own `max`, by the order of the two."""
    numbers, none = np.full((4, 5), filled, np.float32), np.full((4, 5), value, np.float32)
    one = np.where(np.arange(20).reshape(4, 5) == 7, none, numbers)
    for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16):
        for broken in (none.astype(dtype), one.astype(dtype)):
            pair = (broken, numbers) if is_first else (numbers, broken)
            assert compare.compare_arrays(*pair) == (False, np.inf)
            assert compare.compare_arrays(broken, broken.copy()) == (True, np.inf)


def test_differences_of_arrays_that_are_numbers():
    zeros, wide = np.zeros(3, np.float32), np.array([1e300, -1e300, 0])
    assert compare.compare_arrays(zeros, zeros.copy()) == (True, 0.0)
    assert compare.compare_arrays(zeros, -zeros) == (False, 0.0)  # other bits, and no difference
    assert compare.compare_arrays(zeros, np.array([0, 2, 0], np.float32)) == (False, 1.0)
    assert compare.compare_arrays(wide, wide * 0.5) == (False, 0.5)  # beyond float32
    assert compare.compare_arrays(np.array([3e38], np.float32), np.array([-3e38], np.float32))[1] > 1
    with np.errstate(invalid="ignore"):
        assert np.isnan(compare.kl_divergence(np.array([[np.nan, 1.0]]), np.array([[0.0, 1.0]])))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_tensor_of_zeros_and_one_of_nan(value, dtype, other, tmp_path, capsys):
    """Either way round, in one value or in all, without computing and with it."""
    def zeros(tensor):
        return np.zeros_like(tensor).astype(dtype)

    def broken(tensor):
        return np.full_like(tensor, value).astype(dtype)
    zero = other(**{"model.mm_projector.0.bias": zeros}).rename(tmp_path / "zero")
    none = other(**{"model.mm_projector.0.bias": broken})
    for pair, word in (((zero, none), "second"), ((none, zero), "first"), ((none, none), "first")):
        for flags in (["--tensors_only"], []):
            assert verify(*pair, *flags) == 1
            found, last = lines(capsys)
            row = found["tensors: projector"]
            assert "DIFFERS" in row and f"(48 {'NaN' if np.isnan(value) else 'infinite'} among 48 values in the {word}" in row
            assert last == "not equal: tensors: projector" and not any(what.startswith("logits") for what in found)


def test_the_words_of_load_are_flags(original, tmp_path, capsys):
    """A tokenizer and a template for both; what is typed wrong exits 2."""
    sample = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"
    assert verify(original, original, "--tensors_only", "--tokenizer", sample, "--template", "v1.5:mistral_instruct") == 0
    found, _ = lines(capsys)
    assert "the same ids for 5 texts" in found["tokenizer"]
    assert verify(original, original, "--tensors_only", "--tokenizer", sample) == 0
    assert "the same ids for 3 texts" in lines(capsys)[0]["tokenizer"]
    assert verify(original, original, "--tensors_only") == 0
    assert "neither has a tokenizer" in lines(capsys)[0]["tokenizer"]
    for flags, sentence in ((["--template", "v9:none"], "--template: "), (["--tokenizer", tmp_path], "--tokenizer "),
                            (["--dtype", "int8"], "--dtype"), (["--tolerance", "inf"], "--tolerance is inf")):
        assert verify(original, original, "--tensors_only", *flags) == 2
        assert sentence in capsys.readouterr().err
