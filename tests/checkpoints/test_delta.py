"""Deltas: the original's float16 arithmetic to the bit, and a wrong base named before anything is written."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file

from llavamed_jax.checkpoints.assemble.delta import apply_delta, make_delta
from llavamed_jax.checkpoints.load import load_params
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.cli.convert import main
from llavamed_jax.errors import UserError
from tests.support import tiny

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
# As many rows as LLaMA has, so that a float16 of each size occurs; all else is small.
BASE = {**tiny.LLAMA, "vocab_size": 32000, "hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}


def target_tensors(base, rows, projector=None):
    """What training makes of a base: each tensor a little off, `rows` rows more, a projector."""
    moved = {name: t + tiny.drawn({name: t.shape}, 7, np.float32)[name] * 0.01 for name, t in base.items()}
    for name in VOCABULARY:
        moved[name] = np.concatenate([moved[name], tiny.drawn({"x": (rows, moved[name].shape[1])}, 8)["x"]])
    hidden = base[VOCABULARY[0]].shape[1]
    return {name: t.astype(np.float16) for name, t in moved.items()} | (projector or tiny.drawn(tiny.projector_shapes(hidden=hidden), 9))


@pytest.fixture(params=[3, 4], ids=["32003 rows", "32004 rows"])
def pair(request, tmp_path):
    """A base of 32,000 rows and a target of more, both with the buffers that old versions saved."""
    base = tiny.drawn(tiny.decoder_shapes(BASE))
    target = target_tensors(base, request.param)
    config = {**tiny.V1, **{key: BASE[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")},
              "vocab_size": 32000 + request.param}
    tiny.save(tmp_path / "base", BASE, base | tiny.buffers(BASE))
    tiny.save(tmp_path / "target", config, target | tiny.buffers(BASE))
    (tmp_path / "target" / "added_tokens.json").write_text('{"<im_patch>": 32000, "<im_start>": 32001, "<im_end>": 32002}')
    tiny.save_clip(tmp_path / "tiny-tower")
    return base, target


def test_the_arithmetic_is_torchs_in_float16(pair, tmp_path):
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    base, target = pair
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    delta = load_file(tmp_path / "delta" / "model.safetensors")
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert delta.keys() == again.keys() == target.keys()  # no buffers
    for name, wanted in target.items():
        wanted = torch.from_numpy(wanted.copy())
        summed = wanted.clone()
        if name in base:
            rows = torch.from_numpy(base[name])
            wanted[:len(rows)] -= rows
            summed[:len(rows)] = wanted[:len(rows)] + rows
        assert delta[name].tobytes() == wanted.numpy().tobytes(), name
        assert again[name].tobytes() == summed.numpy().tobytes(), name
        np.testing.assert_allclose(again[name], target[name], atol=2e-3, rtol=2e-3)
    for name in VOCABULARY:
        assert delta[name][32000:].tobytes() == target[name][32000:].tobytes()  # verbatim


def test_what_comes_out_is_a_checkpoint_with_the_deltas_config_and_tokenizer(pair, tmp_path, capsys):
    flags = {key: str(tmp_path / key) for key in ("base", "target", "delta", "again")}
    assert main(["make-delta", "--base", flags["base"], "--target", flags["target"], "--out", flags["delta"]]) == 0
    assert main(["apply-delta", "--base", flags["base"], "--delta", flags["delta"], "--out", flags["again"]]) == 0
    size = sum(tensor.nbytes for tensor in pair[1].values()) / 1e6
    assert f"wrote 14 tensors, {size:.2f} MB, to {flags['again']}" in capsys.readouterr().out
    checkpoint = open_checkpoint(tmp_path / "again")
    assert checkpoint.config.decoder.vocab_size == len(pair[1]["lm_head.weight"])
    assert checkpoint.config.projector_type == "linear" and checkpoint.config.use_start_end
    assert json.loads(checkpoint.files["added_tokens.json"].read_text())["<im_end>"] == 32002
    assert json.loads((tmp_path / "again" / "config.json").read_text())["torch_dtype"] == "float16"
    params = load_params(checkpoint)
    np.testing.assert_array_equal(params["projector"]["linear_0"]["kernel"], pair[1]["model.mm_projector.weight"].T)


def test_a_delta_with_zero_buffers_over_a_base_in_another_dtype(tmp_path):
    """As released: `inv_freq` is zero in the delta. A float32 base is rounded to float16 first, as the original loads it."""
    base = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA), dtype=np.float32)
    halves = {name: t.astype(np.float16) for name, t in base.items()}
    target = target_tensors(halves, 3)
    delta = {name: t.copy() for name, t in target.items()}
    for name, half in halves.items():
        delta[name][:len(half)] -= half
    tiny.save(tmp_path / "base", tiny.LLAMA, base | tiny.buffers(tiny.LLAMA, 0.5))
    tiny.save(tmp_path / "delta", {**tiny.V1, "vocab_size": 73}, delta | tiny.buffers(tiny.LLAMA, 0.0))
    apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("inv_freq" in name for name in out)
    for name, half in halves.items():
        np.testing.assert_array_equal(out[name][:len(half)], half + delta[name][:len(half)])
    assert {t.dtype for t in out.values()} == {np.dtype(np.float16)}


def test_a_base_in_bin_shards(tmp_path):
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    base = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA))
    tiny.save(tmp_path / "st", tiny.LLAMA, base)
    tiny.save(tmp_path / "bin", tiny.LLAMA)
    names = list(base)
    for i, part in enumerate((names[:5], names[5:]), 1):
        torch.save({name: torch.from_numpy(base[name]) for name in part}, tmp_path / "bin" / f"pytorch_model-{i:05d}-of-00002.bin")
    tiny.save(tmp_path / "target", {**tiny.V1, "vocab_size": 73}, target_tensors(base, 3))
    for kind in ("st", "bin"):
        make_delta(tmp_path / kind, tmp_path / "target", tmp_path / f"delta-{kind}")
    files = [tmp_path / f"delta-{kind}" / "model.safetensors" for kind in ("st", "bin")]
    assert files[0].read_bytes() == files[1].read_bytes()


WRONG = {
    "hidden size": ({"hidden_size": 96}, "its hidden size is 96; 48 was expected"),
    "layers": ({"num_hidden_layers": 3}, "its number of layers is 3; 2 was expected"),
    "vocabulary": ({"vocab_size": 74}, "its vocabulary has 74 rows; at most 73 were expected"),
    "feed-forward": ({"intermediate_size": 80}, r"mlp.down_proj.weight is \[48, 80\] in the base and \[48, 96\] in the delta"),
    "tied": ({"tie_word_embeddings": True}, "lm_head.weight is missing in the base"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_base_is_named_before_anything_is_written(case, tmp_path, capsys):
    change, sentence = WRONG[case]
    base = {**tiny.LLAMA, **change}
    tiny.save(tmp_path / "base", base, tiny.drawn(tiny.decoder_shapes(base)))
    delta = target_tensors(tiny.drawn(tiny.decoder_shapes(tiny.LLAMA)), 3)
    tiny.save(tmp_path / "delta", {**tiny.V1, "vocab_size": 73}, delta)
    with pytest.raises(UserError, match=f"base is not the base of the delta .*: .*{sentence}"):
        apply_delta(tmp_path / "base", tmp_path / "delta", tmp_path / "out")
    command = ["apply-delta", "--base", str(tmp_path / "base"), "--delta", str(tmp_path / "delta"), "--out", str(tmp_path / "out")]
    assert main(command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta"]


@pytest.mark.parametrize("direction", ["apply-delta", "make-delta"])
def test_a_base_of_the_same_shapes_that_computes_otherwise_is_warned_of(direction, pair, tmp_path, capsys):
    """LLaMA 2 under v1.0's delta (LLaVA-Med's issue 44): nothing but its config tells it from LLaMA."""
    assert main(["make-delta", "--base", str(tmp_path / "base"), "--target", str(tmp_path / "target"),
                 "--out", str(tmp_path / "delta")]) == 0
    assert "not be the base" not in capsys.readouterr().err
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    eps, positions = config["rms_norm_eps"], config["max_position_embeddings"]
    config |= {"rms_norm_eps": 10 * eps, "max_position_embeddings": 2 * positions}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    kind = direction.partition("-")[0]
    other = "delta" if kind == "apply" else "target"
    assert main([direction, "--base", str(tmp_path / "base"), f"--{other}", str(tmp_path / other), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().err
    assert (f"may not be the base of {tmp_path / other}, although the shapes agree: rms_norm_eps is {10 * eps} in the base and {eps} in "
            f"the {other}; max_position_embeddings is {2 * positions} in the base and {positions} in the {other}") in said


def test_a_target_with_tensors_of_its_own_is_no_target(tmp_path):
    base = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA))
    tiny.save(tmp_path / "base", tiny.LLAMA, base)
    target = base | tiny.drawn(tiny.projector_shapes())
    tiny.save(tmp_path / "target", tiny.V1, target | {"model.resampler.weight": np.ones((2, 2), np.float16)})
    with pytest.raises(UserError, match="model.resampler.weight is missing in the base"):
        make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "out")
    with pytest.raises(UserError, match="nowhere is not a directory"):
        make_delta(tmp_path / "nowhere", tmp_path / "target", tmp_path / "out")
    tiny.save(tmp_path / "tower", tiny.CLIP, tiny.drawn(tiny.clip_shapes()))
    with pytest.raises(UserError, match="holds no model.embed_tokens.weight"):
        make_delta(tmp_path / "tower", tmp_path / "target", tmp_path / "out")


def run(command, tmp_path, other):
    argv = [command, "--base", str(tmp_path / "base"), f"--{other}", str(tmp_path / other), "--out", str(tmp_path / "out")]
    return main(argv)


def changed(tensors, **changes):
    """With every value of the named tensors (dots as double underscores) set to another."""
    return {name: np.full_like(t, changes[key]) if (key := name.replace(".", "__")) in changes else t for name, t in tensors.items()}


CONFUSED = {
    "a base that is the result": (lambda b, d: (tiny.V1 | {"vocab_size": 73}, d, tiny.V1 | {"vocab_size": 73}, d),
                                  "base has a projector, so it is a whole LLaVA model; the plain decoder was expected"),
    "a delta that is the base": (lambda b, d: (tiny.LLAMA, b, tiny.LLAMA, b),
                                 "the delta .*delta has no projector .model.mm_projector., so it is a plain decoder"),
    "a config of another vocabulary": (lambda b, d: (tiny.LLAMA, b, tiny.V1 | {"vocab_size": 74}, d),
                                       "config.json has vocab_size 74, but the tensors beside it have 73"),
    "a config of another depth": (lambda b, d: (tiny.LLAMA, b, tiny.V1 | {"vocab_size": 73, "num_hidden_layers": "two"}, d),
                                  "config.json has num_hidden_layers 'two', but the tensors beside it have 2"),
    "a sum that float16 cannot hold": (
        lambda b, d: (tiny.LLAMA, changed(b, model__norm__weight=6e4), tiny.V1 | {"vocab_size": 73}, changed(d, model__norm__weight=6e4)),
        "model.norm.weight is not finite in float16"),
    "a value that is no number": (
        lambda b, d: (tiny.LLAMA, b, tiny.V1 | {"vocab_size": 73}, changed(d, model__mm_projector__bias=np.nan)),
        "model.mm_projector.bias is not finite in float16"),
}


@pytest.mark.parametrize("case", CONFUSED)
def test_models_in_each_others_places_and_broken_ones_write_nothing(case, tmp_path, capsys):
    base = tiny.drawn(tiny.decoder_shapes(tiny.LLAMA))
    make, sentence = CONFUSED[case]
    base_config, base, delta_config, delta = make(base, target_tensors(base, 3))
    tiny.save(tmp_path / "base", base_config, base)
    tiny.save(tmp_path / "delta", delta_config, delta)
    assert run("apply-delta", tmp_path, "delta") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and re.search(sentence, error), error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "delta"]


def test_a_tree_is_no_target_and_the_sentence_says_what_makes_one(tmp_path, capsys):
    tiny.save(tmp_path / "base", tiny.LLAMA, tiny.drawn(tiny.decoder_shapes(tiny.LLAMA)))
    tiny.save(tmp_path / "target" / "model", {"model_type": "llavamed_jax"})
    assert run("make-delta", tmp_path, "target") == 1
    assert "target is not a directory with a config.json; a model in the original's layout was expected (`convert export --layout llava` " \
           "writes one)" in capsys.readouterr().err


def test_the_sum_does_not_go_into_what_it_is_made_of(pair, tmp_path, capsys):
    make_delta(tmp_path / "base", tmp_path / "target", tmp_path / "delta")
    for inside in ("base", "delta"):
        argv = ["apply-delta", "--base", str(tmp_path / "base"), "--delta", str(tmp_path / "delta")]
        assert main([*argv, "--out", str(tmp_path / inside / "sum")]) == 1
        assert f"sum lies inside {tmp_path / inside}, which is an input; a directory outside it was expected" in capsys.readouterr().err
        assert not (tmp_path / inside / "sum").exists()
