"""`python -m convert`: exit statuses, messages, and files that come out as they went in."""

import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.open import open_checkpoint
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.cli.convert import main
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig

CFG = LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14), DecoderConfig(70, 48, 96, 2, 4, 2, 12, 1e-5, 1e6, 512, architecture="mistral"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def original(tmp_path):
    export(random_checkpoint(CFG, seed=1).cast(ml_dtypes.bfloat16), tmp_path / "original", "llava")
    return tmp_path / "original"


def test_import_export_import_export(original, tmp_path, capsys):
    where = {name: str(tmp_path / name) for name in ("tree", "hf", "tree2", "again")}
    assert main(["import", "--checkpoint", str(original), "--out", where["tree"]]) == 0
    assert main(["export", "--checkpoint", where["tree"], "--out", where["hf"], "--layout", "transformers"]) == 0
    assert main(["import", "--checkpoint", where["hf"], "--out", where["tree2"]]) == 0
    assert main(["export", "--checkpoint", where["tree2"], "--out", where["again"], "--layout", "llava"]) == 0
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (original / file).read_bytes()
    out = capsys.readouterr().out
    assert "llava layout, vision tower: the tensors in the checkpoint" in out
    assert f"wrote 80 tensors, 0.19 MB, to {where['again']}" in out


def test_dtype_template_and_tokenizer_are_changed_on_the_way(original, tmp_path):
    pieces = (ROOT / "samples" / "vqa_rad" / "tokenizer.model").read_bytes()
    (tmp_path / "pieces.model").write_bytes(pieces)
    flags = ["--dtype", "float32", "--template", "up:vicuna_v1", "--tokenizer", str(tmp_path / "pieces.model")]
    assert main(["import", "--checkpoint", str(original), "--out", str(tmp_path / "tree"), *flags]) == 0
    source, checkpoint = open_checkpoint(original), open_checkpoint(tmp_path / "tree")
    assert checkpoint.config.template == "up:vicuna_v1"
    assert checkpoint.files["tokenizer.model"].read_bytes() == pieces
    for name in source.tensors:
        assert checkpoint.read(name).dtype == np.float32
        np.testing.assert_array_equal(checkpoint.read(name), source.read(name).astype(np.float32))


def test_inspect_counts(original, capsys):
    assert main(["inspect", str(original)]) == 0
    lines = capsys.readouterr().out.splitlines()
    counts = {line.split()[0]: line.split()[1:] for line in lines[-5:]}
    tensors = load_file(original / "model.safetensors")
    assert counts["all"] == ["80", f"{sum(t.size for t in tensors.values()):,}", "bfloat16"]
    projector = sum(t.size for n, t in tensors.items() if "mm_projector" in n)
    assert counts["projector"] == ["4", f"{projector:,}", "bfloat16"]
    assert counts["unused"][0] == "18"  # the last block's 16 and post_layernorm's 2
    text = "\n".join(lines)
    for fact in ("llava layout", "the tensors in the checkpoint", "3 layers, width 32", "4 tokens per image", "mlp2x_gelu", "mistral",
                 "tokenizer     none", "theta 1e+06"):
        assert fact in text


@pytest.mark.parametrize(("argv", "status", "sentence"), [
    ([], 2, "COMMAND"),
    (["frobnicate"], 2, "'frobnicate'"),
    (["export", "--checkpoint", "IN", "--out", "OUT"], 2, "--layout"),
    (["export", "--checkpoint", "IN", "--out", "OUT", "--layout", "onnx"], 2, "'transformers', 'llava'"),
    (["import", "--checkpoint", "IN", "--out", "OUT", "--dtype", "int8"], 2, "'float32', 'float16', 'bfloat16'"),
    (["import", "--checkpoint", "IN", "--out", "OUT", "--tokenizer", "nowhere"], 2, "--tokenizer nowhere does not exist; a tokenizer.model"),
    (["import", "--checkpoint", "IN", "--out", "OUT", "--tokenizer", "EMPTY"], 2, "--tokenizer: EMPTY is not a SentencePiece model"),
    (["import", "--checkpoint", "IN", "--out", "OUT", "--template", "foo"], 2, "--template: the template 'foo' does not exist; one of"),
    (["import", "--checkpoint", "nowhere", "--out", "OUT"], 2, "nowhere is not a directory"),
    (["import", "--checkpoint", "IN", "--out", "IN"], 1, "exists and is not empty"),
    (["inspect", "IN", "--vision_tower", "nowhere"], 2, "nowhere holds no config.json"),
    (["inspect", "preset:huge"], 1, "one of small, v15-7b"),
])
def test_errors_are_one_sentence_and_leave_nothing(argv, status, sentence, original, tmp_path, capsys):
    out, empty = tmp_path / "out", original / "empty.model"
    empty.write_bytes(b"")
    argv = [{"IN": str(original), "OUT": str(out), "EMPTY": str(empty)}.get(word, word) for word in argv]
    assert main(argv) == status
    error = capsys.readouterr().err.strip().replace(str(empty), "EMPTY")
    assert error.startswith("error: ") and sentence in error and "\n" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["original"]


def test_a_tokenizer_that_does_not_fit_is_not_exported(original, tmp_path, capsys):
    flags = ["export", "--checkpoint", str(original), "--out", str(tmp_path / "hf"), "--layout", "transformers", "--tokenizer"]
    assert main([*flags, str(ROOT / "samples" / "vqa_rad" / "tokenizer.model")]) == 1
    assert "the tokenizer has 1024 pieces, but the embedding table has 70 rows" in capsys.readouterr().err
    (tmp_path / "broken.model").write_bytes(b"no pieces")
    assert main([*flags, str(tmp_path / "broken.model")]) == 2
    assert "broken.model is not a SentencePiece model" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_a_tensor_too_many_fails_with_its_name(original, capsys):
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    assert main(["inspect", str(original)]) == 1
    assert "9 tensors unexpected: model.layers.1." in capsys.readouterr().err


def test_the_door_at_the_top(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    shown = capsys.readouterr().out
    assert not ended.value.code and all(word in shown for word in ("import", "export", "inspect"))
    done = subprocess.run([sys.executable, "-m", "convert", "inspect", "nowhere"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere is not a directory; a checkpoint's directory, owner/name of a hub or preset:NAME was expected\n"
