"""Tokenizers in transformers' layout put a blank before a text only if the model's own tokenizer does."""

import json
import shutil
from pathlib import Path

import pytest

from llavamed_jax.checkpoints.export.tokenizer import write_tokenizer
from llavamed_jax.text.tokenizer import Tokenizer

pytest.importorskip("tokenizers")
SAMPLE = Path(__file__).resolve().parents[2] / "samples" / "vqa_rad" / "tokenizer.model"
TEXTS = ["a", "Is there a fracture?", " lung", "the lung</s>the heart", "</s>a</s> b", "12 mm\n\u65e5", "", "x<unk>the  y "]


def exported(directory, *readers):
    """The ids of our tokenizer of a directory, and of every reader of its export."""
    out = directory / "hf"
    out.mkdir()
    write_tokenizer({path.name: path for path in directory.iterdir() if path.is_file()}, out)
    ours = Tokenizer.load(directory)
    for reader in (lambda path: Tokenizer.load(path, True), *readers):
        theirs = reader(out)
        for text in TEXTS:
            assert list(theirs.encode(text)) == ours.encode(text), (text, reader)
            ids = ours.encode(text)[1:]
            assert Tokenizer.load(out, True).decode(ids) == ours.decode(ids), text
    return ours


@pytest.mark.parametrize("is_legacy", [True, False])
@pytest.mark.parametrize("has_prefix", [True, False])
def test_a_sentencepiece_models_own_prefix(has_prefix, is_legacy, tmp_path):
    transformers = pytest.importorskip("transformers")
    from sentencepiece import sentencepiece_model_pb2 as proto
    model = proto.ModelProto.FromString(SAMPLE.read_bytes())
    assert model.normalizer_spec.add_dummy_prefix
    model.normalizer_spec.add_dummy_prefix = has_prefix
    (tmp_path / "tokenizer.model").write_bytes(model.SerializeToString())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"legacy": is_legacy}))
    readers = [transformers.AutoTokenizer.from_pretrained] if is_legacy and not has_prefix else []
    ours = exported(tmp_path, *readers)
    assert (ours.encode("the", bos=False) == ours.encode("</s>the", bos=False)[1:]) is is_legacy
    assert ours.bytes_of(ours.encode("a", bos=False)[0]).startswith(b" ") is (has_prefix or not is_legacy)


@pytest.mark.parametrize("scheme", ["never", "always"])
def test_a_tokenizer_jsons_own_prefix(scheme, tmp_path):
    """What transformers writes of LLaMA's tokenizer: Metaspace with a scheme."""
    transformers = pytest.importorskip("transformers")
    shutil.copyfile(SAMPLE, tmp_path / "tokenizer.model")
    made = transformers.LlamaTokenizer.from_pretrained(tmp_path, add_prefix_space=scheme == "always", legacy=True)
    (tmp_path / "tokenizer.model").unlink()
    made.save_pretrained(tmp_path)
    before = json.loads((tmp_path / "tokenizer.json").read_text())["pre_tokenizer"]
    assert (before["type"], before["prepend_scheme"]) == ("Metaspace", scheme)
    exported(tmp_path, transformers.AutoTokenizer.from_pretrained)
    assert json.loads((tmp_path / "hf" / "tokenizer.json").read_text())["pre_tokenizer"]["prepend_scheme"] == scheme
