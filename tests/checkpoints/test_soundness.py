"""Weights that no training leaves, and values that a cast loses: refused or counted on every way in and out."""

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import llavamed_jax as lm
from llavamed_jax.checkpoints import soundness
from llavamed_jax.checkpoints.assemble.delta import apply_delta, make_delta
from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.checkpoints.tree.model import write_model
from llavamed_jax.cli.convert import main
from llavamed_jax.errors import UserError
from tests.support import released, tiny
from tests.support.released import TINY

BF16 = ml_dtypes.bfloat16
TYPES = [np.float64, np.float32, np.float16, BF16]


def special(dtype):
    info = ml_dtypes.finfo(dtype)
    finite = [0.0, -0.0, float(info.max), float(info.min), float(info.smallest_subnormal), float(info.tiny), 1.0, -1.5]
    return np.array(finite, np.float64).astype(dtype), np.array([np.nan, -np.nan, np.inf, -np.inf]).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [1, 7, 2**16 - 1, 2**16, 2**16 + 1, 200_000])
def test_what_is_finite_and_what_is_zero(dtype, size):
    finite, others = special(dtype)
    array = np.resize(finite, size)
    assert soundness.is_finite(array) and soundness.is_finite(np.zeros(0, dtype))
    assert soundness.is_zero(np.resize(finite[:2], size)) and soundness.is_zero(np.zeros(0, dtype))
    for value in finite[2:]:
        one = np.zeros(size, dtype)
        one[size * 2 // 3] = value
        assert not soundness.is_zero(one)
    for value in others:
        for at in {0, size // 2, size - 1}:
            broken = array.copy()
            broken[at] = value
            assert not soundness.is_finite(broken) and not soundness.is_finite(broken.reshape(1, -1).T)
            assert not soundness.is_zero(broken)


@pytest.mark.parametrize("target", TYPES)
@pytest.mark.parametrize("source", TYPES)
def test_a_cast_gives_the_nearest_values_and_counts_what_it_loses(source, target):
    rng = np.random.default_rng(0)
    exponents = rng.uniform(np.log2(float(ml_dtypes.finfo(source).smallest_subnormal)) + 1, 10, 70_000)
    array = (rng.choice([-1, 1], exponents.size) * 2.0**exponents).astype(source).reshape(700, 100).T  # not contiguous
    array[3, 4] = 0
    tally = soundness.Tally()
    out = tally.cast("x", array, target)
    with np.errstate(all="ignore"):
        wanted = array.astype(target)
    np.testing.assert_array_equal(out.astype(np.float64), wanted.astype(np.float64))
    assert out.dtype == target and (out is array) == (source == target)
    lost = int(((wanted == 0) & (array != 0)).sum())
    assert tally.vanished == ({np.dtype(target).name: {"x": lost}} if lost else {})
    assert (lost > 0) == (float(ml_dtypes.finfo(target).smallest_subnormal) > 2 * float(ml_dtypes.finfo(source).smallest_subnormal))


@pytest.mark.parametrize(("source", "target", "value", "largest"), [
    (np.float32, np.float16, 65520.0, "65504"), (np.float32, np.float16, -1e30, "65504"), (BF16, np.float16, 70000.0, "65504"),
    (np.float64, np.float16, 1e300, "65504"), (np.float64, np.float32, -1e39, r"3.4028e\+38"), (np.float64, BF16, 1e39, r"3.3895e\+38"),
    (np.float32, BF16, 3.4e38, r"3.3895e\+38")])
def test_a_value_beyond_a_type_is_refused(source, target, value, largest):
    array = np.ones((300, 300), source)
    array[299, 299] = array[0, 7] = value
    sentence = f"x has 2 of 90000 values beyond {largest}, the largest {np.dtype(target).name}; {np.dtype(source).name} can hold them"
    with pytest.raises(UserError, match=sentence):
        soundness.Tally().cast("x", array, target)
    array[299, 299] = array[0, 7] = np.nan  # is no matter of the cast: `look` says it
    assert np.isnan(soundness.Tally().cast("x", array, target).astype(np.float64)).sum() == 2


def test_the_largest_of_a_type_is_not_beyond_it():
    array = np.array([65504.0, 65519.0, -65504.0], np.float32)
    assert soundness.Tally().cast("x", array, np.float16).tolist() == [65504.0, 65504.0, -65504.0]


# --- every way in and out ------------------------------------------------------------------------------------------------------------


def changed(directory, name, change):
    """A checkpoint in which one tensor is another."""
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors[name].copy())
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def v15(root, dtype=np.float32):
    released.save(root / "tiny-tower", released.TOWER, {})
    return released.save(root / "v15", released.V15, released.v15_tensors(dtype=dtype))


def put(value):
    def change(tensor):
        tensor.flat[5] = value
        return tensor
    return change


def convert(command, directory, out, *flags):
    layout = ["--layout", command.partition(" ")[2]] if " " in command else []
    return main([command.split()[0], "--checkpoint", str(directory), "--out", str(out), *layout, *flags])


COMMANDS = ("import", "export transformers", "export llava")
KERNEL = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", [KERNEL, "model.vision_tower.vision_tower.vision_model.encoder.layers.2.mlp.fc1.bias"])
def test_weights_that_are_no_numbers_are_not_written(command, value, name, tmp_path, capsys):
    directory = changed(v15(tmp_path), name, put(value))
    assert convert(command, directory, tmp_path / "out") == 1
    error = capsys.readouterr().err
    ours = "decoder/layers_1/mlp/up_proj/kernel" if name == KERNEL else "vision_tower/layers_2/mlp/fc1/bias"
    size, word = 4608 if name == KERNEL else 64, "NaN" if np.isnan(value) else "infinite"
    assert error.endswith(f"error: {directory}: {ours} holds 1 {word} among {size} values; finite weights were expected\n")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-tower", "v15"]


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("dtype", [None, np.float32, BF16])
def test_weights_that_are_no_numbers_are_not_loaded(scan, dtype, tmp_path):
    directory = changed(v15(tmp_path), KERNEL, put(np.nan))
    with pytest.raises(UserError, match="layers_1/mlp/up_proj/kernel holds 1 NaN among 4608 values"):
        load_params(open_checkpoint(directory), dtype, scan)
    with pytest.raises(UserError, match=f"{directory}: decoder/layers_1/mlp/up_proj/kernel holds 1 NaN"):
        lm.load(directory, dtype=dtype)


def test_a_tree_with_weights_that_are_no_numbers_is_not_loaded(tmp_path, monkeypatch):
    directory = changed(v15(tmp_path), KERNEL, put(np.inf))
    monkeypatch.setattr(soundness.Tally, "look", lambda self, name, array, where="": array)  # as one of before has it
    write_model(tmp_path / "tree", open_checkpoint(directory))
    monkeypatch.undo()
    with pytest.raises(UserError, match="up_proj/kernel holds 1 infinite among 4608 values"):
        lm.load(tmp_path / "tree")


def test_a_part_that_is_no_number_is_not_built_in(tmp_path, capsys):
    tiny.save(tmp_path / "decoder", tiny.LLAMA, tiny.drawn(tiny.decoder_shapes(tiny.LLAMA)))
    tiny.save_clip(tmp_path / "clip")
    arguments = ["build", "--decoder", str(tmp_path / "decoder"), "--vision", str(tmp_path / "clip"), "--projector", "linear"]
    changed(tmp_path / "clip", "vision_model.pre_layrnorm.weight", put(np.nan))
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "vision_tower/pre_layrnorm/scale holds 1 NaN among 32 values" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_does_not_start_from_weights_that_are_no_numbers(tmp_path):
    from llavamed_jax.training.trainer import fit
    from tests.support.training_runs import shrunk, write_data, write_start
    start = write_start(tmp_path / "start")
    base = load_file(start / "base" / "model.safetensors")
    name = "decoder/layers_0/self_attn/q_proj/kernel"
    base[name] = put(np.nan)(base[name].copy())
    save_file(base, start / "base" / "model.safetensors")
    (start / "base" / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{start}: {name} holds 1 NaN among 256 values"):
        fit(shrunk(start, write_data(tmp_path), batch_size=8), tmp_path / "run")


@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_float16_cannot_hold_are_not_written(command, tmp_path, capsys):
    directory = changed(v15(tmp_path), KERNEL, put(7e4))
    assert convert(command, directory, tmp_path / "out", "--dtype", "float16") == 1
    assert ("layers_1/mlp/up_proj/kernel has 1 of 4608 values beyond 65504, the largest float16; float32 can hold them, and so can bfloat16"
            in capsys.readouterr().err)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny-tower", "v15"]
    assert convert(command, directory, tmp_path / "out", "--dtype", "bfloat16") == 0
    capsys.readouterr()


def test_values_that_float16_cannot_hold_are_not_loaded(tmp_path):
    directory = changed(v15(tmp_path), KERNEL, put(7e4))
    for scan in (False, True):
        with pytest.raises(UserError, match="up_proj/kernel has 1 of 4608 values beyond 65504"):
            load_params(open_checkpoint(directory), np.float16, scan)
    with pytest.raises(UserError, match="up_proj/kernel has 1 of 4608 values beyond 65504"):
        lm.load(directory, dtype="float16")
    changed(directory, KERNEL, put(3.4e38))  # a float32 that bfloat16 rounds to infinity
    with pytest.raises(UserError, match=r"beyond 3.3895e\+38, the largest bfloat16; float32 can hold them$"):
        lm.load(directory, dtype="bfloat16")


def test_values_that_the_computation_cannot_hold_are_not_trained_over(tmp_path):
    import jax
    from jax.sharding import SingleDeviceSharding

    from llavamed_jax.training import state
    where = {"a/kernel": SingleDeviceSharding(jax.devices()[0])}
    with pytest.raises(UserError, match="a/kernel has 1 of 4 values beyond"):
        state.place({"a": {"kernel": np.array([1, 2, 3, 3.4e38], np.float32)}}, where, BF16)


@pytest.mark.parametrize("command", COMMANDS)
def test_values_that_become_zero_are_counted(command, tmp_path, capsys):
    def change(tensor):
        tensor.flat[5:12] = 2e-8
        return tensor
    directory = changed(changed(v15(tmp_path), KERNEL, change), "model.mm_projector.0.weight", put(-1e-9))
    assert convert(command, directory, tmp_path / "out", "--dtype", "float16") == 0
    error = capsys.readouterr().err
    assert error.count("warning: ") == 1
    assert "warning: 8 values are too small for float16 and became 0, in 2 tensors: " in error
    assert "projector/linear_0/kernel" in error and "decoder/layers_1/mlp/up_proj/kernel" in error
    assert convert(command, directory, tmp_path / "wide", "--dtype", "bfloat16") == 0
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("name, ours", [(KERNEL, "decoder/layers_1/mlp/up_proj/kernel"),
                                        ("model.embed_tokens.weight", "decoder/embed_tokens/embedding")])
def test_kernels_and_tables_of_zeros_are_said_and_biases_are_not(name, ours, tmp_path, capsys):
    directory = changed(v15(tmp_path), name, np.zeros_like)
    changed(directory, "model.mm_projector.0.bias", np.zeros_like)
    said = f"warning: 1 kernels hold only zeros, like weights that were never filled: {ours}\n"
    for command in COMMANDS:
        assert convert(command, directory, tmp_path / command) == 0
        assert capsys.readouterr().err == said
    lm.load(directory)
    assert capsys.readouterr().err == said
    lm.load(v15(tmp_path / "other"))
    assert capsys.readouterr().err == ""


# --- deltas --------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def delta(tmp_path):
    """A released delta: norms of about 0, and buffers that are zeros."""
    target = tiny.save_v1(tmp_path)
    base = tiny.save(tmp_path / "base", tiny.LLAMA, tiny.drawn(tiny.decoder_shapes(tiny.LLAMA), seed=0))
    rng = np.random.default_rng(1)
    near = {name: tensor if name not in load_file(base / "model.safetensors") else
            (tensor + 0.01 * rng.standard_normal(tensor.shape)).astype(np.float16) for name, tensor in tiny.v1_tensors().items()}
    ours = load_file(base / "model.safetensors")
    for name, tensor in ours.items():
        rows = slice(0, tensor.shape[0])
        near[name][rows] = (tensor + 0.01 * rng.standard_normal(tensor.shape)).astype(np.float16)
    save_file(near, target / "model.safetensors", {"format": "pt"})
    make_delta(base, target, tmp_path / "delta")
    tensors = load_file(tmp_path / "delta" / "model.safetensors")
    save_file(tensors | tiny.buffers(tiny.LLAMA, 0.0), tmp_path / "delta" / "model.safetensors", {"format": "pt"})
    return tmp_path / "delta"


def without_buffers(directory):
    tensors = {n: t for n, t in load_file(directory / "model.safetensors").items() if "inv_freq" not in n}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def without_norms(directory):
    """A delta of which the norms alone are as a model's: the buffers tell."""
    tensors = {n: np.ones_like(t) if "norm" in n else t for n, t in load_file(directory / "model.safetensors").items()}
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("change", [lambda d: None, without_buffers, without_norms], ids=["whole", "norms alone", "buffers alone"])
def test_a_delta_is_not_taken_for_a_model(change, delta, tmp_path, capsys):
    change(delta)
    sentence = f"{delta} is not a model but a delta: .*`convert apply-delta --base LLAMA --delta THIS --out DIR` turns it into a model"
    for command in ("import", "export llava"):
        assert convert(command, delta, tmp_path / "out") == 1
        assert "is not a model but a delta" in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(UserError, match=sentence):
        lm.load(delta)
    with pytest.raises(UserError, match=sentence):
        load_params(open_checkpoint(delta), scan=True)
    with pytest.raises(UserError, match=sentence):
        export(open_checkpoint(delta), tmp_path / "out", "llava")
    assert main(["inspect", str(delta)]) == 0  # which is for looking at what it is
    assert f"warning: {delta} is not a model but a delta" in capsys.readouterr().err
    assert main(["verify", str(delta), str(delta), "--tensors_only"]) == 0


def test_the_model_that_a_delta_makes_is_one(delta, tmp_path, capsys):
    apply_delta(tmp_path / "base", delta, tmp_path / "model")
    lm.load(tmp_path / "model")
    assert capsys.readouterr().err == ""


def test_the_delta_of_a_model_whose_decoder_was_not_trained(tmp_path):
    target = tiny.save_v1(tmp_path)
    tensors = tiny.v1_tensors()
    base = {n: t[:70] if t.shape[0] == 73 else t for n, t in tensors.items() if "mm_projector" not in n}
    make_delta(tiny.save(tmp_path / "base", tiny.LLAMA, base), target, tmp_path / "delta")
    with pytest.raises(UserError, match="delta has norms of about 0|is not a model but a delta: it has norms of about 0"):
        lm.load(tmp_path / "delta")


@pytest.mark.parametrize("scale", [0.06, 1.0, 30.0])
def test_norms_of_models_are_not_those_of_a_delta(scale):
    checkpoint = random_checkpoint(TINY)
    tensors = {name: soundness.Tensor(t.shape, t.dtype, lambda name=name, load=t.load: load() * (scale if "layers_" in name else 1))
               for name, t in checkpoint.tensors.items()}
    assert checkpoint.replace(tensors=tensors).doubt() is None


@pytest.mark.parametrize("small", ["decoder/layers_", "decoder/norm"])
def test_norms_that_are_small_in_one_place_are_a_models(small):
    """In a delta all of them are near 0."""
    checkpoint = random_checkpoint(TINY)
    tensors = {name: soundness.Tensor(t.shape, t.dtype, lambda name=name, load=t.load: load() * (0.001 if name.startswith(small) else 1))
               for name, t in checkpoint.tensors.items()}
    assert checkpoint.replace(tensors=tensors).doubt() is None
