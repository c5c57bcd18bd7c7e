"""`make verify-release` against a hub on loopback, on a tiny checkpoint of LLaVA-Med v1.5's layout."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llavamed_jax.checkpoints.export.directory import export
from llavamed_jax.checkpoints.random import random_checkpoint
from llavamed_jax.cli.verify_release import main
from llavamed_jax.config import DecoderConfig, LlavaConfig, VisionConfig
from tests.conftest import ROOT
from tests.support import local_hub, xla
from tests.support.local_hub import LocalHub

CONFIG = LlavaConfig(VisionConfig(32, 64, 3, 4, 28, 14),
                     DecoderConfig(32000, 48, 96, 2, 4, 2, 12, 1e-5, 1e6, 32768, architecture="mistral"),
                     extra=json.dumps({"mm_vision_tower": "openai/tiny-tower", "use_mm_proj": True, "tokenizer_padding_side": "right"}))
MODEL = "someone/llava-med-v1.5-tiny"
SHIPPED = "model.vision_tower.vision_tower."


@pytest.fixture(scope="module")
def models(tmp_path_factory, mistral_tokenizer):
    """name -> directory: the checkpoint with its tokenizer, and a stock tower of which one tensor is another."""
    root = tmp_path_factory.mktemp("hub")
    checkpoint = random_checkpoint(CONFIG, seed=3).replace(files={"tokenizer.model": mistral_tokenizer})
    export(checkpoint, root / "model", "llava")
    stock = {n.removeprefix(SHIPPED): t for n, t in load_file(root / "model" / "model.safetensors").items() if n.startswith(SHIPPED)}
    stock["vision_model.encoder.layers.1.mlp.fc1.weight"] = stock["vision_model.encoder.layers.1.mlp.fc1.weight"] * np.float32(1.25)
    (root / "tower").mkdir()
    save_file(stock, root / "tower" / "model.safetensors", {"format": "pt"})
    (root / "tower" / "config.json").write_text(json.dumps(CONFIG.vision.to_hf()))
    return {MODEL: root / "model", "openai/tiny-tower": root / "tower"}


@pytest.fixture(scope="module")
def fetched(models, tmp_path_factory):
    """What the first two steps leave at home, and how the command ended."""
    home = tmp_path_factory.mktemp("home") / "fetched"
    with LocalHub(models) as hub:
        return home, verify(hub, home, "--steps", "fetch,tensors")


def words(home, *flags):
    return [str(word) for word in ("--model", MODEL, "--out", home / "verification.md", "--workdir", home / "run", *flags)]


def verify(hub, home, *flags):
    """The command, as a process would run it."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as said:
        local_hub.ask(patch, hub.url, home / "hf")
        patch.chdir(ROOT)
        return SimpleNamespace(returncode=main(words(home, *flags)), stderr=said.getvalue())


def test_fetch_and_tensors(models, fetched):
    home, done = fetched
    assert done.returncode == 0, done.stderr
    text = (home / "verification.md").read_text()
    tensors = load_file(models[MODEL] / "model.safetensors")
    assert f"| all | {len(tensors)} | {sum(t.size for t in tensors.values()):,} |" in text
    assert "| projector | 4 |" in text and "| model.safetensors |" in text and "sha256 as stated" in text and "git blob as stated" in text
    assert "54 of 55 tensors are bit-identical" in text  # one of the layers' 48, 5 around and 2 after them
    assert "layer 2                   0.2" in text and "15 of 16 bit for bit" in text
    assert "decoder.hidden_size is 48 (expected 4096)" in text and "decoder.rope_theta" not in text
    assert "not done: tower, answers, vqa_rad" in text and "VQA-RAD, zero-shot" not in text
    assert "licence" in done.stderr


def test_a_file_that_is_not_what_the_hub_states(models, fetched, tmp_path):
    """A flipped byte in the cache: the hub's client looks at names and sizes, and would take it."""
    shutil.copytree(fetched[0] / "hf", tmp_path / "hf", symlinks=True)
    file = next((tmp_path / "hf").rglob("models--someone*/**/model.safetensors")).resolve()
    assert file.is_relative_to(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.chmod(0o644)
    file.write_bytes(content)
    with LocalHub(models) as hub:
        done = verify(hub, tmp_path, "--steps", "fetch")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(f"error: model.safetensors of {MODEL} has ") and " bytes and the sha256 " in done.stderr
    assert not (tmp_path / "verification.md").exists()


def test_values_that_are_not_finite_are_named(models, tmp_path, monkeypatch, capsys):
    directory = tmp_path / "broken"
    shutil.copytree(models[MODEL], directory)
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = np.inf
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    monkeypatch.chdir(ROOT)
    assert main(["--model", str(directory), "--steps", "tensors", "--out", str(tmp_path / "out.md")]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"error: decoder/norm/scale of {directory} holds values that are not finite"


@pytest.mark.parametrize(("flags", "status", "sentence"), [
    (["--steps", "fetch,hope"], 2, "'hope' does not exist; one of fetch, tensors, tower, answers, vqa_rad"),
    (["--steps", "vqa_rad"], 2, "needs --vqa_rad DIR"),
    (["--config.generation.max_new_tokens=many", "--steps", "fetch"], 2, "max_new_tokens")])
def test_wrong_calls_are_one_sentence(flags, status, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main([*flags, "--out", str(tmp_path / "out.md")]) == status
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and sentence in error and "\n" not in error


def test_no_network_is_one_sentence(tmp_path):
    """In a process of its own, as make starts it."""
    nowhere = "http://127.0.0.1:9"
    done = subprocess.run([sys.executable, "-m", "llavamed_jax.cli.verify_release", *words(tmp_path, "--steps", "fetch")], cwd=ROOT,
                          capture_output=True, text=True, env=os.environ | {
                              "HF_ENDPOINT": nowhere, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf"), "XLA_FLAGS": xla.flags()})
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert done.stderr == (f"error: {MODEL} is not a directory here, and the hub model of this name is not in the cache of hub models "
                           f"({nowhere} cannot be reached); give a checkpoint's directory\n")
    assert not (tmp_path / "verification.md").exists()


@pytest.mark.slow
def test_whole_with_all_451_questions(models, shared, tmp_path):
    with LocalHub(models) as hub:
        done = verify(hub, tmp_path, "--vqa_rad", shared / "data" / "vqa_rad", "--config.generation.max_new_tokens=8")
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "verification.md").read_text()
    assert "Steps: fetch, tensors, tower, answers, vqa_rad\n" in text
    assert "the shipped and the stock tower, float32: largest difference" in text and "mean 1.000000" not in text
    assert text.count("\n  > ") >= 4 and "(Right upper lobe)" in text
    assert "272 closed and 179 open questions" in text
    for number in ("53.7", "51.4", "46.6"):
        assert number in text.split("their prompts and scorers differ")[1]
    assert len((tmp_path / "run" / "predictions.jsonl").read_text().splitlines()) == 451
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["n_closed"] == 272


@pytest.mark.parametrize("accuracy, words", [(53.0, "53.0 of 100 are right, which agrees with the published 53.7 (50.7 to 56.7)"),
                                             (50.0, "50.0 of 100 are right, which DIFFERS from"), (None, "--config.scoring=medevalkit")])
def test_medevalkits_row_is_a_check_by_its_protocol(accuracy, words):
    from llavamed_jax.evaluation import published
    from llavamed_jax.verification import release

    table = None if accuracy is None else {"accuracy": accuracy, "published": published.medevalkit("vqa_rad", "test", 451, True, [])}
    assert words in release._by_medevalkit(table)
